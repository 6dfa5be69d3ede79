"""Traffic while processes die, reload and crash, each apart: nobody waits long to be accepted, reloads cost nothing.

Every request has a connection of its own, so that each one needs an accept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ascproxy.model.tenant import Tenant
from tests.kit.processes import Service, eventually, running

SECONDS = 4.0
RATE = 150.0  # requests a second
LONGEST_WAIT_S = 0.3


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as started:
        yield started


@dataclass
class Traffic:
    """What became of the requests: seconds from connect to the answer, and failures by type."""

    waits: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def ask(self, address: tuple[str, int]) -> None:
        begin = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = await reader.read()
            writer.close()
        except OSError as error:
            self.failures.append(type(error).__name__)
            return
        if answer.startswith(b"HTTP/1.1 200"):
            self.waits.append(time.monotonic() - begin)
        else:
            self.failures.append("cut")

    async def run(self, address: tuple[str, int], disturb: asyncio.Task[None]) -> None:
        """Requests at a steady rate until ``disturb`` ends."""
        begin, asking = time.monotonic(), []
        while not disturb.done():
            asking.append(asyncio.create_task(self.ask(address)))
            await asyncio.sleep(max(0.0, begin + len(asking) / RATE - time.monotonic()))
        await asyncio.gather(disturb, *asking)


def under_traffic(service: Service, act: object, every_s: float) -> Traffic:
    async def disturb() -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            await asyncio.to_thread(act)  # type: ignore[arg-type]
            await asyncio.sleep(every_s)

    async def both() -> Traffic:
        traffic = Traffic()
        await traffic.run(service.address, asyncio.create_task(disturb()))
        return traffic

    traffic = asyncio.run(both())
    assert len(traffic.waits) > SECONDS * RATE / 2
    return traffic


def test_reloads_fail_no_request(service: Service) -> None:
    revisions = iter(range(1, 100))

    def reload() -> None:
        service.reload(dataclasses.replace(service.snapshot, revision=f"{next(revisions):012x}"))

    traffic = under_traffic(service, reload, 0.3)
    assert traffic.failures == []
    assert max(traffic.waits) < LONGEST_WAIT_S
    assert len([line for line in service.log() if line["message"] == "reloaded"]) > 3


def test_a_killed_worker_takes_only_its_own_connections_with_it(service: Service) -> None:
    killed: list[int] = []

    def kill() -> None:
        worker = eventually(lambda: (w := service.workers()[len(killed) % 2])["state"] == "ready" and w)
        os.kill(worker["pid"], signal.SIGKILL)
        killed.append(worker["pid"])

    traffic = under_traffic(service, kill, 0.5)
    assert len(killed) > 3
    # At this rate a worker has an exchange or two open at any moment; what waits in the queue of its socket survives.
    assert len(traffic.failures) <= 3 * len(killed), traffic.failures
    assert max(traffic.waits) < LONGEST_WAIT_S


def test_a_slot_in_a_crash_loop_strands_nobody(service: Service) -> None:
    service.reload(dataclasses.replace(service.snapshot, tenants=(Tenant("crash-0"),)))
    service.until_logged("reloaded")
    os.kill(service.workers()[0]["pid"], signal.SIGKILL)
    traffic = under_traffic(service, lambda: None, 0.1)
    assert len(traffic.failures) <= 3
    assert max(traffic.waits) < LONGEST_WAIT_S
    assert service.workers()[0]["state"] in ("waiting", "starting")
