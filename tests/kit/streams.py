"""Fakes of the native core for tests of the walk: they keep the contract of ``ascproxy/_native.pyi`` and its refusals
(a second answer, a forward over a connection that is not ready), and write down what was done to them.

Nothing here parses or sends: a test plays client and upstream by :class:`FakeCore`'s methods.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import orjson

from ascproxy import _native

MS = 1_000_000


class FakeClock:
    """Monotonic and wall nanoseconds that move when told."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        self.wall = 1_700_000_000_000_000_000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return self.wall

    def sleep_ms(self, ms: int) -> None:
        self.now_ns += ms * MS
        self.wall += ms * MS


class FakePage:
    """A metric page: cells by number, series by key."""

    def __init__(self) -> None:
        self.cells: dict[int, int] = {}
        self.keys: dict[bytes, int] = {}

    def series(self, key: bytes, cells: int) -> int:
        return self.keys.setdefault(key, 1_000 * (len(self.keys) + 1))

    def add(self, cell: int, n: int) -> None:
        self.cells[cell] = self.cells.get(cell, 0) + n

    def count(self, *labels: str) -> int:
        """The value of the counter with that key, 0 if there is none."""
        return self.cells.get(self.keys.get("\0".join(labels).encode(), -1), 0)

    def labels(self, block: int) -> tuple[str, ...]:
        """What the block is about."""
        (key,) = (key for key, first in self.keys.items() if first == block)
        return tuple(key.decode().split("\0"))


class FakeLog:
    """Lines as tuples."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def warning(self, message: str, **fields: Any) -> None:
        self.lines.append(("warning", message, fields))

    def error(self, message: str, **fields: Any) -> None:
        self.lines.append(("error", message, fields))


class TlsError(Exception):
    pass


class TlsContext:
    def __init__(self, **files: Any) -> None:
        self.files = files

    @staticmethod
    def client(**files: Any) -> TlsContext:
        if files.get("ca") == "/missing":
            raise TlsError("cannot read /missing")
        return TlsContext(**files)


class Names:
    def __init__(self, names: tuple[str, ...]) -> None:
        for name in names:
            if not name or name != name.lower() or " " in name or name.count("*") > 1:
                raise ValueError(f"not a lower-case header name or pattern with one '*': {name!r}")
        self.names = names

    def __contains__(self, name: str) -> bool:
        return any(fnmatchcase(name.lower(), pattern) for pattern in self.names)


@dataclass(frozen=True, kw_only=True)
class Plan:
    endpoint: int
    head: bytes
    request_headers: Names
    response_headers: Names
    secret: Any = None
    secret_prefix: bytes = b""
    model: str | None = None
    scan: int = 0
    first_byte_ms: int = 300_000
    idle_ms: int = 120_000
    total_ms: int = 3_600_000
    block: int = 0
    log: bytes = b""
    ask: bytes | None = None
    strip: bool = False
    endings: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.head.endswith(b"\r\n") or b"\r\n\r\n" in self.head:
            raise ValueError("head is lines that each end with CRLF, without the empty line")


@dataclass(frozen=True)
class Secret:
    origin: str
    value: bytes = field(repr=False)


class SecretArena:
    """Knows files by a dictionary."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = files or {}

    def load(self, path: str) -> Secret:
        if path not in self.files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return Secret(path, self.files[path])

    def put(self, value: bytearray) -> Secret:
        secret = Secret("put", bytes(value))
        value[:] = bytes(len(value))
        return secret


class FakeNative:
    """Stands for the module ``ascproxy._native``."""

    SCAN_NONE, SCAN_OPENAI, SCAN_MESSAGES, SCAN_RESPONSES, SCAN_TGI = range(5)
    Plan = Plan
    Names = Names
    TlsContext = TlsContext
    TlsError = TlsError


@dataclass(eq=False)
class FakeListener:
    name: str = "public"


class FakeUpstream:
    """A connection; ``log`` of all that are made is the core's."""

    def __init__(self, endpoint: int, now_ns: int) -> None:
        self.endpoint = endpoint
        self.idle_since_ns = now_ns
        self.served = 0
        self.open = True
        self.stream: FakeStream | None = None
        self.answered = False
        self.pool: Any = None

    @property
    def ready(self) -> bool:
        return self.open and self.stream is None

    @property
    def reusable(self) -> bool:
        return self.open and self.stream is None and self.answered

    def usable(self, now_ns: int, idle_ms: int) -> bool:
        return self.ready and now_ns < self.idle_since_ns + idle_ms * MS

    def close(self) -> None:
        if self.stream is not None:
            raise RuntimeError("an exchange uses this connection")
        self.open = False


@dataclass
class Answer:
    """What a stream was answered with by the walk itself."""

    status: int
    headers: dict[str, str]
    body: bytes
    code: str
    block: int

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class FakeStream:
    """An exchange. Made by :meth:`FakeCore.request`."""

    def __init__(
        self, core: FakeCore, method: bytes | None, path: bytes | None, headers: dict[str, str], body: bytes
    ) -> None:
        self.core = core
        self.method = method
        self.path, _, self.query = path.partition(b"?") if path is not None else (None, b"", b"")
        self._headers = {name.lower(): value.encode() for name, value in headers.items()}
        self._body = body
        self.listener = core.listener
        self.peer = "127.0.0.1:50000"
        self.request_id = self._headers.get("x-request-id", b"0" * 32)
        bearer = self._headers.get("authorization", b"")
        bearer = bearer[7:] if bearer.lower().startswith(b"bearer ") else b""
        key = self._headers.get("x-api-key", b"")
        self.credential = bearer or key or None
        self.two_credentials = bool(bearer and key and bearer != key)
        self.client_cert = None
        self.content_length = len(body)
        self.body_len = len(body)
        self.scan_error, self.scan_code, self.model, self.stream, self.max_tokens = scan(body)
        self.scan_limit = ""
        self.trips: list[str] = []
        self.reject = ""
        self.body_limit = 32 * 1024 * 1024
        self.failure = ""
        self.upstream_status = 0
        self.answer_headers: dict[str, bytes] = {}
        self.reused = False
        self.attempts = 0
        self.status = 0
        self.committed = False
        self.outcome = ""
        self.usage_in = self.usage_out = -1
        self.usage_source = "none"
        self.finish = ""
        self.bytes_in = len(body)
        self.bytes_out = 0
        self.upstream: FakeUpstream | None = None
        self.context: Any = None
        self.log: Any = None
        self.code = ""
        self.task: asyncio.Task[None] | None = None
        self.done = False
        # of the fake
        self.answer: Answer | None = None
        self.plans: list[Plan] = []
        self.phase = "body"
        self.held = False
        self.in_walk = 0

    @property
    def credential_digest(self) -> bytes | None:
        return None if self.credential is None else hashlib.sha256(self.credential).digest()

    @property
    def asks(self) -> tuple[Any, ...] | None:
        if self.two_credentials or self.credential is None or self.scan_error or self.model is None:
            return None
        return self.listener, self.method, self.path, self.query, self.credential_digest, self.model

    def header(self, name: str) -> bytes | None:
        return self._headers.get(name)

    def upstream_header(self, name: str) -> bytes | None:
        return self.answer_headers.get(name)

    def body(self) -> bytes:
        return self._body

    def trip(self, limit: str) -> None:
        if limit not in _native.LIMIT_NAMES:
            raise ValueError(f"not a limit: {limit!r}")
        self.trips.append(limit)

    def forward(self, upstream: FakeUpstream, plan: Plan) -> None:
        if self.done or self.phase != "deciding":
            raise RuntimeError("the exchange does not wait for a decision")
        if not upstream.ready:
            raise RuntimeError("the upstream connection is not ready")
        self._release()
        self.upstream = upstream
        self.plans.append(plan)
        self.reused = upstream.served > 0
        self.attempts += 1
        self.failure = ""
        self.upstream_status = 0
        self.phase = "wait"
        upstream.stream = self
        upstream.served += 1
        upstream.answered = False

    def relay(self) -> None:
        if not self.held or self.phase != "deciding":
            raise RuntimeError("there is no answer of an upstream to pass on")
        self.phase = "relay"

    def respond(
        self, status: int, headers: bytes, body: bytes, *, code: str = "", close: bool = False, block: int = 0
    ) -> None:
        if self.done or self.committed or self.phase not in ("deciding", "body"):
            raise RuntimeError("the exchange has an answer already")
        if headers and not headers.endswith(b"\r\n"):
            raise ValueError("headers are complete lines")
        lines = [line.split(": ", 1) for line in headers.decode("ascii").split("\r\n")[:-1]]
        self._release()
        self.answer = Answer(status, dict(lines), body, code, block)
        assert len(self.answer.headers) == len(lines), "a field twice"
        self.status, self.code, self.committed = status, code, True
        self.outcome = "complete" if status < 400 else "refused"
        self.phase = "flush"
        if not self.in_walk:
            self.core._settle(self)

    def abort(self, outcome: str) -> None:
        self.core.client_gone(self, outcome)

    def _release(self) -> None:
        upstream = self.upstream
        if upstream is not None and upstream.stream is self:
            upstream.stream = None
            if not upstream.answered:
                upstream.close()


def scan(body: bytes) -> tuple[str, str, bytes | None, bool, int]:
    """What the native scanner says of a body, for the bodies that tests of the walk use."""
    if not body:
        return "", "", None, False, -1
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "it is not JSON", "invalid_json", None, False, -1
    if not isinstance(document, dict):
        return "it is not an object", "invalid_json", None, False, -1
    if body.count(b'"model":') > 1:
        return "a member is there twice", "duplicate_field", None, False, -1
    model = document.get("model")
    if model is not None and not isinstance(model, str):
        return "a member has the wrong type", "invalid_request", None, False, -1
    return (
        "",
        "",
        None if model is None else model.encode(),
        document.get("stream") is True,
        document.get("max_tokens", -1),
    )


class FakeCore:
    """Calls a walk as the native core does."""

    def __init__(self, walk: Any, clock: FakeClock) -> None:
        self.walk = walk
        self.clock = clock
        self.listener = FakeListener()
        self.calls: list[str] = []
        self.connections: list[FakeUpstream] = []
        self.settled: list[FakeStream] = []

    # the client's side

    def request(
        self,
        path: str = "/v1/chat/completions",
        body: Any = None,
        *,
        method: str = "POST",
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> FakeStream:
        """A request that arrives whole."""
        stream = self.stream(path, body, method=method, key=key, headers=headers)
        self.complete(stream)
        return stream

    def stream(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> FakeStream:
        """A request of which nothing was decided yet."""
        raw = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        fields = dict(headers or {})
        if key is not None:
            fields["authorization"] = f"Bearer {key}"
        return FakeStream(self, method.encode(), path.encode(), fields, raw)

    def complete(self, stream: FakeStream) -> None:
        stream.phase = "deciding"
        self._call("on_request", stream)

    def head(self, stream: FakeStream, content_length: int) -> None:
        """Only the head of a request is here."""
        stream.content_length = content_length
        self._call("on_head", stream)

    def reject(self, stream: FakeStream, code: str) -> None:
        stream.reject = code
        stream.phase = "deciding"
        self._call("on_reject", stream)

    def client_gone(self, stream: FakeStream, outcome: str = "client_gone") -> None:
        stream.outcome, stream.done = outcome, True
        if not stream.committed:
            stream.status = 499
        stream._release()
        if stream.task is not None:
            stream.task.cancel()
        self._settle(stream)

    # the upstream's side

    def answer(
        self, stream: FakeStream, status: int = 200, headers: dict[str, bytes] | None = None, *, keep: bool = True
    ) -> None:
        """The upstream answers, completely."""
        upstream = stream.upstream
        assert stream.phase == "wait", stream.phase
        assert upstream is not None
        stream.upstream_status = status
        if status in (401, 403, 429) or status >= 500:
            stream.phase, stream.held, stream.failure = "deciding", True, ""
            stream.answer_headers = headers or {}
            stream.task = None
            self._call("on_response", stream)
            stream.held = False
        else:
            stream.phase = "relay"
        if stream.phase != "relay":
            if upstream.stream is stream:
                stream._release()
            return
        stream.status, stream.committed = status, True
        upstream.answered = keep
        upstream.idle_since_ns = self.clock.now_ns
        stream._release()
        stream.outcome = "complete"
        self._settle(stream)

    def fail(self, stream: FakeStream, failure: str) -> None:
        """The upstream connection fails before the answer began."""
        assert stream.phase == "wait", stream.phase
        stream._release()
        stream.failure, stream.phase, stream.task = failure, "deciding", None
        self._call("on_response", stream)

    # the walk's side

    def connect(
        self, endpoint: int, tls: Any, server_name: str, ready: Callable[[Any, str], None]
    ) -> Callable[[], Any]:
        raise AssertionError("tests of the walk connect by FakeConnector")

    def _call(self, name: str, stream: FakeStream) -> None:
        self.calls.append(name)
        stream.in_walk += 1
        getattr(self.walk, name)(stream)
        stream.in_walk -= 1
        if name != "on_head":
            assert stream.phase != "deciding" or stream.task is not None, f"{name} decided nothing"
        if stream.phase == "flush" and not stream.in_walk:
            self._settle(stream)

    def _settle(self, stream: FakeStream) -> None:
        if stream.phase == "done":
            return
        stream.phase, stream.done = "done", True
        self.calls.append("on_settle")
        self.walk.on_settle(stream)
        stream.task = None
        stream.context = None
        self.settled.append(stream)


class FakeConnector:
    """Stands for :class:`ascproxy.upstream.connection.Connector`. Endpoints in ``down`` refuse; ``hold`` makes callers
    wait until :meth:`let_go`."""

    def __init__(self, core: FakeCore) -> None:
        self.core = core
        self.down: dict[int, Exception] = {}
        self.asked: list[tuple[int, int]] = []  # endpoint, within_ms
        self.addresses: list[Any] = []
        self.gate: asyncio.Event | None = None

    async def connect(self, address: Any, within_ms: int) -> FakeUpstream:
        self.asked.append((address.endpoint, within_ms))
        self.addresses.append(address)
        if self.gate is not None:
            await self.gate.wait()
        if address.endpoint in self.down:
            raise self.down[address.endpoint]
        upstream = FakeUpstream(address.endpoint, self.core.clock.now_ns)
        self.core.connections.append(upstream)
        return upstream
