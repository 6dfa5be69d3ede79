"""The node's state from pages that the test writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ascproxy import _native
from ascproxy.control import node as nodes
from ascproxy.control.node import Node, SharedPage
from ascproxy.supervisor.rundir import RunDir
from ascproxy.supervisor.slots import State
from ascproxy.telemetry import metrics

SECOND = 1_000_000_000
CELLS = _native.Page.CELLS


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "run"))


def test_the_numbers_of_states_are_the_supervisors() -> None:
    assert len(nodes.STATES) == len(State)
    assert (nodes.EMPTY, nodes.READY) == (State.EMPTY, State.READY)
    assert nodes.STATES[State.DRAINING] == "draining"


def test_readiness_needs_a_revision_and_a_worker_that_ticks(run_dir: RunDir) -> None:
    page = run_dir.create_slot_page(0).page
    now = 100 * SECOND
    node = Node(run_dir.path, lambda: now)
    assert node.readiness(None).reasons == ("no revision is in force", "no worker accepts connections")
    page.store(CELLS["state"], State.READY)
    page.store(CELLS["listening"], 1)
    page.store(CELLS["heartbeat_ns"], 91 * SECOND)
    assert node.readiness("0000000000a1").ready
    assert node.live()
    now = 101 * SECOND
    assert not node.live()
    assert node.readiness("0000000000a1").reasons == ("no worker has ticked within 10 s",)
    page.store(CELLS["state"], State.DRAINING)
    assert node.readiness("0000000000a1").reasons == ("no worker accepts connections",)


def test_slots_that_are_added_are_seen_and_empty_ones_are_not_shown(run_dir: RunDir) -> None:
    node = Node(run_dir.path)
    assert node.status(None) == {"revision": None, "separation": "none", "workers": [], "upgrade": None}
    assert Node(run_dir.path, separation="units").status(None)["separation"] == "units"
    run_dir.create_slot_page(0).page.store(CELLS["state"], State.EMPTY)
    second = run_dir.create_slot_page(1).page
    second.store(CELLS["state"], State.PAUSED)
    second.store(CELLS["restarts"], 4)
    assert node.status("00000000000a")["workers"] == [
        {"slot": 1, "pid": None, "state": "waiting", "revision": None, "restarts": 4, "in_flight": 0}
    ]


def test_the_shared_page_is_read_where_it_is_written(run_dir: RunDir) -> None:
    file = run_dir.create_shared_page()
    readers = file.page
    descriptor = run_dir.open_to_write(file)
    shared = SharedPage(descriptor)
    os.close(descriptor)
    shared.bump_key_epoch()
    shared.bump_key_epoch()
    shared.set_revision("00ab12cd34ef")
    assert readers.load(readers.series(metrics.KEY_EPOCH, 1)) == 2
    assert metrics.revision_name(readers.load(readers.series(metrics.REVISION, 1))) == "00ab12cd34ef"
