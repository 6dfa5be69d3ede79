"""``python -m ascproxy.supervisor CONFIG``: what ``ascproxy serve`` becomes.

Order of a start: control checks the configuration (nothing is touched before it is right), the run directory is locked
and emptied, sockets are bound, the workers' modules are loaded and frozen, workers are forked.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence

from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot
from ascproxy.net import memfile
from ascproxy.net.mailbox import Frame, Kind, Mailbox
from ascproxy.supervisor import child
from ascproxy.supervisor.child import Child
from ascproxy.supervisor.holdings import Holdings
from ascproxy.supervisor.loop import Supervisor
from ascproxy.telemetry.log import Log

LOAD_TIMEOUT_MS = 60_000
WORKER = "ascproxy.worker.datapath:run"
CONTROL = "ascproxy.control"


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
    options = parser.parse_args(arguments)
    log = Log("supervisor")
    child.raise_descriptors()  # for its sockets: one for each slot and listener
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop runs, a signal just ends us, and children follow

    def start_control() -> tuple[Child, Mailbox]:
        ours, theirs = Mailbox.pair()
        command = ["-m", options.control, "--config", options.config, "--fd", str(child.MAILBOX_FD)]
        running = child.execute(command, theirs.fileno(), environment)
        theirs.close()
        return running, ours

    control = start_control()
    try:
        worker = child.entry(options.worker)  # while control reads the configuration
        loaded = ask_to_load(*control)
        for warning in loaded.payload.get("warnings", []):
            log.warning(str(warning))
        holdings = open_holdings(loaded, environment)
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        end(control[0])
        return error.exit_code
    supervisor = Supervisor(
        holdings=holdings,
        worker=worker,
        start_control=start_control,
        control=control,
        environment=environment,
        log=log,
    )
    gc.collect()
    gc.freeze()  # workers share this heap: their collectors must not copy it (DESIGN D18)
    return supervisor.run()


def ask_to_load(control: Child, mailbox: Mailbox) -> Frame:
    """Control's answer to LOAD, with the snapshot's descriptor. Raises :class:`StartError` with its findings."""
    mailbox.send(Frame(Kind.LOAD, 1))
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


def end(running: Child) -> None:
    """Stop a child and wait for it."""
    running.signal(signal.SIGTERM)
    waiting = select.poll()
    waiting.register(running.pidfd, select.POLLIN)
    if not waiting.poll(1_000):
        running.signal(signal.SIGKILL)
        waiting.poll()
    running.reap()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
