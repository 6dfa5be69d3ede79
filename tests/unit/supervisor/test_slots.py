"""The machine of a slot and the rule over all of them, driven by hand; no process, no clock."""

from __future__ import annotations

import itertools

import pytest

from ascproxy.supervisor import slots
from ascproxy.supervisor.slots import MS, Action, Event, Fleet, Slot, State


def ready_fleet(n: int, now: int = 0) -> Fleet:
    fleet = Fleet()
    fleet.resize(n, now)
    for number in range(n):
        fleet.step(number, Event.READY, now)
    return fleet


def test_a_slot_that_was_ready_is_replaced_at_once() -> None:
    slot = Slot(0)
    assert slot.step(Event.WANTED, 0) == (Action.SPAWN,)
    assert slot.step(Event.READY, 5) == ()
    assert slot.step(Event.EXITED, 9) == (Action.SPAWN,)
    assert (slot.state, slot.incarnation, slot.restarts, slot.vacant_ns) == (State.STARTING, 2, 1, 9)


def test_a_slot_that_never_was_ready_waits_longer_each_time_up_to_5_s() -> None:
    slot, now, pauses = Slot(0), 0, []
    slot.step(Event.WANTED, now)
    for _ in range(8):
        slot.step(Event.EXITED, now)
        assert slot.state is State.PAUSED
        deadline = slot.deadline()
        assert deadline is not None and deadline[1] is Event.DUE
        pauses.append((deadline[0] - now) // MS)
        now = deadline[0]
        assert slot.step(Event.DUE, now) == (Action.SPAWN,)
    assert pauses == [100, 200, 400, 800, 1600, 3200, 5000, 5000]
    slot.step(Event.READY, now)
    slot.step(Event.EXITED, now)
    slot.step(Event.EXITED, now)
    assert slot.due_ns - now == 100 * MS  # it had recovered


def test_a_silent_process_is_killed_after_10_s_and_replaced_by_what_it_was() -> None:
    fleet = ready_fleet(2)
    fleet.slots[1].beat(5_000 * MS)
    assert fleet.tick(10_000 * MS - 1) == []
    assert fleet.tick(10_000 * MS) == [(Action.KILL, 0)]
    assert fleet.step(0, Event.EXITED, 10_001 * MS) == [(Action.SPAWN, 0)]
    assert fleet.tick(15_000 * MS) == [(Action.KILL, 1)]

    starting = Slot(0)
    starting.step(Event.WANTED, 0)
    assert starting.deadline() == (slots.SILENCE_NS, Event.SILENT)
    assert starting.step(Event.SILENT, slots.SILENCE_NS) == (Action.KILL,)
    assert starting.step(Event.EXITED, slots.SILENCE_NS) == ()
    assert starting.state is State.PAUSED


def test_a_vacant_slot_is_adopted_after_100_ms_by_the_ready_sibling_with_fewest() -> None:
    fleet = ready_fleet(4)
    for number in (0, 1):
        fleet.step(number, Event.EXITED, 0)
    assert fleet.next_ns() == 100 * MS
    assert fleet.tick(100 * MS - 1) == []
    assert fleet.tick(100 * MS) == [(Action.ADOPT, 0), (Action.ADOPT, 1)]
    assert {fleet.adopter_for(0), fleet.adopter_for(1)} == {2, 3}
    assert fleet.tick(101 * MS) == []
    assert fleet.step(0, Event.READY, 200 * MS) == [(Action.RELEASE, 0)]


def test_what_an_adopter_had_is_adopted_again_when_it_dies() -> None:
    fleet = ready_fleet(3)
    fleet.step(0, Event.EXITED, 0)
    fleet.tick(100 * MS)
    adopter = fleet.adopter_for(0)
    assert adopter is not None
    fleet.step(adopter, Event.EXITED, 150 * MS)
    assert fleet.slots[0].adopter is None
    assert fleet.tick(150 * MS) == [(Action.ADOPT, 0)]
    assert fleet.adopter_for(0) == 3 - adopter


def test_a_failed_adoption_is_tried_again_after_a_second() -> None:
    fleet = ready_fleet(2)
    fleet.step(0, Event.EXITED, 0)
    fleet.tick(100 * MS)
    fleet.adopter_for(0)
    fleet.adoption_failed(0, 100 * MS)
    assert fleet.tick(1_099 * MS) == []
    assert fleet.tick(1_100 * MS) == [(Action.ADOPT, 0)]


def test_a_slot_that_never_accepted_is_not_adopted() -> None:
    fleet = Fleet()
    fleet.resize(2, 0)
    fleet.step(0, Event.READY, 0)
    fleet.step(1, Event.EXITED, 0)  # its socket never listened: the kernel sends it nothing
    assert fleet.tick(99 * MS) == []
    assert (Action.ADOPT, 1) not in fleet.tick(5_000 * MS)


def test_nobody_adopts_while_no_sibling_is_ready_nor_while_stopping() -> None:
    fleet = ready_fleet(1)
    fleet.step(0, Event.EXITED, 0)
    assert fleet.tick(200 * MS) == []
    fleet = ready_fleet(2)
    assert fleet.stop(0) == [(Action.DRAIN, 0), (Action.DRAIN, 1)]
    fleet.step(0, Event.EXITED, 0)
    assert fleet.tick(200 * MS) == []
    fleet.step(1, Event.EXITED, 0)
    assert fleet.settled


def test_fewer_workers_drain_the_last_slots_and_siblings_take_their_sockets() -> None:
    fleet = ready_fleet(3)
    assert fleet.resize(2, 0) == [(Action.DRAIN, 2)]
    assert fleet.tick(100 * MS) == [(Action.ADOPT, 2)]
    fleet.adopter_for(2)
    assert fleet.step(2, Event.EXITED, 200 * MS) == []
    assert fleet.slots[2].state is State.EMPTY
    assert fleet.resize(3, 300 * MS) == [(Action.SPAWN, 2)]
    assert fleet.step(2, Event.READY, 400 * MS) == [(Action.RELEASE, 2)]


def test_wanted_again_while_draining_starts_after_the_exit() -> None:
    fleet = ready_fleet(2)
    fleet.resize(1, 0)
    assert fleet.resize(2, 1) == []
    assert fleet.step(1, Event.EXITED, 2) == [(Action.SPAWN, 1)]


def test_stop_ends_every_state_without_a_further_start() -> None:
    """From any state that events can lead to, a stop is followed by exits only."""
    for events in itertools.product(Event, repeat=4):
        slot = Slot(0)
        for event in events:
            if slot.alive or event is not Event.EXITED:
                slot.step(event, 0)
        slot.step(Event.UNWANTED, 1)
        if slot.alive:
            slot.step(Event.EXITED, 2)
        assert slot.state is State.EMPTY, events


@pytest.mark.parametrize("state", State)
def test_every_state_with_a_process_can_see_its_exit(state: State) -> None:
    assert ((state, Event.EXITED) in slots.TABLE) == (state in slots.ALIVE)
