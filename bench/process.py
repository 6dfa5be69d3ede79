"""What a process tree spent and holds, from /proc.

A tree is the started process, its descendants, and everything else in its session (a child whose parent died keeps the
session). CPU is utime + stime of the living plus what each of them has reaped (cutime + cstime), in clock ticks
(10 ms): over a window of seconds an error below one percent. The kernel charges the receiving half of a loopback send
to the sender, so a subject pays for its peers' receive paths, and whoever wrote to it paid for its own: the same for
every subject. What a child spent that was reaped after its own parent had died is lost: no subject does that midway.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat that matter here (proc(5)); times in clock ticks."""

    pid: int
    parent: int
    session: int
    ticks: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Sums over processes in KiB. `rss` counts a page shared by two processes twice, `pss` gives each its part."""

    rss_kib: int
    pss_kib: int
    processes: int


def parse_state(text: str) -> str:
    """The letter of a process's state in a line of /proc/PID/stat: R, S, T, ..."""
    return text.rpartition(") ")[2][0]


def parse_stat(text: str) -> Stat:
    """Reads one line of /proc/PID/stat; the name in brackets may itself hold blanks and brackets."""
    pid, _, rest = text.partition(" (")
    fields = rest[rest.rindex(")") + 2 :].split()
    return Stat(pid=int(pid), parent=int(fields[1]), session=int(fields[3]), ticks=sum(int(f) for f in fields[11:15]))


def parse_smaps_rollup(text: str) -> dict[str, int]:
    """Fields of /proc/PID/smaps_rollup in KiB."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {row[0].rstrip(":"): int(row[1]) for row in rows}


def select(root: int, stats: list[Stat]) -> list[Stat]:
    """The members of the tree of `root`, which leads a session of its own."""
    members = {s.pid for s in stats if root in (s.pid, s.session)}
    while True:
        more = {s.pid for s in stats if s.parent in members} - members
        if not more:
            return [s for s in stats if s.pid in members]
        members |= more


def living() -> list[Stat]:
    """Every process that lives now."""
    stats = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stats.append(parse_stat((entry / "stat").read_text()))
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since the folder was listed
    return stats


def cpu_seconds(root: int, stats: list[Stat]) -> float:
    """User and system time of the tree of `root` since its start."""
    return sum(s.ticks for s in select(root, stats)) / TICKS_PER_SECOND


def children(pid: int) -> list[int]:
    """The processes whose parent it is."""
    return [s.pid for s in living() if s.parent == pid]


def memory(root: int) -> Memory:
    """Resident memory of the tree now."""
    return memory_of([member.pid for member in select(root, living())])


def memory_of(pids: list[int]) -> Memory:
    """Resident memory of these processes now; one that has ended counts nothing."""
    rss = pss = count = 0
    for pid in pids:
        try:
            fields = parse_smaps_rollup(Path("/proc", str(pid), "smaps_rollup").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
        rss, pss, count = rss + fields["Rss"], pss + fields["Pss"], count + 1
    return Memory(rss, pss, count)
