"""What the service does when memory runs short: three steps, decided here, obeyed by the workers (LIMITS 1, overload).

Theory. The memory of all processes is compared with ``memory_limit`` several times a second, and the step is published
in the shared page, from which every worker reads it with its tick:

    1  at 85 %   answers close their connections, so that callers spread to other nodes
    2  at 92 %   requests are answered 503 ``overloaded`` with Retry-After before anything of them is kept
    3  at 97 %   nobody accepts; connections wait in the kernel, and the node is not ready

A step is left 3 points below where it was entered, so that nothing flaps. Metrics and management are in control, which
obeys no step. Each worker tells its own memory through its page, because it cannot be looked into from outside.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

from ascproxy import _native
from ascproxy.telemetry import memory, metrics
from ascproxy.telemetry.log import Log

ENTER = (0.85, 0.92, 0.97)
LEAVE = (0.82, 0.89, 0.94)
PERIOD_NS = 200_000_000
OF_MACHINE = 0.8  # the limit where nobody says one
CGROUPS = Path("/sys/fs/cgroup")


class Step(IntEnum):
    """How far it has come; each does what those before it do."""

    NONE = 0
    NO_KEEP_ALIVE = 1
    REFUSE = 2
    NO_ACCEPT = 3


WORDS = {
    Step.NONE: "memory is below its limit again",
    Step.NO_KEEP_ALIVE: "memory runs short: answers close their connections",
    Step.REFUSE: "memory runs short: requests are refused",
    Step.NO_ACCEPT: "memory runs short: no connection is accepted",
}


def step_after(before: Step, used: int, limit: int) -> Step:
    """The step at ``used`` bytes, coming from ``before``."""
    entered = sum(used >= share * limit for share in ENTER)
    kept = sum(used >= share * limit for share in LEAVE)
    return Step(max(entered, min(before, kept)))


def limit_of(wanted: int, machine: int, cgroup: int | None) -> int:
    """The limit in force: what the configuration says, else the cgroup's, else 80 % of the machine's memory. A cgroup
    that may have all of it has no limit."""
    if wanted:
        return wanted
    return cgroup if cgroup is not None and cgroup < machine else int(machine * OF_MACHINE)


def cgroup_limit(own: str, root: Path = CGROUPS) -> int | None:
    """The smallest ``memory.max`` of a process's cgroup (v2) and those above it; None where none has one.

    ``own`` is the text of ``/proc/self/cgroup``.
    """
    path = next((line.removeprefix("0::/") for line in own.splitlines() if line.startswith("0::/")), None)
    if path is None:
        return None
    found: list[int] = []
    for folder in (root / path, *(root / path).parents):
        with contextlib.suppress(OSError, ValueError):  # the root has no such file, and "max" is no number
            found.append(int((folder / "memory.max").read_text()))
        if folder == root:
            break
    return min(found, default=None)


def own_cgroup() -> str:
    """The text of ``/proc/self/cgroup``, empty where there are no cgroups."""
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Memory:
    """Looks, decides, publishes. The only writer of its cells of ``shared``. ``due_ns``: when to look again."""

    def __init__(self, shared: _native.Page, wanted: int, log: Log) -> None:
        self._page = shared
        self._log = log
        self._step_cell, self._used_cell, limit_cell = (
            shared.series(key, 1) for key in (metrics.OVERLOAD, metrics.MEMORY, metrics.MEMORY_LIMIT)
        )
        self.step = Step(shared.load(self._step_cell))
        self.limit = limit_of(wanted, machine_memory(), cgroup_limit(own_cgroup()))
        self.due_ns = 0
        shared.store(limit_cell, self.limit)

    def look(self, now_ns: int, workers: Iterable[_native.Page], others: Sequence[int]) -> None:
        """If it is time: sum up, and publish. ``others`` are the pids of children that have no page."""
        if now_ns < self.due_ns:
            return
        self.due_ns = now_ns + PERIOD_NS
        cell = _native.Page.CELLS["memory"]
        used = memory.anonymous() + memory.shared() + sum(page.load(cell) for page in workers)
        for pid in others:
            with contextlib.suppress(OSError):  # it has just gone
                used += memory.anonymous(pid)
        self.judge(used)

    def judge(self, used: int) -> None:
        """Publish what ``used`` bytes mean."""
        self._page.store(self._used_cell, used)
        step = step_after(self.step, used, self.limit)
        if step is self.step:
            return
        self._page.store(self._step_cell, step)
        report = self._log.warning if step > self.step else self._log.info
        report(WORDS[step], step=int(step), used_bytes=used, limit_bytes=self.limit)
        self.step = step
