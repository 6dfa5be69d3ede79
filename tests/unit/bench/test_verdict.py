"""Every promise of the soak, kept and broken, by observations that are made up."""

from dataclasses import replace
from typing import Any

import pytest

from bench.verdict import Failure, Kill, Observed, Pressure, Process, owed_to, slope, violations

KIB_A_MINUTE = 1024 / 60


def flat(pid: int = 10, role: str = "worker", grows_mib: float = 0.0, **changes: Any) -> Process:
    """A process over a hundred seconds, which fills 5 MiB in its first ten and then grows by so much a minute."""
    memory = [
        (float(t), int(20_000 + min(t, 10) * 512 + max(0, t - 10) * grows_mib * KIB_A_MINUTE)) for t in range(101)
    ]
    return replace(Process(pid, role, tuple(memory), descriptors_before=20, descriptors_after=20), **changes)


GOOD = Observed(
    begin=0.0,
    end=100.0,
    requests=10_000,
    requests_due=10_000,
    restarts=0,
    pressures=(Pressure("pressure", due=50_000, answered=50_000),),
    processes=(flat(), flat(11, "supervisor"), flat(12, "control")),
)
FAILED = Failure(opened=49.0, ended=51.0, port=4711, error="ConnectionResetError")
KILL = Kill(at=50.0, pid=9, ports=frozenset({4711, 4712}))


def test_a_good_soak_has_no_violation() -> None:
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failures": (FAILED,)}, "1 of 10000 requests failed; the first: ConnectionResetError"),
        ({"failures": (replace(FAILED, foreign=True),)}, "1 answers were another request's"),
        ({"requests": 8_000}, "only 8,000 of 10,000 requests with markers were made"),
        ({"pressures": (Pressure("p", 100, 100, failed=1, first_error="status 502"),)}, "1 requests failed and 0 were"),
        (
            {"pressures": (Pressure("p", 100, 100, lost=1),)},
            "0 requests failed and 1 were lost; the first: the connection",
        ),
        ({"pressures": (Pressure("p", 100, 80),)}, "only 80 of 100 requests were answered in time"),
        ({"processes": (flat(grows_mib=1.5),)}, "worker 10 grows by 1.5 MiB a minute; 1 is the bound"),
        (
            {
                "processes": (
                    flat(),
                    flat(11, "control", grows_mib=3),
                )
            },
            "control 11 grows by 3.0 MiB a minute",
        ),
        ({"processes": (flat(descriptors_after=21),)}, "worker 10 holds 21 descriptors after the load, 20 before it"),
        ({"restarts": 1}, "workers were replaced 1 times, and 0 were killed"),
        ({"kills": (KILL,)}, "workers were replaced 0 times, and 1 were killed"),
        ({"exit_code": 1}, "the service ended with exit code 1"),
    ],
)
def test_each_promise_can_be_broken(changes: dict[str, Any], said: str) -> None:
    (found,) = violations(replace(GOOD, **changes))
    assert said in found


def test_a_soak_in_which_nothing_can_be_judged_does_not_pass() -> None:
    found = violations(replace(GOOD, processes=()))
    assert "no process lived from the first 10 s to the end: its memory cannot be judged" in found
    assert "descriptors were not counted before the load" in found


@pytest.mark.parametrize(
    ("failure", "excused"),
    [
        (FAILED, True),
        (replace(FAILED, port=4713), False),  # the worker had not this connection
        (replace(FAILED, opened=50.5), False),  # the port was used again, after the kill
        (replace(FAILED, ended=49.9), False),  # it failed before
    ],
)
def test_a_kill_excuses_what_was_open_to_the_killed_worker_and_nothing_else(failure: Failure, excused: bool) -> None:
    assert owed_to(failure, [KILL]) is excused
    seen = replace(GOOD, failures=(failure,), kills=(KILL,), restarts=1)
    assert (violations(seen) == []) is excused


def test_a_kill_excuses_no_answer_of_another_request() -> None:
    seen = replace(GOOD, failures=(replace(FAILED, foreign=True),), kills=(KILL,), restarts=1)
    assert violations(seen) == ["1 answers were another request's"]


@pytest.mark.parametrize(("lost", "passes"), [(2, True), (3, False)])
def test_the_pressure_may_lose_as_many_as_the_killed_workers_had(lost: int, passes: bool) -> None:
    pressure = Pressure("p", due=100, answered=100, failed=1, lost=lost - 1)
    assert (violations(replace(GOOD, pressures=(pressure,), kills=(KILL,), restarts=1)) == []) is passes


def test_a_replaced_worker_is_not_judged_by_its_memory_but_by_its_descriptors() -> None:
    late = flat(13, grows_mib=30, descriptors_before=None)
    late = replace(late, memory=tuple(point for point in late.memory if point[0] >= 60))
    seen = replace(GOOD, kills=(KILL,), restarts=1)
    assert violations(replace(seen, processes=(*GOOD.processes, late))) == []
    (found,) = violations(replace(seen, processes=(*GOOD.processes, replace(late, descriptors_after=24))))
    assert "worker 13 holds 24 descriptors" in found


def test_the_slope_is_of_most_pairs_and_a_step_does_not_move_it() -> None:
    assert slope([(t, 1000 + 1024 * t) for t in range(60)]) == pytest.approx(60)
    assert slope([(t, 1000 if t < 30 else 9000) for t in range(20)] + [(20 + t, 9000) for t in range(40)]) == 0
    assert slope([(0, 1), (1, 2)]) is None
    assert slope([]) is None


def test_the_slope_of_an_hour_is_found_from_a_part_of_its_points() -> None:
    assert slope([(t, 1000 + t) for t in range(3600)]) == pytest.approx(60 / 1024)


def test_the_report_is_json_without_what_is_too_long() -> None:
    told = replace(GOOD, kills=(KILL,)).as_json()
    assert told["kills"] == [{"at": 50.0, "pid": 9, "connections": 2}]
    assert told["processes"][0]["mib_a_minute"] == pytest.approx(0, abs=0.01)
    assert "memory" not in told["processes"][0]
