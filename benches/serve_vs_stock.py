"""`radapt serve` and stock mistral.rs 0.8.1 in turn, on the same model folders: throughput and time to first token.

    cargo build --release --manifest-path benches/stock/Cargo.toml --target-dir target/stock
    python3 benches/serve_vs_stock.py --radapt target/release/radapt --stock target/stock/release/stock
        [--pairs 9] [--seconds 0.5] [--models pocket,llava,qwen3] [--json FILE]

Python's standard library alone. Both servers run on the CPU in f32, with up to 16 sequences at a time, and stay up; ours
and stock's turns alternate strictly (machines drift), and ratios are taken within a pair: above 1, ours is faster. The
same requests go to both: one picture and a question, or a question alone, greedy. They are asked of copies of the
folders whose end of an answer is a token that is never said, so that all answers have --tokens tokens: stock takes
`logit_bias` and does nothing with it. Ours with no defence (`--anchor none --no-gif`) is the comparison; the default
defence is there to see what it costs. Ours never has a prefix cache; stock's is off for the comparison, and once on, to
see what it gives.

Throughput is of whole answers, time to first token of streamed ones, both at 1, 4 and 16 connections that ask all the
time. A turn is --seconds of each, after a warm-up. Beside the clock's ratios stands that of the processor time per
request, which other work on the machine disturbs less.

Stock's server leaves Nagle's algorithm on, which costs its streams 40 ms; benches/stock switches it off. Stock cannot
answer several LLaVA conversations with pictures at a time (status 500, "unexpected rank"): that is told as a failure,
and those of one connection are compared.
"""

import argparse
import base64
import http.client
import json
import os
import pathlib
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "fixtures"
# Folder, the side of its pictures, and our way to prepare them that is stock's.
MODELS = {
    "pocket": (HERE.parent / "pocket" / "llava", 96, "llava-pad"),
    "llava": (FIXTURES / "llava" / "v4", 20, "llava-pad"),
    "qwen3": (FIXTURES / "qwen_chat" / "qwen3_vl", 96, None),
}
CONNECTIONS = [1, 4, 16]
OURS = {"none": ["--anchor", "none", "--no-gif"], "default": []}


def png(side):
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    rows = b"".join(b"\0" + bytes((x * (c + 2) + y * 3) & 255 for x in range(side) for c in range(3)) for y in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def endless(folder, to):
    """A copy of a model folder in which padding ends an answer, and nothing else."""
    shutil.copytree(folder, to)
    edit = lambda name, change: (to / name).write_text(json.dumps({**json.loads((to / name).read_text()), **change}))
    tokenizer = json.loads((to / "tokenizer.json").read_text())
    pad = json.loads((to / "tokenizer_config.json").read_text())["pad_token"]
    number = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == pad)
    edit("tokenizer_config.json", {"eos_token": pad})
    edit("generation_config.json", {"eos_token_id": number})
    return to


class Server:
    def __init__(self, name, command, model):
        self.name, self.model = name, model
        self.log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log)
        self.port = None
        for line in self.process.stdout:
            found = line.decode(errors="replace").strip()
            if found.startswith("{"):
                found = json.loads(found)["address"]
            elif found.startswith("http://"):
                found = found.removeprefix("http://")
            else:
                continue
            self.port = int(found.rsplit(":", 1)[1])
            break
        if self.port is None:
            self.process.wait()
            raise RuntimeError(f"{name} did not start: {self.said()}")
        # It may say more, which nobody reads.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def said(self):
        return pathlib.Path(self.log.name).read_text(errors="replace")[-600:]

    def stop(self):
        self.process.kill()
        self.process.wait()

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def body(server, picture, side, tokens, stream):
    url = "data:image/png;base64," + base64.b64encode(png(side)).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}] if picture else []
    return json.dumps({
        "model": server.model,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is in the picture?"}]}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }).encode()


def ask(connection, data, tokens):
    """One whole answer: its text."""
    connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {text[:300]}")
    found = json.loads(text)
    # Stock counts a LLaVA picture's tokens as the answer's.
    if found["choices"][0]["finish_reason"] != "length":
        raise RuntimeError(f"fewer than {tokens} tokens: {text[:300]}")
    return found


def first(connection, data):
    """Seconds until a streamed answer's first text, and until its end."""
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read(300)}")
    seen = None
    while line := response.readline():
        if seen is None and line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices")
            if choices and choices[0]["delta"].get("content"):
                seen = time.perf_counter() - start
        if line.startswith(b"data: [DONE]"):
            break
    response.read()
    if seen is None:
        raise RuntimeError("a stream without text")
    return seen, time.perf_counter() - start


def turn(server, whole, streamed, tokens, connections, seconds):
    """One server's turn: requests and tokens a second, and the median time to first token."""
    firsts, faults = [], []

    def drive(work):
        ends, done = time.perf_counter() + seconds, []
        start = time.perf_counter()

        def one():
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            try:
                while time.perf_counter() < ends:
                    work(connection)
                    done.append(time.perf_counter())
            except Exception as error:  # noqa: BLE001 - told by the caller
                faults.append(repr(error))
            finally:
                connection.close()

        threads = [threading.Thread(target=one) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # From the start to the last answer: those begun in time are counted whole.
        return len(done) / (max(done, default=start + 1) - start)

    cpu = server.cpu_seconds()
    begun = time.perf_counter()
    requests = drive(lambda connection: ask(connection, whole, tokens))
    cpu = (server.cpu_seconds() - cpu) / (time.perf_counter() - begun)
    drive(lambda connection: firsts.append(first(connection, streamed)[0]))
    if faults:
        raise RuntimeError(f"{server.name}: {faults[0]}")
    return {
        "requests_per_second": requests,
        "tokens_per_second": requests * tokens,
        "cpu_ms_per_request": 1000 * cpu / requests,
        "first_token_seconds": statistics.median(firsts),
    }


def compare(ours, stock, options, side, picture, connections):
    """Pairs of turns, and the medians of their ratios."""
    requests = {
        server: [body(server, picture, side, options.tokens, stream) for stream in (False, True)] for server in (ours, stock)
    }
    pairs = []
    for pair in range(-1, options.pairs):
        seconds = options.seconds if pair >= 0 else min(0.5, options.seconds)
        # Who is first takes turns as well.
        order = (ours, stock) if pair % 2 == 0 else (stock, ours)
        found = {server: turn(server, *requests[server], options.tokens, connections, seconds) for server in order}
        if pair >= 0:
            pairs.append((found[ours], found[stock]))
    median = lambda which, key: statistics.median(pair[which][key] for pair in pairs)
    throughput = [a["requests_per_second"] / b["requests_per_second"] for a, b in pairs]
    first_token = [b["first_token_seconds"] / a["first_token_seconds"] for a, b in pairs]
    cpu = [b["cpu_ms_per_request"] / a["cpu_ms_per_request"] for a, b in pairs]
    return {
        "ours": {key: median(0, key) for key in pairs[0][0]},
        "stock": {key: median(1, key) for key in pairs[0][1]},
        "throughput_ratio": statistics.median(throughput),
        "first_token_ratio": statistics.median(first_token),
        "cpu_ratio": statistics.median(cpu),
        "throughput_ratios": [round(r, 3) for r in throughput],
        "first_token_ratios": [round(r, 3) for r in first_token],
        "cpu_ratios": [round(r, 3) for r in cpu],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--radapt", required=True)
    parser.add_argument("--stock", required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--connections", default=",".join(map(str, CONNECTIONS)))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--modes", default="none,default,prefix-cache", help="none, default (ours with its defence), prefix-cache (stock's on)")
    parser.add_argument("--json")
    options = parser.parse_args()
    rows, failures, answers = [], [], []
    for name in options.models.split(","):
        folder, side, contract = MODELS[name]
        copies = tempfile.TemporaryDirectory()
        folder = endless(folder, pathlib.Path(copies.name) / name)
        for mode in options.modes.split(","):
            servers = []
            try:
                ours = [options.radapt, "serve", "--addr", "127.0.0.1:0", "--json", "--model", str(folder), "--name", "m", "--in-flight", "16", "--offline"]
                ours += OURS["default" if mode == "default" else "none"] + (["--contract", contract] if contract else [])
                cache = "16" if mode == "prefix-cache" else "0"
                servers.append(Server("radapt", ours, "m"))
                servers.append(Server("stock", [options.stock, str(folder), "--prefix-cache", cache, "--max-seqs", "16"], "default"))
                for picture in (True, False):
                    what = "picture" if picture else "text"
                    try:
                        seen = []
                        for server in servers:
                            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
                            found = ask(connection, body(server, picture, side, options.tokens, False), options.tokens)
                            seen.append({"server": server.name, "text": found["choices"][0]["message"]["content"][:120], "usage": found["usage"]})
                        answers.append({"model": name, "mode": mode, "what": what, "answers": seen})
                        for connections in map(int, options.connections.split(",")):
                            found = compare(*servers, options, side, picture, connections)
                            rows.append({"model": name, "mode": mode, "what": what, "connections": connections, **found})
                            print(
                                f"{name:7} {mode:12} {what:8} {connections:2}: {found['ours']['requests_per_second']:8.1f} and"
                                f" {found['stock']['requests_per_second']:8.1f} requests/s, {found['throughput_ratio']:.3f}x; first token"
                                f" {1000 * found['ours']['first_token_seconds']:7.2f} and {1000 * found['stock']['first_token_seconds']:7.2f} ms,"
                                f" {found['first_token_ratio']:.3f}x; cpu {found['ours']['cpu_ms_per_request']:.2f} and"
                                f" {found['stock']['cpu_ms_per_request']:.2f} ms, {found['cpu_ratio']:.3f}x",
                                flush=True,
                            )
                    except (RuntimeError, OSError, http.client.HTTPException) as error:
                        failures.append({"model": name, "mode": mode, "what": what, "error": str(error), "stock_log": servers[1].said()[-300:]})
                        print(f"{name:7} {mode:12} {what:8} FAILED: {str(error)[:400]}", flush=True)
            except RuntimeError as error:
                failures.append({"model": name, "mode": mode, "what": "start", "error": str(error)})
                print(f"{name:7} {mode:12} FAILED: {str(error)[:600]}", flush=True)
            finally:
                for server in servers:
                    server.stop()
    wanted = [row for row in rows if row["mode"] == "none"]
    ok = bool(wanted) and all(row["throughput_ratio"] >= 0.98 and row["first_token_ratio"] >= 0.98 for row in wanted)
    found = {
        "ok": ok,
        "pairs": options.pairs,
        "seconds": options.seconds,
        "tokens": options.tokens,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "rows": rows,
        "answers": answers,
        "failures": failures,
    }
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print("at least 0.98x of stock everywhere, undefended" if ok else "below 0.98x of stock somewhere, undefended, or nothing measured")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
