"""The life of a worker: from the fork to its exit. Everything that a request meets is behind :class:`DataPath`.

A worker obeys its mailbox and nothing else: signals of the process group are ignored, and when the supervisor dies the
kernel kills it. Its sockets were bound before it existed and outlive it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import uvloop

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot as snapshots
from ascproxy.model.snapshot import Snapshot
from ascproxy.net import memfile
from ascproxy.net.listener import Bound
from ascproxy.net.mailbox import Frame, FrameError, Kind, Mailbox
from ascproxy.net.tls import TicketKeys
from ascproxy.telemetry import metrics
from ascproxy.telemetry.log import Log
from ascproxy.telemetry.memory import Footprint
from ascproxy.worker import accesslog

TICK_S = 0.1
TICKS_PER_BEAT = 10
MS = 1_000_000
NO_ACCEPT = 3  # the step of ascproxy.supervisor.memory at which nobody accepts


class Accepting(Protocol):
    """What accepts on one socket."""

    def close(self) -> None: ...


class DataPath(Protocol):
    """What serves connections. The real one is :class:`ascproxy.worker.datapath.GatewayPath`."""

    def adopt(self, snapshot: Snapshot, tickets: TicketKeys) -> None:
        """Use this revision from now on. Raises AscproxyError, with the old one untouched, when it cannot be built."""

    async def listen(self, listener: str, end: socket.socket) -> Accepting:
        """Accept a listener's connections on a socket that is bound, and perhaps listens already. Raises KeyError for
        a name that the revision lacks, OSError for what the socket says."""

    def use_tickets(self, tickets: TicketKeys) -> None:
        """Seal and open session tickets with these keys."""

    def overload(self, step: int) -> None:
        """Do what the step of :mod:`ascproxy.supervisor.memory` asks for, from now on."""

    def tick(self, now_ns: int) -> None: ...
    def drain(self, unary_ns: int, stream_ns: int, idle_ns: int) -> None:
        """Finish what is under way by these monotonic times; let connections go that are idle for ``idle_ns``."""

    def take_log(self) -> bytes: ...
    async def close(self) -> None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def connections(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Which worker this is, and what it was given. ``snapshot`` is the descriptor of a memory file."""

    slot: int
    incarnation: int
    mailbox: Mailbox
    sockets: tuple[Bound, ...]
    page: _native.Page
    shared_page: _native.Page
    snapshot: int
    tickets: TicketKeys
    log: Log


MakeDataPath = Callable[[asyncio.AbstractEventLoop, Place, Snapshot], DataPath]


@dataclass(slots=True)
class Worker:
    """A running worker. ``sockets`` are by slot, its own and those that it has adopted; ``servers`` accept on copies of
    them, so that accepting can pause and go on while connections wait in the kernel."""

    place: Place
    loop: asyncio.AbstractEventLoop
    path: DataPath
    sink: accesslog.Sink | None
    done: asyncio.Event
    footprint: Footprint
    step_cell: int
    sockets: dict[int, list[tuple[str, socket.socket]]] = field(default_factory=dict)
    servers: dict[int, list[Accepting]] = field(default_factory=dict)
    commands: set[asyncio.Task[None]] = field(default_factory=set)
    draining: bool = False
    paused: bool = False
    hard_stop_ns: int = 0
    drained_ticks: int = 0
    _ticks: int = 0
    _dropped: int = 0

    def tick(self) -> None:
        """Every 100 ms: deadlines of the data path, access lines, and every tenth time a beat."""
        now = monotonic_ns()
        self.path.tick(now)
        page, cells = self.place.page, _native.Page.CELLS
        page.store(cells["heartbeat_ns"], now)
        page.store(cells["memory"], self.footprint.read())
        self.heed(self.place.shared_page.load(self.step_cell))
        self.flush_log()
        if self._ticks % TICKS_PER_BEAT == 0:
            self.place.mailbox.send(Frame(Kind.BEAT, payload={"in_flight": self.path.in_flight}))
        self._ticks += 1
        if self.draining:
            # Not at the first tick: what the loop accepted in the turn of the drain is no connection of the path yet.
            self.drained_ticks += 1
            if (self.path.connections == 0 and self.drained_ticks > 1) or now >= self.hard_stop_ns:
                self.done.set()
                return
        self.loop.call_later(TICK_S, self.tick)

    def flush_log(self) -> None:
        """Hand the access lines of the last turns to their sink."""
        lines = self.path.take_log()
        if self.sink is None:
            return
        self.sink.write(lines)
        if self.sink.dropped != self._dropped:
            self.place.page.add(_native.Page.CELLS["log_dropped"], self.sink.dropped - self._dropped)
            self._dropped = self.sink.dropped

    def heed(self, step: int) -> None:
        """Obey the step of overload that the supervisor has published."""
        self.path.overload(step)
        if step >= NO_ACCEPT and not self.paused:
            self.paused = True
            self.place.page.store(_native.Page.CELLS["listening"], 0)
            for servers in self.servers.values():
                close(servers)
        elif step < NO_ACCEPT and self.paused and not self.draining:
            self.paused = False
            task = self.loop.create_task(self.accept_again())
            self.commands.add(task)
            task.add_done_callback(self.commands.discard)

    async def accept_again(self) -> None:
        """Go on after a pause."""
        try:
            for slot in list(self.sockets):
                await self.open(slot)
        except OSError as error:
            self.place.log.error("cannot accept again", reason=str(error))
            for servers in self.servers.values():
                close(servers)
            self.paused = True  # the next tick tries again, from the beginning
            return
        if not self.draining and not self.paused:
            self.place.page.store(_native.Page.CELLS["listening"], 1)

    async def accept(self, slot: int, sockets: Sequence[tuple[str, socket.socket]]) -> None:
        """Accept on a slot's sockets, unless this is a pause: then after it."""
        self.sockets[slot] = list(sockets)
        await self.open(slot)

    async def open(self, slot: int) -> None:
        """Open servers on a slot's sockets. They listen already or start to: the backlog is passed each time."""
        for name, end in self.sockets.get(slot, ()):
            if self.paused:
                return
            server = await self.path.listen(name, end)
            if self.paused or slot not in self.sockets:  # meanwhile
                server.close()
            else:
                self.servers.setdefault(slot, []).append(server)

    def stop_accepting(self, slot: int) -> None:
        """Never accept on a slot's sockets again."""
        close(self.servers.pop(slot, []))
        for _, end in self.sockets.pop(slot, []):
            end.close()

    def read_mailbox(self) -> None:
        """Take every command that waits."""
        while True:
            try:
                frame = self.place.mailbox.receive()
            except FrameError as error:
                self.place.log.error("not a frame", reason=str(error))
                continue
            except EOFError:
                self.loop.remove_reader(self.place.mailbox.fileno())
                return
            if frame is None:
                return
            task = self.loop.create_task(self.obey(frame))
            self.commands.add(task)
            task.add_done_callback(partial(self.obeyed, frame))

    def obeyed(self, frame: Frame, task: asyncio.Task[None]) -> None:
        """A command is always acknowledged: what nobody foresaw is an answer too, and a line in the log."""
        self.commands.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.place.log.error(f"{frame.kind.name} failed unexpectedly", error=repr(error))
            self.place.mailbox.send(Frame(Kind.FAILED, frame.request, {"reason": f"unexpected: {error!r}"}))

    async def obey(self, frame: Frame) -> None:
        """Carry out one command and acknowledge it."""
        try:
            match frame.kind:
                case Kind.REVISION:
                    await self.take_revision(frame.descriptors[0], tickets_in(frame))
                case Kind.TICKETS:
                    self.path.use_tickets(tickets_in(frame))
                case Kind.ADOPT:
                    names = frame.payload["names"]
                    ends = [socket.socket(fileno=os.dup(descriptor)) for descriptor in frame.descriptors]
                    await self.accept(int(frame.payload["slot"]), list(zip(names, ends, strict=True)))
                case Kind.RELEASE:
                    self.stop_accepting(int(frame.payload["slot"]))
                case Kind.DRAIN:
                    times = (int(frame.payload.get(name, 0)) for name in ("unary_ms", "stream_ms", "idle_ms"))
                    self.drain(*times)
                case other:
                    raise AscproxyError(f"a worker does not know the command {other.name}")
        except (AscproxyError, OSError, LookupError, ValueError) as error:
            self.place.mailbox.send(Frame(Kind.FAILED, frame.request, {"reason": str(error) or type(error).__name__}))
        else:
            self.place.mailbox.send(Frame(Kind.DONE, frame.request))
        finally:
            for descriptor in frame.descriptors:
                os.close(descriptor)

    async def take_revision(self, descriptor: int, tickets: TicketKeys) -> None:
        """Build a revision and use it; on any error the old one stays, and the page says so.

        The access log is opened anew each time: a file that was rotated away is let go.
        """
        page, cells = self.place.page, _native.Page.CELLS
        sink: accesslog.Sink | None = None
        try:
            found = read_snapshot(descriptor)
            sink = accesslog.open_sink(found.node.access_log)
            await asyncio.sleep(0)  # thousands of routes take their time twice: let requests in between
            self.path.adopt(found, tickets)
        except AscproxyError:
            page.store(cells["revision_failed"], 1)
            if sink is not None:
                sink.close()
            raise
        self.flush_log()
        if self.sink is not None:
            self.sink.close()
        self.sink, self._dropped = sink, 0
        page.store(cells["revision"], metrics.revision_number(found.revision))
        page.store(cells["revision_failed"], 0)

    def drain(self, unary_ms: int, stream_ms: int, idle_ms: int) -> None:
        """Accept no more; exit when the last connection is gone, at the latest after the longest time."""
        for slot in list(self.sockets):
            self.stop_accepting(slot)
        self.place.page.store(_native.Page.CELLS["listening"], 0)
        now = monotonic_ns()
        self.path.drain(now + unary_ms * MS, now + stream_ms * MS, idle_ms * MS)
        self.hard_stop_ns = now + max(unary_ms, stream_ms, idle_ms) * MS
        self.draining = True


def close(servers: list[Accepting]) -> None:
    """Stop accepting, and forget the servers."""
    while servers:
        servers.pop().close()


def serve(place: Place, make: MakeDataPath) -> int:
    """Run a worker on the data path that ``make`` builds, until it has drained. The exit status."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_live(place, loop, make))
    except AscproxyError as error:
        place.mailbox.send(Frame(Kind.FAILED, payload={"reason": str(error)}))
        return 1
    finally:
        loop.close()
    return 0


async def _live(place: Place, loop: asyncio.AbstractEventLoop, make: MakeDataPath) -> None:
    found = read_snapshot(place.snapshot)
    os.close(place.snapshot)
    path = make(loop, place, found)
    path.adopt(found, place.tickets)
    sink = accesslog.open_sink(found.node.access_log)
    step = place.shared_page.series(metrics.OVERLOAD, 1)
    worker = Worker(place, loop, path, sink, asyncio.Event(), Footprint(), step)
    cells = _native.Page.CELLS
    place.page.store(cells["revision"], metrics.revision_number(found.revision))
    worker.heed(place.shared_page.load(step))
    try:
        await worker.accept(place.slot, [(bound.name, bound.socket) for bound in place.sockets])
        place.page.store(cells["listening"], int(not worker.paused))
        loop.add_reader(place.mailbox.fileno(), worker.read_mailbox)
        place.mailbox.send(Frame(Kind.READY, payload={"revision": found.revision}))
        worker.tick()
        await worker.done.wait()
    finally:
        await path.close()
    worker.flush_log()


def tickets_in(frame: Frame) -> TicketKeys:
    """The keys in a frame. Raises ValueError when there are none."""
    return TicketKeys.unpack(bytes.fromhex(str(frame.payload.get("tickets", ""))))


def read_snapshot(descriptor: int) -> Snapshot:
    """The snapshot in a sealed memory file. Raises AscproxyError when it holds none."""
    try:
        return snapshots.decode(memfile.read(descriptor))
    except (OSError, ValueError) as error:
        raise AscproxyError(f"the snapshot cannot be read: {error}") from error
