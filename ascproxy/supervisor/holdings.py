"""What the supervisor holds for the life of the service: everything that outlives a worker, in one object.

At an upgrade it passes to the next program: :meth:`Holdings.record` names its descriptors, which survive the exec under
their numbers, and :meth:`Holdings.adopt` makes the same object of them there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot as snapshots
from ascproxy.model.node import Node
from ascproxy.net import listener, memfile, tls
from ascproxy.net.listener import Bound
from ascproxy.net.mailbox import Mailbox
from ascproxy.net.meeting import Meeting
from ascproxy.net.tls import TicketKeys
from ascproxy.supervisor.rundir import CONTROL_SOCKET, PageFile, RunDir


@dataclass(frozen=True, slots=True)
class Post:
    """What one process of a slot has to itself: its page, and both ends of its mailbox."""

    page: PageFile
    ours: Mailbox
    theirs: Mailbox

    def record(self) -> dict[str, Any]:
        return {"page": self.page.name, "ours": self.ours.fileno(), "theirs": self.theirs.fileno()}

    @classmethod
    def adopt(cls, run_dir: RunDir, raw: Mapping[str, Any]) -> Post:
        ends = [Mailbox.inherited(int(raw[name])) for name in ("ours", "theirs")]
        return cls(run_dir.open_page(str(raw["page"])), *ends)

    def close(self) -> None:
        """Close the mailbox; the page stays."""
        self.ours.close()
        self.theirs.close()


@dataclass(slots=True)
class Berth:
    """A slot's lasting things: its sockets, what its process has, and pages of earlier ones that nobody writes now.

    Two processes are in a slot while one hands over to the next. A page has one writer, so each has its own, and the
    counters of a spare one still count.
    """

    sockets: tuple[Bound, ...]
    post: Post
    spare: list[PageFile] = field(default_factory=list)
    pages: int = 1


@dataclass(slots=True)
class Holdings:
    """``node`` is the node file as it was at the start; ``snapshot`` the descriptor of the revision in force.

    ``boot`` is that of the first revision: what needs a restart is compared with it. ``tickets`` are for all workers:
    with keys of its own for each, a session would resume on one of them only; ``trust`` is which clients they were made
    under (:func:`ascproxy.net.tls.trust_of`). ``meeting`` is where control comes if it
    is not a child.
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
    trust: str = ""
    tickets: TicketKeys = field(default_factory=lambda: tls.fresh(os.urandom))
    berths: list[Berth] = field(default_factory=list)
    meeting: Meeting | None = None

    @classmethod
    def open(
        cls,
        node: Node,
        snapshot: int,
        revision: str,
        environment: Mapping[str, str],
        *,
        met: tuple[RunDir, Meeting] | None = None,
        trust: str = "",
    ) -> Holdings:
        """Lock and empty the run directory, bind everything that is not a slot's own. ``met``: that has been done, to
        meet control in it. Raises AscproxyError with one sentence."""
        run_dir, meeting = met if met is not None else (RunDir(node.run_dir), None)
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
            trust=trust,
            meeting=meeting,
        )

    def record(self) -> dict[str, Any]:
        """Names and numbers for the next program."""
        return {
            "run_dir": {"path": str(self.run_dir.path), "lock": self.run_dir.lock, "made": self.run_dir.made},
            "shared": [_record(bound) for bound in self.shared],
            "metrics": self.metrics.fileno(),
            "control": self.control.fileno(),
            "snapshot": self.snapshot,
            "boot": self.boot,
            "revision": self.revision,
            "slotted": dict(self.slotted),
            "tickets": self.tickets.pack().hex(),
            "trust": self.trust,
            "meeting": None if self.meeting is None else {"descriptor": self.meeting.fileno(), "uid": self.meeting.uid},
            "berths": [
                {
                    "sockets": [_record(bound) for bound in berth.sockets],
                    "post": berth.post.record(),
                    "spare": [page.name for page in berth.spare],
                    "pages": berth.pages,
                }
                for berth in self.berths
            ],
        }

    @classmethod
    def adopt(cls, raw: Mapping[str, Any]) -> Holdings:
        """The same holdings in the next program. Raises AscproxyError when something is not what the record says."""
        try:
            return cls._adopt(raw)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise AscproxyError(f"what the running service holds cannot be taken over: {error!r}") from error

    @classmethod
    def _adopt(cls, raw: Mapping[str, Any]) -> Holdings:
        run_dir = RunDir.adopt(**raw["run_dir"])
        for name in ("snapshot", "boot"):
            os.set_inheritable(raw[name], False)
        return cls(
            node=snapshots.decode(memfile.read(raw["boot"])).node,
            run_dir=run_dir,
            shared_page=run_dir.open_shared_page(),
            shared=tuple(_adopt(each, shared=True) for each in raw["shared"]),
            metrics=_inherited(raw["metrics"]),
            control=_inherited(raw["control"]),
            snapshot=raw["snapshot"],
            boot=raw["boot"],
            revision=raw["revision"],
            slotted=raw["slotted"],
            tickets=TicketKeys.unpack(bytes.fromhex(raw["tickets"])),
            trust=raw.get("trust", ""),  # layout 1 has been written without it: then the next reload makes fresh keys
            berths=[
                Berth(
                    tuple(_adopt(each, shared=False) for each in berth["sockets"]),
                    Post.adopt(run_dir, berth["post"]),
                    [run_dir.open_page(name) for name in berth["spare"]],
                    berth["pages"],
                )
                for berth in raw["berths"]
            ],
            meeting=Meeting.inherited(**raw["meeting"]) if raw.get("meeting") is not None else None,
        )

    def descriptors(self) -> Iterator[int]:
        """Everything of it that must survive an exec."""
        yield from (self.run_dir.lock, self.metrics.fileno(), self.control.fileno(), self.snapshot, self.boot)
        if self.meeting is not None:
            yield self.meeting.fileno()
        yield from (bound.socket.fileno() for bound in self.all_sockets())
        for berth in self.berths:
            yield from (berth.post.ours.fileno(), berth.post.theirs.fileno())

    def add_berth(self) -> Berth:
        """Bind and make what one more slot needs."""
        number = len(self.berths)
        berth = Berth(listener.bind_slot(self.slotted), self._post(self.run_dir.create_slot_page(number)))
        self.berths.append(berth)
        return berth

    def renew_post(self, number: int) -> Post:
        """Give the slot a post for its next process, and return the one that its last process keeps."""
        berth = self.berths[number]
        before = berth.post
        if berth.spare:
            page = berth.spare.pop()
        else:
            page = self.run_dir.create_slot_page(number, berth.pages)
            berth.pages += 1
        berth.post = self._post(page)
        return before

    def give_up(self, number: int, post: Post) -> None:
        """Nobody uses this post of the slot any more."""
        post.close()
        self.berths[number].spare.append(post.page)

    def reinstate(self, number: int, post: Post) -> None:
        """Give the slot an earlier post back, in place of the one that it has."""
        self.give_up(number, self.berths[number].post)
        self.berths[number].post = post

    def all_sockets(self) -> list[Bound]:
        """Every listening socket of the data path."""
        return [*self.shared, *(bound for berth in self.berths for bound in berth.sockets)]

    def leave_in_child(self, slot: int) -> None:
        """Close in slot's freshly forked worker what is not its own."""
        self.run_dir.close_in_child()
        self.metrics.close()
        self.control.close()
        if self.meeting is not None:
            self.meeting.close()
        for number, berth in enumerate(self.berths):
            berth.post.ours.close()
            if number != slot:
                berth.post.theirs.close()
                for bound in berth.sockets:
                    bound.socket.close()

    def close(self) -> None:
        """Give everything back."""
        listener.stop_listening(self.all_sockets())
        self.metrics.close()
        self.control.close()
        if self.meeting is not None:
            self.meeting.close()
        self.run_dir.close()

    @staticmethod
    def _post(page: PageFile) -> Post:
        return Post(page, *Mailbox.pair())


def _record(bound: Bound) -> dict[str, Any]:
    return {"name": bound.name, "descriptor": bound.socket.fileno(), "passed": bound.passed}


def _adopt(raw: Mapping[str, Any], *, shared: bool) -> Bound:
    end = _inherited(raw["descriptor"])
    if end.type != socket.SOCK_STREAM:
        raise ValueError(f"descriptor {raw['descriptor']} is no listening socket")
    return Bound(raw["name"], end, shared=shared, passed=raw["passed"])


def _inherited(descriptor: int) -> socket.socket:
    end = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    end.setblocking(False)
    return end
