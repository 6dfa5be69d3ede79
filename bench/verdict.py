"""What a soak observed, and whether that is what was promised. No I/O: tests make up observations that must fail."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

SLOPE_MAX_MIB = 1.0  # a minute
SETTLE_S = 10.0  # what a service fills for good it fills in its first seconds
KEPT_MIN = 0.9  # of the load that was due: a soak without load proves nothing
PAIRS_MAX = 400  # points of a series that are compared with each other


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed: when its connection was opened and when the request ended (seconds of the monotonic
    clock), the caller's port, and what was wrong. `foreign`: it got another request's answer."""

    opened: float
    ended: float
    port: int
    error: str
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker that was killed: when, and the callers' ports of the connections that it had."""

    at: float
    pid: int
    ports: frozenset[int]


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the service: anonymous memory in KiB over time, and descriptors before and after the load; None
    where it did not live."""

    pid: int
    role: str
    memory: tuple[tuple[float, int], ...]
    descriptors_before: int | None = None
    descriptors_after: int | None = None
    draining: bool = False  # still, when descriptors were counted after the load


@dataclass(frozen=True, slots=True)
class Pressure:
    """The load at a rate: what was due and what was answered in time. `failures` are the requests that failed and those
    that were lost with their connection and sent again, which are `lost`. `untold`: failures beyond those."""

    name: str
    due: int
    answered: int
    failures: tuple[Failure, ...] = ()
    lost: int = 0
    untold: int = 0


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that is judged. Times are seconds of the monotonic clock."""

    begin: float
    end: float
    requests: int
    requests_due: int
    failures: tuple[Failure, ...] = ()
    kills: tuple[Kill, ...] = ()
    reloads: int = 0
    upgrades: int = 0
    restarts: int | None = None  # workers replaced, by the service's own count; None: it started anew meanwhile
    pressures: tuple[Pressure, ...] = ()
    processes: tuple[Process, ...] = ()
    exit_code: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the report; ports of kills and single points of memory are left out."""
        found = asdict(self)
        for p, told in zip(self.pressures, found["pressures"], strict=True):
            told["owed_to_kills"] = owed(p.failures, self.kills)
        found["kills"] = [{"at": kill.at, "pid": kill.pid, "connections": len(kill.ports)} for kill in self.kills]
        found["processes"] = [
            {
                "pid": p.pid,
                "role": p.role,
                "mib_first": p.memory[0][1] / 1024 if p.memory else None,
                "mib_last": p.memory[-1][1] / 1024 if p.memory else None,
                "mib_a_minute": slope(settled(p, self)),
                "descriptors_before": p.descriptors_before,
                "descriptors_after": p.descriptors_after,
            }
            for p in self.processes
        ]
        return found


def slope(points: Iterable[tuple[float, int]]) -> float | None:
    """MiB a minute: the median of the slopes between any two points (Theil and Sen), which a step or two do not move as
    they move a line of least squares. None with fewer than three points."""
    kept = list(points)
    kept = kept[:: -(-len(kept) // PAIRS_MAX)] if kept else kept
    if len(kept) < 3:
        return None
    slopes = [(b - a) / (t - s) for i, (s, a) in enumerate(kept) for t, b in kept[i + 1 :] if t > s]
    return median(slopes) * 60 / 1024 if slopes else None


def settled(process: Process, seen: Observed) -> list[tuple[float, int]]:
    """The points of a process after the first seconds, if it lived from then to the end; else none."""
    points = [(t, kib) for t, kib in process.memory if t >= seen.begin + SETTLE_S]
    lived = bool(process.memory) and process.memory[0][0] <= seen.begin + SETTLE_S
    return points if lived and process.descriptors_after is not None else []


def owed_to(failure: Failure, kills: Iterable[Kill]) -> bool:
    """Whether a kill explains it: the worker had this connection, and was killed while it was in use."""
    return any(failure.port in kill.ports and failure.opened <= kill.at <= failure.ended for kill in kills)


def owed(failures: Iterable[Failure], kills: Iterable[Kill]) -> int:
    """How many of them a kill explains."""
    return sum(owed_to(failure, kills) for failure in failures)


def violations(seen: Observed) -> list[str]:
    """A sentence for each promise that was broken; none: the soak passed."""
    return [*_answers(seen), *_pressure(seen), *_memory(seen), *_descriptors(seen), *_life(seen)]


def _requests(failures: Iterable[Failure], made: int, kills: tuple[Kill, ...]) -> list[str]:
    """What is wrong with the requests of one load: each failure needs a kill of its own that explains it, and nothing
    explains an answer that is another request's."""
    foreign = [f for f in failures if f.foreign]
    found = [f"{len(foreign)} answers were another request's; the first: {foreign[0].error}"] if foreign else []
    broken = [f for f in failures if not f.foreign and not owed_to(f, kills)]
    if broken:
        where = ", on connections that no killed worker had" if kills else ""
        found.append(f"{len(broken)} of {made:,} requests failed{where}; the first: {broken[0].error}")
    return found


def _answers(seen: Observed) -> list[str]:
    found = _requests(seen.failures, seen.requests, seen.kills)
    if seen.requests < KEPT_MIN * seen.requests_due:
        found.append(f"only {seen.requests:,} of {seen.requests_due:,} requests of the storm were made")
    return found


def _pressure(seen: Observed) -> list[str]:
    found = []
    for p in seen.pressures:
        found += [f"{p.name}: {wrong}" for wrong in _requests(p.failures, p.due, seen.kills)]
        if p.untold:
            found.append(f"{p.name}: {p.untold} more failures than the load tells one by one")
        if p.answered < KEPT_MIN * p.due:
            found.append(f"{p.name}: only {p.answered:,} of {p.due:,} requests were answered in time")
    return found


def _memory(seen: Observed) -> list[str]:
    found = []
    judged = 0
    for p in seen.processes:
        grows = slope(settled(p, seen))
        if grows is None:
            continue
        judged += 1
        if grows > SLOPE_MAX_MIB:
            found.append(f"{p.role} {p.pid} grows by {grows:.1f} MiB a minute; {SLOPE_MAX_MIB:g} is the bound")
    if judged == 0:
        found.append(f"no process lived from the first {SETTLE_S:g} s to the end: its memory cannot be judged")
    return found


def _descriptors(seen: Observed) -> list[str]:
    found = []
    before: dict[str, int] = {}
    for p in seen.processes:
        if p.descriptors_before is not None:
            before[p.role] = max(before.get(p.role, 0), p.descriptors_before)
    if not before:
        found.append("descriptors were not counted before the load")
    for p in seen.processes:
        bound = before.get(p.role)
        if p.draining:  # what it holds is not a leak, and nobody can say whether it has one
            found.append(f"{p.role} {p.pid} still drains: its descriptors cannot be judged")
            continue
        if p.descriptors_after is not None and bound is not None and p.descriptors_after > bound:
            found.append(f"{p.role} {p.pid} holds {p.descriptors_after} descriptors after the load, {bound} before it")
    return found


def _life(seen: Observed) -> list[str]:
    found = []
    if seen.restarts is not None and seen.restarts != len(seen.kills):
        found.append(f"workers were replaced {seen.restarts} times, and {len(seen.kills)} were killed")
    if seen.exit_code != 0:
        found.append(f"the service ended with exit code {seen.exit_code}")
    return found
