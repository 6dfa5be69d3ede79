"""Connecting, over real sockets on loopback: deadlines, errors in sentences, what is left open when it goes wrong."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import pytest
import uvloop

from ascproxy.upstream.connection import RECEIVE_BUFFER, Address, ConnectError, Connector, ConnectTimeout, forbidden

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return "asyncio", {"loop_factory": uvloop.new_event_loop if request.param == "uvloop" else None}


class Protocol(asyncio.Protocol):
    """Stands for the native Upstream: tells ``ready`` at once, after a byte ("TLS"), or never."""

    def __init__(self, how: str, ready: Callable[[Any, str], None]) -> None:
        self.how = how
        self.tell = ready
        self.open = False

    @property
    def ready(self) -> bool:
        return self.open

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.open = True
        if self.how == "plain":
            self.tell(self, "")

    def data_received(self, data: bytes) -> None:
        if self.how == "handshake":
            self.tell(self, "")
        elif self.how == "refuse":
            self.tell(self, "the certificate is for another name")
            self.transport.abort()

    def connection_lost(self, reason: Exception | None) -> None:
        self.open = False
        self.tell(self, "the server closed the connection")

    def close(self) -> None:
        self.transport.close()


class Factory:
    """Stands for ``Core.connect``."""

    def __init__(self, how: str = "plain") -> None:
        self.how = how
        self.made: list[Protocol] = []
        self.asked: list[tuple[int, Any, str]] = []

    def __call__(
        self, endpoint: int, tls: Any, server_name: str, ready: Callable[[Any, str], None]
    ) -> Callable[[], Any]:
        self.asked.append((endpoint, tls, server_name))

        def make() -> Protocol:
            self.made.append(Protocol(self.how, ready))
            return self.made[-1]

        return make


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


def connector(factory: Any) -> Connector:
    return Connector(asyncio.get_running_loop(), factory)


@pytest.mark.parametrize("how", ["plain", "handshake"])
async def test_a_connection_is_ready_when_it_is_handed_out(server: Any, how: str) -> None:
    factory = Factory(how)
    upstream: Any = await connector(factory).connect(address(server[0], tls="context", server_name="gpu"), 1_000)
    assert upstream.ready
    assert factory.asked == [(7, "context", "gpu")]
    sock = upstream.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * RECEIVE_BUFFER, "the kernel doubles it"
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    upstream.close()


async def test_a_name_is_resolved(server: Any) -> None:
    upstream: Any = await connector(Factory()).connect(address(server[0], "localhost"), 1_000)
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
        upstream: Any = await connector(Factory()).connect(address(server[0], "gpus.test"), 1_000)
    assert tried == ["gpus.test"]
    assert upstream.transport.get_extra_info("peername") == ("127.0.0.1", server[0])
    upstream.close()


async def test_a_refused_connection_is_a_sentence() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with pytest.raises(ConnectError, match=rf"^127\.0\.0\.1:{port} refused the connection: Connection refused$"):
            await connector(Factory()).connect(address(port), 1_000)


async def test_a_name_that_does_not_exist_is_a_sentence() -> None:
    with pytest.raises(ConnectError, match=r"^gpu\.invalid:80 cannot be resolved: "):
        await connector(Factory()).connect(address(80, "gpu.invalid"), 5_000)


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
            await connector(Factory()).connect(address(port, connect_ms=30), 60_000)
        assert timeout.value.limit == "connect"
        with pytest.raises(ConnectTimeout, match=r"did not accept a connection within 40 ms") as timeout:
            await connector(Factory()).connect(address(port), 40)
        assert timeout.value.limit == "total"


async def test_a_handshake_that_does_not_end_is_given_up_in_time_and_leaves_nothing_open(server: Any) -> None:
    factory = Factory("never")
    with pytest.raises(ConnectTimeout, match=r"did not finish the TLS handshake within 30 ms") as timeout:
        await connector(factory).connect(address(server[0], tls_ms=30), 60_000)
    assert timeout.value.limit == "tls"
    await closed(factory)


async def test_a_handshake_that_fails_says_why(server: Any) -> None:
    factory = Factory("refuse")
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:\d+: the certificate is for another name"):
        await connector(factory).connect(address(server[0]), 1_000)
    await closed(factory)


async def test_a_server_that_closes_before_it_is_ready_is_a_sentence(server: Any) -> None:
    factory = Factory("never")
    task = asyncio.create_task(connector(factory).connect(address(server[0]), 1_000))
    while not server[1]:
        await asyncio.sleep(0)
    server[1][0].close()
    with pytest.raises(ConnectError, match="the server closed the connection"):
        await task


async def test_who_stops_waiting_leaves_nothing_open(server: Any) -> None:
    factory = Factory("never")
    task = asyncio.create_task(connector(factory).connect(address(server[0]), 60_000))
    while not factory.made:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await closed(factory)


async def test_a_connection_that_died_at_once_is_not_handed_out(server: Any) -> None:
    class Dead(Protocol):
        @property
        def ready(self) -> bool:
            return False

    def factory(_e: int, _t: Any, _n: str, ready: Callable[[Any, str], None]) -> Callable[[], Any]:
        return lambda: Dead("plain", ready)

    with pytest.raises(ConnectError, match="closed the connection at once"):
        await connector(factory).connect(address(server[0]), 1_000)


async def closed(factory: Factory) -> None:
    """Returns once the connection is lost; the test's own timeout bounds it."""
    while factory.made[0].open:
        await asyncio.sleep(0)


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
        """Resolves any name to the metadata service; any use besides that is a failure of the test."""

        async def getaddrinfo(self, *_: Any, **__: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

    with pytest.raises(ConnectError, match=r"gpu:80 leads to 169\.254\.169\.254, a link-local address"):
        await Connector(Loop(), Factory()).connect(address(80, "gpu"), 1_000)  # type: ignore[arg-type]
