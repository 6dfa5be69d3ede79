"""Upgrades with real processes: what passes, who serves meanwhile, and how a failed one is turned round."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascproxy.model.tenant import Tenant
from tests.kit.processes import Service, eventually, gone, running, snapshot


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as started:
        yield started


def upgrade(service: Service) -> dict[str, Any]:
    """Ask for one and wait for its end; the supervisor's word."""
    before = outcome(service)
    service.process.send_signal(signal.SIGUSR2)
    number = before["number"] if before is not None else 0
    return eventually(
        lambda: (o := outcome(service)) and o["number"] > number and o["state"] in ("done", "failed") and o,
        30, service.log_file.read_text(),
    )  # fmt: skip


def outcome(service: Service) -> dict[str, Any] | None:
    file = Path(service.snapshot.node.run_dir) / "upgrade.json"
    return json.loads(file.read_bytes()) if file.exists() else None


def pids(service: Service) -> dict[int, int]:
    return {slot: worker["pid"] for slot, worker in service.workers().items() if worker["state"] == "ready"}


class Asking:
    """A thread that asks on fresh connections all the time: every answer and every failure is kept."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.answers: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self.service.ask())
            except (OSError, ValueError) as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_new_workers_serve_in_the_same_slots_and_old_ones_end(service: Service) -> None:
    before, children = pids(service), service.children()
    with Asking(service) as asking:
        for number in range(1, 4):
            assert upgrade(service) == {
                "number": number, "state": "done", "from": "0.1.0", "to": "0.1.0", "reason": None
            }  # fmt: skip
            eventually(lambda: set(pids(service)) == {0, 1} and not set(pids(service).values()) & set(before.values()))
            eventually(lambda before=before: all(gone(pid) for pid in before.values()), what="old workers end")
            before = pids(service)
    assert asking.failures == []
    assert len({answer["incarnation"] for answer in asking.answers}) >= 3
    eventually(lambda: len(service.children()) == 3, what=f"two workers and control: {service.children()}")
    assert not set(children) & set(service.children())
    assert {worker["restarts"] for worker in service.workers().values()} == {0}, "an upgrade is no crash"
    assert service.status()["upgrade"]["state"] == "done"
    service.process.terminate()
    assert service.process.wait(10) == 0
