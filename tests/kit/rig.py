"""A native core on a real event loop, with a walk that forwards everything and an upstream that follows a script.

What is under test is the data path alone: sockets, framing, back-pressure, cancellation, deadlines. The walk here is
the smallest one that obeys the contract of ``ascproxy/_native.pyi``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import mmap
import random
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvloop

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.model.node import Limits
from ascproxy.worker.datapath import native_network

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ALL = _native.Names(("content-type", "accept", "x-pass-*"))
REJECTED = {
    "request_timeout": 408,
    "body_too_large": 413,
    "uri_too_long": 414,
    "headers_too_large": 431,
    "overloaded": 503,
    "draining": 503,
    "internal_error": 500,
    "version_not_supported": 505,
}
BACK = _native.Names(("content-type", "retry-after", "x-back"))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a test's coroutine on uvloop, with a deadline that no test should ever meet."""

    async def bounded() -> Any:
        return await asyncio.wait_for(main, 60)

    return uvloop.run(bounded())


def free_port() -> int:
    """A port below 32768 that can be bound right now."""
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def limits(**changes: Any) -> dict[str, int]:
    return dataclasses.asdict(dataclasses.replace(Limits(), **changes))


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Let the loop turn until a condition holds."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"never happened: {what}"
        await asyncio.sleep(0.001)


async def settled_at(value: Callable[[], int], turns: int = 100) -> int:
    """The value once it has stopped changing."""
    last, same = value(), 0
    while same < turns:
        await asyncio.sleep(0.002)
        now = value()
        same = same + 1 if now == last else 0
        last = now
    return last


class Forwarder:
    """Forwards every request to one port; remembers what it saw."""

    def __init__(self) -> None:
        self.rig: Rig | None = None
        self.plan: _native.Plan | None = None
        self.settled: list[dict[str, Any]] = []
        self.rejects: list[str] = []
        self.failures: list[str] = []
        self.heads = 0
        self.seen_certificates: list[_native.ClientCertificate | None] = []
        self.idle: list[_native.Upstream] = []
        self.answer_on_response = True

    def on_head(self, s: _native.Stream) -> None:
        self.heads += 1

    def on_request(self, s: _native.Stream) -> None:
        assert self.plan is not None
        assert self.rig is not None
        self.seen_certificates.append(s.client_cert)
        while self.idle:
            u = self.idle.pop()
            if u.usable(monotonic_ns(), 4_000):
                s.forward(u, self.plan)
                return
        s.task = asyncio.get_running_loop().create_task(self.connect(s))

    async def connect(self, s: _native.Stream) -> None:
        assert self.plan is not None
        assert self.rig is not None
        try:
            u = await self.rig.connect()
        except OSError as error:
            if not s.done:
                s.respond(502, b"", str(error).encode(), code="upstream_unreachable")
            return
        if s.done:
            self.idle.append(u)
        else:
            s.forward(u, self.plan)

    def on_reject(self, s: _native.Stream) -> None:
        self.rejects.append(s.reject)
        s.respond(REJECTED.get(s.reject, 400), b"content-type: text/plain\r\n", s.reject.encode(), code=s.reject)

    def on_response(self, s: _native.Stream) -> None:
        self.failures.append(s.failure or str(s.upstream_status))
        if s.failure in ("", "error_event") and self.answer_on_response:
            s.relay()
        elif s.failure == "closed" and s.reused:
            self.on_request(s)
        else:
            s.respond(502, b"", s.failure.encode(), code="upstream_malformed")

    def on_settle(self, s: _native.Stream) -> None:
        fact = {"outcome": s.outcome, "status": s.status, "bytes_out": s.bytes_out, "code": s.code}
        self.settled.append(fact | {"usage": (s.usage_in, s.usage_out), "source": s.usage_source, "finish": s.finish})
        self.settled[-1]["attempts"] = s.attempts
        u = s.upstream
        if u is not None and u.reusable:
            self.idle.append(u)


class Rig:
    """``async with Rig(script) as rig``: ``rig.port`` is the gateway, ``rig.walk`` its walk."""

    def __init__(
        self,
        script: Script,
        *,
        walk: Forwarder | None = None,
        server_tls: _native.TlsContext | None = None,
        client_tls: _native.TlsContext | None = None,
        upstream_ssl: Any = None,
        upstream_rcvbuf: int = 0,
        upstream_sndbuf: int = 0,
        proxy_protocol: bool = False,
        trusted: tuple[str, ...] = (),
        http2: bool = True,
        **changes: int,
    ) -> None:
        self.script = script
        self.walk = walk or Forwarder()
        self.walk.rig = self
        self.server_tls = server_tls
        self.client_tls = client_tls
        self.upstream_ssl = upstream_ssl
        self.upstream_rcvbuf = upstream_rcvbuf
        self.upstream_sndbuf = upstream_sndbuf
        self.http2 = http2
        self.limits = limits(**changes)
        self.page = _native.Page(mmap.mmap(-1, 1 << 20))
        self.proxy_protocol = proxy_protocol
        self.core = _native.Core(
            walk=self.walk, page=self.page, limits=self.limits, trusted_peers=tuple(map(native_network, trusted))
        )
        self.port = 0
        self.upstream_port = 0
        self.upstream_connections = 0
        self.ticking = True
        self._tick: asyncio.Task[None] | None = None

    def make_plan(self, **changes: Any) -> _native.Plan:
        values: dict[str, Any] = {
            "endpoint": 0,
            "head": b"POST /v1/chat/completions HTTP/1.1\r\nhost: model\r\naccept-encoding: identity\r\n",
            "request_headers": ALL,
            "response_headers": BACK,
            "scan": _native.SCAN_OPENAI,
            "log": b'"route":"test"',
        }
        return _native.Plan(**(values | changes))

    async def connect(self) -> _native.Upstream:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[_native.Upstream] = loop.create_future()

        def told(u: _native.Upstream, reason: str) -> None:
            if not ready.done():
                if reason:
                    ready.set_exception(OSError(reason))
                else:
                    ready.set_result(u)

        sock = socket.socket()
        sock.setblocking(False)
        if self.upstream_rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.upstream_rcvbuf)
        await loop.sock_connect(sock, ("127.0.0.1", self.upstream_port))
        self.core.connect(sock.detach(), 0, self.client_tls, "localhost", told)
        return await ready

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.upstream_connections += 1
        if self.upstream_sndbuf:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.upstream_sndbuf)
        try:
            await self.script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.ticking:
                self.core.tick(monotonic_ns())

    async def __aenter__(self) -> Rig:
        loop = asyncio.get_running_loop()
        self.upstream_port = free_port()
        self._upstream = await asyncio.start_server(
            self._serve, "127.0.0.1", self.upstream_port, ssl=self.upstream_ssl, limit=1 << 26
        )
        self.port = free_port()
        self.listener = _native.Listener(
            name="test",
            tls=self.server_tls,
            limits=self.limits,
            proxy_protocol=self.proxy_protocol,
            http2=self.http2,
        )
        self.core.attach(loop)
        with socket.create_server(("127.0.0.1", self.port), backlog=1024) as listening:
            self._server = self.core.listen(self.listener, listening.fileno())
        if self.walk.plan is None:
            self.walk.plan = self.make_plan()
        self._tick = loop.create_task(self._ticks())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._tick is not None
        self._tick.cancel()
        self._server.close()
        self._upstream.close()
        self.core.drain(0, 0)
        self.core.tick(monotonic_ns())
        for u in self.walk.idle:
            u.close()
        await until(lambda: self.core.connections == 0, "every connection is closed")
        assert self.core.in_flight == 0
        assert self.core.body_bytes == 0
        self.core.detach()

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26)


def post(body: bytes | dict[str, Any], *fields: str, path: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: gateway", f"Content-Length: {len(data)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request with a content-length, as the upstream sees it: head and body. Raises when the peer has gone."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head, await reader.readexactly(length)


class Answer:
    """One parsed answer: ``status``, ``fields`` (lower-case), ``body``, ``raw`` (head)."""

    def __init__(self, raw: bytes, body: bytes) -> None:
        self.raw, self.body = raw, body
        first, *lines = raw.rstrip(b"\r\n").split(b"\r\n")
        self.status = int(first.split()[1])
        self.fields = {k.strip().lower().decode(): v.strip().decode() for k, v in (x.split(b":", 1) for x in lines)}


async def read_answer(reader: asyncio.StreamReader, *, no_body: bool = False) -> Answer:
    raw = await reader.readuntil(b"\r\n\r\n")
    answer = Answer(raw, b"")
    if no_body or answer.status in (204, 304) or 100 <= answer.status < 200:
        return answer
    if answer.fields.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append(await reader.readexactly(size))
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readexactly(2) == b"\r\n"
        answer.body = b"".join(parts)
    elif "content-length" in answer.fields:
        answer.body = await reader.readexactly(int(answer.fields["content-length"]))
    else:
        answer.body = await reader.read()
    return answer


def parse_chunks(raw: bytes) -> bytes:
    """The body of a recorded answer in chunks."""
    rest, body = raw.partition(b"\r\n\r\n")[2], b""
    while True:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        if size == 0:
            return body
        body, rest = body + rest[:size], rest[size + 2 :]
