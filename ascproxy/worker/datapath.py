"""The data path of the gateway, composed: native core, walk, TLS contexts, credentials' arena, keys.

Order of a revision: contexts of all listeners first, then the walk's runtime; only when all of it is built is anything
swapped, and what is swapped are references. A listener that the worker has no socket for has no native listener yet: it
takes effect at a restart.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ascproxy import _native
from ascproxy.gateway.exchange import Exchange
from ascproxy.model.key import KeyRow
from ascproxy.model.node import Limits, Listener
from ascproxy.model.snapshot import Snapshot
from ascproxy.net import tls
from ascproxy.net.listener import BACKLOG
from ascproxy.net.tls import TicketKeys
from ascproxy.store.env import open_store
from ascproxy.store.keys import KeyStore
from ascproxy.telemetry import metrics
from ascproxy.worker.accesslog import NONE
from ascproxy.worker.process import Place, serve

KeyLookup = Callable[[str], KeyRow | None]
RESERVED_DESCRIPTORS = 256  # listening sockets of all slots, pages, store, logs
DESCRIPTORS_PER_STREAM = 2  # the client's connection and the upstream's
REFUSED_PERIOD_NS = 10_000_000_000  # between two lines about connections that a listener refused


class GatewayPath:
    """What a worker serves with (:class:`ascproxy.worker.process.DataPath`)."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, place: Place, snapshot: Snapshot, *, key_lookup: KeyLookup
    ) -> None:
        epoch = place.shared_page.series(metrics.KEY_EPOCH, 1)
        self._exchange = Exchange(
            loop,
            page=place.page,
            arena=_native.SecretArena(),
            key_lookup=key_lookup,
            key_epoch=partial(place.shared_page.load, epoch),
            log=place.log,
            environ=os.environ,
        )
        limits = snapshot.node.limits
        self._core = _native.Core(
            walk=self._exchange,
            page=place.page,
            limits=native_limits(limits),
            trusted_peers=tuple(map(native_network, limits.trusted_peers)),
        )
        self._loop = loop
        self._exchange.bind(self._core)
        self._page = place.page
        self._listeners: dict[str, _native.Listener] = {}
        self._attached = False
        self._wanted = {bound.name for bound in place.sockets}
        self._log = place.log
        self._guarded: list[tuple[str, _native.Listener]] = []
        self._quiet_until_ns = 0

    def adopt(self, snapshot: Snapshot, tickets: TicketKeys) -> None:
        """Build a revision whole, then use it."""
        contexts = {each.name: _context(each, tickets) for each in snapshot.node.listeners}
        self._exchange.adopt(snapshot)
        metrics.show_file_dates(
            self._page, {name: context.file_dates for name, context in contexts.items() if context is not None}
        )
        self._core.access_log = snapshot.node.access_log != NONE
        for each in snapshot.node.listeners:
            known = self._listeners.get(each.name)
            context = contexts[each.name]
            if known is not None:
                known.http2 = each.http2
                if context is not None and known.tls is not None:  # from plaintext to TLS and back needs a restart
                    known.tls = context
            elif each.name in self._wanted:
                self._listeners[each.name] = _native.Listener(
                    name=each.name,
                    tls=context,
                    limits=native_limits(each.limits),
                    proxy_protocol=each.proxy_protocol,
                    http2=each.http2,
                )
                if each.proxy_protocol:
                    self._guarded.append((each.name, self._listeners[each.name]))

    def use_tickets(self, tickets: TicketKeys) -> None:
        for listener in self._listeners.values():
            if listener.tls is not None:
                tls.use_tickets(listener.tls, tickets)

    async def listen(self, listener: str, end: socket.socket) -> _native.Acceptor:
        if not self._attached:  # only now: what is attached has to be detached before its loop is closed
            self._core.attach(self._loop)
            self._attached = True
        end.listen(BACKLOG)
        return self._core.listen(self._listeners[listener], end.fileno())

    def tick(self, now_ns: int) -> None:
        self._core.tick(now_ns)
        if self._guarded and now_ns >= self._quiet_until_ns:
            self._tell_refused(now_ns)

    def _tell_refused(self, now_ns: int) -> None:
        """Log what ``proxy_protocol`` refused: the first at once, later ones together, so that nobody fills the log."""
        for name, listener in self._guarded:
            refused = listener.take_refused()
            if refused is not None:
                count, reason, peer = refused
                self._log.warning("proxy_protocol: closed", listener=name, peer=peer, reason=reason, connections=count)
                self._quiet_until_ns = now_ns + REFUSED_PERIOD_NS

    def overload(self, step: int) -> None:
        self._core.overload = step

    def drain(self, unary_ns: int, stream_ns: int, idle_ns: int) -> None:
        self._core.drain(unary_ns, stream_ns, idle_ns)

    def take_log(self) -> bytes:
        return self._core.take_log()

    async def close(self) -> None:
        await self._exchange.close()
        self._core.detach()

    @property
    def in_flight(self) -> int:
        return self._core.in_flight

    @property
    def connections(self) -> int:
        return self._core.connections


def native_limits(limits: Limits) -> dict[str, int]:
    """The limits by name, with no more connections than descriptors allow (docs/decisions/0004-connections.md)."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, (descriptors - RESERVED_DESCRIPTORS) // DESCRIPTORS_PER_STREAM)
    numbers = {name: value for name, value in asdict(limits).items() if isinstance(value, int)}
    return numbers | {"max_connections": min(limits.max_connections, most)}


def native_network(text: str) -> tuple[bytes, int]:
    """A network as the core compares it: IPv4 addresses are ``::ffff:a.b.c.d`` there."""
    network = ipaddress.ip_network(text)
    if network.version == 4:
        return bytes(10) + b"\xff\xff" + network.network_address.packed, network.prefixlen + 96
    return network.network_address.packed, network.prefixlen


def _context(listener: Listener, tickets: TicketKeys) -> _native.TlsContext | None:
    if listener.tls is None:
        return None
    return tls.listener_context(listener.tls, tickets=tickets, alpn=tls.HTTP2 if listener.http2 else tls.HTTP1)


def run(**given: Any) -> int:
    """What the supervisor forks: a worker of the gateway. ``given`` are the fields of :class:`Place`."""
    return serve(Place(**given), _with_store)


def _with_store(loop: asyncio.AbstractEventLoop, place: Place, snapshot: Snapshot) -> GatewayPath:
    store = KeyStore(open_store(Path(snapshot.node.state_dir), write=False))  # after the fork, once (LIMITS 5, LMDB)
    return GatewayPath(loop, place, snapshot, key_lookup=store.get)
