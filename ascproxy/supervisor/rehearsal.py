"""What a program does when it is asked for a rehearsal: all of an upgrade that can fail, touching nothing.

It has been imported whole by then. It adopts a copy of what would be handed over (descriptors, pages, layouts), has its
own control check the configuration, lets a worker without sockets get ready on it, and answers with its
version. It holds listening sockets meanwhile, and accepts on none.
"""

from __future__ import annotations

import mmap
import select
import signal
from collections.abc import Callable

from ascproxy import __version__, _native
from ascproxy.errors import AscproxyError
from ascproxy.net.mailbox import Frame, FrameError, Kind, Mailbox
from ascproxy.supervisor import child
from ascproxy.supervisor.handover import Handover
from ascproxy.supervisor.holdings import Holdings
from ascproxy.telemetry import metrics
from ascproxy.telemetry.log import Log

READY_MS = 30_000


def answer(descriptor: int, rehearse: Callable[[], None]) -> int:
    """Rehearse, and tell the program that asked, at its mailbox ``descriptor``. The exit status."""
    mailbox = Mailbox.inherited(descriptor)
    try:
        rehearse()
    except AscproxyError as error:
        mailbox.send(Frame(Kind.FAILED, payload={"reason": str(error)}))
        return error.exit_code
    mailbox.send(Frame(Kind.DONE, payload={"version": __version__}))
    return 0


def try_worker(worker: Callable[..., int], handover: Handover, holdings: Holdings, snapshot: int, log: Log) -> None:
    """Start a worker that accepts nothing, and wait until it is ready. Raises AscproxyError when it does not get so."""
    ours, theirs = Mailbox.pair()
    slot = len(handover.slots)

    def run() -> int:
        ours.close()
        return worker(
            slot=slot,
            incarnation=0,
            mailbox=theirs,
            sockets=(),
            page=_native.Page(mmap.mmap(-1, metrics.PAGE_SIZE)),
            shared_page=holdings.shared_page.page,
            snapshot=snapshot,
            tickets=holdings.tickets,
            log=log.named("worker-rehearsal"),
        )

    trial = child.fork(run)
    theirs.close()
    waiting = select.poll()
    waiting.register(ours.fileno(), select.POLLIN)
    while waiting.poll(READY_MS):
        try:
            frame = ours.receive()
        except (EOFError, FrameError):
            break
        if frame is not None and frame.kind is Kind.READY:
            child.end(trial, signal.SIGKILL)
            return
        if frame is not None and frame.kind is Kind.FAILED:
            child.end(trial, signal.SIGKILL)
            raise AscproxyError(f"a worker does not start: {frame.payload.get('reason')}")
    child.end(trial, signal.SIGKILL)
    raise AscproxyError("a worker does not get ready: what it printed is in the log above")
