"""A soak of `radapt serve`: clients that come and go, break off, are killed, and a SIGTERM at the end.

    python3 benches/serve_soak.py target/release/radapt [--minutes 15] [--clients 64] [--json FILE]

Python's standard library alone; Linux, whose /proc tells the server's memory. A quarter of the clients are processes of
their own that are killed with SIGKILL in the middle of what they do; the rest share this process. Each asks one thing
after another: chat whole and streamed, text, a picture and several, the responses API, several choices, JSON schemas,
tools, bad requests, slow readers and slow senders, connections that close in the middle.

Exit code 0 if all of this holds:
  statuses   no 5xx before SIGTERM; 503 alone after it
  answers    every 200 whole: JSON with its choices finished, or a stream with its last event; every connection the
             client did not break gets an answer
  counts     for each status, the server counted at least as many as the clients saw, and at most those and the
             requests whose end no client saw
  nothing_left  with the clients gone, within 15 s nothing is in flight or waiting, and one connection (this one) is open
  memory     the median of the resident memory over the last third of the time is at most 5 % above that over the
             middle third; the first third is for warming up. Open files likewise, at most 16 more.
  log        no panic in it
  drain      requests running at SIGTERM end with 200, those waiting with 200 or 429; new ones get 503 with Retry-After while the door is
             open; the process exits with 0 in time
"""

import argparse
import asyncio
import base64
import collections
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "fixtures" / "decode"
# Token ids that end an answer are among the first in all models' vocabularies; without them answers are long.
ENDLESS = {"logit_bias": {"0": -100, "1": -100, "2": -100}}
SERVER_FLAGS = ["--in-flight", "16", "--queue", "32", "--queue-time", "10"]
LINGER, DRAIN = 3, 60


def png(width, height, seed):
    """A picture of stripes and noise."""
    draw = random.Random(seed)
    base = [draw.randrange(256) for _ in range(3)]
    rows = bytearray()
    for y in range(height):
        row = bytes((base[c] + x * (c + 1) + 5 * y) & 255 for x in range(width) for c in range(3))
        rows += b"\0" + row

    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(rows), 1)) + chunk(b"IEND", b"")


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def pictures():
    sizes = [(32, 32), (64, 48), (48, 96), (224, 224), (336, 200), (640, 480)]
    urls = [data_url(png(*size, seed)) for seed, size in enumerate(sizes)]
    for name in ["busy-420.jpg", "busy-progressive.jpg", "lossy.webp", "animated.gif", "palette8.png", "rgba16.png"]:
        urls.append(data_url((FIXTURES / name).read_bytes()))
    return urls


class Unfinished(Exception):
    """The connection ended before its answer did."""


class Answer:
    def __init__(self, status, headers):
        self.status, self.headers, self.body = status, headers, b""


class Connection:
    """HTTP/1.1, one request after another."""

    def __init__(self, port, small=False):
        self.port, self.small, self.writer = port, small, None

    async def __aenter__(self):
        sock = socket.socket()
        sock.setblocking(False)
        if self.small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=1 << 20 if not self.small else 4096)
        except BaseException:
            sock.close()
            raise
        return self

    async def __aexit__(self, *_):
        self.close()

    def close(self, abruptly=False):
        if abruptly:
            self.writer.transport.abort()
        else:
            self.writer.close()

    def send(self, method, path, body=b"", headers=()):
        lines = [f"{method} {path} HTTP/1.1", "host: soak", f"content-length: {len(body)}", "content-type: application/json"]
        self.writer.write("\r\n".join([*lines, *headers, "", ""]).encode() + body)

    async def head(self):
        try:
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Unfinished("no answer") from error
        first, *rest = text.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in rest)}
        return Answer(int(first.split()[1]), headers)

    async def pieces(self, answer):
        """The body as it comes."""
        try:
            if "content-length" in answer.headers:
                yield await self.reader.readexactly(int(answer.headers["content-length"]))
                return
            while True:
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                data = await self.reader.readexactly(size + 2)
                if size == 0:
                    return
                yield data[:-2]
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise Unfinished("half an answer") from error


class Tally:
    """What was begun and what came of it; a child tells its parent line by line."""

    def __init__(self, out=None):
        self.out = out
        self.begun, self.statuses, self.outcomes = 0, collections.Counter(), collections.Counter()
        self.seconds, self.faults = collections.defaultdict(list), []

    def tell(self, *what):
        if self.out is None:
            self.take(what)
        else:
            os.write(self.out, ("\t".join(map(str, what)) + "\n").encode())

    def take(self, what):
        match what:
            case ["begin"]:
                self.begun += 1
            case ["status", status]:
                self.statuses[int(status)] += 1
            case ["done", kind, outcome, seconds]:
                self.outcomes[kind, outcome] += 1
                if outcome == "200":
                    self.seconds[kind].append(float(seconds))
            case ["fault", *text]:
                if len(self.faults) < 50:
                    self.faults.append(" ".join(text))
                self.outcomes["fault", text[0]] += 1


class Client:
    def __init__(self, port, model, tally, seed, urls):
        self.port, self.model, self.tally, self.urls = port, model, tally, urls
        self.draw, self.turned_away = random.Random(seed), False

    # What is asked.

    def chat(self, pictures=0, text="What is in the picture?", **more):
        parts = [{"type": "image_url", "image_url": {"url": self.draw.choice(self.urls)}} for _ in range(pictures)]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        return {"model": self.model, "max_tokens": self.draw.choice([4, 16, 40]), "messages": messages, **more}

    def responses(self, pictures=0, **more):
        parts = [{"type": "input_image", "image_url": self.draw.choice(self.urls)} for _ in range(pictures)]
        items = [{"role": "user", "content": [*parts, {"type": "input_text", "text": "What is it?"}]}]
        return {"model": self.model, "max_output_tokens": 32, "input": items, **more}

    def long(self, **more):
        tokens = self.draw.choice([50, 150, 400])
        return self.chat(self.draw.choice([0, 1]), **{**ENDLESS, "stream": True, "max_tokens": tokens, **more})

    def structured(self):
        schema = {"type": "object", "properties": {"what": {"type": "string", "maxLength": 12}}, "required": ["what"], "additionalProperties": False}
        return self.chat(1, max_tokens=60, response_format={"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}})

    def called(self):
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}}}
        return self.chat(0, max_tokens=60, tools=[tool], tool_choice="required")

    def conversation(self):
        body = self.chat(1)
        answer = {"role": "assistant", "content": "A lamp."}
        body["messages"] = [{"role": "system", "content": "Be short."}, *body["messages"], answer, *self.chat(2)["messages"]]
        return body

    def bad(self):
        """A request that is turned away: path, body."""
        chat = "/v1/chat/completions"
        url = lambda url: (chat, {**self.chat(), "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]})
        bomb = png(1, 1, 0).replace(struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000), 1)
        return self.draw.choice([
            lambda: (chat, b"{"),
            lambda: (chat, b'{"model": "\xff"}'),
            lambda: (chat, b"[" * 10_000),
            lambda: (chat, {**self.chat(), "model": "gpt-4"}),
            lambda: (chat, {**self.chat(), "messages": []}),
            lambda: (chat, {**self.chat(), "temperature": -1}),
            lambda: (chat, {**self.chat(), "max_tokens": 10**9}),
            lambda: (chat, self.chat(9)),
            lambda: (chat, self.chat(0, "word " * 40_000)),
            lambda: (chat, {**self.chat(), "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}}),
            lambda: ("/v1/nothing", {}),
            lambda: ("/v1/models", {}),
            lambda: ("/v1/responses", {**self.responses(), "previous_response_id": "resp_1"}),
            lambda: url("file:///etc/passwd"),
            lambda: url("https://169.254.169.254/latest/meta-data/"),
            lambda: url("data:image/png;base64,@@@"),
            lambda: url(data_url(png(200, 200, 1)[:500])),
            lambda: url(data_url(bomb)),
        ])()

    # How it is asked.

    async def ask(self, kind, connection, path, body, *, read=None):
        """One exchange, read to its end or by `read`; checks what came."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        start = time.monotonic()
        self.tally.tell("begin")
        try:
            connection.send("POST", path, data)
            await connection.writer.drain()
        except ConnectionError:
            pass  # It may have answered already.
        answer = await self.head(connection)
        if answer.status == 200 and read is not None:
            return await read(connection, answer)
        async for piece in connection.pieces(answer):
            answer.body += piece
        self.check(kind, body, answer)
        self.tally.tell("done", kind, str(answer.status), f"{time.monotonic() - start:.4f}")
        return answer

    async def head(self, connection):
        answer = await connection.head()
        self.tally.tell("status", answer.status)
        return answer

    def check(self, kind, body, answer):
        fault = lambda text: self.tally.tell("fault", f"{kind}:", text, repr(answer.body[-300:]))
        if kind == "bad":
            if not 400 <= answer.status < 500:
                fault(f"status {answer.status}")
            return
        if answer.status == 429:
            self.turned_away = True
            if "retry-after" not in answer.headers:
                fault("429 without Retry-After")
            return
        if answer.status == 503 and self.tally.outcomes["drain", "SIGTERM"]:
            return
        if answer.status != 200:
            return fault(f"status {answer.status}")
        if not isinstance(body, dict) or not body.get("stream"):
            found = json.loads(answer.body)
            whole = found["status"] in ("completed", "incomplete") if "output" in found else all(c["finish_reason"] for c in found["choices"])
        elif "input" in body:
            whole = b"event: response.completed" in answer.body or b"event: response.incomplete" in answer.body
        else:
            whole = answer.body.endswith(b"data: [DONE]\n\n") and b'"error"' not in answer.body
        if not whole:
            fault("not whole")

    async def answered(self, kind, body, path="/v1/chat/completions"):
        async with Connection(self.port) as connection:
            for _ in range(self.draw.choice([1, 1, 3])):  # Kept alive, some.
                answer = await self.ask(kind, connection, path, body)
                if self.turned_away or answer.headers.get("connection") == "close":
                    return

    async def breaks_off(self):
        """Closes in the middle of a stream."""
        pieces = self.draw.randrange(1, 60)

        async def read(connection, answer):
            count = 0
            async for _ in connection.pieces(answer):
                count += 1
                if count >= pieces:
                    break
            connection.close(abruptly=self.draw.random() < 0.5)
            self.tally.tell("done", "breaks off", "left", 0)

        async with Connection(self.port) as connection:
            await self.ask("breaks off", connection, "/v1/chat/completions", self.long(), read=read)

    async def leaves(self):
        """Is gone before there is an answer."""
        async with Connection(self.port) as connection:
            self.tally.tell("begin")
            connection.send("POST", "/v1/chat/completions", json.dumps(self.long(stream=False, n=self.draw.choice([1, 4]))).encode())
            await connection.writer.drain()
            await asyncio.sleep(self.draw.random() * 0.3)
            connection.close(abruptly=self.draw.random() < 0.5)
            self.tally.tell("done", "leaves", "left", 0)

    async def reads_slowly(self):
        async def read(connection, answer):
            until = time.monotonic() + 8
            async for piece in connection.pieces(answer):
                answer.body += piece
                if time.monotonic() < until:
                    await asyncio.sleep(0.03)
            self.check("reads slowly", body, answer)
            self.tally.tell("done", "reads slowly", "200", 0)

        body = self.long(n=4)
        async with Connection(self.port, small=True) as connection:
            await self.ask("reads slowly", connection, "/v1/chat/completions", body, read=read)

    async def sends_slowly(self):
        """The body in bits; some never end it."""
        body = self.chat(1)
        data = json.dumps(body).encode()
        gives_up = self.draw.random() < 0.3
        async with Connection(self.port) as connection:
            self.tally.tell("begin")
            connection.writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode())
            for part in range(10):
                connection.writer.write(data[len(data) * part // 10 : len(data) * (part + 1) // 10])
                await connection.writer.drain()
                await asyncio.sleep(0.15)
                if gives_up and part == 5:
                    self.tally.tell("done", "sends slowly", "left", 0)
                    return
            answer = await self.head(connection)
            async for piece in connection.pieces(answer):
                answer.body += piece
            self.check("sends slowly", body, answer)
            self.tally.tell("done", "sends slowly", str(answer.status), 0)

    async def step(self):
        """One thing, drawn by weight."""
        draw, chat, responses = self.draw, self.chat, self.responses
        many = draw.randrange(2, 9)
        actions = [
            (10, lambda: self.answered("text", chat())),
            (10, lambda: self.answered("picture", chat(1))),
            (8, lambda: self.answered("pictures", chat(many))),
            (8, lambda: self.answered("stream", chat(stream=True, stream_options={"include_usage": True}))),
            (8, lambda: self.answered("picture, stream", chat(1, stream=True))),
            (5, lambda: self.answered("conversation", self.conversation())),
            (4, lambda: self.answered("choices", chat(1, n=4, temperature=1, seed=draw.randrange(99), logprobs=True, top_logprobs=3))),
            (3, lambda: self.answered("schema", self.structured())),
            (3, lambda: self.answered("tools", self.called())),
            (5, lambda: self.answered("responses", responses(draw.randrange(3)), "/v1/responses")),
            (5, lambda: self.answered("responses, stream", responses(1, stream=True), "/v1/responses")),
            (4, lambda: self.answered("long stream", self.long())),
            (8, lambda: self.answered("bad", *reversed(self.bad()))),
            (6, self.breaks_off),
            (5, self.leaves),
            (2, self.reads_slowly),
            (3, self.sends_slowly),
        ]
        weights, actions = zip(*actions)
        await draw.choices(actions, weights)[0]()

    async def live(self, until):
        while time.monotonic() < until:
            try:
                await self.step()
            except Unfinished as error:
                self.tally.tell("fault", "unfinished:", str(error))
            except ConnectionError as error:
                self.tally.tell("fault", "connection:", repr(error))
            if self.turned_away and self.draw.random() < 0.9:  # Most do as they are told.
                await asyncio.sleep(1 + self.draw.random())
            elif self.draw.random() < 0.2:  # Goes, and comes back.
                await asyncio.sleep(self.draw.random())
            self.turned_away = False


async def mortal(options, port, model, tally, seed, until):
    """A client that is a process, killed and started again and again."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--client", str(port), model, str(draw.randrange(1 << 30)), stdout=subprocess.PIPE
        )

        async def follow():
            async for line in process.stdout:
                tally.take(line.decode().rstrip("\n").split("\t"))

        reading = asyncio.create_task(follow())
        await asyncio.sleep(min(draw.uniform(1, 20), max(0.0, until - time.monotonic())))
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        else:
            tally.tell("fault", "client:", f"ended by itself with {process.returncode}")
        await process.wait()
        await reading
        tally.outcomes["client", "killed"] += 1


class Server:
    def __init__(self, radapt, flags):
        self.log = tempfile.NamedTemporaryFile(prefix="soak-", suffix=".log")
        command = [radapt, "serve", "--addr", "127.0.0.1:0", "--json", "--linger", str(LINGER), "--drain-time", str(DRAIN), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the server did not start: {pathlib.Path(self.log.name).read_text()}")
        started = json.loads(line)
        self.port, self.model = int(started["address"].rsplit(":", 1)[1]), started["model"]
        self.samples, self.start = [], time.monotonic()

    def sample(self):
        folder = pathlib.Path(f"/proc/{self.process.pid}")
        resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        files = len(os.listdir(folder / "fd"))
        threads = len(os.listdir(folder / "task"))
        self.samples.append((time.monotonic() - self.start, resident, files, threads))

    def peak(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def metrics(self, tally):
        async with Connection(self.port) as connection:
            tally.tell("begin")
            connection.send("GET", "/metrics", headers=["connection: close"])
            answer = await connection.head()
            tally.tell("status", answer.status)
            body = b"".join([piece async for piece in connection.pieces(answer)])
        found = {}
        for line in body.decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name] = float(value)
        return found


async def drain(server, urls, seed):
    """SIGTERM while requests run and wait."""
    tally = Tally()
    client = Client(server.port, server.model, tally, seed, urls)
    bodies = [{**client.long(), "max_tokens": 400, **more} for more in [{}, {"stream": False}, {"n": 2}, {}] * 6]

    async def accepted(body, small):
        try:
            async with Connection(server.port, small) as connection:
                await client.ask("accepted", connection, "/v1/chat/completions", body)
        except (Unfinished, ConnectionError) as error:
            tally.tell("fault", "accepted:", repr(error))

    idle = Connection(server.port)
    await idle.__aenter__()
    await client.ask("idle", idle, "/v1/chat/completions", client.chat())
    running = [asyncio.create_task(accepted(body, i % 6 == 0)) for i, body in enumerate(bodies)]
    until = time.monotonic() + 10
    while (found := await server.metrics(tally))["radapt_in_flight"] < 12 and time.monotonic() < until:
        await asyncio.sleep(0.02)
    stopped = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    tally.outcomes["drain", "SIGTERM"] += 1
    await asyncio.sleep(0.1)
    turned, shut, missing = collections.Counter(), None, 0
    late = Client(server.port, server.model, Tally(), seed + 1, urls)
    late.tally.outcomes["drain", "SIGTERM"] += 1
    while shut is None and time.monotonic() < stopped + LINGER + DRAIN:
        try:
            async with Connection(server.port) as connection:
                answer = await late.ask("late", connection, "/v1/chat/completions", late.chat(late.draw.randrange(2)))
            turned[answer.status] += 1
            missing += "retry-after" not in answer.headers
        except ConnectionRefusedError:
            shut = time.monotonic() - stopped
        except (Unfinished, ConnectionError):
            # The door was shut on a connection that was not yet accepted.
            turned["reset"] += 1
        if len(turned) and sum(turned.values()) == 3:
            # A connection from before does not get in either.
            answer = await late.ask("late", idle, "/v1/chat/completions", late.chat())
            turned[answer.status] += 1
        await asyncio.sleep(0.05)
    await asyncio.gather(*running)
    answered = time.monotonic() - stopped
    idle.close()
    code = None
    try:
        code = await asyncio.to_thread(server.process.wait, LINGER + DRAIN + 5 - answered)
    except subprocess.TimeoutExpired:
        server.process.kill()
    took = time.monotonic() - stopped
    outcomes = {outcome: n for (kind, outcome), n in tally.outcomes.items() if kind == "accepted"}
    ok = (
        code == 0
        and not tally.faults
        # Those still waiting may be told that it takes too long.
        and sum(outcomes.values()) == len(bodies)
        and set(outcomes) <= {"200", "429"}
        and outcomes.get("200", 0) >= found["radapt_in_flight"]
        and turned[503] > 0
        and set(turned) <= {503, "reset"}
        and turned["reset"] <= 1
        and missing == 0
        and shut is not None
    )
    return {
        "ok": ok,
        "in_flight_at_sigterm": found["radapt_in_flight"],
        "waiting_at_sigterm": found["radapt_waiting"],
        "accepted": outcomes,
        "new": {str(k): v for k, v in turned.items()},
        "without_retry_after": missing,
        "door_shut_after_seconds": shut,
        "last_answer_after_seconds": answered,
        "exited_after_seconds": took,
        "exit_code": code,
        "faults": tally.faults,
    }


def memory(samples):
    """Whether the samples are flat, and by how much."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    if third < 10:
        return {"ok": False, "reason": "too short to tell"}
    before, after = (statistics.median(s[1] for s in part) for part in (middle, last))
    files = [statistics.median(s[2] for s in part) for part in (middle, last)]
    slope = statistics.linear_regression([s[0] / 3600 for s in samples[third:]], [s[1] for s in samples[third:]]).slope
    return {
        "ok": after <= before * 1.05 and files[1] <= files[0] + 16,
        "resident_mib_first_third": statistics.median(s[1] for s in samples[:third]),
        "resident_mib_middle_third": before,
        "resident_mib_last_third": after,
        "growth": after / before - 1,
        "slope_mib_per_hour": slope,
        "open_files": files,
        "threads": max(s[3] for s in samples),
    }


async def soak(options):
    urls = pictures()
    flags = SERVER_FLAGS + (options.flags.split() if options.flags else [])
    server = Server(options.radapt, ["--model", options.model, *flags])
    tally = Tally()
    start, until = time.monotonic(), time.monotonic() + 60 * options.minutes
    processes = options.clients // 4
    clients = [Client(server.port, server.model, tally, seed, urls).live(until) for seed in range(options.clients - processes)]
    mortals = [mortal(options, server.port, server.model, tally, 1000 + seed, until) for seed in range(processes)]

    async def watch():
        while time.monotonic() < until:
            server.sample()
            await asyncio.sleep(max(0.1, min(1.0, options.minutes / 10)))

    try:
        await asyncio.gather(watch(), *clients, *mortals)
        took, cpu, peak = time.monotonic() - start, server.cpu_seconds(), server.peak()
        # Those who have left are noticed when the next piece is written.
        for _ in range(60):
            left = await server.metrics(tally)
            gone = left["radapt_in_flight"] == left["radapt_waiting"] == 0 and left["radapt_connections"] <= 1
            if gone:
                break
            await asyncio.sleep(0.25)
        at_rest = server.process.poll() is None
        server.sample()
        rest = server.samples.pop()[1:]
        # Its own request is not counted yet.
        counted = collections.Counter()
        for name, value in left.items():
            if found := re.match(r'radapt_requests_total\{.*status="(\d+)"', name):
                counted[int(found[1])] += int(value)
        seen = collections.Counter(tally.statuses)
        seen[200] -= 1
        unseen = tally.begun - sum(tally.statuses.values())
        # 499: gone before there was a status.
        balanced = all(seen[s] <= counted[s] <= seen[s] + unseen for s in {*seen, *counted})
        ending = await drain(server, urls, 77)
    finally:
        if server.process.poll() is None:
            server.process.kill()
    log = pathlib.Path(server.log.name).read_text(errors="replace")
    panics = [line for line in log.splitlines() if "panicked" in line]
    statuses = {str(s): n for s, n in sorted(tally.statuses.items())}
    checks = {
        "statuses": {"ok": not any(s >= 500 for s in tally.statuses), "seen": statuses},
        "answers": {"ok": not tally.faults, "faults": tally.faults},
        "counts": {"ok": balanced, "server": {str(s): n for s, n in sorted(counted.items())}, "clients": {str(s): n for s, n in sorted(seen.items())}, "end_unseen": unseen},
        "nothing_left": {"ok": gone and at_rest, **{k: left[f"radapt_{k}"] for k in ("in_flight", "waiting", "connections")}},
        "memory": {**memory(server.samples), "peak_mib": peak, "at_rest_mib": rest[0], "at_rest_files": rest[1]},
        "log": {"ok": not panics, "panics": panics[:5], "lines": log.count("\n"), "bytes": len(log)},
        "drain": ending,
    }
    kinds = {}
    for (kind, outcome), n in sorted(tally.outcomes.items()):
        kinds.setdefault(kind, {})[outcome] = n
    slow = {
        kind: {"median": statistics.median(s), "p99": sorted(s)[int(len(s) * 0.99)], "max": max(s)}
        for kind, s in sorted(tally.seconds.items())
        if s and max(s) > 0
    }
    step = max(1, len(server.samples) // 180)
    return {
        "ok": all(check["ok"] for check in checks.values()),
        "clients": options.clients,
        "of_them_processes": processes,
        "seconds": took,
        "server_cpu_seconds": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "flags": flags,
        "model": server.model,
        "requests_begun": tally.begun,
        "requests_per_second": sum(tally.statuses.values()) / took,
        "tokens": {k.split('"')[1]: v for k, v in left.items() if k.startswith("radapt_tokens_total")},
        "pictures": left.get("radapt_pictures_total"),
        "checks": checks,
        "kinds": kinds,
        "latency_seconds": slow,
        "samples_seconds_mib_files_threads": [[round(v, 1) for v in sample] for sample in server.samples[::step]],
    }


def main():
    if sys.argv[1:2] == ["--client"]:
        port, model, seed = int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
        client = Client(port, model, Tally(out=1), seed, pictures())
        asyncio.run(client.live(float("inf")))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("radapt", help="the binary")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--flags", help="more flags for the server")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    found = asyncio.run(soak(options))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['requests_begun']} requests in {found['seconds']:.0f} s, {found['requests_per_second']:.1f} a second")
    for name, check in found["checks"].items():
        print(f"{'ok  ' if check['ok'] else 'FAIL'} {name}: {json.dumps({k: v for k, v in check.items() if k != 'ok'})[:1500]}")
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
