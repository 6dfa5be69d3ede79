"""Medians, ratios and doubts, from samples made by hand."""

from typing import Any

import pytest

from bench import table
from bench.lines import Sample
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


def test_ratios_are_of_medians_against_each_reference() -> None:
    rounds = [sample(), sample(subject="haproxy", cpu_us=25.0), sample(subject="ascproxy", cpu_us=15.0)]
    text = table.ratios(rounds, ["W1", "latency"], ["bare", "nginx", "haproxy", "ascproxy"])
    assert cells(text, "ascproxy / nginx") == ["0.75"]
    assert cells(text, "ascproxy / haproxy") == ["0.60"]
    assert "bare" not in text


def test_a_subject_that_was_not_measured_keeps_its_row() -> None:
    subjects = ["nginx", "ascproxy"]
    assert cells(table.summary([sample()], ["W1"], subjects), "ascproxy") == ["-", "-"]
    assert cells(table.ratios([sample()], ["W1"], subjects), "ascproxy / nginx") == ["-"]


def test_added_latency_is_taken_within_a_round() -> None:
    rounds = []
    for number, bare in enumerate((50.0, 500.0, 60.0)):
        base = {"line": "latency", "round": number}
        rounds.append(sample(**base, subject="bare", latency_us={"p50": bare, "p99": bare}))
        rounds.append(sample(**base, latency_us={"p50": bare + 70 + number, "p99": bare + 200}))
    assert table.added_us(rounds, "nginx", "p50") == 71.0
    assert cells(table.summary(rounds, ["latency"], ["bare", "nginx"]), "nginx") == ["71/200"]


def test_memory_is_shown_in_mib_resident_and_proportional() -> None:
    held = sample(line="memory", idle=Memory(15 * 1024, 8 * 1024, 2), loaded=Memory(25 * 1024, 18 * 1024, 2))
    assert cells(table.summary([held], ["memory"], ["nginx"]), "nginx") == ["15/25", "8/18"]


STREAM = {"line": "SSE", "busy": 0.4, "per_second": 25_000.0, "latency_us": {"p50": 20_000.0, "p99": 23_000.0}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": 3, "first_error": "status 401"}, "3 errors; the first: status 401"),
        ({"units": 0}, "nothing was answered"),
        ({"busy": 0.5}, "only 50% of its core was used"),
        ({**STREAM, "per_second": 20_000.0}, "only 80% of the events that were due came"),
        ({**STREAM, "latency_us": {"p50": 0.0, "p99": 220_000.0}}, "gathered or late, up to 220 ms apart"),
        ({"stub_late": 1001}, "1001 events of the stub were late or skipped"),
    ],
)
def test_a_figure_that_means_something_else_is_named(changes: dict[str, Any], said: str) -> None:
    (doubt,) = table.doubts([sample(**changes)])
    assert said in doubt


@pytest.mark.parametrize("changes", [{}, STREAM, {"line": "W5", "busy": 0.5}])
def test_a_good_figure_raises_no_doubt(changes: dict[str, Any]) -> None:
    assert table.doubts([sample(**changes)]) == []
