"""One reload, from the signal to the last worker's answer: the pure decisions, then what carries them out.

Theory. Control checks the new configuration; then every ready worker gets the revision and answers. The first success
puts the revision in force, so that a worker started later gets it too; if all fail, the old one stays in force, and
nothing is said to be new. A worker that dies while it is asked counts as failed: its successor starts on what is
in force.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from ascproxy.clock import monotonic_ns
from ascproxy.net import tls
from ascproxy.net.mailbox import Frame, Kind
from ascproxy.net.notify import Notifier
from ascproxy.net.tls import TicketKeys
from ascproxy.supervisor.commands import Answer
from ascproxy.supervisor.holdings import Holdings
from ascproxy.supervisor.slots import Fleet, State
from ascproxy.telemetry.log import Log

SHOWN = 20  # sentences of a kind in one log line


class Outcome(Enum):
    """What an answer decided."""

    WAITING = "waiting"
    FIRST_SUCCESS = "first success"
    NONE = "none"  # the last answer, and none was a success
    ALL = "all"
    SOME = "some"


@dataclass(slots=True)
class Reload:
    """``revision`` goes to the slots in ``waiting``. ``snapshot``: its descriptor; ``serial``: its number; ``trust``
    and ``tickets``: which clients are let in, and fresh keys of session tickets if that has changed."""

    revision: str
    snapshot: int
    waiting: set[int]
    serial: int = 0
    trust: str = ""
    tickets: TicketKeys | None = None
    failed: dict[int, str] = field(default_factory=dict)
    succeeded: int = 0

    def answer(self, slot: int, reason: str | None) -> tuple[Outcome, ...]:
        """A slot's answer, ``reason`` None for success; what follows from it, in order."""
        if slot not in self.waiting:
            return ()
        self.waiting.discard(slot)
        outcomes = []
        if reason is None:
            self.succeeded += 1
            if self.succeeded == 1:
                outcomes.append(Outcome.FIRST_SUCCESS)
        else:
            self.failed[slot] = reason
        if self.waiting:
            return (*outcomes, Outcome.WAITING)
        if not self.succeeded:
            return (Outcome.NONE,)
        return (*outcomes, Outcome.SOME if self.failed else Outcome.ALL)


@dataclass(slots=True)
class Reloader:
    """Carries reloads out, one at a time.

    ``to_control`` and ``to_worker`` send commands; ``control_ready`` says whether control can be asked;
    ``said`` is told, as a document, what becomes of each reload, for people and metrics;
    ``in_force`` is called when a revision has come into force. ``serial`` is its number, and ``given`` is the
    number that each slot's worker has: descriptors are reused and would not tell.
    """

    holdings: Holdings
    fleet: Fleet
    notifier: Notifier
    log: Log
    to_control: Callable[[Frame, Answer], None]
    to_worker: Callable[[int, Frame, Answer], None]
    control_ready: Callable[[], bool]
    in_force: Callable[[], None]
    status: Callable[[], str]
    said: Callable[[Mapping[str, Any]], None]
    serial: int = 0
    given: dict[int, int] = field(default_factory=dict)
    held: bool = False  # while an upgrade is under way, a reload only waits
    _serials: int = 0
    _number: int = 0  # of the newest reload: when it began, so that numbers go on over an upgrade
    _wanted: bool = False
    _loading: bool = False
    _reload: Reload | None = None
    _notes: tuple[list[str], list[str]] = ([], [])  # of the configuration that is being taken: restart, warnings

    def start(self) -> None:
        """Load the configuration anew, or note that it is wanted: taken up when what is under way is over."""
        if self.fleet.stopping:
            return
        if self.held or not self.idle or not self.control_ready():
            self._wanted = True
            return
        self._wanted = False
        self._loading = True
        self._number = monotonic_ns()
        self._say("running")
        self.notifier.reloading(self._number)
        self.to_control(Frame(Kind.LOAD), self._on_loaded)

    @property
    def idle(self) -> bool:
        """Whether no reload is under way."""
        return not self._loading and self._reload is None

    def take_up(self) -> None:
        """Start what was wanted meanwhile."""
        if self._wanted:
            self.start()

    def worker_ready(self, number: int) -> None:
        """A worker that started while a revision was being taken in gets it once it is ready."""
        if self._reload is None and self.given[number] != self.serial:
            self.given[number] = self.serial
            self.to_worker(number, self._frame(self.holdings.snapshot), partial(self._on_late_answer, number))

    def rotate_tickets(self) -> None:
        """The next key of session tickets, for all workers. Keys that a reload is about to bring are fresher still."""
        if self._reload is not None and self._reload.tickets is not None:
            return
        self.holdings.tickets = tls.rotate(self.holdings.tickets, os.urandom)
        for number in self._ready():
            frame = Frame(Kind.TICKETS, payload={"tickets": self.holdings.tickets.pack().hex()})
            self.to_worker(number, frame, lambda *_: None)

    def _on_loaded(self, reason: str | None, frame: Frame | None) -> None:
        self._loading = False
        if reason is not None or frame is None or not frame.descriptors:
            findings = _sentences(frame, "findings") or [reason or "control sent no snapshot"]
            message = f"reload refused, revision {self.holdings.revision} stays in force"
            self.log.error(message, findings=findings[:SHOWN])
            self._say("failed", findings=findings)
            self._end()
            return
        for sentence in _sentences(frame, "restart"):
            self.log.warning(f"takes effect at the next restart: {sentence}")
        for sentence in _sentences(frame, "warnings"):
            self.log.warning(sentence)
        self._notes = (_sentences(frame, "restart"), _sentences(frame, "warnings"))
        # Who is let in has changed, and with it who may resume a session: keys that know no earlier ticket.
        trust = str(frame.payload.get("trust", ""))
        ready = self._ready()
        self._reload = reload = Reload(
            str(frame.payload["revision"]),
            frame.descriptors[0],
            set(ready),
            self._next_serial(),
            trust,
            tls.fresh(os.urandom) if trust != self.holdings.trust else None,
        )
        if not ready:
            self._follow(reload, (Outcome.FIRST_SUCCESS, Outcome.ALL))  # whoever starts next takes it
        for number in ready:
            frame = self._frame(reload.snapshot, reload.tickets)
            self.to_worker(number, frame, partial(self._on_answer, number, reload))

    def _on_answer(self, number: int, reload: Reload, reason: str | None, _: Frame | None) -> None:
        outcomes = reload.answer(number, reason)
        if reason is not None:
            self.log.error("worker keeps its revision", slot=number, reason=reason)
        if reason is None:
            self.given[number] = reload.serial
        self._follow(reload, outcomes)

    def _follow(self, reload: Reload, outcomes: tuple[Outcome, ...]) -> None:
        for outcome in outcomes:
            match outcome:
                case Outcome.FIRST_SUCCESS:
                    os.close(self.holdings.snapshot)
                    self.serial = reload.serial
                    self.holdings.snapshot, self.holdings.revision = reload.snapshot, reload.revision
                    self.holdings.trust = reload.trust
                    if reload.tickets is not None:
                        self.holdings.tickets = reload.tickets
                    self.in_force()
                case Outcome.ALL:
                    self.log.info("reloaded", revision=reload.revision)
                    self._say("done")
                case Outcome.SOME:
                    slots = [str(number) for number in reload.failed]
                    self.log.error("reloaded, but not everywhere", revision=reload.revision, slots=slots[:SHOWN])
                    self._say("partly", findings=_reasons(reload))
                case Outcome.NONE:
                    os.close(reload.snapshot)
                    self.log.error(f"reload failed, revision {self.holdings.revision} stays in force")
                    self._say("failed", findings=_reasons(reload))
        if outcomes and Outcome.WAITING not in outcomes:
            self._reload = None
            for number in self._ready():
                if number not in reload.failed:
                    self.worker_ready(number)
            self._end()

    def _on_late_answer(self, number: int, reason: str | None, _: Frame | None) -> None:
        if reason is not None:
            self.log.error("worker keeps its revision", slot=number, reason=reason)

    def _next_serial(self) -> int:
        self._serials += 1
        return self._serials

    def _end(self) -> None:
        self.notifier.ready(self.status())
        self.take_up()

    def _frame(self, snapshot: int, tickets: TicketKeys | None = None) -> Frame:
        keys = tickets or self.holdings.tickets
        return Frame(Kind.REVISION, payload={"tickets": keys.pack().hex()}, descriptors=(snapshot,))

    def _say(self, state: str, findings: Sequence[str] = ()) -> None:
        restart, warnings = self._notes if state in ("done", "partly") else ([], [])
        self.said(
            {
                "number": self._number,
                "state": state,
                "revision": self.holdings.revision,
                "findings": list(findings),
                "restart": restart,
                "warnings": warnings,
            }
        )

    def _ready(self) -> list[int]:
        return [slot.number for slot in self.fleet.slots if slot.state is State.READY]


def _reasons(reload: Reload) -> list[str]:
    """Why workers keep their revision, each reason once."""
    return list(dict.fromkeys(reload.failed.values()))


def _sentences(frame: Frame | None, name: str) -> list[str]:
    found: Any = frame.payload.get(name, []) if frame is not None else []
    return [str(sentence) for sentence in found]
