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
FOREIGN = replace(FAILED, foreign=True)
KILL = Kill(at=50.0, pid=9, ports=frozenset({4711, 4712}))


def test_a_good_soak_has_no_violation() -> None:
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failures": (FAILED,)}, "1 of 10,000 requests failed; the first: ConnectionResetError"),
        ({"failures": (FOREIGN,)}, "1 answers were another request's; the first: "),
        ({"requests": 8_000}, "only 8,000 of 10,000 requests of the storm were made"),
        ({"pressures": (Pressure("p", 100, 100, (FAILED,)),)}, "p: 1 of 100 requests failed; the first: Connection"),
        ({"pressures": (Pressure("p", 100, 100, (FOREIGN,)),)}, "p: 1 answers were another request's; the first: "),
        ({"pressures": (Pressure("p", 100, 100, untold=3),)}, "p: 3 more failures than the load tells one by one"),
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
        ({"processes": (flat(), flat(13, draining=True, descriptors_after=90))}, "worker 13 still drains: its"),
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


@pytest.mark.parametrize("load", ["storm", "pressure"])
def test_a_kill_excuses_no_answer_of_another_request(load: str) -> None:
    seen = replace(GOOD, kills=(KILL,), restarts=1, **by(load, FOREIGN))
    (found,) = violations(seen)
    assert "1 answers were another request's" in found


def by(load: str, *failures: Failure) -> dict[str, Any]:
    """The same failures in either of the two loads."""
    if load == "storm":
        return {"failures": failures}
    return {"pressures": (Pressure("p", due=100, answered=100, failures=failures, lost=len(failures)),)}


@pytest.mark.parametrize("load", ["storm", "pressure"])
def test_each_failure_needs_a_kill_of_its_own(load: str) -> None:
    """Two failures, on connections that a killed worker had; a third one on a connection of no killed worker is not
    made up for by the kill having had more connections than have failed."""
    many = replace(KILL, ports=frozenset(range(4711, 4811)))
    owed_ = (FAILED, replace(FAILED, port=4712))
    stray = replace(FAILED, port=5000, error="reset by nobody")
    seen = replace(GOOD, kills=(many,), restarts=1)
    assert violations(replace(seen, **by(load, *owed_))) == []
    (found,) = violations(replace(seen, **by(load, *owed_, stray)))
    assert "1 of " in found
    assert "on connections that no killed worker had; the first: reset by nobody" in found


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


def test_the_report_says_how_many_failures_are_owed_to_kills() -> None:
    told = replace(GOOD, kills=(KILL,), **by("pressure", FAILED, replace(FAILED, port=1))).as_json()
    assert told["pressures"][0]["owed_to_kills"] == 1
    assert [one["port"] for one in told["pressures"][0]["failures"]] == [4711, 1]


def test_the_report_is_json_without_what_is_too_long() -> None:
    told = replace(GOOD, kills=(KILL,)).as_json()
    assert told["kills"] == [{"at": 50.0, "pid": 9, "connections": 2}]
    assert told["processes"][0]["mib_a_minute"] == pytest.approx(0, abs=0.01)
    assert "memory" not in told["processes"][0]
