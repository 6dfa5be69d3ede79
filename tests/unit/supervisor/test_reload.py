"""The decisions of one reload."""

from __future__ import annotations

from ascproxy.supervisor.reload import Outcome, Reload


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
