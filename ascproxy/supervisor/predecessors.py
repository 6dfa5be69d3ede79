"""Workers of a slot that has another process by now: they serve or finish what they have, and end.

Theory. At an upgrade the workers of the earlier program become predecessors: they accept as before, while those of the
new program start in the same slots, on the same sockets. Then one side is dismissed: it is told to drain, and is killed
if it has not ended in time. A predecessor that was not dismissed can be reinstated. Each has its own page and mailbox
(:class:`~ascproxy.supervisor.holdings.Post`), so nothing is written by two.
"""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.net.mailbox import Frame, FrameError, Kind
from ascproxy.supervisor.child import Child, status_words
from ascproxy.supervisor.commands import Commands
from ascproxy.supervisor.handover import Process
from ascproxy.supervisor.holdings import Holdings, Post
from ascproxy.supervisor.slots import MS, SILENCE_NS, Slot, State
from ascproxy.telemetry import metrics
from ascproxy.telemetry.log import Log

GRACE_MS = 5_000  # after the last deadline of a drain, it is killed
# An idle connection is let go this long after an upgrade: longer than clients keep one for reuse (httpx 5 s, undici
# 4 s, aiohttp 15 s), so that none is reset under a request. nginx has keepalive_min_timeout for the same.
IDLE_MS = 20_000


@dataclass(slots=True)
class Predecessor:
    """``slot`` is the machine as it was when its place was taken. ``until_ns``: dismissed, and killed then."""

    slot: Slot
    child: Child
    post: Post
    until_ns: int | None = None

    @property
    def key(self) -> int:
        """Its name among commands: slots and control have the numbers from -1 up."""
        return -self.child.pid

    def passed(self) -> Process:
        """As the next program is told of it."""
        return Process(self.slot, self.child.pid, self.child.pidfd, self.post.record(), self.until_ns)


@dataclass(slots=True)
class Predecessors:
    """All of them. ``changed`` is called when one has been told to drain, or has ended."""

    holdings: Holdings
    selector: selectors.BaseSelector
    commands: Commands
    log: Log
    changed: Callable[[], None]
    present: list[Predecessor] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)  # told to drain, and may still accept

    def add(self, one: Predecessor) -> None:
        """Watch one."""
        one.slot.beat(monotonic_ns())
        self.present.append(one)
        self.selector.register(one.child.pidfd, selectors.EVENT_READ, partial(self._on_exit, one))
        self.selector.register(one.post.ours, selectors.EVENT_READ, partial(self._read, one))

    def take_back(self, slot: int) -> Predecessor | None:
        """The one that still accepts in ``slot``, not watched any more: it is no predecessor from now on."""
        found = next((one for one in self.present if one.slot.number == slot and one.until_ns is None), None)
        if found is not None:
            self._forget(found)
            self.commands.fail(found.key)
        return found

    def dismiss(self, one: Predecessor, unary_ms: int, stream_ms: int, idle_ms: int = 0) -> None:
        """Tell one to drain."""
        one.until_ns = monotonic_ns() + (max(unary_ms, stream_ms, idle_ms) + GRACE_MS) * MS
        one.post.page.page.store(_native.Page.CELLS["state"], State.DRAINING)
        self.asked.add(one.key)
        payload = {"unary_ms": unary_ms, "stream_ms": stream_ms, "idle_ms": idle_ms}
        self.commands.send(one.key, one.post.ours, Frame(Kind.DRAIN, payload=payload), partial(self._on_draining, one))

    def dismiss_all(self, unary_ms: int, stream_ms: int, idle_ms: int = 0) -> None:
        """Tell all to drain, those too that do already: the shorter time holds."""
        for one in list(self.present):
            self.dismiss(one, unary_ms, stream_ms, idle_ms)

    def kill(self, one: Predecessor) -> None:
        """End one at once."""
        one.until_ns = monotonic_ns()
        one.child.signal(signal.SIGKILL)

    def tick(self, now_ns: int) -> None:
        """Kill who is silent or late."""
        for one in self.present:
            if self._deadline(one) <= now_ns:
                self.log.warning("earlier worker does not end and is killed", slot=one.slot.number, pid=one.child.pid)
                one.slot.beat(now_ns)
                self.kill(one)
                one.until_ns = now_ns + GRACE_MS * MS

    def next_ns(self) -> int | None:
        """When :meth:`tick` is next needed."""
        return min((self._deadline(one) for one in self.present), default=None)

    def leave_in_child(self) -> None:
        """Close in a freshly forked worker what is the supervisor's."""
        for one in self.present:
            os.close(one.child.pidfd)
            one.post.close()

    @staticmethod
    def _deadline(one: Predecessor) -> int:
        silent = one.slot.beat_ns + SILENCE_NS
        return silent if one.until_ns is None else min(silent, one.until_ns)

    def _on_draining(self, one: Predecessor, reason: str | None, _: Frame | None) -> None:
        if reason is not None and one in self.present:
            one.child.signal(signal.SIGKILL)  # it cannot be asked: it would keep its place for ever
        self.asked.discard(one.key)
        self.changed()

    def _read(self, one: Predecessor) -> None:
        while one.post.ours.fileno() >= 0:
            try:
                frame = one.post.ours.receive()
            except FrameError as error:
                self.log.error("a child sent what is no frame", reason=str(error))
                continue
            except EOFError:  # its exit arrives by the pidfd
                self.selector.unregister(one.post.ours)
                return
            if frame is None:
                return
            one.slot.beat(monotonic_ns())
            if frame.kind in (Kind.DONE, Kind.FAILED):
                self.commands.reply(frame)

    def _on_exit(self, one: Predecessor) -> None:
        status = one.child.reap()
        if status is None:
            return
        self._forget(one)
        metrics.zero_gauges(one.post.page.page)
        for cell in ("state", "pid"):
            one.post.page.page.store(_native.Page.CELLS[cell], 0)
        self.holdings.give_up(one.slot.number, one.post)
        report = self.log.info if one.until_ns is not None else self.log.warning
        report("earlier worker exited", slot=one.slot.number, status=status_words(status))
        self.commands.fail(one.key)
        self.asked.discard(one.key)
        self.changed()

    def _forget(self, one: Predecessor) -> None:
        self.present.remove(one)
        for watched in (one.child.pidfd, one.post.ours.fileno()):
            if watched in self.selector.get_map():
                self.selector.unregister(watched)
