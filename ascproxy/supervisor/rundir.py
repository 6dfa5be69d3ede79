"""The run directory: one supervisor at a time, emptied at its start, and the pages in it.

``lock`` is locked (flock) for the life of the supervisor; it holds its pid, for a person to read and for nothing else.
``slot-N.page`` are the metric pages, ``shared.page`` is what all processes read. A clean stop removes the directory
if a supervisor made it; so whoever has locked makes sure that what is locked is still the file in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from ascproxy import _native
from ascproxy.errors import AscproxyError
from ascproxy.telemetry import metrics

LOCK = "lock"
SHARED = "shared.page"
CONTROL_SOCKET = "control.sock"


class RunDirError(AscproxyError):
    """The run directory cannot be used; the sentence says what to do."""


@dataclass(slots=True)
class PageFile:
    """A mapped page. The mapping is shared with every process that maps the same file."""

    memory: mmap.mmap
    page: _native.Page


class RunDir:
    """The locked, empty run directory of a running service."""

    def __init__(self, path: str) -> None:
        """Raises :class:`RunDirError` when it is in use, somebody else's, or cannot be made."""
        self.path = Path(path)
        while True:
            self._lock = self._open_lock(path)
            self._take_lock()
            if self._is_locked():
                break
            os.close(self._lock)  # the one before us was just removing it
        self.empty()

    def _open_lock(self, path: str) -> int:
        try:
            self.made = not self.path.exists() or (self.path / LOCK).exists()  # by us, now or before a crash
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
            if found.st_uid != os.geteuid():
                raise RunDirError(f"run_dir {path} must belong to uid {os.geteuid()}: chown it or name another folder")
            if not (self.path / LOCK).exists() and any(self.path.iterdir()):
                raise RunDirError(f"run_dir {path} holds files that are not ours, it is emptied at start: name another")
            self.path.chmod(0o700)
            return os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RunDirError(f"cannot use run_dir {path}: {(error.strerror or str(error)).lower()}") from error

    def _is_locked(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._lock), (self.path / LOCK).lstat())
        except FileNotFoundError:
            return False

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise RunDirError(f"already running, pid {pid} (run_dir {self.path}): stop it first") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def empty(self) -> None:
        """Remove every file but the lock."""
        for entry in self.path.iterdir():
            if entry.name != LOCK and not entry.is_dir():
                entry.unlink()

    def create_page(self, name: str) -> PageFile:
        """A new zeroed page file."""
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, metrics.PAGE_SIZE)
            memory = mmap.mmap(descriptor, metrics.PAGE_SIZE)
        finally:
            os.close(descriptor)
        return PageFile(memory, _native.Page(memory))

    def create_slot_page(self, slot: int) -> PageFile:
        """The page of a slot, with its number in it."""
        page = self.create_page(f"slot-{slot}.page")
        page.page.store(_native.Page.CELLS["slot"], slot)
        return page

    def create_shared_page(self) -> PageFile:
        """The shared page, with its cells: every process finds them by their keys."""
        page = self.create_page(SHARED)
        page.page.series(metrics.KEY_EPOCH, 1)
        for key in (metrics.REVISION, metrics.OVERLOAD, metrics.MEMORY, metrics.MEMORY_LIMIT):
            page.page.series(key, 1)
        return page

    def repair(self, file: PageFile, slot: int) -> bool:
        """Make a page that its worker damaged usable again, at the price of its counters. True if it was."""
        try:
            file.page = _native.Page(file.memory)
        except ValueError:
            file.memory[:] = bytes(metrics.PAGE_SIZE)
            file.page = _native.Page(file.memory)
            file.page.store(_native.Page.CELLS["slot"], slot)
            return True
        return False

    def close_in_child(self) -> None:
        """Give up the lock's descriptor; the lock stays with the supervisor."""
        os.close(self._lock)

    def close(self) -> None:
        """Remove what is in the directory, and the directory if it was made here, and unlock it."""
        self.empty()
        (self.path / LOCK).unlink(missing_ok=True)
        if self.made:
            with contextlib.suppress(OSError):  # the folder above may not be ours to write
                self.path.rmdir()
        os.close(self._lock)
