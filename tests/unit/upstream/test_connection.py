"""Connecting, over real sockets on loopback: deadlines, errors in sentences, what is left open when it goes wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import pytest
import uvloop

from ascproxy.upstream.connection import (
    BEGIN_MAX,
    RECEIVE_BUFFER,
    Address,
    ConnectError,
    Connector,
    ConnectTimeout,
    forbidden,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return "asyncio", {"loop_factory": uvloop.new_event_loop if request.param == "uvloop" else None}


class Held:
    """Stands for the native Upstream: owns the descriptor; tells ``ready`` at once, after a byte ("TLS"), or never."""

    def __init__(self, descriptor: int, how: str, tell: Callable[[Any, str], None]) -> None:
        self.sock = socket.socket(fileno=descriptor)
        self.how = how
        self.tell = tell
        self.open = True
        asyncio.get_running_loop().add_reader(descriptor, self.read)
        if how == "plain":
            tell(self, "")

    @property
    def ready(self) -> bool:
        return self.open

    def read(self) -> None:
        if not self.sock.recv(100):
            self.close()
            self.tell(self, "the server closed the connection")
        elif self.how == "handshake":
            self.tell(self, "")
        elif self.how == "refuse":
            self.close()
            self.tell(self, "the certificate is for another name")

    def close(self) -> None:
        if self.open:
            self.open = False
            asyncio.get_running_loop().remove_reader(self.sock.fileno())
            self.sock.close()


class TakeOver:
    """Stands for ``Core.connect``."""

    def __init__(self, how: str = "plain", made: type[Held] = Held) -> None:
        self.how = how
        self.kind = made
        self.made: list[Held] = []
        self.asked: list[tuple[int, Any, str]] = []

    def __call__(
        self, descriptor: int, endpoint: int, tls: Any, server_name: str, ready: Callable[[Any, str], None]
    ) -> Any:
        self.asked.append((endpoint, tls, server_name))
        self.made.append(self.kind(descriptor, self.how, ready))
        return self.made[-1]


@pytest.fixture
async def server() -> AsyncIterator[tuple[int, list[asyncio.StreamWriter]]]:
    """A port, and the connections that were accepted there; each is greeted with a byte."""
    accepted: list[asyncio.StreamWriter] = []

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        writer.write(b"!")

    listening = await asyncio.start_server(greet, "127.0.0.1", 0)
    yield listening.sockets[0].getsockname()[1], accepted
    for writer in accepted:
        writer.transport.abort()
    listening.close()
    await listening.wait_closed()


def address(port: int, host: str = "127.0.0.1", **more: Any) -> Address:
    return Address(
        **(
            {
                "endpoint": 7,
                "host": host,
                "port": port,
                "tls": None,
                "server_name": host,
                "connect_ms": 3_000,
                "tls_ms": 5_000,
            }
            | more
        )
    )


def connector(taken: Any) -> Connector:
    return Connector(asyncio.get_running_loop(), taken)


@pytest.mark.parametrize("how", ["plain", "handshake"])
async def test_a_connection_is_ready_when_it_is_handed_out(server: Any, how: str) -> None:
    taken = TakeOver(how)
    upstream: Any = await connector(taken).connect(address(server[0], tls="context", server_name="gpu"), 1_000)
    assert upstream.ready
    assert taken.asked == [(7, "context", "gpu")]
    sock = upstream.sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * RECEIVE_BUFFER, "the kernel doubles it"
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    upstream.close()


async def test_a_name_is_resolved(server: Any) -> None:
    upstream: Any = await connector(TakeOver()).connect(address(server[0], "localhost"), 1_000)
    upstream.close()


async def test_each_address_of_a_name_is_tried(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    async def resolve(self: Connector, where: Address, _: str) -> list[tuple[int, Any]]:
        tried.append(where.host)
        return [(socket.AF_INET, ("127.0.0.2", unheard)), (socket.AF_INET, ("127.0.0.1", server[0]))]

    with socket.socket() as nobody:  # bound and not listening: a connection to it is refused
        nobody.bind(("127.0.0.2", 0))
        unheard = nobody.getsockname()[1]
        monkeypatch.setattr(Connector, "_resolve", resolve)
        upstream: Any = await connector(TakeOver()).connect(address(server[0], "gpus.test"), 1_000)
    assert tried == ["gpus.test"]
    assert upstream.sock.getpeername() == ("127.0.0.1", server[0])
    upstream.close()


async def test_a_refused_connection_is_a_sentence() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with pytest.raises(ConnectError, match=rf"^127\.0\.0\.1:{port} refused the connection: Connection refused$"):
            await connector(TakeOver()).connect(address(port), 1_000)


async def test_without_a_descriptor_left_it_is_a_sentence(server: Any) -> None:
    asked = connector(TakeOver())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(ConnectError, match=rf"^no socket for 127\.0\.0\.1:{server[0]}: Too many open files$"):
            await asked.connect(address(server[0]), 1_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_name_that_does_not_exist_is_a_sentence() -> None:
    with pytest.raises(ConnectError, match=r"^gpu\.invalid:80 cannot be resolved: "):
        await connector(TakeOver()).connect(address(80, "gpu.invalid"), 5_000)


async def test_a_server_that_does_not_accept_is_given_up_in_time() -> None:
    """A listener whose backlog is full leaves a connection without an answer."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        port = full.getsockname()[1]
        with pytest.raises(ConnectTimeout, match=r"did not accept a connection within 30 ms") as timeout:
            await connector(TakeOver()).connect(address(port, connect_ms=30), 60_000)
        assert timeout.value.limit == "connect"
        with pytest.raises(ConnectTimeout, match=r"did not accept a connection within 40 ms") as timeout:
            await connector(TakeOver()).connect(address(port), 40)
        assert timeout.value.limit == "total"


async def test_a_handshake_that_does_not_end_is_given_up_in_time_and_leaves_nothing_open(server: Any) -> None:
    taken = TakeOver("never")
    with pytest.raises(ConnectTimeout, match=r"did not finish the TLS handshake within 30 ms") as timeout:
        await connector(taken).connect(address(server[0], tls_ms=30), 60_000)
    assert timeout.value.limit == "tls"
    assert closed(taken)


async def test_a_handshake_that_fails_says_why(server: Any) -> None:
    taken = TakeOver("refuse")
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:\d+: the certificate is for another name"):
        await connector(taken).connect(address(server[0]), 1_000)
    assert closed(taken)


async def test_a_server_that_closes_before_it_is_ready_is_a_sentence(server: Any) -> None:
    taken = TakeOver("never")
    task = asyncio.create_task(connector(taken).connect(address(server[0]), 1_000))
    while not server[1]:
        await asyncio.sleep(0)
    server[1][0].close()
    with pytest.raises(ConnectError, match="the server closed the connection"):
        await task


async def test_who_stops_waiting_leaves_nothing_open(server: Any) -> None:
    taken = TakeOver("never")
    task = asyncio.create_task(connector(taken).connect(address(server[0]), 60_000))
    while not taken.made:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed(taken)


async def test_few_begin_in_one_turn_of_the_loop_and_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = 0
    begun: list[tuple[int, int]] = []  # the turn, and who

    async def begin(self: Connector, where: Address, _: str) -> list[tuple[int, Any]]:
        begun.append((turn, where.port))
        return []

    monkeypatch.setattr(Connector, "_resolve", begin)
    one = connector(TakeOver())
    asked = [asyncio.create_task(one.connect(address(port), 1_000)) for port in range(5 * BEGIN_MAX)]
    asked[BEGIN_MAX + 1].cancel()  # before it has begun
    while not all(task.done() for task in asked):
        await asyncio.sleep(0)
        turn += 1
        if turn == 2:
            asked[BEGIN_MAX + 3].cancel()  # while it waits
    assert [who for _, who in begun] == [n for n in range(5 * BEGIN_MAX) if n not in (BEGIN_MAX + 1, BEGIN_MAX + 3)]
    assert max(Counter(turn for turn, _ in begun).values()) == BEGIN_MAX
    assert all(task.cancelled() or isinstance(task.exception(), ConnectError) for task in asked)


async def test_a_connection_that_died_at_once_is_not_handed_out(server: Any) -> None:
    class Dead(Held):
        @property
        def ready(self) -> bool:
            return False

    with pytest.raises(ConnectError, match="closed the connection at once"):
        await connector(TakeOver("plain", Dead)).connect(address(server[0]), 1_000)


async def test_a_descriptor_that_cannot_be_taken_over_is_a_sentence_and_closed(server: Any) -> None:
    taken: list[int] = []

    def refuse(descriptor: int, *_: Any) -> Any:
        taken.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:\d+: No space left on device"):
        await connector(refuse).connect(address(server[0]), 1_000)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(taken[0])


def closed(taken: TakeOver) -> bool:
    return not taken.made[0].open and taken.made[0].sock.fileno() == -1


@pytest.mark.parametrize(
    ("ip", "why"),
    [
        ("127.0.0.1", ""),
        ("10.1.2.3", ""),
        ("192.168.0.1", ""),
        ("93.184.216.34", ""),
        ("fd00::1", ""),
        ("::1", ""),
        ("169.254.169.254", "a link-local address"),
        ("::ffff:169.254.169.254", "a link-local address"),
        ("fe80::1", "a link-local address"),
        ("224.0.0.1", "a multicast or broadcast address"),
        ("255.255.255.255", "a multicast or broadcast address"),
        ("ff02::1", "a multicast or broadcast address"),
        ("0.0.0.0", "the unspecified address"),
        ("::", "the unspecified address"),
    ],
)
def test_where_a_name_may_lead(ip: str, why: str) -> None:
    """LIMITS 2 and 3: server-side request forgery by a poisoned name."""
    assert forbidden(ip_address(ip)) == why


async def test_a_name_that_leads_to_metadata_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        """Resolves any name to the metadata service; a use besides that and turning is a failure of the test."""

        call_soon = asyncio.get_running_loop().call_soon

        async def getaddrinfo(self, *_: Any, **__: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

    with pytest.raises(ConnectError, match=r"gpu:80 leads to 169\.254\.169\.254, a link-local address"):
        await Connector(Loop(), TakeOver()).connect(address(80, "gpu"), 1_000)  # type: ignore[arg-type]
