"""``python -m ascproxy.supervisor CONFIG``: what ``ascproxy serve`` becomes.

Order of a start: control checks the configuration (nothing is touched before it is right), the run directory is locked
and emptied, sockets are bound, the workers' modules are loaded and frozen, workers are forked.

At an upgrade the program before starts this one twice: as its child for a rehearsal, then in its own place.
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

from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot
from ascproxy.net import memfile
from ascproxy.net.mailbox import Frame, Kind, Mailbox
from ascproxy.supervisor import child, rehearsal
from ascproxy.supervisor.child import Child
from ascproxy.supervisor.handover import DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE, Handover, HandoverError, decode
from ascproxy.supervisor.holdings import Holdings
from ascproxy.supervisor.loop import Supervisor
from ascproxy.telemetry.log import Log

LOAD_TIMEOUT_MS = 60_000
WORKER = "ascproxy.worker.datapath:run"
CONTROL = "ascproxy.control"
UPGRADE_VARIABLES = (DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE)


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
    parser.add_argument("--again", nargs=argparse.REMAINDER, metavar="COMMAND", help="what an upgrade runs; the rest")
    options = parser.parse_args(arguments)
    child.raise_descriptors()  # for its sockets: one for each slot and listener
    program = Program(
        config=options.config,
        worker=options.worker,
        control=options.control,
        again=options.again or [sys.executable, *sys.orig_argv[1:]],
        environment={name: value for name, value in environment.items() if name not in UPGRADE_VARIABLES},
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
    """What runs: the parts of the service, and the command that an upgrade runs."""

    config: str
    worker: str
    control: str
    again: list[str]
    environment: Mapping[str, str]

    def start(self, log: Log) -> int:
        """Start the service and supervise it; the exit status."""
        control = self.start_control()
        try:
            worker = child.entry(self.worker)  # while control reads the configuration
            loaded = ask_to_load(*control)
            for warning in loaded.payload.get("warnings", []):
                log.warning(str(warning))
            holdings = open_holdings(loaded, self.environment)
        except AscproxyError as error:
            sys.stderr.write(f"{error}\n")
            child.end(control[0])
            return error.exit_code
        return self.supervise(holdings, worker, control, log)

    def rehearse(self, handed: int, log: Log) -> None:
        """All of an upgrade that can fail. Raises AscproxyError when it would."""
        worker = child.entry(self.worker)
        handover, holdings = adopt(handed)
        control = self.start_control()
        try:
            loaded = ask_to_load(*control, holdings.boot)
            rehearsal.try_worker(worker, handover, holdings, loaded.descriptors[0], log)
        finally:
            child.end(control[0])

    def take_over(self, handed: int, log: Log) -> int:
        """Go on in the place of the program before; the exit status."""
        handover, holdings = adopt(handed)
        worker = child.entry(self.worker)
        return self.supervise(holdings, worker, self.start_control(), log, handover)

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
        control: tuple[Child, Mailbox],
        log: Log,
        handover: Handover | None = None,
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


def ask_to_load(control: Child, mailbox: Mailbox, boot: int | None = None) -> Frame:
    """Control's answer to LOAD, with the snapshot's descriptor. Raises :class:`StartError` with its findings.

    ``boot``: the first snapshot of a service that runs already.
    """
    mailbox.send(Frame(Kind.LOAD, 1, descriptors=() if boot is None else (boot,)))
    waiting = select.poll()
    waiting.register(mailbox.fileno(), select.POLLIN)
    waiting.register(control.pidfd, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in waiting.poll(LOAD_TIMEOUT_MS)]
        try:
            frame = mailbox.receive() if mailbox.fileno() in ready else None
        except EOFError:
            frame = None
        if frame is not None and frame.request == 1:
            break
        if not ready:
            raise StartError(f"the configuration was not read within {LOAD_TIMEOUT_MS // 1000} s")
        if frame is None and control.pidfd in ready:
            raise StartError("control ended before it had read the configuration; its message is above")
    if frame.kind is Kind.FAILED or not frame.descriptors:
        findings = [str(sentence) for sentence in frame.payload.get("findings", [])]
        reason = "\n".join(findings) or str(frame.payload.get("reason", "control sent no snapshot"))
        raise StartError(reason, int(frame.payload.get("exit_code", 1)))
    return frame


def open_holdings(loaded: Frame, environment: Mapping[str, str]) -> Holdings:
    """What the snapshot asks for: run directory and sockets."""
    descriptor = loaded.descriptors[0]
    found = snapshot.decode(memfile.read(descriptor))
    return Holdings.open(found.node, descriptor, found.revision, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
