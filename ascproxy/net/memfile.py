"""Sealed memory files: how a snapshot travels between processes. Once sealed, nobody can change one."""

from __future__ import annotations

import fcntl
import os

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def seal(name: str, data: bytes) -> int:
    """The descriptor of a new sealed file with these bytes."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


def read(descriptor: int) -> bytes:
    """All bytes of a sealed file. Raises OSError, and ValueError when it is not sealed: it could change meanwhile.

    Read and not mapped: before Linux 6.7 a write-sealed file cannot be mapped shared, not even for reading.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise ValueError("the memory file is not sealed")
    data, size = bytearray(), os.fstat(descriptor).st_size
    while len(data) < size:
        part = os.pread(descriptor, size - len(data), len(data))
        if not part:
            break
        data += part
    return bytes(data)
