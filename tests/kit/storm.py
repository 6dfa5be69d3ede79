"""Open-loop load in which every request carries a marker of its own, and every answer must carry it back.

Half of the requests come on fresh connections, half on kept ones; several ways (plaintext or TLS, one answer or a
stream) are taken in turn. Requests leave when they are due, whatever became of those before.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.kit.rig import Answer, post, read_answer
from tests.kit.service import Service

PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Way:
    """How a request comes, and what it asks for."""

    tls: bool = False
    stream: bool = False


@dataclass
class Outcome:
    """One request: when it began, when its connection was opened and from which local port, when it ended, and what
    was wrong. ``foreign`` is the worst of all: an answer that belongs to another request."""

    started: float
    opened: float
    ended: float
    fresh: bool
    way: Way = Way()
    port: int = 0
    error: str = ""
    foreign: bool = False


@dataclass
class Kept:
    """A connection between two requests."""

    opened: float
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def usable(self) -> bool:
        """Whether the other side has not closed it meanwhile."""
        return self.reader.exception() is None and not self.reader.at_eof()


@dataclass
class Storm:
    """``rate`` requests a second for ``seconds``. ``outcomes`` has one entry a request, or, without ``keep_good``, one
    a request that failed: an hour of good ones would be too many."""

    service: Service
    rate: float
    seconds: float
    ways: tuple[Way, ...] = (Way(),)
    keep_good: bool = True
    model: str = "sim-chat"
    outcomes: list[Outcome] = field(default_factory=list)
    done: int = 0
    slowest_s: float = 0.0
    lag: float = 0.0
    _idle: dict[bool, list[Kept]] = field(default_factory=lambda: defaultdict(list))
    _stopped: bool = False

    def __post_init__(self) -> None:
        self._tls = self.service.tls()
        self._credential = f"Authorization: Bearer {self.service.key}"

    async def watch(self) -> None:
        """Note how late this process is at the most."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            self.lag = max(self.lag, loop.time() - due)

    async def connect(self, way: Way, outcome: Outcome) -> Kept:
        """A new connection. The outcome knows its port before anything can go wrong: a TLS handshake can."""
        loop = asyncio.get_running_loop()
        outcome.opened = loop.time()
        outside = socket.socket()
        try:
            outside.setblocking(False)
            port = self.service.https_port if way.tls else self.service.http_port
            await loop.sock_connect(outside, ("127.0.0.1", port))
            outcome.port = outside.getsockname()[1]
            tls, name = (self._tls, "127.0.0.1") if way.tls else (None, None)
            streams = await asyncio.open_connection(sock=outside, ssl=tls, server_hostname=name)
            return Kept(outcome.opened, *streams)
        except BaseException:
            outside.close()
            raise

    def kept(self, way: Way) -> Kept | None:
        """A waiting connection that still lives."""
        while self._idle[way.tls]:
            found = self._idle[way.tls].pop()
            if found.usable:
                return found
            found.writer.close()
        return None

    async def one(self, n: int) -> None:
        """Request number ``n``, to its outcome."""
        now = asyncio.get_running_loop().time
        way = self.ways[n // 2 % len(self.ways)]
        connection = None if n % 2 == 0 else self.kept(way)
        outcome = Outcome(now(), now(), now(), connection is None, way)
        try:
            async with asyncio.timeout(PATIENCE_S):
                if connection is None:
                    connection = await self.connect(way, outcome)
                else:
                    outcome.opened = connection.opened
                    outcome.port = connection.writer.get_extra_info("sockname")[1]
                marker = f"marker-{n}-of-this-storm"
                body: dict[str, Any] = {
                    "model": self.model,
                    "user": marker,
                    "messages": [{"role": "user", "content": "hi"}],
                }
                body |= {"stream": True} if way.stream else {}
                connection.writer.write(post(body, "Content-Type: application/json", self._credential))
                answer = await read_answer(connection.reader)
            outcome.error = wrong(answer, marker, way)
            outcome.foreign = outcome.error == FOREIGN
            if not outcome.error and n % 2 and answer.fields.get("connection") != "close":
                self._idle[way.tls].append(connection)
                connection = None
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        if connection is not None:
            connection.writer.close()
        outcome.ended = now()
        self.done += 1
        if not outcome.error and outcome.fresh:
            self.slowest_s = max(self.slowest_s, outcome.ended - outcome.started)
        if outcome.error or self.keep_good:
            self.outcomes.append(outcome)

    def stop(self) -> None:
        """No further request."""
        self._stopped = True

    async def run(self, disturb: Callable[[], Awaitable[None]]) -> None:
        """Until the last answer; ``disturb`` goes on meanwhile and is cancelled then. What it raises is raised here."""
        loop = asyncio.get_running_loop()
        disturbing = asyncio.ensure_future(disturb())
        watching = asyncio.ensure_future(self.watch())
        begin = loop.time()
        tasks: set[asyncio.Future[None]] = set()
        for n in itertools.count():
            if n >= self.rate * self.seconds or self._stopped or disturbing.done():
                break
            await asyncio.sleep(max(0.0, begin + n / self.rate - loop.time()))
            task = asyncio.ensure_future(self.one(n))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        watching.cancel()
        if disturbing.done():
            disturbing.result()
        disturbing.cancel()
        for waiting in self._idle.values():
            for connection in waiting:
                connection.writer.close()
            waiting.clear()

    @property
    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.error]


FOREIGN = "another request's answer"


def wrong(answer: Answer, marker: str, way: Way) -> str:
    """What is wrong with an answer; "" when it is whole and its request's own."""
    if answer.status != 200:
        return f"{answer.status} {answer.body[:100]!r}"
    try:
        said = streamed(answer.body) if way.stream else json.loads(answer.body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"not a chat completion ({type(error).__name__}: {error}): {answer.body[-100:]!r}"
    return "" if marker in said else FOREIGN


def streamed(body: bytes) -> str:
    """The text of a whole stream. ValueError when it has no end, or an error in it."""
    frames = [part.removeprefix("data: ") for part in body.decode().split("\n\n") if part.startswith("data: ")]
    if not frames or frames[-1] != "[DONE]":
        raise ValueError("a stream without its end")
    said = []
    for frame in frames[:-1]:
        event = json.loads(frame)
        if "error" in event:
            raise ValueError(f"an error in the stream: {event['error']}")
        said += [choice["delta"].get("content") or "" for choice in event["choices"]]
    return "".join(said)
