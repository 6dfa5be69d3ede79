"""Pools and balance: who waits how long, who is asked next."""

from __future__ import annotations

import pytest

from ascproxy.upstream.balance import choose
from ascproxy.upstream.pool import COOL_NS, MAX_IDLE, Pool
from tests.kit.streams import MS, FakeUpstream


def pool_of(*idle_since_ms: int, idle_ms: int = 4_000) -> tuple[Pool, list[FakeUpstream]]:
    pool = Pool(idle_ms)
    connections = [FakeUpstream(1, ms * MS) for ms in idle_since_ms]
    for connection in connections:
        pool.put(connection)  # type: ignore[arg-type]
    return pool, connections


def test_the_last_one_in_is_the_first_one_out() -> None:
    pool, (first, second) = pool_of(10, 20)
    assert pool.take(30 * MS) is second
    assert pool.take(30 * MS) is first
    assert pool.take(30 * MS) is None


def test_what_the_server_closed_is_skipped() -> None:
    pool, (first, second) = pool_of(10, 20)
    second.open = False
    assert pool.take(30 * MS) is first


def test_what_waited_too_long_is_closed_and_not_used() -> None:
    pool, (old, young) = pool_of(0, 2_000)
    assert pool.take(5_999 * MS) is young
    assert pool.take(5_999 * MS) is None
    assert not old.open


def test_a_sweep_closes_the_old_and_keeps_the_order_of_the_rest() -> None:
    pool, (old, middle, young) = pool_of(0, 2_000, 3_000)
    pool.sweep(4_000 * MS)
    assert (old.open, middle.open, young.open) == (False, True, True)
    assert pool.take(4_000 * MS) is young


def test_no_more_than_a_bound_wait() -> None:
    pool, connections = pool_of(*range(MAX_IDLE + 1))
    assert len(pool) == MAX_IDLE
    assert [c.open for c in connections] == [True] * MAX_IDLE + [False]


def test_a_closed_pool_closes_what_waits_and_what_comes_back() -> None:
    pool, (waiting,) = pool_of(1)
    pool.close()
    late = FakeUpstream(1, 0)
    pool.put(late)  # type: ignore[arg-type]
    assert not waiting.open
    assert not late.open


def test_the_first_failure_in_a_while_is_worth_a_line() -> None:
    pool = Pool(4_000)
    assert pool.failed(5)
    assert not pool.failed(5 + COOL_NS - 1)
    assert pool.failed(5 + 2 * COOL_NS)


@pytest.mark.parametrize(
    ("in_flight", "cool", "turn", "chosen"),
    [
        ([0, 0, 0], [0, 0, 0], 0, 0),
        ([0, 0, 0], [0, 0, 0], 1, 1),
        ([0, 0, 0], [0, 0, 0], 5, 2),
        ([2, 1, 3], [0, 0, 0], 0, 1),
        ([2, 1, 1], [0, 0, 0], 2, 2),
        ([9, 0, 0], [0, 101, 101], 0, 0),
        ([9, 0, 0], [0, 100, 101], 0, 1),
        ([3, 2], [200, 200], 0, 1),
        ([7], [200], 0, 0),
    ],
)
def test_the_least_busy_is_asked_and_one_that_just_failed_last(
    in_flight: list[int], cool: list[int], turn: int, chosen: int
) -> None:
    pools = []
    for busy, until in zip(in_flight, cool, strict=True):
        pool = Pool(4_000)
        pool.in_flight, pool.cool_until_ns = busy, until
        pools.append(pool)
    assert choose(pools, turn, 100) == chosen
