"""Which endpoint of a provider: the one with the fewest exchanges under way from this worker; equals take turns."""

from __future__ import annotations

from collections.abc import Sequence

from ascproxy.upstream.pool import Pool


def choose(pools: Sequence[Pool], turn: int, now_ns: int) -> int:
    """The index in ``pools`` to ask.

    An endpoint that failed to connect within the last second comes after all others. Among equals the first at or
    after ``turn`` (taken modulo their number) wins, so that a caller who counts turns up visits all.
    """
    n = len(pools)
    best, best_rank = 0, None
    for step in range(n):
        index = (turn + step) % n
        pool = pools[index]
        rank = (pool.cool_until_ns > now_ns, pool.in_flight)
        if best_rank is None or rank < best_rank:
            best, best_rank = index, rank
    return best
