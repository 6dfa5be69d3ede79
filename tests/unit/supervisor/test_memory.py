"""Memory of the service: which step follows from how much, where the limit comes from, and what is counted."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from ascproxy import _native
from ascproxy.supervisor.memory import PERIOD_NS, Memory, Step, cgroup_limit, limit_of, step_after
from ascproxy.telemetry import memory, metrics
from ascproxy.telemetry.log import Log

MIB = 1 << 20


def page() -> _native.Page:
    return _native.Page(mmap.mmap(-1, 1 << 20))


@pytest.mark.parametrize(
    ("before", "used", "after"),
    [
        (0, 849, 0), (0, 850, 1), (0, 919, 1), (0, 920, 2), (0, 969, 2), (0, 970, 3), (0, 2000, 3),
        (1, 820, 1), (1, 819, 0), (2, 890, 2), (2, 889, 1), (2, 819, 0), (3, 940, 3), (3, 939, 2), (3, 889, 1),
        (3, 0, 0), (1, 970, 3), (2, 849, 1),
    ],
)  # fmt: skip
def test_a_step_is_entered_at_once_and_left_three_points_lower(before: int, used: int, after: int) -> None:
    assert step_after(Step(before), used, 1000) is Step(after)


def test_a_wave_around_a_bound_does_not_flap() -> None:
    step, changes = Step.NONE, 0
    for turn in range(1000):
        following = step_after(step, 920 + (turn % 2) * 25 - 12, 1000)
        changes += following is not step
        step = following
    assert step is Step.REFUSE
    assert changes == 2


def test_the_limit_is_the_files_then_the_cgroups_then_the_machines() -> None:
    assert limit_of(5, 1000, 100) == 5
    assert limit_of(0, 1000, 100) == 100
    assert limit_of(0, 1000, None) == 800
    assert limit_of(0, 1000, 1000) == 800, "a cgroup that may have everything has no limit"


def test_the_smallest_limit_of_a_cgroup_and_those_above_it_counts(tmp_path: Path) -> None:
    leaf = tmp_path / "system.slice" / "ascproxy.service"
    leaf.mkdir(parents=True)
    own = "1:name=systemd:/elsewhere\n0::/system.slice/ascproxy.service\n"
    assert cgroup_limit(own, tmp_path) is None
    (leaf / "memory.max").write_text("max\n")
    assert cgroup_limit(own, tmp_path) is None
    (leaf / "memory.max").write_text("3000\n")
    assert cgroup_limit(own, tmp_path) == 3000
    (leaf.parent / "memory.max").write_text("2000\n")
    assert cgroup_limit(own, tmp_path) == 2000
    assert cgroup_limit("4:memory:/old\n", tmp_path) is None
    assert cgroup_limit("0::/\n", tmp_path) is None
    assert cgroup_limit("", tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")  # a container sees its own cgroup as the root
    assert cgroup_limit("0::/\n", tmp_path) == 1000


def test_every_process_is_counted_once_and_the_step_is_published(capfd: pytest.CaptureFixture[str]) -> None:
    shared, worker = page(), page()
    watch = Memory(shared, 40 * 1024 * MIB, Log("supervisor"))

    def cell(key: bytes) -> int:
        return shared.load(shared.series(key, 1))

    assert cell(metrics.MEMORY_LIMIT) == 40 * 1024 * MIB
    watch.look(1, [], [])
    alone = cell(metrics.MEMORY)
    assert alone >= memory.anonymous()
    worker.store(_native.Page.CELLS["memory"], 35 * 1024 * MIB)
    watch.look(PERIOD_NS, [worker], [os.getpid()])
    assert cell(metrics.MEMORY) == alone, "it was not time"
    watch.look(PERIOD_NS + 1, [worker], [os.getpid(), 1 << 22 | 12345])
    assert abs(cell(metrics.MEMORY) - (alone + 35 * 1024 * MIB + memory.anonymous())) < 16 * MIB
    assert cell(metrics.OVERLOAD) == Step.NO_KEEP_ALIVE
    watch.judge(39 * 1024 * MIB)
    watch.judge(39 * 1024 * MIB + 1)
    assert cell(metrics.OVERLOAD) == Step.NO_ACCEPT
    watch.judge(0)
    assert cell(metrics.OVERLOAD) == Step.NONE
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3, "one line for each change of the step"


def test_memory_that_a_process_takes_is_seen_and_what_it_inherited_is_not() -> None:
    ballast = bytearray(os.urandom(1)) * (64 * MIB)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            own = memory.Footprint()
            before = own.read()
            more = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not what the heap has kept
            for page in range(0, len(more), 4096):
                more[page] = 1
            os.write(write, f"{before} {own.read()} {len(more)}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        before, after, _ = map(int, answer.read().split())
    os.waitpid(pid, 0)
    assert memory.anonymous() >= len(ballast)
    assert before < memory.anonymous() - len(ballast) // 4, "pages shared with the parent are not a child's own"
    assert 30 * MIB <= after - before <= 40 * MIB
