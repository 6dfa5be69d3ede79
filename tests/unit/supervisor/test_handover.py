"""What one program hands to the next: its layouts, and the same object on the other side."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import orjson
import pytest

from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot as snapshots
from ascproxy.model.node import Listener
from ascproxy.net import memfile
from ascproxy.net.mailbox import Frame, Kind
from ascproxy.net.meeting import Meeting
from ascproxy.supervisor import arrival
from ascproxy.supervisor.handover import LAYOUT, ControlProcess, Handover, HandoverError, Process, decode
from ascproxy.supervisor.holdings import Holdings
from ascproxy.supervisor.rundir import RunDir, RunDirError
from ascproxy.supervisor.slots import Event, Slot, State
from tests.kit.processes import snapshot

SLOTS = (
    Slot(0, State.READY, incarnation=3, restarts=2, opened=True),
    Slot(1, State.PAUSED, incarnation=9, vacant_ns=5, adopter=0, opened=True),
)
HANDOVER = Handover(
    version="0.1.0",
    number=4,
    wanted=2,
    rotate_ns=77,
    holdings={"revision": "a1"},
    slots=SLOTS,
    processes=(
        Process(SLOTS[0], 100, 10),
        Process(Slot(0, State.READY, 2), 99, 11, {"page": "slot-0.1.page", "ours": 12, "theirs": 13}, until_ns=8),
    ),
    control=ControlProcess(98, 14, 15),
)


def test_it_is_read_as_it_was_written() -> None:
    assert decode(HANDOVER.encode()) == HANDOVER
    assert sorted(HANDOVER.descriptors()) == [10, 11, 12, 13, 14, 15]


def test_a_control_that_is_no_child_has_a_mailbox_only() -> None:
    attached = dataclasses.replace(HANDOVER, control=ControlProcess(None, None, 15))
    assert decode(attached.encode()) == attached
    assert sorted(attached.descriptors()) == [10, 11, 12, 13, 15]


def test_its_bytes_are_a_contract() -> None:
    """Another version reads them: a change of this golden file needs a new layout and a lift (docs/formats)."""
    golden = Path(__file__).parents[2] / "golden" / "handover-1.json"
    assert orjson.dumps(orjson.loads(HANDOVER.encode()), option=orjson.OPT_INDENT_2) + b"\n" == golden.read_bytes()
    assert LAYOUT == 1


def test_a_layout_of_the_version_before_is_lifted() -> None:
    def lift(document: dict[str, Any]) -> dict[str, Any]:
        document["rotate_ns"] = document.pop("rotation_ms") * 1_000_000
        return document

    old = orjson.loads(HANDOVER.encode())
    old["rotation_ms"] = 3
    del old["rotate_ns"]
    found = decode(orjson.dumps(old), lifts={LAYOUT: lift}, newest=LAYOUT + 1)
    assert found == dataclasses.replace(HANDOVER, rotate_ns=3_000_000)


@pytest.mark.parametrize("layout", [0, LAYOUT + 1, 999, "1", None])
def test_an_unknown_layout_is_refused_with_what_to_do(layout: object) -> None:
    document = orjson.loads(HANDOVER.encode()) | {"layout": layout}
    with pytest.raises(HandoverError, match=f"hands over layout {layout}, this version reads layout 1: upgrade to a"):
        decode(orjson.dumps(document))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"layout": 1}'])
def test_damage_is_a_sentence(damage: bytes) -> None:
    with pytest.raises(HandoverError, match="handed over"):
        decode(damage)


@pytest.mark.parametrize("name", ["slots", "processes", "holdings", "control", "number"])
def test_a_member_that_is_missing_is_named(name: str) -> None:
    document = orjson.loads(HANDOVER.encode())
    del document[name]
    with pytest.raises(HandoverError, match=name):
        decode(orjson.dumps(document))


# holdings


@pytest.fixture
def holdings(tmp_path: Path) -> Holdings:
    listeners = (snapshot(tmp_path).node.listeners[0], Listener("local", f"unix:{tmp_path}/data.sock"))
    first = snapshot(tmp_path, listeners=listeners)
    held = Holdings.open(first.node, memfile.seal("s", snapshots.encode(first)), first.revision, {})
    held.add_berth()
    held.add_berth()
    return held


def copied(record: dict[str, Any]) -> dict[str, Any]:
    """The record with copies of its descriptors, as an exec would leave them to the next program."""

    def copy(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: copy(member, key) for key, member in value.items()}
        if isinstance(value, list):
            return [copy(member) for member in value]
        descriptors = ("lock", "metrics", "control", "snapshot", "boot", "descriptor", "ours", "theirs")
        if name in descriptors:
            number = os.dup(value)
            os.set_inheritable(number, True)
            return number
        return value

    found = copy(record)
    assert isinstance(found, dict)
    return found


def test_adopted_holdings_are_the_same_things(holdings: Holdings) -> None:
    record = copied(orjson.loads(orjson.dumps(holdings.record())))
    taken = Holdings.adopt(record)
    assert (taken.node, taken.revision, taken.tickets) == (holdings.node, holdings.revision, holdings.tickets)
    assert [bound.name for bound in taken.all_sockets()] == [bound.name for bound in holdings.all_sockets()]
    for mine, theirs in zip(taken.all_sockets(), holdings.all_sockets(), strict=True):
        assert mine.socket.getsockname() == theirs.socket.getsockname()
        assert (mine.shared, mine.passed) == (theirs.shared, theirs.passed)
    assert taken.berths[1].post.page.name == "slot-1.page"
    holdings.berths[1].post.page.page.store(5, 41)
    assert taken.berths[1].post.page.page.load(5) == 41
    taken.berths[0].post.ours.send(Frame(Kind.TICKETS))
    received = holdings.berths[0].post.theirs.receive()
    assert received is not None and received.kind is Kind.TICKETS
    for descriptor in taken.descriptors():
        assert not os.get_inheritable(descriptor), "no worker gets it by accident"
    assert taken.meeting is None
    taken.close()
    assert not holdings.run_dir.path.exists()


def test_the_socket_where_control_comes_is_passed_on(tmp_path: Path) -> None:
    first = snapshot(tmp_path)
    run_dir = RunDir(first.node.run_dir, 0o750)
    met = run_dir, Meeting.open(run_dir.path / "gateway.sock", 4711)
    held = Holdings.open(first.node, memfile.seal("s", snapshots.encode(first)), first.revision, {}, met=met)
    assert held.meeting is not None and held.meeting.fileno() in list(held.descriptors())
    taken = Holdings.adopt(copied(orjson.loads(orjson.dumps(held.record()))))
    assert taken.meeting is not None and taken.meeting.uid == 4711
    assert not os.get_inheritable(taken.meeting.fileno())
    before = orjson.loads(orjson.dumps(held.record()))
    del before["meeting"]  # as a version that did not know it writes
    assert Holdings.adopt(copied(before)).meeting is None
    taken.close()


def test_a_post_that_is_given_up_is_used_again(holdings: Holdings) -> None:
    first = holdings.renew_post(0)
    assert holdings.berths[0].post.page.name == "slot-0.1.page"
    holdings.give_up(0, first)
    assert holdings.renew_post(0).page.name == "slot-0.1.page"
    assert holdings.berths[0].post.page.name == "slot-0.page"
    record = holdings.record()["berths"][0]
    assert (record["post"]["page"], record["spare"], record["pages"]) == ("slot-0.page", [], 2)


def test_a_page_of_another_layout_is_refused(holdings: Holdings) -> None:
    record = copied(holdings.record())
    holdings.berths[0].post.page.memory[8:16] = (99).to_bytes(8, "little")
    with pytest.raises(RunDirError, match=r"slot-0\.page cannot be read by this version"):
        Holdings.adopt(record)


def test_a_snapshot_of_another_layout_is_refused(holdings: Holdings) -> None:
    record = copied(holdings.record())
    record["boot"] = memfile.seal("boot", b'{"layout": 99, "snapshot": {}}')
    with pytest.raises(AscproxyError, match="snapshot has layout 99"):
        Holdings.adopt(record)


@pytest.mark.parametrize("change", ["a file for a socket", "nothing for a socket", "another lock"])
def test_descriptors_that_are_something_else_are_refused(holdings: Holdings, change: str, tmp_path: Path) -> None:
    record = copied(holdings.record())
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDWR)
    if change == "a file for a socket":
        record["metrics"] = other
    elif change == "nothing for a socket":
        os.close(record["metrics"])
    else:
        record["run_dir"]["lock"] = other
    with pytest.raises(AscproxyError):
        Holdings.adopt(record)


def test_only_what_is_no_listening_stream_is_refused(holdings: Holdings) -> None:
    record = copied(holdings.record())
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    record["berths"][0]["sockets"][0]["descriptor"] = datagram.detach()
    with pytest.raises(AscproxyError, match="no listening socket"):
        Holdings.adopt(record)


# slots on the other side


def test_slots_of_the_next_program_count_on() -> None:
    ready, paused = arrival.fresh_slots(HANDOVER, 50)
    assert (ready.state, ready.incarnation, ready.restarts, ready.opened) == (State.EMPTY, 3, 2, False)
    assert (paused.vacant_ns, paused.adopter) == (None, None), "wanted: its new worker comes at once"
    ready.step(Event.WANTED, 60)
    assert (ready.incarnation, ready.restarts) == (4, 2)
    fewer = arrival.fresh_slots(dataclasses.replace(HANDOVER, wanted=1), 50)
    assert (fewer[1].opened, fewer[1].vacant_ns) == (True, 50), "not wanted, but its socket must be accepted"


def test_a_slot_that_is_turned_round_never_repeats_an_incarnation() -> None:
    before, failed = Slot(0, State.READY, incarnation=3), Slot(0, State.PAUSED, incarnation=6)
    slot, event = arrival.turned_back(before, failed, present=True)
    assert (slot.state, slot.incarnation, event) == (State.READY, 6, None)


def test_a_slot_whose_old_worker_died_meanwhile_gets_another() -> None:
    before, failed = Slot(0, State.READY, incarnation=3), Slot(0, State.STARTING, incarnation=4)
    slot, event = arrival.turned_back(before, failed, present=False)
    assert event is Event.EXITED
    slot.step(event, 5)
    assert (slot.state, slot.incarnation) == (State.STARTING, 5)
