"""Opening a connection to an endpoint that the configuration names, and to nothing else.

Names are resolved once per connection and the address that was checked is the one connected to (LIMITS 2: no second
look-up that could answer differently). The socket is made here, because its receive buffer must be bounded before it
connects: that is what a client that stops reading leaves in the kernel (DESIGN 5).
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from ascproxy.errors import AscproxyError

if TYPE_CHECKING:
    from ascproxy._native import TlsContext, Upstream

# The kernel doubles it for its own bookkeeping. With 64 KiB unsent towards the client (TCP_NOTSENT_LOWAT) a stalled
# stream stays below 256 KiB there; measured: 128 KiB here leave 285 KiB.
RECEIVE_BUFFER = 80 * 1024

# Each costs the loop some 0.1 ms. Thousands in one turn would hold up everything else, and their own deadlines with it.
BEGIN_MAX = 32

Open = Callable[[int, int, "TlsContext | None", str, Callable[["Upstream", str], None]], "Upstream"]


class ConnectError(AscproxyError):
    """No connection: nothing was sent. The sentence names the address, so it is for the log and not for callers."""


class ConnectTimeout(ConnectError):
    """No connection within its deadline; ``limit`` names it: ``connect``, ``tls`` or ``total``."""

    def __init__(self, reason: str, limit: str) -> None:
        super().__init__(reason)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect and how. ``host`` is a name or an address without brackets; ``server_name`` is what the
    certificate must be for; ``tls`` None means plaintext."""

    endpoint: int
    host: str
    port: int
    tls: TlsContext | None
    server_name: str
    connect_ms: int
    tls_ms: int


def forbidden(ip: IPv4Address | IPv6Address) -> str:
    """Why a *name* may not lead to ``ip``, or "". Model servers live in private networks, so those are allowed; a
    cloud's metadata service (link-local) is what a poisoned name would point at. An address that the configuration
    spells out is the operator's word and not asked here."""
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_link_local:
        return "a link-local address"
    if ip.is_multicast or ip == IPv4Address("255.255.255.255"):
        return "a multicast or broadcast address"
    if ip.is_unspecified:
        return "the unspecified address"
    return ""


class Connector:
    """Opens connections on ``loop``. ``take_over`` is ``Core.connect``: a connected socket becomes an upstream."""

    __slots__ = ("_begun", "_loop", "_take_over", "_waiting")

    def __init__(self, loop: AbstractEventLoop, take_over: Open) -> None:
        self._loop = loop
        self._take_over = take_over
        self._begun = 0  # in this turn of the loop
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def connect(self, address: Address, within_ms: int) -> Upstream:
        """A connection that is ready to carry a request, TLS included. ``within_ms`` bounds it besides the address's
        own deadlines, from the turn of the loop in which it may begin. Raises :class:`ConnectError`. When cancelled,
        nothing is left open."""
        where = f"{address.host}:{address.port}"
        if self._begun >= BEGIN_MAX or self._waiting:
            await self._wait()
        else:
            self._begin()
        try:
            async with asyncio.timeout(min(address.connect_ms, within_ms) / 1000):
                sock = await self._socket(address, where)
        except TimeoutError as error:
            limit_ms = min(address.connect_ms, within_ms)
            limit = "connect" if limit_ms == address.connect_ms else "total"
            raise ConnectTimeout(f"{where} did not accept a connection within {limit_ms} ms", limit) from error
        return await self._ready(sock, address, where, within_ms)

    def _begin(self) -> None:
        if self._begun == 0:
            self._loop.call_soon(self._next_turn)
        self._begun += 1

    async def _wait(self) -> None:
        turn = self._loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        """Let the next ones begin, in the order in which they came."""
        self._begun = 0
        while self._waiting and self._begun < BEGIN_MAX:
            turn = self._waiting.popleft()
            if not turn.done():  # else cancelled
                self._begin()
                turn.set_result(None)

    async def _socket(self, address: Address, where: str) -> socket.socket:
        refused: ConnectError | None = None
        for family, target in await self._resolve(address, where):
            try:
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError as error:  # no descriptor is left, or the family is not there
                raise ConnectError(f"no socket for {where}: {_sentence(error)}") from error
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.sock_connect(sock, target)
            except OSError as error:
                sock.close()
                refused = ConnectError(f"{where} refused the connection: {_sentence(error)}")
                refused.__cause__ = error
            except asyncio.CancelledError:
                sock.close()
                raise
            else:
                return sock
        raise refused if refused is not None else ConnectError(f"{where} has no address")

    async def _resolve(self, address: Address, where: str) -> list[tuple[int, Any]]:
        try:
            literal = ip_address(address.host)
        except ValueError:
            pass
        else:
            family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
            return [(family, (address.host, address.port))]
        try:
            found = await self._loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectError(f"{where} cannot be resolved: {_sentence(error)}") from error
        targets: list[tuple[int, Any]] = []
        why = ""
        for family, _, _, _, target in found:
            reason = forbidden(ip_address(str(target[0]).partition("%")[0]))
            if reason:
                why = f"{where} leads to {target[0]}, {reason}: name that address in the configuration if it is meant"
            else:
                targets.append((family, target))
        if not targets and why:
            raise ConnectError(why)
        return targets

    async def _ready(self, sock: socket.socket, address: Address, where: str, within_ms: int) -> Upstream:
        outcome: asyncio.Future[tuple[Upstream, str]] = self._loop.create_future()

        def ready(upstream: Upstream, reason: str) -> None:
            if not outcome.done():
                outcome.set_result((upstream, reason))
            elif not reason:
                upstream.close()  # nobody waits any more

        try:
            made = self._take_over(sock.fileno(), address.endpoint, address.tls, address.server_name, ready)
        except OSError as error:
            sock.close()
            raise ConnectError(f"{where}: {_sentence(error)}") from error
        sock.detach()
        try:
            async with asyncio.timeout(min(address.tls_ms, within_ms) / 1000):
                upstream, reason = await outcome
        except TimeoutError as error:
            made.close()
            limit_ms = min(address.tls_ms, within_ms)
            limit = "tls" if limit_ms == address.tls_ms else "total"
            raise ConnectTimeout(f"{where} did not finish the TLS handshake within {limit_ms} ms", limit) from error
        except asyncio.CancelledError:
            made.close()
            raise
        if reason:
            raise ConnectError(f"{where}: {reason}")
        if not upstream.ready:  # closed between the call of ready and now
            raise ConnectError(f"{where} closed the connection at once")
        return upstream


def _sentence(error: OSError) -> str:
    """What went wrong, without the call that asyncio names in its place."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return error.strerror or str(error)
    return os.strerror(error.errno)
