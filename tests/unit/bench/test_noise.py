"""Steal and strangers, from the text of /proc/stat."""

import pytest

from bench.noise import Noise, Ticks, between, parse, read

TEXT = """\
cpu  965453 35991 294878 1362648 7583 0 80683 3902 10 5
cpu0 400 10 100 1000 50 5 20 7 0 0
cpu1 500 0 200 900 0 0 0 3 0 0
intr 12345 0 1
ctxt 99
"""


def test_the_cores_and_their_sum_are_read() -> None:
    found = parse(TEXT)
    assert found.keys() == {-1, 0, 1}
    assert found[0] == Ticks(busy=400 + 10 + 100 + 5 + 20, idle=1050, steal=7)
    assert found[-1].steal == 3902


def test_this_machine_has_cores() -> None:
    found = read()
    assert found[-1].busy > 0
    assert len(found) > 1


def around(busy: int, idle: int, steal: int, *, all_busy: int) -> tuple[dict[int, Ticks], dict[int, Ticks]]:
    before = {-1: Ticks(50, 50, 5), 1: Ticks(10, 20, 3)}
    after = {-1: Ticks(50 + all_busy, 50, 5), 1: Ticks(10 + busy, 20 + idle, 3 + steal)}
    return before, after


def test_what_is_not_the_subjects_is_foreign_and_what_is_stolen_is_neither() -> None:
    before, after = around(80, 10, 10, all_busy=150)
    found = between(before, after, core=1, subject_ticks=60, own_ticks=140)
    assert found == Noise(steal=pytest.approx(0.1), foreign=pytest.approx(0.2), foreign_anywhere=pytest.approx(0.1))
    assert found.useless


def test_clocks_that_differ_by_a_tick_make_no_negative_noise() -> None:
    before, after = around(99, 1, 0, all_busy=150)
    found = between(before, after, core=1, subject_ticks=100, own_ticks=152)
    assert found == Noise(0.0, 0.0, 0.0)
    assert not found.useless


def test_a_window_of_no_time_has_no_noise() -> None:
    before, after = around(0, 0, 0, all_busy=0)
    assert between(before, after, core=1, subject_ticks=0, own_ticks=0) == Noise(0.0, 0.0, 0.0)
