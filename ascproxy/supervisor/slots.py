"""The machine of one slot: which process runs in it, and what to do about it. Pure: no process is touched here.

Theory. A slot is wanted or not, and holds at most one process. A process starts, becomes ready once, beats, and exits;
that it was ready decides what its exit costs: one that served is replaced at once, one that never did is replaced after
a pause that doubles from 0.1 to 5 s, so that a crash loop does not eat the machine. A process that has been silent
for 10 s is killed, and what follows is its exit. Each pair of state and event has one row in :data:`TABLE`; a pair that
is not there changes nothing (a late beat of a process that is being killed, say).

A slot that has accepted once must be accepted for as long as the service lives: its socket stays open and the kernel
keeps sending it connections. 100 ms after it lost its ready process a ready sibling adopts its sockets, until it is
ready again. :class:`Fleet` is that rule over all slots.

Times are monotonic nanoseconds, handed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum

MS = 1_000_000
SILENCE_NS = 10_000 * MS
ADOPTION_NS = 100 * MS
ADOPTION_RETRY_NS = 1_000 * MS
FIRST_PAUSE_NS = 100 * MS
LONGEST_PAUSE_NS = 5_000 * MS


class State(IntEnum):
    """What a slot holds. The number is in the slot's page, so it is a contract."""

    EMPTY = 0  # not wanted, no process
    PAUSED = 1  # wanted, waiting before the next start
    STARTING = 2
    READY = 3
    DRAINING = 4  # no longer wanted: finishing its exchanges
    FAILING = 5  # killed before it was ready; its exit is awaited
    REPLACING = 6  # killed after it was ready, or wanted again while it drained; its exit is awaited


class Event(Enum):
    """What happens to a slot."""

    WANTED = "wanted"
    UNWANTED = "unwanted"
    DUE = "due"
    READY = "ready"
    SILENT = "silent"
    EXITED = "exited"


class Action(Enum):
    """What the loop must do now."""

    SPAWN = "spawn"
    KILL = "kill"
    DRAIN = "drain"
    ADOPT = "adopt"
    RELEASE = "release"


TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (State.EMPTY, Event.WANTED): (State.STARTING, (Action.SPAWN,)),
    (State.PAUSED, Event.DUE): (State.STARTING, (Action.SPAWN,)),
    (State.PAUSED, Event.UNWANTED): (State.EMPTY, ()),
    (State.STARTING, Event.READY): (State.READY, ()),
    (State.STARTING, Event.SILENT): (State.FAILING, (Action.KILL,)),
    (State.STARTING, Event.UNWANTED): (State.DRAINING, (Action.KILL,)),
    (State.STARTING, Event.EXITED): (State.PAUSED, ()),
    (State.READY, Event.SILENT): (State.REPLACING, (Action.KILL,)),
    (State.READY, Event.UNWANTED): (State.DRAINING, (Action.DRAIN,)),
    (State.READY, Event.EXITED): (State.STARTING, (Action.SPAWN,)),
    (State.DRAINING, Event.SILENT): (State.DRAINING, (Action.KILL,)),
    (State.DRAINING, Event.WANTED): (State.REPLACING, ()),
    (State.DRAINING, Event.EXITED): (State.EMPTY, ()),
    (State.FAILING, Event.EXITED): (State.PAUSED, ()),
    (State.FAILING, Event.UNWANTED): (State.DRAINING, ()),
    (State.REPLACING, Event.SILENT): (State.REPLACING, (Action.KILL,)),
    (State.REPLACING, Event.UNWANTED): (State.DRAINING, ()),
    (State.REPLACING, Event.EXITED): (State.STARTING, (Action.SPAWN,)),
}
ALIVE = frozenset({State.STARTING, State.READY, State.DRAINING, State.FAILING, State.REPLACING})


@dataclass(slots=True)
class Slot:
    """One slot. ``incarnation`` counts its processes, ``restarts`` those that replaced another.

    ``vacant_ns`` is when it lost its ready process, None while it has one or never had; ``adopter`` is the slot that
    accepts for it.
    """

    number: int
    state: State = State.EMPTY
    incarnation: int = 0
    restarts: int = 0
    beat_ns: int = 0
    due_ns: int = 0
    pause_ns: int = FIRST_PAUSE_NS
    vacant_ns: int | None = None
    adopter: int | None = None
    opened: bool = False

    @property
    def alive(self) -> bool:
        """Whether a process is in the slot, dying ones included."""
        return self.state in ALIVE

    def step(self, event: Event, now_ns: int) -> tuple[Action, ...]:
        """Apply one event; what to do about it."""
        row = TABLE.get((self.state, event))
        if row is None:
            return ()
        before, (self.state, actions) = self.state, row
        if self.state is State.READY:
            self.opened, self.vacant_ns, self.pause_ns = True, None, FIRST_PAUSE_NS
        elif before is State.READY:
            self.vacant_ns = now_ns
        if self.state is State.PAUSED:
            self.due_ns = now_ns + self.pause_ns
            self.pause_ns = min(2 * self.pause_ns, LONGEST_PAUSE_NS)
        if Action.SPAWN in actions:
            self.restarts += before is not State.EMPTY
            self.incarnation += 1
        if Action.SPAWN in actions or Action.KILL in actions:
            self.beat_ns = now_ns
        return actions

    def beat(self, now_ns: int) -> None:
        """The process is alive."""
        self.beat_ns = now_ns

    def deadline(self) -> tuple[int, Event] | None:
        """When something happens to the slot if nothing else does, and what."""
        if self.state is State.PAUSED:
            return self.due_ns, Event.DUE
        if self.state in ALIVE:
            return self.beat_ns + SILENCE_NS, Event.SILENT
        return None


Order = tuple[Action, int]  # what, and for which slot


@dataclass(slots=True)
class Fleet:
    """All slots, by number. Slots are added and never removed: their sockets stay."""

    slots: list[Slot] = field(default_factory=list)
    stopping: bool = False
    _adopt_after_ns: int = 0

    def resize(self, wanted: int, now_ns: int) -> list[Order]:
        """Want the first ``wanted`` slots and no other."""
        while len(self.slots) < wanted:
            self.slots.append(Slot(len(self.slots)))
        orders = []
        for slot in self.slots:
            event = Event.WANTED if slot.number < wanted else Event.UNWANTED
            orders += [(action, slot.number) for action in slot.step(event, now_ns)]
        return orders

    def stop(self, now_ns: int) -> list[Order]:
        """Drain all. Nobody adopts any more: sockets are closed, not left."""
        self.stopping = True
        return self.resize(0, now_ns)

    def step(self, number: int, event: Event, now_ns: int) -> list[Order]:
        """One slot's event; what to do, releases of what was adopted included."""
        slot = self.slots[number]
        orders = [(action, number) for action in slot.step(event, now_ns)]
        if slot.state is State.READY and slot.adopter is not None:
            orders.append((Action.RELEASE, number))
        if slot.state is not State.READY:
            for other in self.slots:  # what this one had adopted is vacant again
                if other.adopter == number:
                    other.adopter = None
        return orders

    def tick(self, now_ns: int) -> list[Order]:
        """What the passing of time asks for."""
        orders: list[Order] = []
        for slot in self.slots:
            deadline = slot.deadline()
            if deadline is not None and deadline[0] <= now_ns:
                orders += self.step(slot.number, deadline[1], now_ns)
        if now_ns >= self._adopt_after_ns:
            orders += [(Action.ADOPT, slot.number) for slot in self._vacant() if self._vacant_until(slot) <= now_ns]
        return orders

    def adopter_for(self, number: int) -> int | None:
        """Choose the ready slot with the fewest adopted ones, and note it."""
        ready = [slot for slot in self.slots if slot.state is State.READY and slot.number != number]
        if not ready:
            return None
        loads = {slot.number: sum(other.adopter == slot.number for other in self.slots) for slot in ready}
        self.slots[number].adopter = min(loads, key=lambda n: loads[n])
        return self.slots[number].adopter

    def adoption_failed(self, number: int, now_ns: int) -> None:
        """Nobody could take the slot's sockets: try again in a second."""
        self.slots[number].adopter = None
        self._adopt_after_ns = now_ns + ADOPTION_RETRY_NS

    def next_ns(self) -> int | None:
        """When :meth:`tick` is next needed, None for never."""
        times = [deadline[0] for slot in self.slots if (deadline := slot.deadline()) is not None]
        times += [max(self._vacant_until(slot), self._adopt_after_ns) for slot in self._vacant()]
        return min(times, default=None)

    @property
    def ready(self) -> int:
        """How many slots are ready."""
        return sum(slot.state is State.READY for slot in self.slots)

    @property
    def settled(self) -> bool:
        """Whether no process is left."""
        return not any(slot.alive for slot in self.slots)

    def _vacant(self) -> Iterator[Slot]:
        """Slots that a sibling could adopt now or soon."""
        if not self.stopping and self.ready:
            for slot in self.slots:
                if slot.opened and slot.vacant_ns is not None and slot.adopter is None:
                    yield slot

    @staticmethod
    def _vacant_until(slot: Slot) -> int:
        return (slot.vacant_ns or 0) + ADOPTION_NS
