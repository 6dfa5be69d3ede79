"""The simulator's server: which recording, failure or dialect answers a request, and the ``/sim/`` endpoints for tests.

* ``GET /sim/stats``: what reached the server, see :meth:`ascproxy.sim.stats.Gauges.page`.
* ``GET /sim/settings``: the settings that can change; ``PUT`` changes those that its JSON body names: ``fail``
  (KIND[:ARG] or null), ``wire`` (a recording for every request, or null), ``split``, ``gap``, ``chunk``,
  ``tokens``, ``rate``.
* ``GET /sim/wires``: the names of the recordings.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from email.utils import formatdate
from itertools import chain, islice
from typing import Any, Protocol

import orjson

from ascproxy.errors import AscproxyError, UsageError
from ascproxy.sim.answer import Answer, render
from ascproxy.sim.connection import Connection
from ascproxy.sim.failure import End, Failure, Kind, Reply, damage
from ascproxy.sim.recording import CONTINUE, Recording, Shelf
from ascproxy.sim.request import Request
from ascproxy.sim.settings import Settings
from ascproxy.sim.stats import Gauges
from ascproxy.sim.tgi import TGI
from ascproxy.sim.vllm import VLLM

BACKLOG = 4096
REFUSALS = frozenset({Kind.BUSY, Kind.ERROR, Kind.UNAUTHORIZED, Kind.RATE_LIMITED})


class Dialect(Protocol):
    """What a model server's wire has to know."""

    idle_close_s: float | None

    def answer(self, request: Request, failure: Failure | None) -> Answer:
        """The answer to a request."""

    def refusal(self, failure: Failure, request: Request) -> Answer:
        """The answer of a server that is busy, broken, locked or limiting."""

    def error_events(self, request: Request) -> list[bytes]:
        """How a stream ends when the engine dies."""

    def head(self, answer: Answer, request: Request, date: bytes, *, close: bool) -> bytes:
        """The response head."""


class Server:
    """One simulator: its settings, counters, recordings, listening socket and connections."""

    def __init__(self, settings: Settings, *, wall: Callable[[], float], entropy: Callable[[int], bytes]) -> None:
        """``wall`` gives Unix seconds, ``entropy`` random bytes."""
        self.settings = settings
        self.gauges = Gauges()
        self.gauges.running_tokens = self._running_tokens
        self.shelf = Shelf(settings.recordings)
        make = VLLM if settings.type == "vllm" else TGI
        self.dialect: Dialect = make(settings, self.gauges, now=lambda: int(wall()), new_id=lambda: entropy(8).hex())
        self.connections: set[Connection] = set()
        self._wall = wall
        self._date: tuple[int, bytes] = (0, b"")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tls: ssl.SSLContext | None = None
        self._socket: socket.socket | None = None
        self._listener: asyncio.Server | None = None
        self._listening: asyncio.Task[None] | None = None
        self.address: tuple[str, int] = ("", 0)

    # -- life

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Listen on ``sock``, which is bound and not listening; with ``--fail refuse`` it stays so."""
        self._loop = asyncio.get_running_loop()
        self._socket, self._tls = sock, tls
        self.address = sock.getsockname()[:2]
        if not self._refuses():
            await self._listen(sock)

    async def _listen(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Connection(self, loop), sock=sock, backlog=BACKLOG, ssl=self._tls
        )

    def _refuses(self) -> bool:
        return self.settings.fail is not None and self.settings.fail.kind is Kind.REFUSE

    def refuse(self, spare: Connection | None) -> None:
        """Close the listening socket and reset every connection but ``spare``. The port stays bound, and ours."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._socket = bind(*self.address)
        for connection in list(self.connections):
            if connection is not spare:
                connection.reset()

    def resume(self) -> None:
        """Listen again after :meth:`refuse`."""
        if self._listener is None and self._socket is not None and self._loop is not None:
            self._listening = self._loop.create_task(self._listen(self._socket))

    def stop(self) -> None:
        """Close everything at once."""
        if self._listener is not None:
            self._listener.close()
        elif self._socket is not None:
            self._socket.close()
        for connection in list(self.connections):
            connection.reset()

    # -- for connections

    def date(self) -> bytes:
        """The Date header's value, made once a second."""
        now = int(self._wall())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return self._date[1]

    def reply(self, request: Request, *, continued: bool) -> tuple[Reply, bool]:
        """The bytes that answer ``request``, and whether a model is at work on it."""
        if request.path.startswith("/sim/"):
            return self._plain(self._steer(request), request), False
        try:
            name, failure = self._orders(request)
        except UsageError as error:  # a misspelt failure must not look like a healthy server
            return self._plain(_problem(400, str(error)), request), False
        if name is not None:
            return self._replay(name, request, continued), False
        if failure is not None and failure.kind in REFUSALS:
            return self._plain(self.dialect.refusal(failure, request), request), False
        answer = self.dialect.answer(request, failure)
        if failure is None:
            return self._plain(answer, request), answer.generates
        return self._spoiled(answer, request, failure), answer.generates or failure.kind is Kind.HANG

    def _orders(self, request: Request) -> tuple[str | None, Failure | None]:
        """(recording, failure) that the request, or else the settings, ask for. Raises UsageError."""
        wire = request.header("x-sim-wire") or request.argument("wire")
        fail = request.header("x-sim-fail")
        if request.body and (wire is None or fail is None):
            model = _model(request)
            if model.startswith("wire:"):
                wire = wire or model[5:]
            elif "!" in model:
                fail = fail or model.partition("!")[2]
        failure = self.settings.fail if fail is None else Failure.parse(fail)
        return wire or self.settings.wire, failure

    def _plain(self, answer: Answer, request: Request) -> Reply:
        keep = request.keep_alive
        head = self.dialect.head(answer, request, self.date(), close=not keep)
        if request.method == "HEAD":
            answer.body = b""
        return Reply(render(answer, head, self.settings.chunk), End.KEEP if keep else End.CLOSE)

    def _spoiled(self, answer: Answer, request: Request, failure: Failure) -> Reply:
        if failure.kind is Kind.REFUSE:
            self.refuse(None)
            return Reply(iter(()), End.RESET)
        if failure.kind is Kind.ERROR_FRAME and answer.status == 200:
            if answer.events is None:
                return self._plain(self.dialect.refusal(failure, request), request)
            dying = ((0, event) for event in self.dialect.error_events(request))
            answer.events = chain(islice(answer.events, int(failure.argument)), dying)
        if failure.kind is Kind.BAD_CHUNK and answer.events is None:
            answer.events, answer.body = iter([(answer.tokens, answer.body or b"")]), None
        stream = answer.events is not None
        keep = request.keep_alive
        head = self.dialect.head(answer, request, self.date(), close=not keep)
        reply = Reply(render(answer, head, self.settings.chunk), End.KEEP if keep else End.CLOSE)
        return damage(failure, reply, head, stream=stream)

    def _replay(self, name: str, request: Request, continued: bool) -> Reply:
        recording = self.shelf.find(name)
        if recording is None:
            return self._plain(_problem(404, f"no recording {name!r}; GET /sim/wires lists them"), request)
        return replay(recording, continued=continued)

    # -- steering

    def _steer(self, request: Request) -> Answer:
        match (request.method, request.path):
            case ("GET", "/sim/stats"):
                return Answer(body=orjson.dumps(self.gauges.page()))
            case ("GET", "/sim/wires"):
                return Answer(body=orjson.dumps(self.shelf.names()))
            case ("GET", "/sim/settings"):
                return Answer(body=orjson.dumps(self._shown()))
            case ("PUT", "/sim/settings"):
                return self._change(request)
        return _problem(404, "there is GET /sim/stats, GET /sim/wires, GET and PUT /sim/settings")

    def _shown(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "fail": str(settings.fail) if settings.fail is not None else None,
            "wire": settings.wire,
            "split": settings.split,
            "gap": settings.gap,
            "chunk": settings.chunk,
            "tokens": settings.tokens,
            "rate": settings.rate,
        }

    def _change(self, request: Request) -> Answer:
        try:
            wanted = request.document()
            changes = checked(wanted)
        except orjson.JSONDecodeError as error:
            return _problem(400, f"not JSON: {error}")
        except UsageError as error:
            return _problem(400, str(error))
        refused = self._refuses()
        for name, value in changes.items():
            setattr(self.settings, name, value)
        if self._refuses() and not refused:
            self.refuse(next((c for c in self.connections if c.request is request), None))
        elif refused and not self._refuses():
            self.resume()
        return Answer(body=orjson.dumps(self._shown()))

    def _running_tokens(self) -> int:
        return sum(connection.progress() for connection in self.connections)


def replay(recording: Recording, *, continued: bool) -> Reply:
    """The recorded bytes. ``continued``: the 100 Continue that the recording begins with has been sent already."""
    data = recording.response
    if continued and data.startswith(CONTINUE):
        data = data[len(CONTINUE) :]
    return Reply(iter([(0, data)]), End.CLOSE if recording.closed else End.KEEP)


def checked(wanted: object) -> dict[str, Any]:
    """The changes that a ``PUT /sim/settings`` asks for. Raises UsageError."""
    if not isinstance(wanted, dict):
        raise UsageError("a JSON object is needed")
    changes: dict[str, Any] = {}
    for name, value in wanted.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "fail" and (value is None or isinstance(value, str)):
            changes[name] = Failure.parse(value) if value else None
        elif name == "wire" and (value is None or isinstance(value, str)):
            changes[name] = value or None
        elif (name in ("rate", "gap") and number and value >= 0) or (
            name in ("split", "chunk", "tokens") and isinstance(value, int) and number and value >= (name == "tokens")
        ):
            changes[name] = value
        else:
            raise UsageError(f"{name}: {value!r} is not possible")
    return changes


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet. Raises AscproxyError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise AscproxyError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; choose another --port"
        ) from error
    return sock


def _model(request: Request) -> str:
    try:
        document = request.document()
    except orjson.JSONDecodeError:
        return ""
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, str) else ""


def _problem(status: int, sentence: str) -> Answer:
    return Answer(status, orjson.dumps({"error": sentence}))
