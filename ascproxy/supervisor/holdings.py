"""What the supervisor holds for the life of the service: everything that outlives a worker, in one object."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from ascproxy.model.node import Node
from ascproxy.net import listener, tls
from ascproxy.net.listener import Bound
from ascproxy.net.mailbox import Mailbox
from ascproxy.net.tls import TicketKeys
from ascproxy.supervisor.rundir import CONTROL_SOCKET, PageFile, RunDir


@dataclass(slots=True)
class Berth:
    """A slot's lasting things: its sockets, its page, and both ends of its mailbox."""

    sockets: tuple[Bound, ...]
    page: PageFile
    ours: Mailbox
    theirs: Mailbox


@dataclass(slots=True)
class Holdings:
    """``node`` is the node file as it was at the start; ``snapshot`` the descriptor of the revision in force.

    ``boot`` is that of the first revision: what needs a restart is compared with it. ``tickets`` are for all workers:
    with keys of its own for each, a session would resume on one of them only.
    """

    node: Node
    run_dir: RunDir
    shared_page: PageFile
    shared: tuple[Bound, ...]
    metrics: socket.socket
    control: socket.socket
    snapshot: int
    boot: int
    revision: str
    slotted: Mapping[str, str]
    tickets: TicketKeys = field(default_factory=lambda: tls.fresh(os.urandom))
    berths: list[Berth] = field(default_factory=list)

    @classmethod
    def open(cls, node: Node, snapshot: int, revision: str, environment: Mapping[str, str]) -> Holdings:
        """Lock and empty the run directory, bind everything that is not a slot's own. Raises AscproxyError with one
        sentence."""
        run_dir = RunDir(node.run_dir)
        addresses = {each.name: each.address for each in node.listeners}
        passed = listener.passed_sockets(environment, os.getpid(), addresses)
        slotted = {name: address for name, address in addresses.items() if name not in {b.name for b in passed}}
        listener.ensure_free(slotted)
        return cls(
            node=node,
            run_dir=run_dir,
            shared_page=run_dir.create_shared_page(),
            shared=(*passed, *listener.bind_shared(slotted)),
            metrics=listener.bind_alone(node.metrics_address),
            control=listener.bind_unix(str(run_dir.path / CONTROL_SOCKET), 0o600),
            snapshot=snapshot,
            boot=os.dup(snapshot),
            revision=revision,
            slotted=slotted,
        )

    def add_berth(self) -> Berth:
        """Bind and make what one more slot needs."""
        ours, theirs = Mailbox.pair()
        page = self.run_dir.create_slot_page(len(self.berths))
        berth = Berth(listener.bind_slot(self.slotted), page, ours, theirs)
        self.berths.append(berth)
        return berth

    def all_sockets(self) -> list[Bound]:
        """Every listening socket of the data path."""
        return [*self.shared, *(bound for berth in self.berths for bound in berth.sockets)]

    def leave_in_child(self, slot: int) -> None:
        """Close in slot's freshly forked worker what is not its own."""
        self.run_dir.close_in_child()
        self.metrics.close()
        self.control.close()
        for number, berth in enumerate(self.berths):
            berth.ours.close()
            if number != slot:
                berth.theirs.close()
                for bound in berth.sockets:
                    bound.socket.close()

    def close(self) -> None:
        """Give everything back."""
        listener.stop_listening(self.all_sockets())
        self.metrics.close()
        self.control.close()
        self.run_dir.close()
