"""The supervisor's loop: waits for signals, mailboxes, exits and deadlines, and carries out what the machines say.

Nothing here blocks but ``select``. What each kind of event does is one method; decisions are in
:mod:`ascproxy.supervisor.slots`, :mod:`ascproxy.supervisor.reload`, :mod:`ascproxy.supervisor.departure` and
:mod:`ascproxy.supervisor.arrival`.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ascproxy import __version__, _native
from ascproxy.clock import monotonic_ns
from ascproxy.net import listener
from ascproxy.net.mailbox import Frame, FrameError, Kind, Mailbox
from ascproxy.net.meeting import PeerError
from ascproxy.net.notify import Notifier
from ascproxy.supervisor import arrival, child
from ascproxy.supervisor.arrival import CANDIDATE, Arrival
from ascproxy.supervisor.child import Child, status_words
from ascproxy.supervisor.commands import Answer, Commands
from ascproxy.supervisor.departure import Departure
from ascproxy.supervisor.handover import ControlProcess, Handover, Process
from ascproxy.supervisor.holdings import Holdings, Post
from ascproxy.supervisor.memory import Memory
from ascproxy.supervisor.predecessors import GRACE_MS, IDLE_MS, Predecessor, Predecessors
from ascproxy.supervisor.reload import Reloader
from ascproxy.supervisor.slots import MS, SILENCE_NS, Action, Event, Fleet, Order, Slot, State
from ascproxy.telemetry import metrics
from ascproxy.telemetry.log import Log

INTERRUPT_DRAIN_MS = 5_000  # SIGINT: somebody is waiting at a terminal
TICKETS_NS = 8 * 3600 * 1000 * MS  # how long a key of session tickets encrypts
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2)
UNSETTLED = frozenset({State.STARTING, State.FAILING, State.REPLACING})
CONTROL = -1  # the key of control where slots are keys


class Supervisor:
    """Keeps ``holdings.node.workers`` workers and one control process alive until it is told to stop.

    ``again`` is the command that an upgrade runs. ``handover`` comes from the program before, if there was one; then
    ``control`` is the new one, beside the old one that was handed over.

    Where the holdings have a meeting, control is a unit of its own, which somebody else keeps alive: ``control`` is
    None, and ``attached`` the mailbox of the one that has come. It may go and come as it likes.
    """

    def __init__(
        self,
        *,
        holdings: Holdings,
        worker: Callable[..., int],
        start_control: Callable[[], tuple[Child, Mailbox]],
        control: tuple[Child, Mailbox] | None,
        environment: Mapping[str, str],
        again: Sequence[str],
        log: Log,
        handover: Handover | None = None,
        attached: Mailbox | None = None,
    ) -> None:
        self.log = log
        self.holdings = holdings
        self.fleet = Fleet()
        self.notifier = Notifier(environment, os.getpid())
        self._worker = worker
        self._start_control = start_control
        self._first_control: tuple[Child, Mailbox] | None = control
        self._attached = attached
        self._control_slot = Slot(CONTROL)
        self._control_box: Mailbox | None = None
        self._children: dict[int, Child] = {}
        self.commands = Commands()
        self._reloader = Reloader(
            holdings=holdings,
            fleet=self.fleet,
            notifier=self.notifier,
            log=log,
            to_control=self._command_control,
            to_worker=self._command,
            control_ready=lambda: self._control_slot.state is State.READY,
            in_force=self._serve_control,
            status=self._status,
            said=self._say_reload,
        )
        self._memory = Memory(holdings.shared_page.page, holdings.node.limits.memory_limit, log)
        self.wanted = holdings.node.workers if handover is None else handover.wanted
        self._drain_ms = (holdings.node.limits.drain_unary_ms, holdings.node.limits.drain_stream_ms)
        self._hard_stop_ns: int | None = None
        self._draining: set[int] = set()
        self._cut = False
        self._announced = False
        self._watchdog_ns = monotonic_ns()
        self._started_ns = monotonic_ns()
        self._rotate_ns = self._started_ns + TICKETS_NS if handover is None else handover.rotate_ns
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self.predecessors = Predecessors(
            holdings=holdings,
            selector=self._selector,
            commands=self.commands,
            log=log,
            changed=self._close_when_drained,
        )
        self._departure = Departure(
            command=again,
            environment=environment,
            selector=self._selector,
            log=log,
            handover=self._handover,
            descriptors=self._passed,
            quiet=self._quiet,
            leaving=self._leave,
            unheard=self._unheard,
            failed=self.upgrade_failed,
        )
        self._arrival = Arrival(self, handover, control) if handover is not None else None
        self._upgrades = 0 if handover is None else handover.number
        self._retiring: dict[int, tuple[Child, int]] = {}  # controls that were told to end, and when they are killed

    # the loop

    def run(self) -> int:
        """Serve until a signal ends it. 0 after a drain, 1 when it was cut off."""
        if self._arrival is None:
            self._watch_signals()
            for _ in range(self.wanted):
                self.holdings.add_berth()
            self._watch_berths()
            if self._attached is not None:
                self._watch_meeting()
                self._attach(self._attached)
            else:
                self._carry_out_control(self._control_slot.step(Event.WANTED, monotonic_ns()))
            self.start_workers(self.wanted)
        else:
            self._take_over(self._arrival)
            self._watch_signals()
        while not self._finished():
            for key, _ in self._selector.select(self._timeout()):
                if self._selector.get_map().get(key.fd) is key:  # an earlier event may have closed it
                    key.data()
            self._on_time()
        self.log.info("stopped", cut_off=self._cut)
        self.holdings.close()
        self.notifier.close()
        return 1 if self._cut else 0

    def _finished(self) -> bool:
        return self._settled() and not self._control_slot.alive and not self._retiring

    def _settled(self) -> bool:
        """Whether the service stops, and no worker is left."""
        return self.fleet.stopping and self.fleet.settled and not self.predecessors.present

    def _timeout(self) -> float | None:
        control = self._control_slot.deadline()
        times = [self.fleet.next_ns(), control[0] if control else None, self._hard_stop_ns, self._rotate_ns]
        times.append(self._memory.due_ns)
        times += [self.predecessors.next_ns(), self._departure.next_ns()]
        times += [self._arrival.next_ns() if self._arrival is not None else None]
        times += [until for _, until in self._retiring.values()]
        if self.notifier.watchdog_ns is not None:
            times.append(self._watchdog_ns)
        known = [time for time in times if time is not None]
        return max(0.0, (min(known) - monotonic_ns()) / 1e9) if known else None

    def _on_time(self) -> None:
        now = monotonic_ns()
        self._carry_out(self.fleet.tick(now))
        deadline = self._control_slot.deadline()
        if deadline is not None and deadline[0] <= now:
            self._carry_out_control(self._control_slot.step(deadline[1], now))
        if self._hard_stop_ns is not None and now >= self._hard_stop_ns:
            self.log.warning("drain took too long, the rest is cut off")
            self._kill_all()
        self.predecessors.tick(now)
        for running, until_ns in self._retiring.values():
            if now >= until_ns:
                self._retiring[running.pidfd] = (running, now + SILENCE_NS)
                running.signal(signal.SIGKILL)
        if self._arrival is not None:
            self._arrival.tick(now)
        if self._settled():
            self._carry_out_control(self._control_slot.step(Event.UNWANTED, now))
        posts = [*(berth.post for berth in self.holdings.berths), *(one.post for one in self.predecessors.present)]
        control = [self._children[CONTROL].pid] if CONTROL in self._children else []
        self._memory.look(now, [post.page.page for post in posts], control)
        if now >= self._rotate_ns:
            self._rotate_ns = now + TICKETS_NS
            self._reloader.rotate_tickets()
        if self.notifier.watchdog_ns is not None and now >= self._watchdog_ns:
            self.notifier.watchdog()
            self._watchdog_ns = now + self.notifier.watchdog_ns
        self._departure.tick(now)

    # signals

    def _watch_signals(self) -> None:
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the number arrives by the wake-up descriptor
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_signals)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # an upgrade blocks them: what came meanwhile comes now

    def _on_signals(self) -> None:
        for number in self._wake_read.recv(64):
            match number:
                case signal.SIGTERM:
                    self._stop("SIGTERM", self._drain_ms)
                case signal.SIGINT:
                    self._stop("SIGINT", (INTERRUPT_DRAIN_MS, INTERRUPT_DRAIN_MS))
                case signal.SIGHUP:
                    self._reloader.start()
                case signal.SIGTTIN:
                    self._resize(self.wanted + 1)
                case signal.SIGTTOU:
                    self._resize(max(1, self.wanted - 1))
                case signal.SIGUSR2:
                    self._upgrade()

    def _stop(self, name: str, drain_ms: tuple[int, int]) -> None:
        now = monotonic_ns()
        if self.fleet.stopping:
            self.log.warning(f"{name} again, stopping at once")
            self._kill_all()
            return
        self.log.info(f"{name}, draining", unary_ms=drain_ms[0], stream_ms=drain_ms[1])
        self.notifier.stopping("draining")
        self._drain_ms = drain_ms
        self._hard_stop_ns = now + (max(drain_ms) + GRACE_MS) * MS
        self._departure.cancel()
        if self._arrival is not None and self._arrival.under_way:
            self._arrival.abandon()
        self._draining = {slot.number for slot in self.fleet.slots if slot.state is State.READY}
        self.predecessors.dismiss_all(*drain_ms)
        self._carry_out(self.fleet.stop(now))
        self._close_when_drained()

    def _kill_all(self) -> None:
        self._cut = True
        self._hard_stop_ns = None
        for running in (*self._children.values(), *(running for running, _ in self._retiring.values())):
            running.signal(signal.SIGKILL)
        for one in self.predecessors.present:
            self.predecessors.kill(one)

    def _resize(self, wanted: int) -> None:
        if self.fleet.stopping:
            return
        self.wanted = wanted
        if self._arrival is not None and self._arrival.under_way:
            return  # done when it is over
        while len(self.holdings.berths) < wanted:
            number = len(self.holdings.berths)
            try:
                berth = self.holdings.add_berth()
            except listener.ListenError as error:
                self.log.error(f"no worker added: {error}")
                self.wanted = number
                break
            self._watch(berth.post.ours, partial(self._on_worker_frame, number))
        self.log.info("number of workers changed", workers=self.wanted)
        self._carry_out(self.fleet.resize(self.wanted, monotonic_ns()))

    # carrying out

    def _carry_out(self, orders: list[Order]) -> None:
        for action, number in orders:
            match action:
                case Action.SPAWN:
                    self._spawn(number)
                case Action.KILL:
                    self.log.warning("worker does not answer and is killed", slot=number)
                    self._children[number].signal(signal.SIGKILL)
                case Action.DRAIN:
                    self._drain(number)
                case Action.ADOPT:
                    self._adopt(number)
                case Action.RELEASE:
                    self._release(number)
        self._show_slots()

    def _spawn(self, number: int) -> None:
        slot, berth = self.fleet.slots[number], self.holdings.berths[number]
        lost = berth.post.ours.discard() + berth.post.theirs.discard()
        if self.holdings.run_dir.repair(berth.post.page, number):
            self.log.error("metric page was damaged and starts anew", slot=number)
        if lost:
            self.log.debug("frames of a gone worker discarded", slot=number, frames=lost)
        self._reloader.given[number] = self._reloader.serial
        running = child.fork(partial(self._run_worker, number))
        self._children[number] = running
        self._selector.register(running.pidfd, selectors.EVENT_READ, partial(self._on_worker_exit, number))
        self.log.debug("worker started", slot=number, pid=running.pid, incarnation=slot.incarnation)

    def _run_worker(self, number: int) -> int:
        """In the forked child: close what is the supervisor's, become the worker."""
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        self.notifier.close()
        if self._control_box is not None:
            self._control_box.close()
        for running in (*self._children.values(), *(running for running, _ in self._retiring.values())):
            os.close(running.pidfd)
        self.predecessors.leave_in_child()
        self._departure.leave_in_child()
        if self._arrival is not None and self._arrival.under_way:
            if self._arrival.before is not None:
                os.close(self._arrival.before[0])
            if self._arrival.control is not None:
                os.close(self._arrival.control[0].pidfd)
                self._arrival.control[1].close()
        self.holdings.leave_in_child(number)
        berth = self.holdings.berths[number]
        return self._worker(
            slot=number,
            incarnation=self.fleet.slots[number].incarnation,
            mailbox=berth.post.theirs,
            sockets=(*berth.sockets, *self.holdings.shared),
            page=berth.post.page.page,
            shared_page=self.holdings.shared_page.page,
            snapshot=self.holdings.snapshot,
            tickets=self.holdings.tickets,
            log=self.log.named(f"worker-{number}"),
        )

    def _drain(self, number: int) -> None:
        unary, stream = self._drain_ms
        frame = Frame(Kind.DRAIN, payload={"unary_ms": unary, "stream_ms": stream})
        self._command(number, frame, partial(self._on_draining, number))

    def _on_draining(self, number: int, reason: str | None, _: Frame | None) -> None:
        if reason is not None and number in self._children:
            self._children[number].signal(signal.SIGKILL)  # it cannot be asked: it would keep its place for ever
        self._draining.discard(number)
        self._close_when_drained()

    def _close_when_drained(self) -> None:
        """Once no worker accepts any more, connections must be refused and not left in a queue."""
        if self.fleet.stopping and not self._draining and not self.predecessors.asked:
            listener.stop_listening(self.holdings.all_sockets())

    def _adopt(self, number: int) -> None:
        adopter = self.fleet.adopter_for(number)
        if adopter is None:
            return
        sockets = self.holdings.berths[number].sockets
        frame = Frame(
            Kind.ADOPT,
            payload={"slot": number, "names": [bound.name for bound in sockets]},
            descriptors=tuple(bound.socket.fileno() for bound in sockets),
        )
        self._command(adopter, frame, partial(self._on_adopted, number, adopter))

    def _on_adopted(self, number: int, adopter: int, reason: str | None, _: Frame | None) -> None:
        if reason is None:
            self.log.info("slot is accepted by a sibling", slot=number, sibling=adopter)
        elif self.fleet.slots[number].adopter == adopter:
            self.log.warning("slot could not be given to a sibling", slot=number, sibling=adopter, reason=reason)
            self.fleet.adoption_failed(number, monotonic_ns())

    def _release(self, number: int) -> None:
        adopter, self.fleet.slots[number].adopter = self.fleet.slots[number].adopter, None
        if adopter is not None:
            frame = Frame(Kind.RELEASE, payload={"slot": number})
            self._command(adopter, frame, lambda *_: None)

    def _show_slots(self) -> None:
        """Write what the machines know into the pages, for control to read."""
        cells = _native.Page.CELLS
        for slot in self.fleet.slots:
            page = self.holdings.berths[slot.number].post.page.page
            running = self._children.get(slot.number)
            page.store(cells["state"], slot.state)
            page.store(cells["incarnation"], slot.incarnation)
            page.store(cells["restarts"], slot.restarts)
            page.store(cells["pid"], running.pid if running else 0)

    # mailboxes

    def _watch(
        self, mailbox: Mailbox, on_frame: Callable[[Frame], None], on_end: Callable[[], None] | None = None
    ) -> None:
        self._selector.register(mailbox, selectors.EVENT_READ, partial(self._read, mailbox, on_frame, on_end))

    def _read(
        self, mailbox: Mailbox, on_frame: Callable[[Frame], None], on_end: Callable[[], None] | None = None
    ) -> None:
        while mailbox.fileno() >= 0:
            try:
                frame = mailbox.receive()
            except FrameError as error:
                self.log.error("a child sent what is no frame", reason=str(error))
                continue
            except EOFError:  # a child's exit arrives by the pidfd
                self._selector.unregister(mailbox)
                if on_end is not None:
                    on_end()
                return
            if frame is None:
                return
            on_frame(frame)

    def _command(self, number: int, frame: Frame, answer: Answer) -> None:
        self.commands.send(number, self.holdings.berths[number].post.ours, frame, answer)

    def _command_control(self, frame: Frame, answer: Answer) -> None:
        self.commands.send(CONTROL, self._control_box, frame, answer)

    def _on_worker_frame(self, number: int, frame: Frame) -> None:
        slot, now = self.fleet.slots[number], monotonic_ns()
        slot.beat(now)
        match frame.kind:
            case Kind.READY:
                self._carry_out(self.fleet.step(number, Event.READY, now))
                self._reloader.worker_ready(number)
                self._announce()
                if self._arrival is not None:
                    self._arrival.worker_ready()
            case Kind.FAILED if frame.request == 0:
                if self._arrival is not None:
                    self._arrival.reason = str(frame.payload.get("reason"))
                self.log.error("worker cannot start", slot=number, reason=str(frame.payload.get("reason")))
            case Kind.DONE | Kind.FAILED:
                self.commands.reply(frame)

    def _announce(self) -> None:
        if self._announced or self.fleet.ready < self.wanted:
            return
        self._announced = True
        self.log.info(
            "ready",
            revision=self.holdings.revision,
            workers=self.fleet.ready,
            listeners=[each.address for each in self.holdings.node.listeners],
            metrics=self.holdings.node.metrics_address,
            ms=(monotonic_ns() - self._started_ns) // MS,
        )
        self.notifier.ready(self._status())

    def _status(self) -> str:
        return f"serving revision {self.holdings.revision} with {self.wanted} workers"

    # exits

    def _on_worker_exit(self, number: int) -> None:
        status = self._reap(number)
        if status is None:
            return
        slot, now = self.fleet.slots[number], monotonic_ns()
        metrics.zero_gauges(self.holdings.berths[number].post.page.page)
        expected = slot.state is State.DRAINING
        report = self.log.info if expected else self.log.warning
        report("worker exited", slot=number, status=status_words(status), was_ready=slot.state is State.READY)
        orders = self.fleet.step(number, Event.EXITED, now)
        self.commands.fail(number)
        self._draining.discard(number)
        self._carry_out(orders)
        self._close_when_drained()
        if self._arrival is not None and self._arrival.under_way:
            self._arrival.worker_failed(number, status_words(status))

    def _reap(self, number: int) -> int | None:
        running = self._children[number]
        self._selector.unregister(running.pidfd)
        status = running.reap()
        if status is None:  # cannot be: a readable pidfd is an exited process
            self._selector.register(running.pidfd, selectors.EVENT_READ, partial(self._on_worker_exit, number))
            return None
        del self._children[number]
        return status

    # control

    def _carry_out_control(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Action.SPAWN:
                    running, box = self._first_control or self._start_control()
                    self._first_control = None
                    self._children[CONTROL], self._control_box = running, box
                    self._selector.register(running.pidfd, selectors.EVENT_READ, self._on_control_exit)
                    self._watch(box, self._on_control_frame)
                    self._serve_control()
                case Action.KILL:
                    self._end_this_control(signal.SIGKILL, "it does not answer")
                case Action.DRAIN:
                    self._end_this_control(signal.SIGTERM, "the service stops")

    def _end_this_control(self, number: int, reason: str) -> None:
        """End the control that is there: a child by a signal, another's by hanging up."""
        if CONTROL in self._children:
            self._children[CONTROL].signal(number)
        elif self._control_box is not None:
            self._detach(reason)

    def _watch_meeting(self) -> None:
        assert self.holdings.meeting is not None
        self._selector.register(self.holdings.meeting, selectors.EVENT_READ, self._on_meeting)

    def _on_meeting(self) -> None:
        """Somebody has come to be control."""
        assert self.holdings.meeting is not None
        try:
            box = self.holdings.meeting.accept()
        except PeerError as error:
            self.log.error(str(error))
            return
        if box is None:
            return
        if self._control_box is not None:
            self.log.warning("control is refused: there is one")
            box.close()
            return
        self.log.info("control has come")
        self._attach(box)

    def _attach(self, box: Mailbox) -> None:
        """Let who has come be control."""
        self._attached = None
        self._control_box = box
        self._control_slot = Slot(CONTROL, State.STARTING, beat_ns=monotonic_ns())
        self._watch(box, self._on_control_frame, self._on_control_gone)
        self._serve_control()

    def _on_control_gone(self) -> None:
        self._detach("it has gone")

    def _detach(self, reason: str) -> None:
        """Be without control until one comes."""
        box, self._control_box = self._control_box, None
        if box is None:
            return
        self._unwatch(box.fileno())
        box.close()
        report = self.log.info if self.fleet.stopping else self.log.error
        report("without control until it comes again, traffic goes on", reason=reason)
        self._control_slot = Slot(CONTROL)
        self.commands.fail(CONTROL)

    def _serve_control(self) -> None:
        """Tell control what is in force, and give it its sockets."""
        self.let_serve(CONTROL, self._control_box, self._on_control_serves)

    def let_serve(self, key: int, box: Mailbox | None, answer: Answer) -> None:
        """Send a control the command SERVE for what is in force."""
        try:
            page = self.holdings.run_dir.open_to_write(self.holdings.shared_page)
        except OSError as error:
            answer(f"the shared page cannot be opened: {(error.strerror or str(error)).lower()}", None)
            return
        frame = Frame(
            Kind.SERVE,
            payload={"run_dir": self.holdings.node.run_dir},
            descriptors=(
                self.holdings.snapshot,
                self.holdings.boot,
                self.holdings.metrics.fileno(),
                self.holdings.control.fileno(),
                page,
            ),
        )
        try:
            self.commands.send(key, box, frame, answer)
        finally:
            os.close(page)

    def _on_control_serves(self, reason: str | None, _: Frame | None) -> None:
        if reason is not None:
            if CONTROL in self._children or self._control_box is not None:
                self.log.error("control does not serve and is replaced", reason=reason)
                self._end_this_control(signal.SIGKILL, "it does not serve")
            return
        self._carry_out_control(self._control_slot.step(Event.READY, monotonic_ns()))
        self._reloader.take_up()

    def _on_control_frame(self, frame: Frame) -> None:
        self._control_slot.beat(monotonic_ns())
        if frame.kind in (Kind.DONE, Kind.FAILED):
            self.commands.reply(frame)

    def _on_control_exit(self) -> None:
        running = self._children.pop(CONTROL)
        self._selector.unregister(running.pidfd)
        status = running.reap()
        if self._control_box is not None:
            if self._control_box.fileno() in self._selector.get_map():
                self._selector.unregister(self._control_box)
            self._control_box.close()
            self._control_box = None
        if self._control_slot.state is not State.DRAINING:
            self.log.error("control exited and is replaced", status=status_words(status or 0))
        actions = self._control_slot.step(Event.EXITED, monotonic_ns())
        self.commands.fail(CONTROL)
        self._carry_out_control(actions)

    # upgrade

    def _upgrade(self) -> None:
        """Start one, unless one is under way."""
        arriving = self._arrival is not None and self._arrival.under_way
        if self.fleet.stopping or arriving or not self._departure.idle:
            self.log.warning("upgrade ignored: the service is stopping, or one is under way")
            return
        self._upgrades += 1
        self.log.info("upgrade: rehearsing the next program", version=__version__)
        self._say_upgrade("running", __version__)
        self._departure.start()

    def _quiet(self) -> bool:
        """Whether everything that is under way could be handed over."""
        return (
            self._reloader.idle
            and self.commands.idle
            and not self._retiring
            and (self._control_slot.state is State.READY or self._without_control)
            and not any(slot.state in UNSETTLED for slot in self.fleet.slots)
        )

    @property
    def _without_control(self) -> bool:
        """Whether control is a unit of its own that is not there: nothing of it could be handed over."""
        return self.holdings.meeting is not None and not self._control_slot.alive

    def _handover(self) -> Handover:
        late_ns = monotonic_ns() + (max(self._drain_ms) + GRACE_MS) * MS
        own = [
            Process(
                slot, self._children[slot.number].pid, self._children[slot.number].pidfd,
                until_ns=late_ns if slot.state is State.DRAINING else None,
            )
            for slot in self.fleet.slots
            if slot.number in self._children
        ]  # fmt: skip
        control, box = self._children.get(CONTROL), self._control_box
        return Handover(
            version=__version__,
            number=self._upgrades,
            wanted=self.wanted,
            rotate_ns=self._rotate_ns,
            holdings=self.holdings.record(),
            slots=tuple(self.fleet.slots),
            processes=(*own, *(one.passed() for one in self.predecessors.present)),
            control=None
            if box is None
            else ControlProcess(control.pid if control else None, control.pidfd if control else None, box.fileno()),
        )

    def _passed(self) -> Iterator[int]:
        yield from self.holdings.descriptors()
        yield from self._handover().descriptors()

    def _unheard(self) -> bool:
        """Whether a signal has come that the loop has not seen yet."""
        return bool(select.select([self._wake_read], [], [], 0)[0])

    def _leave(self) -> None:
        self.log.info("upgrade: executing the next program")
        self.notifier.reloading(monotonic_ns())

    def _take_over(self, arriving: Arrival) -> None:
        """Go on with what the program before has handed over, and start the new beside it."""
        handover, now = arriving.handover, monotonic_ns()
        self._reloader.held = True
        self._announced = True
        for process in handover.processes:
            number = process.slot.number
            os.set_inheritable(process.pidfd, False)
            if process.post is None:
                post = self.holdings.renew_post(number)
            else:
                post = Post.adopt(self.holdings.run_dir, process.post)
            running = Child(process.pid, process.pidfd)
            self.predecessors.add(Predecessor(process.slot, running, post, process.until_ns))
        self.fleet.slots = arrival.fresh_slots(handover, now)
        self._watch_berths()
        self._first_control = None
        if self.holdings.meeting is not None:
            self._watch_meeting()
        if handover.control is not None:
            self._use_control(_child_of(handover.control), Mailbox.inherited(handover.control.mailbox))
        elif self.holdings.meeting is None:
            self._carry_out_control(self._control_slot.step(Event.WANTED, now))
        if arriving.control is not None:
            running, box = arriving.control
            self._selector.register(running.pidfd, selectors.EVENT_READ, arriving.control_exited)
            self._watch(box, self._on_candidate_frame)
        arriving.begin()

    def _watch_berths(self) -> None:
        for number, berth in enumerate(self.holdings.berths):
            self._watch(berth.post.ours, partial(self._on_worker_frame, number))

    def _on_candidate_frame(self, frame: Frame) -> None:
        if frame.kind in (Kind.DONE, Kind.FAILED):
            self.commands.reply(frame)

    def start_workers(self, wanted: int) -> None:
        """Want this many; there are berths for them."""
        self._carry_out(self.fleet.resize(wanted, monotonic_ns()))

    def dismiss_predecessors(self) -> None:
        """The new workers serve: those of the program before finish what they have."""
        for one in list(self.predecessors.present):
            if one.until_ns is None:
                self.predecessors.dismiss(one, *self._drain_ms, IDLE_MS)

    def replace_control(self, new: tuple[Child, Mailbox]) -> None:
        """The new control serves: the old one ends."""
        self._unwatch(new[0].pidfd, new[1].fileno())
        old, box = self._children.pop(CONTROL, None), self._control_box
        if old is not None and box is not None:
            self.end_control((old, box))
        self.commands.fail(CONTROL)
        self._use_control(*new)

    def _use_control(self, running: Child | None, box: Mailbox) -> None:
        """Have a control that serves already: a child, or one that has come."""
        self._control_slot = Slot(CONTROL, State.READY, incarnation=1, beat_ns=monotonic_ns(), opened=True)
        self._control_box = box
        if running is None:
            self._watch(box, self._on_control_frame, self._on_control_gone)
            return
        self._children[CONTROL] = running
        self._selector.register(running.pidfd, selectors.EVENT_READ, self._on_control_exit)
        self._watch(box, self._on_control_frame)

    def end_control(self, old: tuple[Child, Mailbox]) -> None:
        """Tell a control that is not needed any more to end."""
        running, box = old
        self._unwatch(running.pidfd, box.fileno())
        self.commands.fail(CANDIDATE)
        box.close()
        running.signal(signal.SIGTERM)
        self._retiring[running.pidfd] = (running, monotonic_ns() + SILENCE_NS)
        self._selector.register(running.pidfd, selectors.EVENT_READ, partial(self._on_retired, running))

    def _on_retired(self, running: Child) -> None:
        self._selector.unregister(running.pidfd)
        del self._retiring[running.pidfd]
        running.reap()

    def _unwatch(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)

    def turn_back(self, before: Slot) -> None:
        """Give a slot back to the worker that it had before; the new one, if there is one, goes."""
        number, now = before.number, monotonic_ns()
        failed, running = self.fleet.slots[number], self._children.pop(number, None)
        old = self.predecessors.take_back(number)
        self._unwatch(self.holdings.berths[number].post.ours.fileno())
        if running is not None:
            self._unwatch(running.pidfd)
            self.commands.fail(number)
            new = Predecessor(failed, running, self.holdings.renew_post(number))
            self.predecessors.add(new)
            if failed.state is State.READY:
                self.predecessors.dismiss(new, *self._drain_ms, IDLE_MS)
            else:
                self.predecessors.kill(new)
        if old is not None:
            self.holdings.reinstate(number, old.post)
            self._children[number] = old.child
            self._selector.register(old.child.pidfd, selectors.EVENT_READ, partial(self._on_worker_exit, number))
        self._watch(self.holdings.berths[number].post.ours, partial(self._on_worker_frame, number))
        self._reloader.given[number] = self._reloader.serial
        self.fleet.slots[number], event = arrival.turned_back(before, failed, present=old is not None)
        before.beat(now)
        self._carry_out(self.fleet.step(number, event, now) if event is not None else [])

    def upgraded(self, before: str) -> None:
        """An upgrade has succeeded."""
        self.log.info("upgraded", version=__version__, before=before, revision=self.holdings.revision)
        self._say_upgrade("done", before)
        self._upgrade_over(self._status())

    def upgrade_failed(self, reason: str, before: str = __version__) -> None:
        """An upgrade has failed: all is as it was."""
        self.log.error("upgrade failed", reason=reason)
        self._say_upgrade("failed", before, reason)
        self._upgrade_over(f"{self._status()}; the last upgrade failed")

    def _upgrade_over(self, status: str) -> None:
        self.notifier.ready(status)
        self._reloader.held = False
        self._reloader.take_up()
        if not self.fleet.stopping and self.wanted != sum(slot.state is not State.EMPTY for slot in self.fleet.slots):
            self._resize(self.wanted)

    def _say_reload(self, document: Mapping[str, Any]) -> None:
        if document["state"] != "running":
            page = self.holdings.shared_page.page
            page.store(page.series(metrics.RELOAD_FAILED, 1), int(document["state"] != "done"))
        try:
            self.holdings.run_dir.write_reload(document)
        except OSError as error:
            self.log.error("cannot say what became of the reload", reason=str(error))

    def _say_upgrade(self, state: str, before: str, reason: str | None = None) -> None:
        document = {"number": self._upgrades, "state": state, "from": before, "to": __version__, "reason": reason}
        if state != "done":
            document["to"] = None
        try:
            self.holdings.run_dir.write_upgrade(document)
        except OSError as error:
            self.log.error("cannot say what became of the upgrade", reason=str(error))


def _child_of(control: ControlProcess) -> Child | None:
    """The child that was handed over; None for a control that is nobody's child here."""
    if control.pid is None or control.pidfd is None:
        return None
    os.set_inheritable(control.pidfd, False)
    return Child(control.pid, control.pidfd)
