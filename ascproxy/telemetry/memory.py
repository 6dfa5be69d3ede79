"""How much memory a process uses, from what the kernel counts anyway: a read of a few microseconds.

Anonymous memory is what nothing but this service can give back. A forked worker begins with pages that it shares with
the supervisor; they are counted once, where they came from, so a worker leaves out what it still shared when it was
ready. (Pages that it copies later are then left out too: few, because the heap is frozen before the fork.)
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

KIB = 1024


def anonymous(process: str | int = "self") -> int:
    """Bytes of anonymous memory of a process. Raises OSError when it cannot be read."""
    return _anonymous(Path(f"/proc/{process}/statm").read_bytes())


def shared(process: str | int = "self") -> int:
    """Bytes of shared memory that a process has mapped and touched. Raises OSError when it cannot be read."""
    return _field(Path(f"/proc/{process}/status").read_text(), "RssShmem:")


class Footprint:
    """The anonymous memory of this very process. Make it after the fork, when it is known what the parent lent."""

    __slots__ = ("_descriptor", "_inherited")

    def __init__(self) -> None:
        self._descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        own = 0
        with contextlib.suppress(OSError):  # a kernel that does not tell: what is inherited is counted twice
            own = _field(Path("/proc/self/smaps_rollup").read_text(), "Pss_Anon:")
        self._inherited = max(0, self._all() - own) if own else 0

    def read(self) -> int:
        """Bytes, without what was inherited."""
        return max(0, self._all() - self._inherited)

    def _all(self) -> int:
        return _anonymous(os.pread(self._descriptor, 256, 0))


def _anonymous(statm: bytes) -> int:
    """``statm`` counts pages (proc_pid_statm(5)): the second number is all that is resident, the third what is not
    anonymous of it."""
    _, resident, other, *_ = statm.split()
    return (int(resident) - int(other)) * mmap.PAGESIZE


def _field(text: str, name: str) -> int:
    """The bytes that a line ``Name:  123 kB`` tells, 0 where the kernel has no such line."""
    return next((int(line.split()[1]) * KIB for line in text.splitlines() if line.startswith(name)), 0)
