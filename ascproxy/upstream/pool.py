"""The connections to one endpoint that wait for work, and the count of those at work.

Last in, first out: the connection used most recently is the one least likely to be closed by the server just now, and
those that are not needed grow old together and expire (SEMANTICS 3: vLLM closes after 5.0 s, so ours expire at 4 s).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ascproxy._native import Upstream

# Connections kept per endpoint and worker. No more wait than were at work within `idle_ms`, which ends the others.
MAX_IDLE = 16_384
COOL_NS = 1_000_000_000  # an endpoint that failed to connect is tried last for this long


class Pool:
    """One endpoint's connections in one worker. Written by that worker's event-loop thread only.

    ``in_flight``: exchanges under way, kept by the dispatcher. ``cool_until_ns``: monotonic time until which the
    endpoint is tried last. ``idle_ms``: how long a connection may wait.
    """

    __slots__ = ("_idle", "closed", "cool_until_ns", "idle_ms", "in_flight")

    def __init__(self, idle_ms: int) -> None:
        self._idle: list[Upstream] = []  # oldest first
        self.idle_ms = idle_ms
        self.in_flight = 0
        self.cool_until_ns = 0
        self.closed = False

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, now_ns: int) -> Upstream | None:
        """A connection that can carry a request now, or None."""
        idle = self._idle
        while idle:
            upstream = idle.pop()
            if upstream.usable(now_ns, self.idle_ms):
                return upstream
            upstream.close()
        return None

    def put(self, upstream: Upstream) -> None:
        """Keep a ready connection for later; close it where there are enough or nobody will come."""
        if self.closed or len(self._idle) >= MAX_IDLE:
            upstream.close()
        else:
            self._idle.append(upstream)

    def sweep(self, now_ns: int) -> None:
        """Close what waited too long or was closed by the server. Called each second."""
        idle = self._idle
        if not idle:
            return
        kept = []
        for upstream in idle:
            if upstream.usable(now_ns, self.idle_ms):
                kept.append(upstream)
            else:
                upstream.close()
        self._idle = kept

    def failed(self, now_ns: int) -> bool:
        """Note that connecting failed: True the first time in a while, when it is worth a line in the log."""
        first = now_ns >= self.cool_until_ns
        self.cool_until_ns = now_ns + COOL_NS
        return first

    def close(self) -> None:
        """Close all that wait; those at work are closed when they come back."""
        self.closed = True
        idle, self._idle = self._idle, []
        for upstream in idle:
            upstream.close()
