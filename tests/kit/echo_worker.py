"""A worker whose data path is a few lines of asyncio: who answers, on which revision.

Paths of requests: ``/hold`` is not answered until the drain cuts it, ``/late`` is answered at the first tick of a
drain, anything else at once. A tenant of the snapshot named ``refused`` makes the revision impossible to build; one
named ``crash-N`` makes the worker of slot N exit at its start, and so does ``ASCPROXY_TEST_CRASH_SLOT=N``.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import socket
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.errors import AscproxyError
from ascproxy.model.snapshot import Snapshot
from ascproxy.net.listener import BACKLOG
from ascproxy.net.tls import TicketKeys
from ascproxy.worker.process import Place, serve

PR_GET_DUMPABLE = 3
CRASH_SLOT = "ASCPROXY_TEST_CRASH_SLOT"


class Connection(asyncio.Protocol):
    def __init__(self, path: EchoPath, listener: str) -> None:
        self.path = path
        self.listener = listener
        self.waiting: bytes | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.path.open.add(self)
        self.path.accepted += 1
        self.path.place.page.store(_native.Page.CELLS["accepted"], self.path.accepted)

    def connection_lost(self, error: Exception | None) -> None:
        self.path.open.discard(self)

    def data_received(self, data: bytes) -> None:
        target = data.split(b" ")[1]
        if target in (b"/hold", b"/late"):
            self.waiting = target
        else:
            self.answer()

    def answer(self) -> None:
        place = self.path.place
        body = orjson.dumps(
            {
                "slot": place.slot,
                "incarnation": place.incarnation,
                "pid": os.getpid(),
                "listener": self.listener,
                "revision": self.path.snapshot.revision,
                "tickets": sha256(self.path.tickets.pack()).hexdigest(),
                "descriptors": [
                    str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()
                ],
                "dumpable": ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0),
                "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
            }
        )
        self.transport.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


class EchoPath:
    def __init__(self, loop: asyncio.AbstractEventLoop, place: Place, snapshot: Snapshot) -> None:
        self.place = place
        self.snapshot = snapshot
        self.open: set[Connection] = set()
        self.accepted = place.page.load(_native.Page.CELLS["accepted"])
        self.cut_ns: int | None = None
        self.idle_ns = 0
        crashing = os.environ.get(CRASH_SLOT) == str(place.slot)
        if crashing or any(tenant.name == f"crash-{place.slot}" for tenant in snapshot.tenants):
            os._exit(3)

    def use_tickets(self, tickets: TicketKeys) -> None:
        self.tickets = tickets

    def adopt(self, snapshot: Snapshot, tickets: TicketKeys) -> None:
        if any(tenant.name == "refused" for tenant in snapshot.tenants):
            raise AscproxyError("the tenant refused cannot be built")
        self.snapshot = snapshot
        self.tickets = tickets

    async def listen(self, listener: str, end: socket.socket) -> asyncio.AbstractServer:
        loop = asyncio.get_running_loop()
        make = partial(Connection, self, listener)
        if end.family == socket.AF_UNIX:
            return await loop.create_unix_server(make, sock=end.dup(), backlog=BACKLOG, cleanup_socket=False)  # type: ignore[call-arg]
        return await loop.create_server(make, sock=end.dup(), backlog=BACKLOG)

    def tick(self, now_ns: int) -> None:
        self.place.page.store(_native.Page.CELLS["in_flight"], self.in_flight)
        self.place.page.store(_native.Page.CELLS["connections"], self.connections)
        if self.cut_ns is not None:
            for connection in list(self.open):
                if connection.waiting == b"/late":
                    connection.answer()
                elif now_ns >= (self.idle_ns if connection.waiting is None else self.cut_ns):
                    connection.transport.abort()

    def overload(self, step: int) -> None:
        self.step = step

    def drain(self, unary_ns: int, stream_ns: int, idle_ns: int) -> None:
        self.cut_ns, self.idle_ns = unary_ns, monotonic_ns() + idle_ns

    def take_log(self) -> bytes:
        return b""

    async def close(self) -> None:
        for connection in list(self.open):
            connection.transport.abort()

    @property
    def in_flight(self) -> int:
        return sum(connection.waiting is not None for connection in self.open)

    @property
    def connections(self) -> int:
        return len(self.open)


def run(**given: Any) -> int:
    return serve(Place(**given), EchoPath)
