"""Medians, ratios and doubts, from samples made by hand."""

from typing import Any

import pytest

from bench import table
from bench.lines import Sample, Start
from bench.noise import Noise
from bench.process import Memory

PLAIN: dict[str, Any] = {
    "line": "W1",
    "subject": "nginx",
    "round": 1,
    "seconds": 5.0,
    "units": 100_000,
    "per_second": 20_000.0,
    "cpu_us": 20.0,
    "busy": 0.99,
    "stub_us": 7.0,
    "load_us": 7.0,
    "errors": 0,
    "first_error": "",
    "reconnects": 0,
    "latency_us": {"p50": 100.0, "p99": 300.0},
    "stub_late": 0,
}


def sample(**changes: Any) -> Sample:
    return Sample(**{**PLAIN, **changes})


def cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_a_cell_is_the_median_and_not_the_mean() -> None:
    rounds = [sample(round=n, cpu_us=cost) for n, cost in enumerate((10.0, 11.0, 90.0))]
    assert table.cost_us(rounds, "W1", "nginx") == 11.0


def test_ratios_are_of_medians_of_minima_and_of_pairs() -> None:
    ours, theirs = (10.0, 30.0, 20.0), (10.0, 20.0, 40.0)
    rounds = [sample(subject="ascproxy", window=n, cpu_us=cost) for n, cost in enumerate(ours)]
    rounds += [sample(window=n, cpu_us=cost) for n, cost in enumerate(theirs)]
    text = table.ratios(rounds, ["W1"], ["nginx", "ascproxy"])
    assert cells(text, "ascproxy / nginx, medians") == ["1.00"]
    assert cells(text, "ascproxy / nginx, minima") == ["1.00"]
    assert cells(text, "ascproxy / nginx, paired") == ["1.00"]
    rounds[0] = sample(subject="ascproxy", window=0, cpu_us=5.0)
    text = table.ratios(rounds, ["W1"], ["nginx", "ascproxy"])
    assert cells(text, "ascproxy / nginx, medians") == ["1.00"]
    assert cells(text, "ascproxy / nginx, minima") == ["0.50"]
    assert cells(text, "ascproxy / nginx, paired") == ["0.50"]


def test_a_window_is_paired_with_the_one_beside_it_only() -> None:
    rounds = [sample(subject="ascproxy", round=1, window=2, cpu_us=9.0), sample(round=2, window=1)]
    assert table.paired(rounds, "W1", "ascproxy", "nginx") is None


def test_sizes_are_compared_with_the_smallest() -> None:
    rounds = [
        sample(line="keys", subject="ascproxy", size=size, window=n, cpu_us=cost)
        for size, costs in ((10, (20.0, 22.0)), (1_000_000, (21.0, 23.1)))
        for n, cost in enumerate(costs)
    ]
    text = table.by_size(rounds, ["W1", "keys"])
    assert cells(text, "keys 10") == ["10", "21.0", "20.0", "+0.0%", "+0.0%"]
    assert cells(text, "keys 1,000,000") == ["1,000", "22.1", "21.0", "+5.0%", "+5.0%"]
    assert table.by_size(rounds, ["W1"]) == ""


def test_a_stream_costs_what_the_workers_grew_by() -> None:
    held = sample(
        line="streams",
        connections=1000,
        worker_idle=Memory(10 * 1024, 0, 1),
        worker_loaded=Memory(30 * 1024, 0, 1),
    )
    assert table.stream_bytes(held) == 20 * 1024 * 1024 / 1000
    assert cells(table.streams([held], ["streams"], ["nginx"]), "streams nginx") == ["1,000", "10", "30", "20,972", "0"]


def test_starts_are_told_by_the_number_of_workers() -> None:
    found = [
        Start("ascproxy", workers, n, seconds) for n, (workers, seconds) in enumerate(((1, 0.5), (4, 0.9), (4, 0.7)))
    ]
    text = table.starts(found)
    assert cells(text, "ascproxy, 1 workers") == ["0.50", "0.50", "0.50"]
    assert cells(text, "ascproxy, 4 workers") == ["0.80", "0.70", "0.90"]


def test_ratios_are_against_each_reference() -> None:
    rounds = [sample(), sample(subject="haproxy", cpu_us=25.0), sample(subject="ascproxy", cpu_us=15.0)]
    text = table.ratios(rounds, ["W1", "latency"], ["bare", "nginx", "haproxy", "ascproxy"])
    assert cells(text, "ascproxy / nginx, medians") == ["0.75"]
    assert cells(text, "ascproxy / haproxy, medians") == ["0.60"]
    assert "bare" not in text


def test_a_subject_that_was_not_measured_keeps_its_row() -> None:
    subjects = ["nginx", "ascproxy"]
    assert cells(table.summary([sample()], ["W1"], subjects), "ascproxy") == ["-", "-"]
    assert cells(table.ratios([sample()], ["W1"], subjects), "ascproxy / nginx, medians") == ["-"]


def test_added_latency_is_taken_within_a_round() -> None:
    rounds = []
    for number, bare in enumerate((50.0, 500.0, 60.0)):
        base = {"line": "latency", "round": number}
        rounds.append(sample(**base, subject="bare", latency_us={"p50": bare, "p99": bare}))
        rounds.append(sample(**base, latency_us={"p50": bare + 70 + number, "p99": bare + 200}))
    assert table.added_us(rounds, "nginx", "p50") == 71.0
    assert cells(table.summary(rounds, ["latency"], ["bare", "nginx"]), "nginx") == ["71/200"]


def test_memory_is_shown_in_mib_resident_and_proportional() -> None:
    held = sample(
        line="memory",
        idle=Memory(15 * 1024, 8 * 1024, 3),
        loaded=Memory(25 * 1024, 18 * 1024, 3),
        worker_idle=Memory(10 * 1024, 6 * 1024, 2),
        worker_loaded=Memory(20 * 1024, 16 * 1024, 2),
    )
    # of the tree, of the tree, of one worker, of one worker
    assert cells(table.summary([held], ["memory"], ["nginx"]), "nginx") == ["15/25", "8/18", "5/10", "3/8"]


STREAM = {
    "line": "SSE",
    "connections": 500,
    "busy": 0.4,
    "per_second": 25_000.0,
    "latency_us": {"p50": 20_000.0, "p99": 23_000.0},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": 3, "first_error": "status 401"}, "3 errors; the first: status 401"),
        ({"units": 0}, "nothing was answered in 1 of 1 windows"),
        ({"busy": 0.5}, "only 50% of its core was used"),
        ({**STREAM, "per_second": 20_000.0}, "only 80% of the events that were due came"),
        ({**STREAM, "latency_us": {"p50": 0.0, "p99": 220_000.0}}, "gathered or late, up to 220 ms apart"),
        ({"stub_late": 1001}, "1001 events of the stub were late or skipped"),
    ],
)
def test_a_figure_that_means_something_else_is_named(changes: dict[str, Any], said: str) -> None:
    (doubt,) = table.doubts([sample(**changes)])
    assert said in doubt


@pytest.mark.parametrize(
    "disturbance",
    [Noise(steal=0.04, foreign=0.0, foreign_anywhere=0.0), Noise(0.0, 0.11, 0.11)],
    ids=["steal", "foreign"],
)
def test_a_machine_that_does_other_things_makes_a_figure_useless(disturbance: Noise) -> None:
    quiet = Noise(steal=0.02, foreign=0.09, foreign_anywhere=1.5)
    calm = [sample(window=n, noise=quiet) for n in range(10)]
    assert table.doubts(calm) == []
    assert table.doubts([*calm, sample(noise=disturbance)]) == []
    bad = [sample(subject="haproxy", window=n, noise=disturbance) for n in range(3)]
    (cell,) = table.doubts([*calm, *bad])
    assert cell == "W1 haproxy: the machine was busy with other things in 3 of 3 windows"
    (whole,) = table.doubts(bad)
    assert whole.startswith("in 3 of 3 windows")
    assert "measure again on a quiet machine" in whole


@pytest.mark.parametrize("changes", [{}, STREAM, {"line": "W5", "busy": 0.5}])
def test_a_good_figure_raises_no_doubt(changes: dict[str, Any]) -> None:
    assert table.doubts([sample(**changes)]) == []
