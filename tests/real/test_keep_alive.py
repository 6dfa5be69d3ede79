"""Connections to a real vLLM are used again for as long as it keeps them, and no request pays for its closing them.

vLLM's server closes a connection that was idle for 5.0 s. Each lane has a pool of its own, hence one connection to vLLM
with exactly its own gaps: most with a pool that lets go after 4 s, as by default; some with one that would keep it for
longer than vLLM does, so that every closing is met and the request asked again, as far as the budget of retries goes.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.rig import post, read_answer
from tests.kit.service import Service
from tests.real.access import access_lines
from tests.real.conftest import MODEL, Vllm

pytestmark = pytest.mark.timeout(400)

LANES = 500
REQUESTS = 21  # of each lane
LONGER = 20  # every so many lanes, one whose pool keeps for longer than vLLM
# Seconds between the end of an answer and the next request: densely around 5.0, where vLLM closes.
GAPS = [
    3.95,
    4.0,
    4.05,
    4.5,
    4.8,
    4.9,
    4.95,
    4.97,
    4.98,
    4.985,
    4.99,
    4.994,
    4.996,
    4.998,
    5.0,
    5.002,
    5.004,
    5.01,
    5.05,
    5.2,
]


def pool_idle(lane: int) -> str:
    """Pools are told apart by how long they keep: a millisecond apart here."""
    return f"{(4_000 if lane % LONGER else 30_000) + lane}ms"


async def run(service: Service, lane: int) -> list[int | str]:
    """What one caller on one connection is answered."""
    gap = GAPS[(lane + lane // LONGER) % len(GAPS)]
    body = json.dumps({"model": f"lane-{lane}", "prompt": "light"}).encode()
    asks = post(body, f"authorization: Bearer {service.key}", "content-type: application/json", path="/tokenize")
    seen: list[int | str] = []
    await asyncio.sleep(5 * lane / LANES)  # not all at once
    reader, writer = await asyncio.open_connection("127.0.0.1", service.http_port)
    try:
        for _ in range(REQUESTS):
            writer.write(asks)
            seen.append((await read_answer(reader)).status)
            await asyncio.sleep(gap)  # the gap is what is tested: it is vLLM's clock that runs
    except (OSError, asyncio.IncompleteReadError) as error:
        seen.append(repr(error))
    finally:
        writer.close()
    return seen


def test_no_request_of_ten_thousand_fails_around_the_closing(vllm: Vllm, tmp_path: Path) -> None:
    def each_its_pool(document: dict[str, Any]) -> None:
        (provider,) = document["providers"].values()
        document["providers"] = {f"lane-{n}": provider | {"pool_idle": pool_idle(n)} for n in range(LANES)}
        document["routes"] = {
            f"lane-{n}": {"models": [f"lane-{n}"], "targets": [{"provider": f"lane-{n}", "model": MODEL}]}
            for n in range(LANES)
        }

    async def all_lanes(service: Service) -> list[list[int | str]]:
        return await asyncio.gather(*(run(service, n) for n in range(LANES)))

    with Service(tmp_path / "d", upstream=vllm.url, models=[MODEL], resources=each_its_pool) as service:
        answers = asyncio.run(all_lanes(service))
    asked = access_lines(service)  # it has stopped: all are written
    failed = {n: seen for n, seen in enumerate(answers) if seen != [200] * REQUESTS}
    assert not failed
    assert len(asked) == LANES * REQUESTS
    again = [line["model"] for line in asked if line["attempts"] > 1]
    print(f"{len(asked)} requests, {len(again)} of them asked again on a fresh connection: {sorted(again)[:20]}")
    assert all(int(model.removeprefix("lane-")) % LONGER == 0 for model in again), "the default never meets the closing"
