"""What else happened on the machine during a window: time stolen by the hypervisor, and time of strangers' processes.

Read from the `cpu` lines of /proc/stat (proc(5)), in clock ticks, at both ends of a window. Neither steal nor strangers
are charged to the subject, but both evict its caches and wait with its core, so that its figure grows all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Above these shares of the proxy's core a figure is not worth comparing.
STEAL_MAX = 0.03
FOREIGN_MAX = 0.10


@dataclass(frozen=True, slots=True)
class Ticks:
    """One core, or (as core -1) all of them: ticks since boot. `busy` leaves out idle, waiting for I/O, and steal;
    what guests of this machine take is in it once."""

    busy: int
    idle: int
    steal: int


@dataclass(frozen=True, slots=True)
class Noise:
    """Shares of the proxy's core, 0 to 1, and of all cores: 0 to their number."""

    steal: float
    foreign: float
    foreign_anywhere: float

    @property
    def useless(self) -> bool:
        """Whether a figure measured meanwhile says more about the machine than about the subject."""
        return self.steal > STEAL_MAX or self.foreign > FOREIGN_MAX


def parse(text: str) -> dict[int, Ticks]:
    """The `cpu` lines of /proc/stat by core; -1 is their sum."""
    found = {}
    for line in text.splitlines():
        name, *fields = line.split()
        if not name.startswith("cpu"):
            continue
        user, nice, system, idle, iowait, irq, softirq, steal = (int(f) for f in fields[:8])
        core = int(name[3:]) if name != "cpu" else -1
        found[core] = Ticks(user + nice + system + irq + softirq, idle + iowait, steal)
    return found


def read() -> dict[int, Ticks]:
    """The ticks now."""
    return parse(Path("/proc/stat").read_text())


def between(
    before: dict[int, Ticks], after: dict[int, Ticks], *, core: int, subject_ticks: float, own_ticks: float
) -> Noise:
    """The noise of a window. `subject_ticks` is what the subject spent, all of it on `core`; `own_ticks` what the whole
    measurement spent anywhere, the subject included. The two clocks differ by a tick or so, never below 0."""

    def spent(which: int) -> Ticks:
        a, b = before[which], after[which]
        return Ticks(b.busy - a.busy, b.idle - a.idle, b.steal - a.steal)

    here, everywhere = spent(core), spent(-1)
    window = here.busy + here.idle + here.steal
    if window <= 0:
        return Noise(0.0, 0.0, 0.0)
    return Noise(
        steal=here.steal / window,
        foreign=max(0.0, here.busy - subject_ticks) / window,
        foreign_anywhere=max(0.0, everywhere.busy - own_ticks) / window,
    )
