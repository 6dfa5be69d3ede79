"""The run directory: one supervisor at a time, emptied at its start, and the pages in it.

``lock`` is locked (flock) for the life of the supervisor; it holds its pid, for a person to read and for nothing else.
``slot-N.page`` are the metric pages (``slot-N.K.page`` where processes of one slot overlapped), ``shared.page`` is what
all processes read, ``upgrade.json`` and ``reload.json`` are what became of the last upgrade and the last reload. A
clean stop removes the directory if a supervisor made it; so whoever has locked makes sure that what is locked is still
the file in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from ascproxy import _native
from ascproxy.errors import AscproxyError
from ascproxy.telemetry import metrics

LOCK = "lock"
SHARED = "shared.page"
CONTROL_SOCKET = "control.sock"
UPGRADE = "upgrade.json"
RELOAD = "reload.json"


class RunDirError(AscproxyError):
    """The run directory cannot be used; the sentence says what to do."""


@dataclass(slots=True)
class PageFile:
    """A mapped page. The mapping is shared with every process that maps the same file."""

    name: str
    memory: mmap.mmap
    page: _native.Page


class RunDir:
    """The locked, empty run directory of a running service."""

    def __init__(self, path: str, mode: int = 0o700) -> None:
        """``mode``: who may look into it. Raises :class:`RunDirError` when it is in use, somebody else's, or cannot be
        made."""
        self.path, self._mode = Path(path), mode
        while True:
            self.lock = self._open_lock(path)
            self._take_lock()
            if self._is_locked():
                break
            os.close(self.lock)  # the one before us was just removing it
        self.empty()

    @classmethod
    def adopt(cls, path: str, lock: int, made: bool) -> RunDir:
        """The directory that this process had locked before it executed another program: nothing in it is touched.

        Raises :class:`RunDirError` when what is locked is not the lock in it.
        """
        found = cls.__new__(cls)
        found.path, found.lock, found.made = Path(path), lock, made
        os.set_inheritable(lock, False)
        if not found._is_locked():
            raise RunDirError(f"run_dir {path} is not what the running service had locked")
        return found

    def _open_lock(self, path: str) -> int:
        try:
            self.made = not self.path.exists() or (self.path / LOCK).exists()  # by us, now or before a crash
            self.path.mkdir(mode=self._mode, parents=True, exist_ok=True)
            found = self.path.stat()
            if found.st_uid != os.geteuid():
                raise RunDirError(f"run_dir {path} must belong to uid {os.geteuid()}: chown it or name another folder")
            if not (self.path / LOCK).exists() and any(self.path.iterdir()):
                raise RunDirError(f"run_dir {path} holds files that are not ours, it is emptied at start: name another")
            self.path.chmod(self._mode)
            return os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RunDirError(f"cannot use run_dir {path}: {(error.strerror or str(error)).lower()}") from error

    def _is_locked(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.lock), (self.path / LOCK).lstat())
        except FileNotFoundError:
            return False

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self.lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self.lock)
            raise RunDirError(f"already running, pid {pid} (run_dir {self.path}): stop it first") from None
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"{os.getpid()}\n".encode(), 0)

    def empty(self) -> None:
        """Remove every file but the lock."""
        for entry in self.path.iterdir():
            if entry.name != LOCK and not entry.is_dir():
                entry.unlink()

    def create_page(self, name: str, slot: int = 0) -> PageFile:
        """A new page file, zeroed but for the slot's number. It appears whole: control looks for pages at any time,
        and where it has a user of its own it reads them as one of the group."""
        new = self.path / f".{name}"
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            os.ftruncate(descriptor, metrics.PAGE_SIZE)
            memory = mmap.mmap(descriptor, metrics.PAGE_SIZE)
        finally:
            os.close(descriptor)
        page = _native.Page(memory)
        page.store(_native.Page.CELLS["slot"], slot)
        new.rename(self.path / name)
        return PageFile(name, memory, page)

    def open_page(self, name: str) -> PageFile:
        """A page file that is there. Raises OSError, and :class:`RunDirError` if its layout is another version's."""
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            memory = mmap.mmap(descriptor, metrics.PAGE_SIZE)
        finally:
            os.close(descriptor)
        try:
            return PageFile(name, memory, _native.Page(memory))
        except ValueError as error:
            raise RunDirError(f"{self.path / name} cannot be read by this version: {error}") from error

    def open_to_write(self, file: PageFile) -> int:
        """A descriptor of a page for a process that may write it, though its folder is not open to it."""
        return os.open(self.path / file.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def create_slot_page(self, slot: int, number: int = 0) -> PageFile:
        """A page of a slot, with the slot's number in it. ``number`` tells its pages apart."""
        return self.create_page(f"slot-{slot}.{number}.page" if number else f"slot-{slot}.page", slot)

    def create_shared_page(self) -> PageFile:
        """The shared page, with its cells: every process finds them by their keys."""
        page = self.create_page(SHARED)
        page.page.series(metrics.KEY_EPOCH, 1)
        for key in (metrics.REVISION, metrics.OVERLOAD, metrics.MEMORY, metrics.MEMORY_LIMIT, metrics.RELOAD_FAILED):
            page.page.series(key, 1)
        return page

    def open_shared_page(self) -> PageFile:
        """The shared page that is there."""
        return self.open_page(SHARED)

    def write_reload(self, document: Mapping[str, object]) -> None:
        """Say what has become of a reload: read whole or not at all. Raises OSError."""
        self._write(RELOAD, document)

    def write_upgrade(self, document: Mapping[str, object]) -> None:
        """Say what has become of an upgrade: read whole or not at all. Raises OSError."""
        self._write(UPGRADE, document)

    def _write(self, name: str, document: Mapping[str, object]) -> None:
        new = self.path / f".{name}"
        new.write_bytes(orjson.dumps(document) + b"\n")
        new.rename(self.path / name)

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
        os.close(self.lock)

    def close(self) -> None:
        """Remove what is in the directory, and the directory if it was made here, and unlock it."""
        self.empty()
        (self.path / LOCK).unlink(missing_ok=True)
        if self.made:
            with contextlib.suppress(OSError):  # the folder above may not be ours to write
                self.path.rmdir()
        os.close(self.lock)
