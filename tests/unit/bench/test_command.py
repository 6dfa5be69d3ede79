"""What can be asked of the benchmark, and what is measured where."""

import pytest

from bench.command import STANDARD, SUBJECTS, options
from bench.lines import MANY_STREAMS, RESERVED_DESCRIPTORS, Kind, all_lines, many_streams


def test_the_optional_peers_are_measured_where_they_are_asked_for() -> None:
    assert options([]).peers == ["bare", "nginx", "haproxy", "ascproxy"]
    assert set(SUBJECTS) - set(STANDARD) == {"envoy", "vllm-router", "litellm"}
    assert options(["--only", "W1", "--peers", "litellm,nginx"]).peers == ["nginx", "litellm"]


def test_added_latency_needs_something_to_be_added_to() -> None:
    assert options(["--only", "latency", "--peers", "nginx"]).peers == ["bare", "nginx"]


def test_sizes_are_sorted_so_that_the_first_is_the_smallest() -> None:
    assert options(["--keys", "1_000,10,10"]).keys == [10, 1000]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--keys", "ten"], "no list of numbers"),
        (["--routes", "0,5"], "at least 1"),
        (["--only", "W9"], "no line w9"),
        (["--peers", "apache"], "no subject apache"),
        (["--windows", "0"], "are positive"),
    ],
)
def test_what_is_not_there_is_named(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        options(argv)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("descriptors", "streams"), [(20_000, 9_744), (1_000_000, MANY_STREAMS), (600, 44), (1, 1)])
def test_as_many_streams_are_held_as_descriptors_allow(descriptors: int, streams: int) -> None:
    assert many_streams(descriptors) == streams
    assert streams == 1 or 2 * streams + RESERVED_DESCRIPTORS <= descriptors
    held = [line for line in all_lines(descriptors).values() if line.once]
    assert [(line.connections, line.tls) for line in held] == [(streams, False), (streams, True)]
    assert all(line.kind is Kind.MEMORY for line in held)
