"""How little happens for a request, counted and not timed: Python calls, asyncio's objects, system calls.

Issue "First light", Shows 4. The first half composes a worker's data path in this process, as
``ascproxy/worker/datapath.py`` does, on an event loop that writes down what is asked of it; client and model server are
threads with blocking sockets, so that nothing of asyncio is theirs. The second half counts the system calls of a real
worker under load, from outside.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import uvloop

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.gateway.exchange import Exchange
from tests.kit.rig import Answer, free_port, limits, post, until
from tests.kit.service import ROOT, Service, wait_for
from tests.kit.snapshots import KEY, endpoint, key_row, provider, route, snapshot
from tests.kit.streams import FakeLog

AUTH = f"Authorization: Bearer {KEY}"
UNARY = b'{"usage":{"prompt_tokens":2,"completion_tokens":3}}'
EVENTS = 200
MADE = ("create_task", "create_future", "call_later", "call_at", "call_soon", "call_soon_threadsafe", "run_in_executor")


class Loop(uvloop.Loop):
    """``asked`` are the calls that :data:`MADE` names, while ``watching``; with each, what was given first."""

    watching = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any]] = []


def _watched(name: str) -> Callable[..., Any]:
    def method(self: Loop, *args: Any, **more: Any) -> Any:
        if self.watching:
            self.asked.append((name, args[0] if args else None))
        return getattr(uvloop.Loop, name)(self, *args, **more)

    return method


for name in MADE:
    setattr(Loop, name, _watched(name))


class ModelServer:
    """Answers what asks for a stream by ``EVENTS`` events, each once ``next_event`` is released, else at once."""

    def __init__(self) -> None:
        self.next_event = threading.Semaphore(0)
        self.connections = 0
        self.listening = socket.create_server(("127.0.0.1", free_port()))
        self.port: int = self.listening.getsockname()[1]

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while (request := read_message(stream)) is not None:
                if b'"stream": true' not in request:
                    fields = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(UNARY)
                    connection.sendall(b"HTTP/1.1 200 OK\r\n" + fields + UNARY)
                    continue
                fields = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + fields)
                for n in range(EVENTS):
                    self.next_event.acquire()
                    event = b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % n
                    connection.sendall(b"%x\r\n%b\r\n" % (len(event), event))
                self.next_event.acquire()
                connection.sendall(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def read_message(stream: Any) -> bytes | None:
    """Head and body (of a length) of one message, None at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return None
        head += line
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    return head + stream.read(int(length[1]) if length else 0)


class Calls:
    """Python functions that run in the loop's thread while ``on``. ``entries`` were called by no Python function of
    ours, so by the loop or by native code; ``frames`` counts all."""

    def __init__(self) -> None:
        self.on = False
        self.entries: list[str] = []
        self.frames = 0
        self._depth = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._depth += 1
            if self.on:
                self.frames += 1
                if self._depth == 1:
                    self.entries.append(frame.f_code.co_name)
        elif event == "return":
            self._depth = max(0, self._depth - 1)


class Composed:
    """A worker's data path on a loop, driven by a client in a thread: ``composed.run(client)``."""

    def __init__(self) -> None:
        self.model = ModelServer()
        self.port = free_port()
        self.page = _native.Page(mmap.mmap(-1, 1 << 20))
        self.calls = Calls()
        self.loop = Loop()

    def run(self, client: Callable[[Composed], None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self.main(client))

    async def main(self, client: Callable[[Composed], None]) -> None:
        self.exchange = Exchange(
            self.loop,
            page=self.page,
            arena=_native.SecretArena(),
            key_lookup={"k1": key_row()}.get,
            key_epoch=lambda: 1,
            log=FakeLog(),  # type: ignore[arg-type]
            environ={},
        )
        self.core = _native.Core(walk=self.exchange, page=self.page, limits=limits())
        self.core.access_log = True
        self.exchange.bind(self.core)
        rack = provider("rack-a", endpoint(0, f"http://127.0.0.1:{self.model.port}"))
        self.exchange.adopt(snapshot((route("chat"),), (rack,)))
        listener = _native.Listener(name="public", tls=None, limits=limits())
        self.core.attach(self.loop)
        with socket.create_server(("127.0.0.1", self.port)) as listening:
            server = self.core.listen(listener, listening.fileno())
        threading.Thread(target=self.model.accept, daemon=True).start()
        idle = threading.Event()

        def play() -> None:
            idle.wait()
            client(self)

        playing = self.loop.run_in_executor(None, play)
        sys.setprofile(self.calls)
        self.loop.call_soon(idle.set)  # runs when nothing of this coroutine does
        try:
            await playing
        finally:
            sys.setprofile(None)
        server.close()
        self.model.listening.shutdown(socket.SHUT_RDWR)
        self.model.listening.close()
        await self.exchange.close()
        self.core.drain(0, 0)
        self.core.tick(monotonic_ns())
        await until(lambda: self.core.connections == 0, "every connection is closed")
        self.core.detach()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What happens in here is written down."""
        self.loop.asked.clear()
        self.calls.entries.clear()
        self.calls.frames = 0
        self.calls.on = self.loop.watching = True
        yield
        self.calls.on = self.loop.watching = False

    @property
    def made(self) -> list[tuple[str, Any]]:
        """Asked of the loop, without the sweep of the pools, once a second whatever comes."""
        return [(name, what) for name, what in self.loop.asked if what != self.exchange._sweep]

    @property
    def entries(self) -> list[str]:
        return [name for name in self.calls.entries if name != "_sweep"]


class Client:
    """One connection, with blocking calls."""

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.sock = socket.create_connection(("127.0.0.1", composed.port), timeout=20)
        self.stream = self.sock.makefile("rb")

    def ask(self, body: dict[str, Any], *fields: str, pieces: int = 1) -> Answer:
        """A whole request, sent in so many pieces; its answer, of a length."""
        data = post(body, *(fields or (AUTH,)))
        head = data.index(b"\r\n\r\n") + 4
        if pieces == 1:
            self.sock.sendall(data)
        else:
            before = self.composed.core.calls
            self.sock.sendall(data[:head])
            wait_for(lambda: self.composed.core.calls > before, "the head was looked at")
            self.sock.sendall(data[head:])
        said = read_message(self.stream)
        assert said is not None
        end = said.index(b"\r\n\r\n") + 4
        answer = Answer(said[:end], said[end:])
        wait_for(lambda: self.composed.core.in_flight == 0, "the request is settled")
        return answer

    def close(self) -> None:
        self.stream.close()
        self.sock.close()


def test_a_unary_request_makes_two_calls_and_nothing_else() -> None:
    def play(c: Composed) -> None:
        client = Client(c)
        assert client.ask({"model": "chat"}).status == 200  # and a connection waits
        before = c.core.calls
        with c.watched():
            for _ in range(50):
                assert client.ask({"model": "chat"}).body == UNARY
        assert c.core.calls - before == 100
        assert c.entries == ["on_request", "on_settle"] * 50
        assert c.made == []
        assert c.model.connections == 1
        client.close()

    Composed().run(play)


def test_a_body_that_comes_later_makes_one_call_more() -> None:
    def play(c: Composed) -> None:
        client = Client(c)
        assert client.ask({"model": "chat"}).status == 200
        with c.watched():
            for _ in range(20):
                assert client.ask({"model": "chat"}, pieces=2).status == 200
        assert c.entries == ["on_head", "on_request", "on_settle"] * 20
        assert c.made == []
        client.close()

    Composed().run(play)


@pytest.mark.parametrize(
    ("body", "fields", "status"),
    [({"model": "chat"}, ["X-A: b"], 401), ({"model": "none"}, [AUTH], 404), ({"model": 1}, [AUTH], 400)],
)
def test_a_refusal_makes_two_calls_and_nothing_else(body: dict[str, Any], fields: list[str], status: int) -> None:
    def play(c: Composed) -> None:
        client = Client(c)
        assert client.ask(body, *fields).status == status  # and the connection is accepted
        with c.watched():
            for _ in range(20):
                assert client.ask(body, *fields).status == status
        assert c.entries == ["on_request", "on_settle"] * 20
        assert c.made == []
        client.close()

    Composed().run(play)


def test_a_stream_makes_no_call_for_its_chunks() -> None:
    """The next event leaves the model server only when the client has the last one, so that none are joined."""

    def play(c: Composed) -> None:
        client = Client(c)
        assert client.ask({"model": "chat"}).status == 200
        with c.watched():
            client.sock.sendall(post({"model": "chat", "stream": True}, AUTH))
            c.model.next_event.release()  # the head of the answer leaves with its first content
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.stream.readline()
            assert b'"content":"0"' in chunk(client.stream)
            assert c.entries == ["on_request"]
            walked, calls = c.calls.frames, c.core.calls
            for n in range(1, EVENTS):
                c.model.next_event.release()
                assert b'"content":"%d"' % n in chunk(client.stream)
            assert c.core.calls == calls
            assert c.entries == ["on_request"]
            assert "_sweep" in c.calls.entries or c.calls.frames == walked
            c.model.next_event.release()
            while chunk(client.stream):
                pass
            wait_for(lambda: c.core.in_flight == 0, "the stream is settled")
        assert c.entries == ["on_request", "on_settle"]
        assert c.made == []
        client.close()

    Composed().run(play)


def test_the_watch_sees_what_it_looks_for() -> None:
    """The first request of all has no connection that waits: it needs a task and a timer, and both are seen."""

    def play(c: Composed) -> None:
        client = Client(c)
        assert client.ask({"model": "none"}).status == 404
        with c.watched():
            assert client.ask({"model": "chat"}).status == 200
        assert "create_task" in {name for name, _ in c.made}
        assert "on_request" in c.entries
        client.close()

    Composed().run(play)


def chunk(stream: Any) -> bytes:
    """The data of the next chunk, nothing for the last."""
    size = int(stream.readline(), 16)
    data: bytes = stream.read(size)
    assert stream.readline() == b"\r\n"
    return data


# ---- system calls ----------------------------------------------------------------------------------------------------

CONNECTIONS = 64
REQUESTS = 5_000
TOTAL = re.compile(r"^100\.00 +\S+ +\S+ +(\d+)", re.MULTILINE)
SERVED = re.compile(r'^ascproxy_requests_total\{.*code="200".*\} (\S+)$', re.MULTILINE)


@contextmanager
def running(*argv: str, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["event"] == ready
            yield process
        finally:
            process.kill()


class Traced:
    """``strace -c`` on a process: ``counted()`` detaches and gives the number of system calls."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.report = folder / "strace"
        self.process = subprocess.Popen(
            ["strace", "-f", "-c", "-o", str(self.report), "-p", str(pid)], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if "attached" not in line:
            self.process.wait()
            pytest.skip(f"strace cannot attach: {line.strip()}")

    def counted(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate()
        report = self.report.read_text()
        total = TOTAL.search(report)
        assert total is not None, report
        return int(total[1]), report


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: tools/packages trace")
@pytest.mark.parametrize("transport", ["plaintext", "tls"])
def test_a_unary_request_at_saturation_makes_at_most_five_system_calls(tmp_path: Path, transport: str) -> None:
    from bench import native  # compiles the stub and the load where that was not done yet

    def served() -> int:
        return int(sum(float(value) for value in SERVED.findall(service.metrics())))

    def quiet() -> bool:
        now = served()
        return status()["in_flight"] == 0 and served() == now

    def status() -> dict[str, Any]:
        worker: dict[str, Any] = service.status()["workers"][0]
        return worker

    with ExitStack() as stack:
        port = str(free_port())
        stack.enter_context(running(str(native.program("stub")), "--port", port, "--model", "m", ready="ready"))
        service = stack.enter_context(Service(tmp_path / "d", upstream=f"http://127.0.0.1:{port}", models=["m"]))
        tls = ["--tls", "--ca", service.facts["ca"]] if transport == "tls" else []
        load = stack.enter_context(
            running(
                str(native.program("load")), "--mode", "unary", "--model", "m", "--key", service.key, "--port",
                str(service.https_port if tls else service.http_port), "--connections", str(CONNECTIONS), *tls,
                ready="ready",
            )
        )  # fmt: skip
        # The load stands still whenever requests or system calls are read, so that both are counted over the same time.
        load.send_signal(signal.SIGSTOP)
        wait_for(quiet, "nothing is under way")
        traced = Traced(status()["pid"], tmp_path)
        before = served()
        load.send_signal(signal.SIGCONT)
        wait_for(lambda: served() - before >= REQUESTS, "enough requests", 60)
        load.send_signal(signal.SIGSTOP)
        wait_for(quiet, "nothing is under way")
        requests = served() - before
        calls, report = traced.counted()
        load.send_signal(signal.SIGCONT)
    assert calls >= 4 * requests, (requests, report)  # else it was not this worker that served
    assert calls <= 5 * requests, (requests, report)
