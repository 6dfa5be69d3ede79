"""Times and sizes: what is written is what is meant, and what could mean two things is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascproxy.config.units import MAX_SIZE, MAX_TIME_MS, parse_memory, parse_size, parse_time, show_size, show_time


@pytest.mark.parametrize(
    ("text", "ms"),
    [("1ms", 1), ("250ms", 250), ("10s", 10_000), ("5m", 300_000), ("2h", 7_200_000), ("7d", 604_800_000)],
)
def test_times(text: str, ms: int) -> None:
    assert parse_time(text) == ms


@pytest.mark.parametrize(
    ("text", "size"), [("1B", 1), ("64KiB", 65_536), ("32MiB", 33_554_432), ("64GiB", 68_719_476_736)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


HOW_TIME = "a time is written with its unit, such as 10s, 250ms or 5m"
HOW_SIZE = "a size is written with its unit, such as 64KiB, 32MiB or 512B"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (10, "a time needs its unit: 10s or 10ms"),
        ("10", "a time needs its unit: 10s or 10ms"),
        ("10sec", "'sec' is not a unit of time; use ms, s, m, h or d"),
        ("10S", "'S' is not a unit of time; use ms, s, m, h or d"),
        ("0s", "a time of 0 would end everything at once; write at least 1ms"),
        ("604800001ms", "is longer than 7d, the most that a time can be"),
        ("8d", "is longer than 7d, the most that a time can be"),
        *((wrong, HOW_TIME) for wrong in ("", "s", "-1s", "1.5s", "1 s", "1s ", "1s\n", "1h30m")),
        *((wrong, HOW_TIME) for wrong in ("\u0661s", -1, 1.5, True, None, [], {})),
        ("9" * 16 + "s", HOW_TIME),
    ],
)  # fmt: skip
def test_what_is_no_time(value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse_time(value)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (64, "a size needs its unit: 64B or 64KiB"),
        ("64KB", "'KB' is not a unit of size; use B, KiB, MiB or GiB; did you mean 64KiB?"),
        ("64k", "'k' is not a unit of size; use B, KiB, MiB or GiB; did you mean 64KiB?"),
        ("1gb", "'gb' is not a unit of size; use B, KiB, MiB or GiB; did you mean 1GiB?"),
        ("1TiB", "'TiB' is not a unit of size; use B, KiB, MiB or GiB"),
        ("0B", "a size of 0 would let nothing through; write at least 1B"),
        ("65GiB", "is more than 64GiB, the most that a size can be"),
        *((wrong, HOW_SIZE) for wrong in ("", "KiB", "-1B", "0.5MiB", "1 KiB", False, None, [])),
    ],
)
def test_what_is_no_size(value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse_size(value)


@given(st.integers(1, MAX_TIME_MS))
def test_a_time_is_shown_as_it_could_be_written(ms: int) -> None:
    assert parse_time(show_time(ms)) == ms


@given(st.integers(1, MAX_SIZE))
def test_a_size_is_shown_as_it_could_be_written(size: int) -> None:
    assert parse_size(show_size(size)) == size


def test_the_largest_unit_is_shown() -> None:
    assert (show_time(604_800_000), show_time(90_000), show_size(32 << 20), show_size(1000)) == (
        "7d", "90s", "32MiB", "1000B",
    )  # fmt: skip


def test_memory_may_be_more_than_what_passes_through_it() -> None:
    assert parse_memory("512GiB") == 512 << 30
    with pytest.raises(ValueError, match="is more than 65536GiB, the most that a size can be"):
        parse_memory("65537GiB")
