"""What a tree is, and what its members spent, read from the text of /proc."""

import os

import pytest

from bench.process import Stat, cpu_seconds, living, memory, parse_smaps_rollup, parse_stat, select

TAIL = "S 7 42 42 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 1 0 5 6 7"


@pytest.mark.parametrize("name", ["nginx", "a b", ") R 1 1 1 (", "((", "))"])
def test_a_name_with_blanks_and_brackets_does_not_shift_the_fields(name: str) -> None:
    assert parse_stat(f"4711 ({name}) {TAIL}\n") == Stat(pid=4711, parent=7, session=42, ticks=11 + 22 + 33 + 44)


def test_the_tree_holds_descendants_and_orphans_of_the_session_and_nobody_else() -> None:
    root = Stat(100, 1, 100, 0)
    child = Stat(101, 100, 100, 0)
    grandchild_of_own_session = Stat(102, 101, 102, 0)
    orphan = Stat(103, 1, 100, 0)
    stranger = Stat(104, 1, 104, 0)
    found = select(100, [grandchild_of_own_session, stranger, orphan, child, root])
    assert {s.pid for s in found} == {100, 101, 102, 103}


def test_cpu_is_summed_over_the_tree_in_seconds() -> None:
    per_second = os.sysconf("SC_CLK_TCK")
    stats = [Stat(1, 0, 1, 5 * per_second), Stat(2, 1, 1, per_second // 2), Stat(3, 0, 3, per_second)]
    assert cpu_seconds(1, stats) == pytest.approx(5.5)


def test_smaps_rollup_is_read_in_kib() -> None:
    text = "5600-7ffe ---p 00000000 00:00 0    [rollup]\nRss:    1234 kB\nPss:     567 kB\nPss_Dirty:  8 kB\n"
    assert parse_smaps_rollup(text) == {"Rss": 1234, "Pss": 567, "Pss_Dirty": 8}


def test_this_process_is_found_alive_and_resident() -> None:
    assert os.getpid() in {s.pid for s in living()}
    held = memory(os.getpid())
    assert held.processes >= 1
    assert held.rss_kib >= held.pss_kib > 1000
