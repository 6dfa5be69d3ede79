"""The service under a storm of its own making: crash loops, reloads, kills (issue "First light", Shows 8).

Each run lasts 20 s at 300 requests a second, half of them on fresh connections and half on kept ones, and every answer
must carry its own request's marker.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.kit.service import Service, first_light
from tests.kit.storm import Storm

RATE = 300
SECONDS = 20
SIM = ("--rate", "0", "--tokens", "4")
# A connection waits 0.3 s at most to be accepted; what a request takes then, and what the machine takes from all of us,
# is added: the load's own loop tells how late it was itself.
ACCEPTED_S = 0.3
SERVED_S = 0.5
LAG_FACTOR = 4  # supervisor, worker and simulator each wait for a processor where the load waits once


def run(storm: Storm, disturb: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(storm.run(disturb))
    assert len(storm.outcomes) == RATE * SECONDS


def accepted_in_time(storm: Storm) -> bool:
    return storm.slowest_s <= ACCEPTED_S + SERVED_S + LAG_FACTOR * storm.lag


def workers_of(service: Service) -> dict[int, int]:
    """Slot to pid, by the service's own word."""
    return {w["slot"]: w["pid"] for w in service.status()["workers"]}


def children(pid: int) -> set[int]:
    return {int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.fixture
def service(tmp_path: Path):
    with first_light(tmp_path, *SIM, workers=2) as (running, _):
        yield running


@pytest.mark.timeout(120)
def test_one_slot_in_a_crash_loop(service: Service) -> None:
    """Whatever appears in the slot is killed at once; its socket is served by the sibling meanwhile."""
    assert service.process is not None
    supervisor = service.process.pid
    kept = children(supervisor) - {workers_of(service)[0]}
    kills: list[float] = []

    async def disturb() -> None:
        loop = asyncio.get_running_loop()
        while True:
            for pid in children(supervisor) - kept:
                try:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(loop.time())
                except ProcessLookupError:
                    continue
            await asyncio.sleep(0.005)

    storm = Storm(service, RATE, SECONDS)
    run(storm, disturb)
    assert len(kills) >= 4, "the slot is tried again and again, with pauses"
    first = kills[0]
    for outcome in storm.failed:
        assert any(outcome.opened <= k <= outcome.ended + 0.001 for k in kills), (outcome, first)
    assert len(storm.failed) <= 50
    assert accepted_in_time(storm)


@pytest.mark.timeout(120)
def test_reload_every_two_seconds_fails_nothing(service: Service) -> None:
    before = workers_of(service)

    async def disturb() -> None:
        number = 0
        while True:
            await asyncio.sleep(2)
            number += 1

            def change(document: dict, n: int = number) -> None:
                document["routes"][f"more-{n}"] = {
                    "models": [f"more-{n}"],
                    "targets": [{"provider": next(iter(document["providers"]))}],
                }

            service.edit("resources.yaml", change)
            service.signal(signal.SIGHUP)

    storm = Storm(service, RATE, SECONDS)
    revision = service.status()["revision"]
    run(storm, disturb)
    assert storm.failed == []
    assert accepted_in_time(storm)
    assert service.status()["revision"] != revision, "the reloads were real"
    assert workers_of(service) == before, "a reload replaces no worker"


@pytest.mark.timeout(120)
def test_a_worker_killed_every_second(service: Service) -> None:
    assert service.process is not None
    supervisor = service.process.pid
    workers = set(workers_of(service).values())
    others = children(supervisor) - workers
    kills: list[float] = []

    async def disturb() -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1)
            victim = min(children(supervisor) - others)
            kills.append(loop.time())
            os.kill(victim, signal.SIGKILL)

    storm = Storm(service, RATE, SECONDS)
    run(storm, disturb)
    assert len(kills) >= 18
    for outcome in storm.failed:
        assert any(outcome.opened <= k <= outcome.ended + 0.001 for k in kills), outcome
    assert accepted_in_time(storm)
    assert workers_of(service).keys() == {0, 1}
