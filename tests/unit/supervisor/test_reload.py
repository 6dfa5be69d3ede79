"""The decisions of one reload, and what carries them out, with children that the test plays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ascproxy.net import memfile, tls
from ascproxy.net.mailbox import Frame, Kind
from ascproxy.net.notify import Notifier
from ascproxy.supervisor.commands import Answer
from ascproxy.supervisor.reload import Outcome, Reload, Reloader
from ascproxy.supervisor.slots import Event, Fleet
from ascproxy.telemetry.log import Log


def test_the_first_success_puts_it_in_force_and_the_last_answer_ends_it() -> None:
    reload = Reload("a", 9, {0, 1, 2})
    assert reload.answer(0, None) == (Outcome.FIRST_SUCCESS, Outcome.WAITING)
    assert reload.answer(1, None) == (Outcome.WAITING,)
    assert reload.answer(2, None) == (Outcome.ALL,)
    assert reload.answer(2, None) == ()


def test_one_failure_of_two_is_said() -> None:
    reload = Reload("a", 9, {0, 1})
    assert reload.answer(1, "no certificate") == (Outcome.WAITING,)
    assert reload.answer(0, None) == (Outcome.FIRST_SUCCESS, Outcome.SOME)
    assert reload.failed == {1: "no certificate"}


def test_without_a_success_nothing_is_in_force() -> None:
    reload = Reload("a", 9, {0, 1})
    assert reload.answer(1, "x") == (Outcome.WAITING,)
    assert reload.answer(0, "the process exited") == (Outcome.NONE,)


class Played:
    """A reloader whose control and workers are the test: what they were asked waits in ``asked``."""

    def __init__(self, workers: int) -> None:
        self.asked: list[tuple[int | None, Frame, Answer]] = []
        self.fleet = Fleet()
        self.fleet.resize(workers, 0)
        first = memfile.seal("first", b"first")
        self.holdings: Any = SimpleNamespace(snapshot=first, revision="first", tickets=tls.fresh(os.urandom), trust="")
        self.said: list[Mapping[str, Any]] = []
        self.reloader = Reloader(
            holdings=self.holdings,
            fleet=self.fleet,
            notifier=Notifier({}, 1),
            log=Log("test", outlet=SimpleNamespace(write=len, terminal=False)),  # type: ignore[arg-type]
            to_control=lambda frame, answer: self.asked.append((None, frame, answer)),
            to_worker=lambda number, frame, answer: self.asked.append((number, frame, answer)),
            control_ready=lambda: True,
            in_force=lambda: None,
            status=lambda: "",
            said=self.said.append,
        )
        for slot in range(workers):
            self.reloader.given[slot] = 0

    def ready(self, slot: int) -> None:
        self.fleet.step(slot, Event.READY, 0)
        self.reloader.worker_ready(slot)

    def load(self, revision: str, trust: str = "") -> None:
        self.reloader.start()
        number, frame, answer = self.asked.pop(0)
        assert (number, frame.kind) == (None, Kind.LOAD)
        answer(
            None,
            Frame(Kind.DONE, payload={"revision": revision, "trust": trust}, descriptors=(memfile.seal("x", b""),)),
        )

    def answer(self, slot: int, reason: str | None = None) -> None:
        number, frame, answer = self.asked.pop(0)
        assert (number, frame.kind) == (slot, Kind.REVISION)
        answer(reason, None)


def test_a_worker_that_starts_during_two_reloads_gets_the_newest_once() -> None:
    """Descriptors are reused: that of the second revision is likely the one that the worker started with."""
    played = Played(2)
    played.ready(0)
    for revision in ("second", "third"):
        played.load(revision)
        played.answer(0)
        assert played.holdings.revision == revision
    played.ready(1)
    number, frame, answer = played.asked.pop()
    assert (number, frame.kind, frame.descriptors) == (1, Kind.REVISION, (played.holdings.snapshot,))
    answer(None, None)
    played.reloader.worker_ready(1)
    assert played.asked == []


def test_what_is_wanted_during_a_reload_is_one_more_reload() -> None:
    played = Played(1)
    played.ready(0)
    played.load("second")
    played.reloader.start()
    played.reloader.start()
    assert len(played.asked) == 1
    played.answer(0)
    assert [frame.kind for _, frame, _ in played.asked] == [Kind.LOAD]


def test_without_a_ready_worker_whoever_starts_next_takes_it() -> None:
    played = Played(1)
    played.load("second")
    assert played.holdings.revision == "second"
    played.ready(0)
    played.answer(0)


def test_a_refused_reload_ends_and_the_next_can_begin() -> None:
    played = Played(1)
    played.ready(0)
    played.reloader.start()
    played.asked.pop()[2]("no reason given", Frame(Kind.FAILED, payload={"findings": ["line 3: wrong"]}))
    assert played.holdings.revision == "first"
    played.load("second")
    played.answer(0, "cannot build")
    assert played.holdings.revision == "first"
    played.load("third")
    played.answer(0)
    assert played.holdings.revision == "third"


def test_rotation_gives_every_ready_worker_the_next_key() -> None:
    played = Played(2)
    played.ready(0)
    before = played.holdings.tickets
    played.reloader.rotate_tickets()
    (number, frame, _) = played.asked.pop()
    assert (number, frame.kind, played.asked) == (0, Kind.TICKETS, [])
    assert tls.TicketKeys.unpack(bytes.fromhex(frame.payload["tickets"])).current == before.next


def test_ticket_keys_are_fresh_when_other_clients_are_trusted_and_only_then() -> None:
    played = Played(1)
    played.ready(0)
    before = played.holdings.tickets
    played.load("second", trust="")
    played.answer(0)
    assert played.holdings.tickets is before
    played.load("third", trust="changed")
    sent = played.asked[0][1].payload["tickets"]
    assert sent != before.pack().hex()
    played.reloader.rotate_tickets()  # the worker is getting fresh ones: what it has now must not come back
    assert len(played.asked) == 1
    played.answer(0)
    assert played.holdings.tickets.pack().hex() == sent
    assert played.holdings.trust == "changed"


def test_a_reload_that_fails_leaves_the_ticket_keys() -> None:
    played = Played(1)
    played.ready(0)
    before = played.holdings.tickets
    played.load("second", trust="changed")
    played.answer(0, "cannot build")
    assert (played.holdings.tickets, played.holdings.trust) == (before, "")


def test_what_becomes_of_a_reload_is_said() -> None:
    played = Played(2)
    played.ready(0)
    played.ready(1)
    played.load("second")
    played.answer(0)
    played.answer(1)
    played.load("third")
    played.answer(0)
    played.answer(1, "cannot read key")
    played.load("fourth")
    played.answer(0, "cannot read key")
    played.answer(1, "cannot read key")
    played.reloader.start()
    played.asked.pop()[2]("no", Frame(Kind.FAILED, payload={"findings": ["line 3: wrong"]}))
    assert [
        (each["state"], each["revision"], each["findings"]) for each in played.said if each["state"] != "running"
    ] == [
        ("done", "second", []),
        ("partly", "third", ["cannot read key"]),
        ("failed", "third", ["cannot read key"]),
        ("failed", "third", ["line 3: wrong"]),
    ]
    numbers = [each["number"] for each in played.said]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 4
