"""The second half of an upgrade, in the program that arrives: start the new beside the old, then dismiss one of them.

Theory. Order: the new control checks the configuration; new workers start in every wanted slot; the new control serves;
only then are the old workers and the old control dismissed. Whatever fails before that, or takes too long, turns it
round: the new ones are dismissed, and the old ones, which have accepted all the time, go on. So at every moment a
slot has a process that accepts, and a failed upgrade costs no request.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ascproxy import __version__
from ascproxy.clock import monotonic_ns
from ascproxy.net.mailbox import Frame, Kind, Mailbox
from ascproxy.supervisor.child import Child
from ascproxy.supervisor.handover import Handover
from ascproxy.supervisor.slots import MS, Event, Slot

if TYPE_CHECKING:
    from ascproxy.supervisor.loop import Supervisor

READY_NS = 60_000 * MS  # to load the configuration, and again to get every worker ready
MAX_EXITS = 3  # of one slot's new worker: then it is a crash loop
CANDIDATE = -(2**31)  # the new control's key among commands while the old one serves


class Phase(Enum):
    """Where an arrival is."""

    LOADING = "loading"  # the new control checks the configuration
    STARTING = "starting"  # the new workers start
    SERVING = "serving"  # the new control takes over
    OVER = "over"


@dataclass(slots=True)
class Arrival:
    """One arrival. ``before`` are the descriptor and the revision that were in force, if it has brought others.

    ``control`` is the new one; None where control is a unit of its own: that one goes on, and so does the revision.
    """

    supervisor: Supervisor
    handover: Handover
    control: tuple[Child, Mailbox] | None
    phase: Phase = Phase.LOADING
    until_ns: int = 0
    before: tuple[int, str] | None = None
    exits: dict[int, int] = field(default_factory=dict)
    reason: str = ""  # what a new worker said before it exited

    @property
    def under_way(self) -> bool:
        return self.phase is not Phase.OVER

    def begin(self) -> None:
        """Ask the new control for the configuration."""
        supervisor = self.supervisor
        self.until_ns = monotonic_ns() + READY_NS
        supervisor.log.info("upgrade: arrived", version=__version__, before=self.handover.version)
        if self.control is None:
            self._start_workers()
            return
        frame = Frame(Kind.LOAD, descriptors=(supervisor.holdings.boot,))
        supervisor.commands.send(CANDIDATE, self.control[1], frame, self._on_loaded)

    def _on_loaded(self, reason: str | None, frame: Frame | None) -> None:
        if not self.under_way:
            return
        if reason is not None or frame is None or not frame.descriptors:
            findings = [str(each) for each in frame.payload.get("findings", [])] if frame is not None else []
            self.fail("the configuration cannot be used: " + ("; ".join(findings) or reason or "no snapshot"))
            return
        supervisor, holdings = self.supervisor, self.supervisor.holdings
        for sentence in frame.payload.get("warnings", []):
            supervisor.log.warning(str(sentence))
        self.before = (holdings.snapshot, holdings.revision)
        holdings.snapshot, holdings.revision = frame.descriptors[0], str(frame.payload["revision"])
        self._start_workers()

    def _start_workers(self) -> None:
        self.phase, self.until_ns = Phase.STARTING, monotonic_ns() + READY_NS
        self.supervisor.start_workers(self.handover.wanted)

    def worker_ready(self) -> None:
        """A new worker accepts."""
        supervisor = self.supervisor
        if self.phase is Phase.STARTING and supervisor.fleet.ready >= self.handover.wanted:
            if self.control is None:
                self._succeed()
                return
            self.phase = Phase.SERVING
            supervisor.let_serve(CANDIDATE, self.control[1], self._on_serves)

    def worker_failed(self, number: int, words: str) -> None:
        """A new worker has exited."""
        self.exits[number] = self.exits.get(number, 0) + 1
        if self.exits[number] >= MAX_EXITS:
            why = self.reason or "what it printed is in the log above"
            self.fail(f"the worker of slot {number} exited {MAX_EXITS} times ({words}): {why}")

    def control_exited(self) -> None:
        """The new control has exited before it served."""
        self.fail("the new control exited: what it printed is in the log above")

    def tick(self, now_ns: int) -> None:
        """Give up when it takes too long."""
        if self.under_way and now_ns >= self.until_ns:
            waits = {
                Phase.LOADING: "the configuration was not read",
                Phase.STARTING: "the new workers did not get ready",
                Phase.SERVING: "the new control did not get ready",
            }
            self.fail(f"{waits[self.phase]} in time")

    def next_ns(self) -> int | None:
        """When :meth:`tick` is next needed."""
        return self.until_ns if self.under_way else None

    def _on_serves(self, reason: str | None, _: Frame | None) -> None:
        if not self.under_way:
            return
        if reason is not None:
            self.fail(f"the new control does not serve: {reason}")
            return
        self._succeed()

    def _succeed(self) -> None:
        self.phase = Phase.OVER
        supervisor = self.supervisor
        if self.control is not None:
            supervisor.replace_control(self.control)
        supervisor.dismiss_predecessors()
        if self.before is not None:
            os.close(self.before[0])
        supervisor.upgraded(self.handover.version)

    def fail(self, reason: str) -> None:
        """Turn round: the old processes go on, the new ones end."""
        self.phase = Phase.OVER
        supervisor, holdings = self.supervisor, self.supervisor.holdings
        self._end_control()
        if self.before is not None:
            os.close(holdings.snapshot)
            holdings.snapshot, holdings.revision = self.before
        for slot in self.handover.slots:
            supervisor.turn_back(slot)
        version = self.handover.version
        supervisor.upgrade_failed(f"{reason}; the workers of version {version} go on serving", version)

    def abandon(self) -> None:
        """The service stops: there is nothing to arrive at any more."""
        self.phase = Phase.OVER
        self._end_control()

    def _end_control(self) -> None:
        if self.control is not None:
            self.supervisor.end_control(self.control)


def fresh_slots(handover: Handover, now_ns: int) -> list[Slot]:
    """The machines of the slots in the program that arrives: no process yet, but all that was counted.

    A slot that is not wanted keeps its socket, so it is vacant until a new worker adopts it.
    """
    slots = []
    for slot in handover.slots:
        vacant = slot.opened and slot.number >= handover.wanted
        slots.append(
            Slot(
                slot.number, incarnation=slot.incarnation, restarts=slot.restarts, opened=vacant,
                vacant_ns=now_ns if vacant else None,
            )
        )  # fmt: skip
    return slots


def turned_back(before: Slot, failed: Slot, *, present: bool) -> tuple[Slot, Event | None]:
    """The slot as it was, and what has happened to it meanwhile. Incarnations are never used twice."""
    before.incarnation = max(before.incarnation, failed.incarnation)
    lost = before.alive and not present
    return before, Event.EXITED if lost else None
