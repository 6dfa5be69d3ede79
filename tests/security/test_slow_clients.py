"""Clients that are slow in every way there is, all at once against one worker: each is cut at its deadline, counted by
the name of its limit and, where it had begun a request, in the access log; a good client beside them is served all the
time (LIMITS 2, availability).

A few of each, with short deadlines. With ``ASCPROXY_SLOW=200`` there are 200 of each and the deadlines are the
defaults, which takes 90 seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ascproxy.model.node import Limits
from tests.kit.rig import Answer, free_port, post, read_answer
from tests.kit.service import ROOT, Service, wait_for

MANY = int(os.environ.get("ASCPROXY_SLOW", "0"))
EACH = MANY or 4
SHORT = {"tls_handshake": 2, "header_timeout": 2, "idle_timeout": 3, "body_idle": 2, "write_stall": 2}
LATE_S = 3.0  # within this of the deadline
EARLY_S = 0.2  # a client's clock begins before the gateway's, so that nobody may be cut before the deadline
RATE_WINDOW_S = 10  # of body_min_rate
DRIP_S = 0.5
AT_ONCE = 20  # that connect at the same time: what is looked at is how they are cut, not how fast they come
CLOSED = 7  # TCP_CLOSE of the kernel: by a reset, as nobody here closes
PATIENCE_S = 5.0  # of the good client


def deadline(limit: str) -> float:
    """Seconds of a limit in this run."""
    return SHORT[limit] if not MANY else float(getattr(Limits(), f"{limit}_ms")) / 1000


@dataclass
class Cut:
    """What became of a slow client: when its deadline began, when it was cut, and the answer that it got."""

    begun: float = 0.0
    cut: float = 0.0
    status: int = 0
    error: str = ""


class Client:
    """One slow client's connection: a plain socket that is read only when asked to, TLS by hand above it."""

    def __init__(self, run: Run, cut: Cut, *, tls: bool, small: bool = False) -> None:
        self.run, self.cut, self.loop = run, cut, asyncio.get_running_loop()
        self.port = run.service.https_port if tls else run.service.http_port
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = run.context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost") if tls else None

    def now(self) -> float:
        return self.loop.time()

    async def connect(self) -> None:
        self.cut.begun = self.now()
        await self.loop.sock_connect(self.socket, ("127.0.0.1", self.port))

    async def _step(self, what: Callable[[], Any]) -> Any:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                result = what()
                await self.loop.sock_sendall(self.socket, self.outgoing.read())
                return result
            await self.loop.sock_sendall(self.socket, self.outgoing.read())
            self.incoming.write(await self.loop.sock_recv(self.socket, 65536))

    async def handshake(self) -> None:
        if self.tls is not None:
            await self._step(self.tls.do_handshake)

    async def send(self, data: bytes) -> None:
        if self.tls is not None:
            tls = self.tls
            await self._step(lambda: tls.write(data))
        else:
            await self.loop.sock_sendall(self.socket, data)

    async def receive(self) -> bytes:
        """What comes next; nothing when the connection has ended."""
        try:
            if self.tls is None:
                return await self.loop.sock_recv(self.socket, 65536)
            tls = self.tls
            return bytes(await self._step(lambda: tls.read(65536)))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError):
            return b""

    async def answer(self) -> Answer:
        """One answer of known length."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += await self.receive()
        raw, _, body = data.partition(b"\r\n\r\n")
        answer = Answer(raw, body)
        while len(answer.body) < int(answer.fields["content-length"]):
            answer.body += await self.receive()
        return answer

    async def until_cut(self, drip: bytes = b"") -> None:
        """Send ``drip`` again and again, and note when the other side has had enough, and what it said."""

        async def dripping() -> None:
            with contextlib.suppress(OSError):
                while drip:
                    await self.send(drip)
                    await asyncio.sleep(DRIP_S)

        task = self.loop.create_task(dripping())
        try:
            first = await self.receive()
            self.cut.cut = self.now()
            if first:
                self.cut.status = int(first.split()[1])
                while await self.receive():
                    pass
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until_reset(self, sips: int = 0) -> None:
        """Read nothing, or ``sips`` bytes now and then, until the kernel says that the connection is gone."""
        next_sip = self.now()
        while self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != CLOSED:
            if sips and self.now() >= next_sip:
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    self.socket.recv(sips)
                next_sip = self.now() + DRIP_S
            await asyncio.sleep(0.05)
        self.cut.cut = self.now()


@dataclass
class Run:
    """The service, and what became of everybody."""

    service: Service
    context: ssl.SSLContext
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    good: list[tuple[float, int, str]] = field(default_factory=list)  # how long it took, its status, what was wrong
    lines: list[dict[str, Any]] = field(default_factory=list)
    trips: dict[str, int] = field(default_factory=dict)
    worker: tuple[int, int] = (0, 0)

    def request(self, **members: Any) -> bytes:
        """A whole good request."""
        return post({"model": "sim-chat", "messages": [], **members}, self.key)

    @property
    def key(self) -> str:
        return f"Authorization: Bearer {self.service.key}"

    def head(self, *fields: str) -> bytes:
        """A good head with ``fields``."""
        return "\r\n".join(("POST /v1/chat/completions HTTP/1.1", "Host: a", self.key, *fields, "", "")).encode()


# ---- the kinds -----------------------------------------------------------------------------------------------------


async def slow_handshake(run: Run, cut: Cut) -> None:
    client = Client(run, cut, tls=True)
    await client.connect()
    assert client.tls is not None
    with contextlib.suppress(ssl.SSLWantReadError):
        client.tls.do_handshake()
    hello = client.outgoing.read()
    client.tls = None  # its bytes go by hand from here on
    await client.send(hello[:5])
    step = max(1, int(len(hello) * DRIP_S / deadline("tls_handshake") / 4))
    pieces = iter([hello[i : i + step] for i in range(5, len(hello), step)])

    async def dripping() -> None:
        for piece in pieces:
            with contextlib.suppress(OSError):
                await client.send(piece)
            await asyncio.sleep(DRIP_S)

    task = client.loop.create_task(dripping())
    assert await client.receive() == b""
    cut.cut = client.now()
    assert next(pieces, None) is not None, "the hello was not whole yet"
    task.cancel()


async def never_sends(run: Run, cut: Cut) -> None:
    client = Client(run, cut, tls=False)
    await client.connect()
    await client.until_cut()


async def never_shakes_hands(run: Run, cut: Cut) -> None:
    client = Client(run, cut, tls=True)
    await client.connect()
    client.tls = None
    await client.until_cut()


async def never_asks_over_tls(run: Run, cut: Cut) -> None:
    client = Client(run, cut, tls=True)
    await client.connect()
    await client.handshake()
    cut.begun = client.now()
    await client.until_cut()


async def slow_head(run: Run, cut: Cut, *, tls: bool = False) -> None:
    client = Client(run, cut, tls=tls)
    await client.connect()
    await client.handshake()
    cut.begun = client.now()
    await client.send(run.head().removesuffix(b"\r\n"))
    await client.until_cut(b"x: y\r\n")


async def slow_head_over_tls(run: Run, cut: Cut) -> None:
    await slow_head(run, cut, tls=True)


async def slow_body(run: Run, cut: Cut) -> None:
    client = Client(run, cut, tls=False)
    await client.connect()
    cut.begun = client.now()
    await client.send(run.head("Content-Length: 100000"))
    await client.until_cut(b" " * 100)  # 200 bytes a second where 1,024 are wanted


async def idle_body(run: Run, cut: Cut) -> None:
    """More than body_min_rate wants of the first 10 s, then nothing."""
    client = Client(run, cut, tls=False)
    await client.connect()
    await client.send(run.head("Transfer-Encoding: chunked"))
    cut.begun = client.now()
    await client.send(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
    await client.until_cut()


async def stalled(run: Run, cut: Cut, *, tls: bool = False, sips: int = 0, **members: Any) -> None:
    client = Client(run, cut, tls=tls, small=True)
    await client.connect()
    await client.handshake()
    cut.begun = client.now()
    await client.send(run.request(**members))
    await client.until_reset(sips)


async def stalled_unary(run: Run, cut: Cut) -> None:
    await stalled(run, cut)


async def stalled_stream(run: Run, cut: Cut) -> None:
    await stalled(run, cut, stream=True)


async def stalled_stream_over_tls(run: Run, cut: Cut) -> None:
    await stalled(run, cut, tls=True, stream=True)


async def sipping_stream(run: Run, cut: Cut) -> None:
    """Reads, but so little that the window never opens."""
    await stalled(run, cut, stream=True, sips=16)


async def stalled_and_half_closed(run: Run, cut: Cut) -> None:
    """Says goodbye, but keeps its end of the connection: nobody waits for it to read."""
    client = Client(run, cut, tls=False, small=True)
    await client.connect()
    await client.send(run.request(stream=True))
    seen, since = -1, client.now()
    while client.now() < since + DRIP_S:
        (waiting,) = struct.unpack("i", fcntl.ioctl(client.socket, termios.FIONREAD, bytes(4)))
        if waiting == 0 or waiting != seen:
            seen, since = waiting, client.now()
        await asyncio.sleep(0.05)
    cut.begun = client.now()
    client.socket.shutdown(socket.SHUT_WR)
    await client.until_reset()


async def idle_keep_alive(run: Run, cut: Cut) -> None:
    client = Client(run, cut, tls=False)
    await client.connect()
    await client.send(run.request(max_tokens=1, user="keeps"))
    assert (await client.answer()).status == 200
    cut.begun = client.now() - EARLY_S  # the gateway's clock began when it sent the answer
    await client.until_cut()


@dataclass(frozen=True)
class Kind:
    """``seconds`` from the beginning to the cut; ``limit`` "": none trips; ``status`` 0: no answer; ``line``: whether
    the access log tells of the limit."""

    client: Callable[[Run, Cut], Awaitable[None]]
    limit: str
    seconds: float
    status: int = 0
    line: bool = False


IDLE_BODY = ("body_min_rate", 2.0 * RATE_WINDOW_S) if MANY else ("body_idle", deadline("body_idle"))
KINDS = {
    "slow handshake": Kind(slow_handshake, "tls_handshake", deadline("tls_handshake")),
    "never shakes hands": Kind(never_shakes_hands, "tls_handshake", deadline("tls_handshake")),
    "never sends": Kind(never_sends, "idle_timeout", deadline("idle_timeout")),
    "never asks over TLS": Kind(never_asks_over_tls, "idle_timeout", deadline("idle_timeout")),
    "slow head": Kind(slow_head, "header_timeout", deadline("header_timeout"), 408, line=True),
    "slow head over TLS": Kind(slow_head_over_tls, "header_timeout", deadline("header_timeout"), 408, line=True),
    "slow body": Kind(slow_body, "body_min_rate", RATE_WINDOW_S, 408, line=True),
    # with the defaults the second 10 s without a byte end before body_idle is over
    "idle body": Kind(idle_body, *IDLE_BODY, 408, line=True),
    "stalled unary": Kind(stalled_unary, "write_stall", deadline("write_stall"), line=True),
    "stalled stream": Kind(stalled_stream, "write_stall", deadline("write_stall"), line=True),
    "stalled stream over TLS": Kind(stalled_stream_over_tls, "write_stall", deadline("write_stall"), line=True),
    "sipping stream": Kind(sipping_stream, "write_stall", deadline("write_stall"), line=True),
    "stalled and half-closed": Kind(stalled_and_half_closed, "", 0),
    "idle keep-alive": Kind(idle_keep_alive, "idle_timeout", deadline("idle_timeout")),
}


# ---- the run -------------------------------------------------------------------------------------------------------


async def everybody(run: Run) -> None:
    """All slow clients and the good one, until the last of them is cut."""
    loop = asyncio.get_running_loop()
    longest = max(kind.seconds for kind in KINDS.values()) + 60
    gate = asyncio.Semaphore(AT_ONCE)
    done = asyncio.Event()

    async def slow(name: str, kind: Kind) -> None:
        cut = Cut()
        run.cuts.setdefault(name, []).append(cut)
        try:
            await gate.acquire()
            loop.call_later(0.1, gate.release)
            await asyncio.wait_for(kind.client(run, cut), longest)
        except (OSError, AssertionError, TimeoutError) as error:
            cut.error = repr(error)

    async def good(*, tls: bool) -> None:
        while not done.is_set():
            begun = loop.time()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    more = {"ssl": run.context, "server_hostname": "localhost"} if tls else {}
                    port = run.service.https_port if tls else run.service.http_port
                    reader, writer = await asyncio.open_connection("127.0.0.1", port, **more)
                    writer.write(run.request(max_tokens=1, user="good"))
                    status, error = (await read_answer(reader)).status, ""
                    writer.close()
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as failed:
                status, error = 0, repr(failed)
            run.good.append((loop.time() - begun, status, error))
            await asyncio.sleep(0.1)

    beside = [loop.create_task(good(tls=tls)) for tls in (False, True)]
    await asyncio.gather(*(slow(name, kind) for name, kind in KINDS.items() for _ in range(EACH)))
    done.set()
    await asyncio.gather(*beside)


def look(service: Service) -> tuple[dict[str, int], dict[str, int]]:
    """Trips by reason, and gauges."""
    text = service.metrics()
    trips = re.findall(r'^ascproxy_limit_trips_total\{reason="(\w+)"\} (\d+)', text, re.MULTILINE)
    gauges = re.findall(r"^(ascproxy_\w+) (\d+)", text, re.MULTILINE)
    return {name: int(value) for name, value in trips if int(value)}, {name: int(value) for name, value in gauges}


def told(run: Run) -> str:
    """What became of them, for a reader (pytest -s)."""
    rows = [f"{'kind':26} {'clients':>7} {'limit':14} {'deadline':>9} {'first':>7} {'last':>7} {'status':>6}"]
    for name, kind in KINDS.items():
        took = [cut.cut - cut.begun for cut in run.cuts[name] if not cut.error]
        statuses = "/".join(str(status) for status in sorted({cut.status for cut in run.cuts[name]}))
        times = f"{kind.seconds:8.1f}s {min(took, default=0):6.1f}s {max(took, default=0):6.1f}s"
        rows.append(f"{name:26} {len(took):7} {kind.limit:14} {times} {statuses:>6}")
    slowest = max(seconds for seconds, _, _ in run.good) * 1000
    served = sum(status == 200 for _, status, _ in run.good)
    rows.append(f"beside them {served} of {len(run.good)} good requests served, the slowest in {slowest:.0f} ms")
    return "\n" + "\n".join(rows)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    port = free_port()
    upstream = subprocess.Popen(
        [sys.executable, "-m", "tests.kit.flood", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert upstream.stdout is not None
    assert upstream.stdout.readline() == "listening\n"

    def node(document: dict[str, Any]) -> None:
        if not MANY:
            document["limits"] = {name: f"{seconds}s" for name, seconds in SHORT.items()}

    folder: Path = tmp_path_factory.mktemp("slow") / "d"
    try:
        with Service(folder, upstream=f"http://127.0.0.1:{port}", models=["sim-chat"], node=node) as service:
            run = Run(service, service.tls())
            (worker,) = service.status()["workers"]
            asyncio.run(everybody(run))
            wait_for(lambda: look(service)[1]["ascproxy_connections"] == 0, "nobody is left")
            (after,) = service.status()["workers"]
            run.worker = (worker["pid"], after["pid"])
            run.trips = look(service)[0]
            wait_for(lambda: look(service)[1]["ascproxy_in_flight"] == 0, "nothing is in flight")
            said = service.out.read_text().splitlines()
            run.lines = [json.loads(line) for line in said if '"kind":"access"' in line]
            print(told(run))
            yield run
    finally:
        upstream.kill()
        upstream.wait()
        upstream.stdout.close()


pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("name", KINDS)
def test_each_is_cut_at_its_deadline(ran: Run, name: str) -> None:
    kind, cuts = KINDS[name], ran.cuts[name]
    assert len(cuts) == EACH
    assert [cut.error for cut in cuts if cut.error] == []
    late = [cut.cut - cut.begun - kind.seconds for cut in cuts]
    assert min(late) >= -EARLY_S, f"cut {-min(late):.1f} s too early"
    assert max(late) <= LATE_S, f"cut {max(late):.1f} s too late"
    assert {cut.status for cut in cuts} == {kind.status}


def test_each_cut_is_counted_by_the_name_of_its_limit(ran: Run) -> None:
    assert ran.trips == Counter(kind.limit for kind in KINDS.values() if kind.limit for _ in range(EACH))


def test_each_request_that_was_begun_is_in_the_log_with_its_limit(ran: Run) -> None:
    begun = Counter((kind.limit, kind.status) for kind in KINDS.values() if kind.line for _ in range(EACH))
    # who does not take an answer has been sent the head of it
    wanted = Counter({(limit, status or 200): count for (limit, status), count in begun.items()})
    assert Counter((line["limit"], line["status"]) for line in ran.lines if "limit" in line) == wanted
    assert {line["outcome"] for line in ran.lines if line.get("limit") == "write_stall"} == {"write_stall"}
    whole = sum("limit" not in line for line in ran.lines)
    assert whole == 2 * EACH + len(ran.good), "besides them the good ones, and those that then were idle or left"
    assert sum(line["outcome"] == "client_gone" for line in ran.lines) == EACH


def test_a_good_client_is_served_all_the_time(ran: Run) -> None:
    assert [each for each in ran.good if each[1] != 200] == []
    assert len(ran.good) > 20
    assert ran.worker[0] == ran.worker[1], "by the same worker"
