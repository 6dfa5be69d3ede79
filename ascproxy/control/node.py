"""The state of this node as its pages tell it: status, liveness, readiness. Read only."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.telemetry import metrics

SHARED = "shared.page"
UPGRADE = "upgrade.json"
# The numbers of ascproxy.supervisor.slots.State, a contract between processes; the words are the status document's.
EMPTY, READY = 0, metrics.READY
STATES = ("stopped", "waiting", "starting", "ready", "draining", "failing", "replacing")
HEARTBEAT_LIMIT_NS = 10_000_000_000


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether traffic should come here; ``reasons`` say why not."""

    ready: bool
    revision: str | None
    workers: int
    reasons: tuple[str, ...]


class Node:
    """Reads the pages of ``run_dir``. ``now_ns`` is monotonic. ``separation`` is what keeps control and workers apart:
    ``none``, or ``units`` where each has a user of its own."""

    def __init__(self, run_dir: Path, now_ns: Callable[[], int] = monotonic_ns, *, separation: str = "none") -> None:
        self.run_dir = run_dir
        self.separation = separation
        self.now_ns = now_ns
        self._pages: dict[str, _native.Page] = {}

    def pages(self) -> list[_native.Page]:
        """The pages of all slots: they are added while the service runs, never removed.

        A slot has a second one, ``slot-N.1.page``, once an upgrade has put two processes into it, and so on.
        """
        slot = 0
        while self._open(f"slot-{slot}.page"):
            number = 1
            while self._open(f"slot-{slot}.{number}.page"):
                number += 1
            slot += 1
        return list(self._pages.values())

    def _open(self, name: str) -> bool:
        if name not in self._pages:
            try:
                self._pages[name] = open_page(self.run_dir / name)
            except FileNotFoundError:
                return False
        return True

    def shared_page(self) -> _native.Page | None:
        """The shared page, None before the supervisor has made it."""
        path = self.run_dir / SHARED
        return open_page(path) if path.exists() else None

    def status(self, revision: str | None) -> dict[str, Any]:
        """The document of ``ascproxy status --json``: of one slot's workers, the newest is the last."""
        pages = [page for page in self.pages() if _load(page, "state") != EMPTY]
        pages.sort(key=lambda page: (_load(page, "slot"), _load(page, "state") == READY, _load(page, "incarnation")))
        workers = [self._worker(page) for page in pages]
        return {"revision": revision, "separation": self.separation, "workers": workers, "upgrade": self.upgrade()}

    def upgrade(self) -> dict[str, Any] | None:
        """What became of the last upgrade, by the supervisor's word; None if there was none."""
        try:
            found = orjson.loads((self.run_dir / UPGRADE).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        return found if isinstance(found, dict) else None

    def _worker(self, page: _native.Page) -> dict[str, Any]:
        state = _load(page, "state")
        return {
            "slot": _load(page, "slot"),
            "pid": _load(page, "pid") or None,
            "state": STATES[state] if state < len(STATES) else str(state),
            "revision": metrics.revision_name(_load(page, "revision")),
            "restarts": _load(page, "restarts"),
            "in_flight": _load(page, "in_flight"),
        }

    def live(self) -> bool:
        """Whether a worker's heartbeat is younger than 10 s."""
        now = self.now_ns()
        beats = [_load(page, "heartbeat_ns") for page in self.pages()]
        return any(beat and now - beat < HEARTBEAT_LIMIT_NS for beat in beats)

    def readiness(self, revision: str | None) -> Readiness:
        """Ready: a revision is in force, and a live worker accepts on it."""
        ready = [page for page in self.pages() if _load(page, "state") == READY and _load(page, "listening")]
        reasons = []
        if revision is None:
            reasons.append("no revision is in force")
        if not ready:
            reasons.append("no worker accepts connections")
        elif not self.live():
            reasons.append("no worker has ticked within 10 s")
        return Readiness(not reasons, revision, len(ready), tuple(reasons))


class SharedPage:
    """What control writes into the shared page: nobody else writes these cells. ``descriptor`` is the page's file,
    opened to write; it stays the caller's."""

    def __init__(self, descriptor: int) -> None:
        self._page = _map(descriptor, mmap.PROT_READ | mmap.PROT_WRITE)
        self._epoch = self._page.series(metrics.KEY_EPOCH, 1)
        self._revision = self._page.series(metrics.REVISION, 1)

    def bump_key_epoch(self) -> None:
        """Make every worker forget the keys that it has verified."""
        self._page.add(self._epoch, 1)

    def set_revision(self, revision: str) -> None:
        self._page.store(self._revision, metrics.revision_number(revision))


def open_page(path: Path) -> _native.Page:
    """Map a page file to read it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _map(descriptor, mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _map(descriptor: int, protection: int) -> _native.Page:
    return _native.Page(mmap.mmap(descriptor, metrics.PAGE_SIZE, prot=protection))


def _load(page: _native.Page, cell: str) -> int:
    return page.load(_native.Page.CELLS[cell])
