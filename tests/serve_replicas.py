"""Three replicas of `radapt serve` behind the load balancer of examples/serve, under load: restarted one after the other,
one of them killed.

    python3 tests/serve_replicas.py target/release/radapt [--balancer haproxy|nginx] [--clients 12] [--json FILE]
    python3 tests/serve_replicas.py target/release/radapt --throughput [--pairs 9]

Python's standard library and Debian's `haproxy` or `nginx`; the model is the built-in one. The balancer's file is the one
in examples/serve, with other ports. Clients ask for whole and streamed answers, about small pictures, large ones (that
do not fit into HAProxy's buffer) and none, keep their connections for some requests, and never try again.

Exit code 0 if all of this holds:
  steady    every request is answered with 200, whole, under its own x-request-id; every replica takes some
  streamed  the first piece of a long answer is here before half of its time is over
  rolling   each replica gets SIGTERM, ends with 0 and is started again, and no client sees any of it
  killed    after SIGKILL nothing is lost but what had been sent to that replica before, and no more of that than a
            replica is given at a time
  back      the killed replica, started again, takes requests

With --throughput: requests a second of one replica asked directly, one behind the balancer and two behind it, in turns, and
the processor time of a request, the balancer's and the replicas'.
"""

import argparse
import base64
import collections
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples" / "serve"
CHAT = "/v1/chat/completions"
# Token ids that end an answer are among the first of the vocabulary; without them answers are long.
ENDLESS = {"logit_bias": {"0": -100, "1": -100, "2": -100}}
NOTICE, LINGER = 2, 1


def png(side, seed):
    """Noise, which does not compress."""
    draw = random.Random(seed)
    rows = b"".join(b"\0" + draw.randbytes(3 * side) for _ in range(side))

    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


PICTURES = {"small": png(32, 1), "large": png(320, 2)}


def request(kind, draw, tokens=None, stream=None, more=None):
    parts = [{"type": "image_url", "image_url": {"url": PICTURES[kind]}}] if kind in PICTURES else []
    return {
        "model": "pocket",
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is in the picture?"}]}],
        "max_tokens": tokens or draw.choice([4, 16, 40]),
        "stream": draw.random() < 0.5 if stream is None else stream,
        **(ENDLESS if more is None else more),
    }


def ports(n):
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return None, ""
    finally:
        connection.close()


def until(what, seconds, holds):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"FAIL {what} took longer than {seconds} s")
        time.sleep(0.05)


class Replica:
    def __init__(self, name, radapt, port, folder, flags):
        self.name, self.port, self.log = name, port, folder / f"{name}.log"
        self.command = [radapt, "serve", "--addr", f"127.0.0.1:{port}", "--model", "pocket", "--offline", "--in-flight", "16"]
        self.command += flags
        self.starts = 0

    def start(self):
        self.starts += 1
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        until(f"the start of {self.name}", 60, lambda: self.ready() or self.process.poll() is not None)
        if self.process.poll() is not None:
            raise SystemExit(f"FAIL {self.name} did not start: {self.log.read_text(errors='replace')[-600:]}")

    def ready(self):
        return get(self.port, "/ready")[0] == 200

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=120)

    def counted(self, name):
        """What lines of /metrics that begin so add up to."""
        lines = get(self.port, "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def answered(self):
        return int(self.counted(f'radapt_requests_total{{route="{CHAT}",status="200"'))


class Balancer:
    """The file of examples/serve with other ports."""

    def __init__(self, kind, folder, replicas, name):
        self.port = ports(1)[0]
        source = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[kind]
        text = (EXAMPLES / source).read_text()
        line = {"haproxy": r"( +server r)(\d)( 127\.0\.0\.1:)(\d+)", "nginx": r"( +server )()(127\.0\.0\.1:)(808[1-9])"}[kind]
        given = iter(replicas)
        kept = []
        for one in text.splitlines():
            found = re.match(line, one)
            if found:
                replica = next(given, None)
                if replica is None:
                    continue
                one = f"{found[1]}{found[2]}{found[3]}{replica.port}{one[found.end():]}"
            kept.append(one)
        if next(given, None) is not None:
            raise SystemExit(f"FAIL {source} has fewer servers than {len(replicas)}")
        text = "\n".join(kept) + "\n"
        if text.count("127.0.0.1:8080") != 1:
            raise SystemExit(f"FAIL {source} does not listen on 127.0.0.1:8080")
        text = text.replace("127.0.0.1:8080", f"127.0.0.1:{self.port}")
        file = folder / f"{name}-{source}"
        self.log = folder / f"{name}-{kind}.log"
        if kind == "haproxy":
            file.write_text(text)
            command, check = ["haproxy", "-db", "-f", str(file)], ["haproxy", "-c", "-f", str(file)]
        else:
            spare = "".join(
                f"{what}_temp_path {folder}/{name}-{what};\n" for what in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            )
            log = f"access_log {self.log};\n"
            head = f"daemon off;\npid {folder}/{name}.pid;\nerror_log {self.log} warn;\nworker_processes 2;\nevents {{}}\n"
            file.write_text(f"{head}http {{\n{spare}{log}{text}}}\n")
            command, check = ["nginx", "-e", str(self.log), "-c", str(file)], ["nginx", "-t", "-e", str(self.log), "-c", str(file)]
        checked = subprocess.run(check, capture_output=True, text=True)
        if checked.returncode != 0:
            raise SystemExit(f"FAIL {kind} does not take {source}: {checked.stdout}{checked.stderr}")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(f"the start of {kind}", 10, lambda: get(self.port, "/health")[0] == 200)

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


class Fault(Exception):
    pass


class Clients:
    """Clients that ask all the time."""

    def __init__(self, port, n):
        self.port, self.done, self.lock, self.over = port, [], threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(seed,), daemon=True) for seed in range(n)]
        self.open = 0

    def start(self):
        for thread in self.threads:
            thread.start()
        return self

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=120)

    def client(self, seed):
        draw = random.Random(seed)
        while not self.over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            for number in range(draw.choice([1, 4, 16])):
                if self.over.is_set():
                    break
                kind = draw.choice(["none", "small", "small", "large"])
                body = request(kind, draw)
                name = f"client-{seed}-{number}-{draw.randrange(1 << 30)}"
                what = f"{kind} picture, {'streamed' if body['stream'] else 'whole'}"
                start, fault = time.monotonic(), None
                with self.lock:
                    self.open += 1
                try:
                    ask(connection, body, name)
                except (Fault, OSError, http.client.HTTPException) as error:
                    fault = str(error) or repr(error)
                end = time.monotonic()
                with self.lock:
                    self.open -= 1
                    self.done.append((start, end, what, fault))
                if fault:
                    break
            connection.close()

    def since(self, start):
        with self.lock:
            return [one for one in self.done if one[1] >= start]


def ask(connection, body, name):
    """One exchange; what was wrong with it as a `Fault`."""
    connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json", "x-request-id": name})
    response = connection.getresponse()
    if response.status != 200:
        raise Fault(f"status {response.status} {response.read(300)!r}")
    if response.getheader("x-request-id") != name:
        raise Fault(f"x-request-id {response.getheader('x-request-id')!r} for {name!r}")
    text = response.read()
    if body["stream"]:
        whole = text.endswith(b"data: [DONE]\n\n") and b'"error"' not in text
    else:
        whole = all(choice["finish_reason"] for choice in json.loads(text)["choices"])
    if not whole:
        raise Fault(f"not whole: {text[-200:]!r}")


def streamed(port):
    """What part of a long answer's time its first piece takes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    start = time.monotonic()
    connection.request("POST", CHAT, json.dumps(request("none", None, 1000, True)), {"content-type": "application/json"})
    response = connection.getresponse()
    response.readline()
    first = time.monotonic() - start
    pieces = response.read().count(b"data: ")
    whole = time.monotonic() - start
    connection.close()
    return {"pieces": pieces, "first_seconds": round(first, 4), "seconds": round(whole, 4)}


def told(done):
    """Requests and faults, by kind."""
    faults = collections.Counter(f"{fault[:90]} ({what})" for *_, what, fault in done if fault)
    return {"requests": len(done), "faults": sum(faults.values()), "what": dict(faults)}


def soak(options, folder):
    checks = {}
    replicas = [Replica(f"r{i + 1}", options.radapt, port, folder, options.flag) for i, port in enumerate(ports(3))]
    try:
        for replica in replicas:
            replica.start()
        balancer = Balancer(options.balancer, folder, replicas, "soak")
        try:
            checks["streamed"] = streamed(balancer.port)
            checks["streamed"]["ok"] = checks["streamed"]["first_seconds"] < checks["streamed"]["seconds"] / 2

            clients = Clients(balancer.port, options.clients).start()
            start = time.monotonic()
            time.sleep(options.seconds)
            took = [replica.answered() for replica in replicas]
            checks["steady"] = {**told(clients.since(start)), "replicas": took}
            checks["steady"]["ok"] = checks["steady"]["faults"] == 0 and min(took) > 0

            start = time.monotonic()
            codes, seconds = [], []
            for replica in replicas:
                begun = time.monotonic()
                codes.append(replica.stop())
                seconds.append(round(time.monotonic() - begun, 1))
                replica.start()
                # Two good checks, and some time on all three.
                time.sleep(3)
            checks["rolling"] = {**told(clients.since(start)), "exit_codes": codes, "stop_seconds": seconds}
            checks["rolling"]["ok"] = checks["rolling"]["faults"] == 0 and codes == [0, 0, 0]

            victim = replicas[1]
            until("something to be lost", 30, lambda: victim.counted("radapt_in_flight ") >= 1)
            start = time.monotonic()
            victim.stop(signal.SIGKILL)
            time.sleep(5)
            lost = [one for one in clients.since(start) if one[3]]
            late = [one for one in lost if one[0] > start + 0.2]
            checks["killed"] = {**told(clients.since(start)), "begun_after_the_kill": len(late)}
            # As many as the balancer gives a replica at a time.
            checks["killed"]["ok"] = len(lost) <= 20 and not late

            start = time.monotonic()
            victim.start()
            time.sleep(6)
            took = victim.answered()
            checks["back"] = {**told(clients.since(start)), "took": took}
            checks["back"]["ok"] = checks["back"]["faults"] == 0 and took > 0
            clients.stop()
        finally:
            balancer.stop()
    finally:
        for replica in replicas:
            if getattr(replica, "process", None) and replica.process.poll() is None:
                replica.stop(signal.SIGKILL)
        for log in folder.glob("*.log"):
            if "panicked" in log.read_text(errors="replace"):
                checks[log.name] = {"ok": False, "what": "a panic"}
    return {"ok": all(check["ok"] for check in checks.values()), "checks": checks}


def turn(port, data, connections, seconds):
    """Requests a second."""
    done, faults, end = [], [], time.perf_counter() + seconds
    start = time.perf_counter()

    def one():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            while time.perf_counter() < end:
                connection.request("POST", CHAT, data, {"content-type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                if response.status != 200:
                    raise Fault(f"status {response.status}: {text[:200]!r}")
                done.append(time.perf_counter())
        except (Fault, OSError, http.client.HTTPException) as error:
            faults.append(repr(error))
        finally:
            connection.close()

    threads = [threading.Thread(target=one) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise SystemExit(f"FAIL {faults[0]}")
    return len(done) / (max(done) - start), len(done)


def processor_seconds(process):
    """What a process and its children have used."""
    found = 0
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *children]:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        found += int(fields[11]) + int(fields[12])
    return found / os.sysconf("SC_CLK_TCK")


def throughput(options, folder):
    replicas = [Replica(f"r{i + 1}", options.radapt, port, folder, options.flag) for i, port in enumerate(ports(2))]
    balancers, rows = [], []
    try:
        for replica in replicas:
            replica.start()
        balancers = [Balancer(options.balancer, folder, replicas[:n], f"of{n}") for n in (1, 2)]
        ways = {"direct": replicas[0].port, "one": balancers[0].port, "two": balancers[1].port}
        used = lambda: [sum(map(processor_seconds, some)) for some in ([b.process for b in balancers], [r.process for r in replicas])]
        for kind in ("none", "small", "large"):
            data = json.dumps(request(kind, None, 32, False)).encode()
            for connections in (1, 8):
                pairs, asked, cost = [], collections.Counter(), collections.defaultdict(lambda: [0.0, 0.0])
                for pair in range(-1, options.pairs):
                    order = list(ways) if pair % 2 else list(reversed(ways))
                    found = {}
                    for way in order:
                        before = used()
                        found[way], n = turn(ways[way], data, connections, options.turn)
                        asked[way] += n
                        cost[way] = [c + after - b for c, after, b in zip(cost[way], used(), before)]
                    if pair >= 0:
                        pairs.append(found)
                median = lambda values: statistics.median(values)
                row = {
                    "picture": kind,
                    "connections": connections,
                    **{way: round(median(pair[way] for pair in pairs), 1) for way in ways},
                    "one_to_direct": round(median(pair["one"] / pair["direct"] for pair in pairs), 3),
                    "two_to_one": round(median(pair["two"] / pair["one"] for pair in pairs), 3),
                    # Of a request's processor time, the balancer's and the replicas'.
                    "milliseconds": {way: [round(1000 * c / asked[way], 2) for c in cost[way]] for way in ways},
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    finally:
        for balancer in balancers:
            balancer.stop()
        for replica in replicas:
            if getattr(replica, "process", None) and replica.process.poll() is None:
                replica.stop(signal.SIGKILL)
    return {"ok": True, "cores": os.cpu_count(), "pairs": options.pairs, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("radapt")
    parser.add_argument("--balancer", choices=["haproxy", "nginx"], default="haproxy")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5, help="of the steady part")
    parser.add_argument("--flag", action="append", default=[], help="of the replicas, in place of --notice and --linger")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--turn", type=float, default=0.5, help="seconds")
    parser.add_argument("--json")
    options = parser.parse_args()
    path = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
    if shutil.which(options.balancer, path=path) is None:
        print(f"SKIPPED serve_replicas: `{options.balancer}` is not installed")
        return
    os.environ["PATH"] = path
    options.flag = options.flag or [f"--notice={NOTICE}", f"--linger={LINGER}"]
    os.environ.pop("RADAPT_MODEL", None)
    with tempfile.TemporaryDirectory(prefix="replicas-") as folder:
        # nginx' workers may be another user's.
        os.chmod(folder, 0o755)
        found = (throughput if options.throughput else soak)(options, pathlib.Path(folder))
        for name, check in found.get("checks", {}).items():
            print(f"{'ok  ' if check['ok'] else 'FAIL'} {name}: {json.dumps({k: v for k, v in check.items() if k != 'ok'})}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
