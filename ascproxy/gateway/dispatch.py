"""The only loop that asks again: retry at the same target, fallback to the next (SEMANTICS 3).

Theory. An attempt ends in one of these ways before anything was sent to the client, and :func:`after_connect`,
:func:`after_answer` and :func:`after_failure` say what follows:

    no connection                  nothing was sent: another endpoint of the target once, then the next target
    401, 403                       our credential is at fault: the next target, never the client
    429, 5xx, an error event       a definite failure: the next target; the last one's answer is passed on
    closed, on a reused connection the server had closed it before it saw the request: once more, on a fresh one
    closed, reset, timeout         ambiguous, it may have been served: no further attempt, unless the route says so
    malformed                      no further attempt

A *retry* takes from a budget of a tenth of all requests, so that a failing provider is not asked twice as often; a
fallback goes elsewhere and is bounded by the number of targets. The deadline over all attempts is kept by the core
while one is under way, and here between them.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from ascproxy.gateway.meter import Meter
from ascproxy.gateway.refusal import refuse
from ascproxy.gateway.runtime import Course, Leg
from ascproxy.telemetry.log import Log
from ascproxy.upstream.balance import choose
from ascproxy.upstream.connection import ConnectError, Connector, ConnectTimeout

if TYPE_CHECKING:
    from ascproxy._native import Stream

MS = 1_000_000
BUDGET_SHARE = 0.1  # retries per request
BUDGET_BURST = 10.0  # retries that may be saved up; also what a worker begins with
ALERT_NS = 10_000_000_000  # a provider's credential fault is logged once in this long


class Step(StrEnum):
    """What follows a failed attempt; those that refuse are codes of the catalogue."""

    RETRY = "retry"
    NEXT = "next"
    RELAY = "relay"
    UNREACHABLE = "upstream_unreachable"
    MALFORMED = "upstream_malformed"
    CREDENTIAL = "upstream_credential"
    TIMEOUT = "upstream_timeout"


def after_connect(*, more_endpoints: bool, may_retry: bool, more_targets: bool) -> Step:
    """After no connection could be made."""
    if more_endpoints and may_retry:
        return Step.RETRY
    return Step.NEXT if more_targets else Step.UNREACHABLE


def after_answer(status: int, *, more_targets: bool) -> Step:
    """After an answer of 401, 403, 429 or 5xx."""
    if more_targets:
        return Step.NEXT
    return Step.CREDENTIAL if status in (401, 403) else Step.RELAY


def after_failure(failure: str, *, reused: bool, may_retry: bool, more_targets: bool, retry_ambiguous: bool) -> Step:
    """After a connection failed under a request that was sent; ``failure`` is the stream's."""
    if failure == "closed" and reused and may_retry:
        return Step.RETRY
    if failure == "error_event":
        return Step.NEXT if more_targets else Step.RELAY
    if failure == "malformed":
        return Step.MALFORMED
    if retry_ambiguous:
        if more_targets:
            return Step.NEXT
        if may_retry:
            return Step.RETRY
    return Step.TIMEOUT if failure == "timeout" else Step.UNREACHABLE


class Budget:
    """A token bucket filled by requests and emptied by retries. One per worker."""

    __slots__ = ("_seen", "_tokens", "requests")

    def __init__(self) -> None:
        self.requests = 0  # counted up by the dispatcher for each request
        self._seen = 0
        self._tokens = BUDGET_BURST

    def has(self) -> bool:
        """Whether a retry may be made."""
        self._tokens = min(BUDGET_BURST, self._tokens + (self.requests - self._seen) * BUDGET_SHARE)
        self._seen = self.requests
        return self._tokens >= 1

    def spend(self) -> None:
        """Note that one is made."""
        self._tokens -= 1


class Asking:
    """Where a request stands that did not go through at once. Owned by its stream; changed by the dispatcher only.

    ``leg`` is what carries the request now, None while nothing does. ``until_ns``: monotonic deadline of all attempts.
    """

    __slots__ = ("course", "hopped", "index", "leg", "retried", "until_ns")

    def __init__(self, course: Course, leg: Leg | None, until_ns: int) -> None:
        self.course = course
        self.index = 0 if leg is None else leg.index
        self.leg = leg
        self.retried = False
        self.hopped = False  # gone on to another endpoint, which asks nobody twice and takes from no budget
        self.until_ns = until_ns


class Dispatcher:
    """Sends requests for one worker. ``stream.context`` is its own: (course, leg, time of the beginning) while the
    first attempt is under way on a pooled connection, an :class:`Asking` in all other cases."""

    __slots__ = ("_alerted", "_budget", "_connector", "_log", "_loop", "_meter", "_monotonic_ns")

    def __init__(
        self,
        loop: AbstractEventLoop,
        connector: Connector,
        *,
        meter: Meter,
        log: Log,
        monotonic_ns: Callable[[], int],
    ) -> None:
        self._loop = loop
        self._connector = connector
        self._meter = meter
        self._log = log
        self._monotonic_ns = monotonic_ns
        self._budget = Budget()
        self._alerted: dict[str, int] = {}  # provider to the monotonic time of its last alert

    def begin(self, stream: Stream, course: Course) -> None:
        """Send a request on its course: at once where a connection waits, else from a task."""
        self._budget.requests += 1
        now_ns = self._monotonic_ns()
        leg = course.only
        if leg is None:
            leg = self._pick(course, course.targets[0], now_ns)
        pool = leg.pool
        upstream = pool.take(now_ns)
        if upstream is not None:
            pool.in_flight += 1
            stream.context = (course, leg, now_ns)
            # The last thing done: a failure inside of it calls `failed` before it returns.
            stream.forward(upstream, leg.plan)
            return
        asking = Asking(course, None, now_ns + course.total_ms * MS)
        stream.context = asking
        stream.task = self._loop.create_task(self._connect(stream, asking, leg))

    def failed(self, stream: Stream) -> None:
        """The attempt under way failed before anything was sent to the client."""
        now_ns = self._monotonic_ns()
        context = stream.context
        if type(context) is tuple:
            course, leg, began_ns = context
            stream.context = asking = Asking(course, leg, began_ns + course.total_ms * MS)
        else:
            asking = context
        leg = asking.leg
        assert leg is not None, "an attempt failed that was not under way"
        status, in_time = stream.upstream_status, now_ns < asking.until_ns
        more_targets = in_time and asking.index + 1 < len(asking.course.targets)
        if stream.failure:
            step = after_failure(
                stream.failure,
                reused=stream.reused,
                may_retry=in_time and self._may_retry(asking),
                more_targets=more_targets,
                retry_ambiguous=asking.course.match.route.retry_ambiguous,
            )
        else:
            step = after_answer(status, more_targets=more_targets)
            if status in (401, 403):
                self._alert(leg.provider, status, now_ns)
        if step is Step.RELAY:
            stream.relay()
            return
        asking.leg = None
        leg.pool.in_flight -= 1
        self._follow(stream, asking, step, leg, now_ns)

    def settle(self, stream: Stream) -> None:
        """The exchange is over: its connection goes back where it came from."""
        context = stream.context
        leg = context[1] if type(context) is tuple else context.leg
        if leg is None:
            return
        pool = leg.pool
        pool.in_flight -= 1
        upstream = stream.upstream
        if upstream is not None and upstream.reusable:
            pool.put(upstream)

    def _follow(self, stream: Stream, asking: Asking, step: Step, leg: Leg, now_ns: int) -> None:
        """Do what was decided, from `failed`."""
        if step is Step.RETRY:
            self._spend(asking)
            # Never from the pool: what closed one waiting connection has closed its neighbours.
            stream.task = self._loop.create_task(self._connect(stream, asking, leg))
        elif step is Step.NEXT:
            asking.index += 1
            following = self._forward_pooled(stream, asking, now_ns)
            if following is not None:
                stream.task = self._loop.create_task(self._connect(stream, asking, following))
        else:
            self._refuse(stream, step, leg)

    def _forward_pooled(self, stream: Stream, asking: Asking, now_ns: int) -> Leg | None:
        """Send over a waiting connection of the present target; the leg that needs a new one where there is none."""
        legs = asking.course.targets[asking.index]
        leg = legs[0] if len(legs) == 1 else self._pick(asking.course, legs, now_ns)
        upstream = leg.pool.take(now_ns)
        if upstream is None:
            return leg
        leg.pool.in_flight += 1
        asking.leg = leg
        stream.forward(upstream, leg.plan)
        return None

    async def _connect(self, stream: Stream, asking: Asking, leg: Leg) -> None:
        """Connect to ``leg``, or to what follows it, and send. Cancelled by the core when the client goes away."""
        try:
            following: Leg | None = leg
            while following is not None:
                following = await self._connect_once(stream, asking, following)
        except Exception:
            if not stream.done:
                self._refuse(stream, "internal_error", leg)
            raise

    async def _connect_once(self, stream: Stream, asking: Asking, leg: Leg) -> Leg | None:
        """One attempt to connect and send. The leg to try next, None when the request is on its way or answered."""
        left_ms = (asking.until_ns - self._monotonic_ns()) // MS
        if left_ms <= 0:
            stream.trip("total")
            self._refuse(stream, Step.TIMEOUT, leg)
            return None
        try:
            upstream = await self._connector.connect(leg.address, left_ms)
        except ConnectError as error:
            return self._not_connected(stream, asking, leg, error)
        if stream.done:
            leg.pool.put(upstream)
            return None
        leg.pool.in_flight += 1
        asking.leg = leg
        stream.forward(upstream, leg.plan)
        return None

    def _not_connected(self, stream: Stream, asking: Asking, leg: Leg, error: ConnectError) -> Leg | None:
        now_ns = self._monotonic_ns()
        if leg.pool.failed(now_ns):
            self._log.warning("no connection to a provider", provider=leg.provider, reason=str(error))
        if stream.done:
            return None
        if isinstance(error, ConnectTimeout):
            stream.trip(error.limit)
        step = after_connect(
            more_endpoints=len(asking.course.targets[asking.index]) > 1,
            may_retry=not asking.hopped,
            more_targets=asking.index + 1 < len(asking.course.targets),
        )
        if step is Step.RETRY:
            asking.hopped = True
        elif step is Step.NEXT:
            asking.index += 1
        else:
            self._refuse(stream, step, leg)
            return None
        return self._forward_pooled(stream, asking, now_ns)

    def _refuse(self, stream: Stream, code: str, leg: Leg) -> None:
        refuse(stream, self._meter, code, block=leg.block)

    def _may_retry(self, asking: Asking) -> bool:
        return not asking.retried and self._budget.has()

    def _spend(self, asking: Asking) -> None:
        asking.retried = True
        self._budget.spend()

    def _pick(self, course: Course, legs: tuple[Leg, ...], now_ns: int) -> Leg:
        course.turn += 1
        return legs[choose([leg.pool for leg in legs], course.turn, now_ns)]

    def _alert(self, provider: str, status: int, now_ns: int) -> None:
        last = self._alerted.get(provider)
        if last is None or now_ns - last >= ALERT_NS:
            self._alerted[provider] = now_ns
            self._log.error("a provider refused our credential: renew it and reload", provider=provider, status=status)
