"""The first half of an upgrade, in the program that leaves: rehearse, wait for a quiet moment, hand over, execute.

Theory. An exec cannot be taken back, so everything that can fail is tried before, in a child: the next program is run
for a *rehearsal* (:mod:`ascproxy.supervisor.rehearsal`), in which it reads what would be handed over and has its own
control check the configuration. What has just been rehearsed is executed then, with signals blocked: they wait for the
next program. A rehearsal that fails changes nothing.

A quiet moment is one without a reload, an unanswered command or a process between its start and its readiness: none of
these can be handed over. Traffic does not matter: it is the workers', and they go on.
"""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from ascproxy.clock import monotonic_ns
from ascproxy.net import memfile
from ascproxy.net.mailbox import Frame, FrameError, Kind, Mailbox
from ascproxy.supervisor import child
from ascproxy.supervisor.child import Child, status_words
from ascproxy.supervisor.handover import DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE, Handover
from ascproxy.supervisor.slots import MS
from ascproxy.telemetry.log import Log

REHEARSAL_NS = 90_000 * MS
QUIET_NS = 60_000 * MS


class Phase(Enum):
    """Where a departure is."""

    NONE = "none"
    REHEARSING = "rehearsing"
    WAITING = "waiting"  # for a quiet moment


@dataclass(slots=True)
class Running:
    """A rehearsal under way."""

    child: Child
    mailbox: Mailbox
    handover: int


class Departure:
    """``command`` is the next program's. ``handover`` and ``descriptors`` say what passes, ``quiet`` whether it can
    now, and ``unheard`` whether a signal waits in this program, with which it would be lost; ``leaving`` and ``failed``
    are called before the exec and when it will not happen."""

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        selector: selectors.BaseSelector,
        log: Log,
        handover: Callable[[], Handover],
        descriptors: Callable[[], Iterator[int]],
        quiet: Callable[[], bool],
        leaving: Callable[[], None],
        unheard: Callable[[], bool],
        failed: Callable[[str], None],
    ) -> None:
        self.phase = Phase.NONE
        self._command = list(command)
        self._environment = environment
        self._selector = selector
        self._log = log
        self._handover = handover
        self._descriptors = descriptors
        self._quiet = quiet
        self._leaving = leaving
        self._unheard = unheard
        self._failed = failed
        self._running: Running | None = None
        self._said: Frame | None = None
        self._until_ns: int | None = None

    def start(self) -> None:
        """Begin with the rehearsal."""
        handover = memfile.seal("ascproxy-handover", self._handover().encode())
        ours, theirs = Mailbox.pair()
        self.phase, self._until_ns, self._said = Phase.REHEARSING, monotonic_ns() + REHEARSAL_NS, None
        more = {DESCRIPTOR_VARIABLE: str(handover), REHEARSAL_VARIABLE: str(theirs.fileno())}
        passed = [handover, theirs.fileno(), *self._descriptors()]
        running = child.execute_program(self._command, self._environment, more, passed)
        theirs.close()
        self._running = Running(running, ours, handover)
        self._selector.register(running.pidfd, selectors.EVENT_READ, self._on_exit)
        self._selector.register(ours, selectors.EVENT_READ, self._on_frame)

    def cancel(self) -> None:
        """Do not upgrade after all."""
        self.phase, self._until_ns = Phase.NONE, None
        if self._running is not None:
            self._running.child.signal(signal.SIGKILL)  # its own child follows it

    def tick(self, now_ns: int) -> None:
        """Leave if the moment has come, give up if it has not in time."""
        if self.phase is Phase.WAITING and self._quiet():
            self._leave()
        elif self._until_ns is not None and now_ns >= self._until_ns:
            waited = "the rehearsal has not ended" if self.phase is Phase.REHEARSING else "the service is never quiet"
            self._fail(f"{waited} in time")

    def next_ns(self) -> int | None:
        """When :meth:`tick` is next needed if nothing else happens."""
        return self._until_ns

    @property
    def idle(self) -> bool:
        """Whether another one can start."""
        return self.phase is Phase.NONE and self._running is None

    def leave_in_child(self) -> None:
        """Close in a freshly forked worker what is the supervisor's."""
        if self._running is not None:
            os.close(self._running.child.pidfd)
            os.close(self._running.handover)
            self._running.mailbox.close()

    def _on_frame(self) -> None:
        """What the rehearsal said; it ends then."""
        assert self._running is not None
        try:
            self._said = self._running.mailbox.receive() or self._said
        except (FrameError, EOFError):
            self._selector.unregister(self._running.mailbox)

    def _on_exit(self) -> None:
        running = self._running
        assert running is not None
        if running.mailbox.fileno() in self._selector.get_map():
            self._on_frame()
        for watched in (running.mailbox.fileno(), running.child.pidfd):
            if watched in self._selector.get_map():
                self._selector.unregister(watched)
        status = running.child.reap()
        running.mailbox.close()
        os.close(running.handover)
        self._running = None
        if self.phase is not Phase.REHEARSING:
            return  # cancelled
        said = self._said
        if said is None:
            words = status_words(status or 0)
            self._fail(f"{self._command[0]} does not start ({words}): what it printed is in the log above")
        elif said.kind is not Kind.DONE:
            self._fail(str(said.payload.get("reason", "the rehearsal failed")))
        else:
            self._log.info("upgrade: rehearsal succeeded", version=str(said.payload.get("version")))
            self.phase, self._until_ns = Phase.WAITING, monotonic_ns() + QUIET_NS

    def _fail(self, reason: str) -> None:
        self.cancel()
        self._failed(reason)

    def _leave(self) -> None:
        """Become the next program. Returns only if that was impossible, or if a signal came first."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if self._unheard():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return
        self._leaving()
        handover = memfile.seal("ascproxy-handover", self._handover().encode())
        passed = [handover, *self._descriptors()]
        for descriptor in passed:
            os.set_inheritable(descriptor, True)
        try:
            environment = {**self._environment, DESCRIPTOR_VARIABLE: str(handover)}
            os.execve(self._command[0], self._command, environment)  # noqa: S606 - no shell is wanted
        except OSError as error:
            for descriptor in passed:
                os.set_inheritable(descriptor, False)
            os.close(handover)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._fail(f"cannot execute {self._command[0]}: {error.strerror}")
