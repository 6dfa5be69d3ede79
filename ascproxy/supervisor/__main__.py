"""``python -m ascproxy.supervisor CONFIG``: what ``ascproxy serve`` becomes.

Order of a start: control checks the configuration (nothing is touched before it is right), the run directory is locked
and emptied, sockets are bound, the workers' modules are loaded and frozen, workers are forked.

At an upgrade the program before starts this one twice: as its child for a rehearsal, then in its own place.

``--run-dir PATH --peer UID``: control is no child but a unit of its own, which that user runs. It comes to the socket
in the run directory; so that is locked and emptied first.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ascproxy.clock import monotonic_ns
from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot
from ascproxy.net import memfile
from ascproxy.net.mailbox import Frame, Kind, Mailbox
from ascproxy.net.meeting import GATEWAY_SOCKET, Meeting, PeerError
from ascproxy.supervisor import child, rehearsal
from ascproxy.supervisor.child import Child
from ascproxy.supervisor.handover import DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE, Handover, HandoverError, decode
from ascproxy.supervisor.holdings import Holdings
from ascproxy.supervisor.loop import Supervisor
from ascproxy.supervisor.rundir import RunDir
from ascproxy.telemetry.log import Log

LOAD_TIMEOUT_MS = 60_000
MEET_TIMEOUT_MS = 60_000
SHARED_MODE = 0o750  # of the run directory: control is one of our group, and reads the pages
WORKER = "ascproxy.worker.datapath:run"
CONTROL = "ascproxy.control"
UPGRADE_VARIABLES = (DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE)


class GoneError(AscproxyError):
    """Control, which is no child of ours, has gone."""


class StartError(AscproxyError):
    """The service cannot start; the sentences say why."""

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start and supervise; the exit status of the process."""
    parser = argparse.ArgumentParser(prog="ascproxy.supervisor")
    parser.add_argument("config")
    parser.add_argument("--worker", default=WORKER, metavar="MODULE:FUNCTION", help="what runs in each slot")
    parser.add_argument("--control", default=CONTROL, metavar="MODULE", help="what runs as control")
    parser.add_argument("--run-dir", metavar="PATH", help="where control comes, if it is no child")
    parser.add_argument("--peer", type=int, metavar="UID", help="the user that control runs as then")
    parser.add_argument("--again", nargs=argparse.REMAINDER, metavar="COMMAND", help="what an upgrade runs; the rest")
    options = parser.parse_args(arguments)
    if (options.run_dir is None) != (options.peer is None):
        parser.error("--run-dir and --peer come together")
    child.raise_descriptors()  # for its sockets: one for each slot and listener
    program = Program(
        config=options.config,
        worker=options.worker,
        control=options.control,
        again=options.again or [sys.executable, *sys.orig_argv[1:]],
        environment={name: value for name, value in environment.items() if name not in UPGRADE_VARIABLES},
        apart=None if options.run_dir is None else (options.run_dir, options.peer),
    )
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop runs, a signal just ends us, and children follow
    handed = environment.get(DESCRIPTOR_VARIABLE)
    if handed is None:
        return program.start(Log("supervisor"))
    rehearsal_for = environment.get(REHEARSAL_VARIABLE)
    if rehearsal_for is not None:
        return rehearsal.answer(int(rehearsal_for), lambda: program.rehearse(int(handed), Log("rehearsal")))
    return program.take_over(int(handed), Log("supervisor"))


@dataclass(frozen=True, slots=True)
class Program:
    """What runs: the parts of the service, and the command that an upgrade runs.

    ``apart``: where control comes, and the uid that it has, if it is no child.
    """

    config: str
    worker: str
    control: str
    again: list[str]
    environment: Mapping[str, str]
    apart: tuple[str, int] | None = None

    def start(self, log: Log) -> int:
        """Start the service and supervise it; the exit status."""
        if self.apart is not None:
            return self.start_apart(*self.apart, log)
        control = self.start_control()
        try:
            worker = child.entry(self.worker)  # while control reads the configuration
            loaded = ask_to_load(control[1], control[0].pidfd)
            holdings = open_holdings(loaded, self.environment, log)
        except AscproxyError as error:
            sys.stderr.write(f"{error}\n")
            child.end(control[0])
            return error.exit_code
        return self.supervise(holdings, worker, control, log)

    def start_apart(self, path: str, uid: int, log: Log) -> int:
        """Wait for control to come, start the service and supervise it; the exit status."""
        run_dir: RunDir | None = None
        try:
            worker = child.entry(self.worker)
            run_dir = RunDir(path, SHARED_MODE)
            meeting = Meeting.open(run_dir.path / GATEWAY_SOCKET, uid)
            control, loaded = meet(meeting, log)
            holdings = open_holdings(loaded, self.environment, log, (run_dir, meeting))
        except AscproxyError as error:
            sys.stderr.write(f"{error}\n")
            if run_dir is not None:
                run_dir.close()
            return error.exit_code
        return self.supervise(holdings, worker, None, log, attached=control)

    def rehearse(self, handed: int, log: Log) -> None:
        """All of an upgrade that can fail. Raises AscproxyError when it would."""
        worker = child.entry(self.worker)
        handover, holdings = adopt(handed)
        if holdings.meeting is not None:  # control goes on, and so does its revision
            rehearsal.try_worker(worker, handover, holdings, holdings.snapshot, log)
            return
        control = self.start_control()
        try:
            loaded = ask_to_load(control[1], control[0].pidfd, holdings.boot)
            rehearsal.try_worker(worker, handover, holdings, loaded.descriptors[0], log)
        finally:
            child.end(control[0])

    def take_over(self, handed: int, log: Log) -> int:
        """Go on in the place of the program before; the exit status."""
        handover, holdings = adopt(handed)
        worker = child.entry(self.worker)
        control = self.start_control() if holdings.meeting is None else None
        return self.supervise(holdings, worker, control, log, handover=handover)

    def start_control(self) -> tuple[Child, Mailbox]:
        ours, theirs = Mailbox.pair()
        command = ["-m", self.control, "--config", self.config, "--fd", str(child.MAILBOX_FD)]
        running = child.execute(command, theirs.fileno(), self.environment)
        theirs.close()
        return running, ours

    def supervise(
        self,
        holdings: Holdings,
        worker: Callable[..., int],
        control: tuple[Child, Mailbox] | None,
        log: Log,
        *,
        handover: Handover | None = None,
        attached: Mailbox | None = None,
    ) -> int:
        """Supervise until the service ends; the exit status."""
        supervisor = Supervisor(
            holdings=holdings,
            worker=worker,
            start_control=self.start_control,
            control=control,
            environment=self.environment,
            again=self.again,
            log=log,
            handover=handover,
            attached=attached,
        )
        gc.collect()
        gc.freeze()  # workers share this heap: their collectors must not copy it (DESIGN D18)
        return supervisor.run()


def adopt(handed: int) -> tuple[Handover, Holdings]:
    """What the program before has handed over, in the memory file ``handed``. Raises AscproxyError."""
    try:
        handover = decode(memfile.read(handed))
    except (OSError, ValueError) as error:
        raise HandoverError(f"what was handed over cannot be read: {error}") from error
    finally:
        os.close(handed)
    return handover, Holdings.adopt(handover.holdings)


def meet(meeting: Meeting, log: Log) -> tuple[Mailbox, Frame]:
    """The control that has come, and its answer to LOAD. Raises :class:`StartError`."""
    waiting = select.poll()
    waiting.register(meeting.fileno(), select.POLLIN)
    until_ns = monotonic_ns() + MEET_TIMEOUT_MS * 1_000_000
    while (left_ms := (until_ns - monotonic_ns()) // 1_000_000) > 0:
        waiting.poll(left_ms)
        try:
            mailbox = meeting.accept()
        except PeerError as error:
            log.error(str(error))
            continue
        if mailbox is None:
            continue
        try:
            return mailbox, ask_to_load(mailbox)
        except GoneError as error:
            log.warning(f"{error}, another one is awaited")
            mailbox.close()
    raise StartError(
        f"control has not come within {MEET_TIMEOUT_MS // 1000} s: start ascproxy-control.service, or see its log"
    )


def ask_to_load(mailbox: Mailbox, pidfd: int | None = None, boot: int | None = None) -> Frame:
    """Control's answer to LOAD, with the snapshot's descriptor. Raises :class:`StartError` with its findings.

    ``pidfd``: its process, if it is our child. ``boot``: the first snapshot of a service that runs already.
    """
    mailbox.send(Frame(Kind.LOAD, 1, descriptors=() if boot is None else (boot,)))
    waiting = select.poll()
    waiting.register(mailbox.fileno(), select.POLLIN)
    if pidfd is not None:
        waiting.register(pidfd, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in waiting.poll(LOAD_TIMEOUT_MS)]
        try:
            frame = mailbox.receive() if mailbox.fileno() in ready else None
        except EOFError:
            if pidfd is None:
                raise GoneError("control has gone before it had read the configuration") from None
            frame = None
        if frame is not None and frame.request == 1:
            break
        if not ready:
            raise StartError(f"the configuration was not read within {LOAD_TIMEOUT_MS // 1000} s")
        if frame is None and pidfd in ready:
            raise StartError("control ended before it had read the configuration; its message is above")
    if frame.kind is Kind.FAILED or not frame.descriptors:
        findings = [str(sentence) for sentence in frame.payload.get("findings", [])]
        reason = "\n".join(findings) or str(frame.payload.get("reason", "control sent no snapshot"))
        raise StartError(reason, int(frame.payload.get("exit_code", 1)))
    return frame


def open_holdings(
    loaded: Frame, environment: Mapping[str, str], log: Log, met: tuple[RunDir, Meeting] | None = None
) -> Holdings:
    """What the snapshot asks for: run directory and sockets. ``met``: where control has come."""
    for warning in loaded.payload.get("warnings", []):
        log.warning(str(warning))
    descriptor = loaded.descriptors[0]
    found = snapshot.decode(memfile.read(descriptor))
    if met is not None and Path(found.node.run_dir) != met[0].path:
        raise StartError(
            f"run_dir of the node file is {found.node.run_dir}, and the gateway runs in {met[0].path}: leave it out"
        )
    return Holdings.open(
        found.node, descriptor, found.revision, environment, met=met, trust=str(loaded.payload.get("trust", ""))
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
