"""Recorded exchanges with a real vLLM reach the client byte for byte, however the network cuts them (SEMANTICS 5)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ascproxy import _native
from ascproxy.wire.operation import Scan, at
from tests.kit.rig import Answer, Rig, post, read_answer, read_request, run
from tests.kit.service import first_light

WIRE = Path(__file__).parents[1] / "wire"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# An upstream's 401 is a credential fault of ours and never passed on (SEMANTICS 2).
UNAUTHORIZED = {"vllm-err-no-api-key", "vllm-err-no-api-key-messages", "vllm-err-wrong-api-key", "vllm-api-key-models"}


def whole(name: str) -> bytes:
    return (WIRE / f"{name}.response.txt").read_bytes()


NAMES = sorted(path.name.removesuffix(".response.txt") for path in WIRE.glob("*.response.txt"))
POSTED = [n for n in NAMES if (WIRE / f"{n}.request.txt").read_bytes().startswith(b"POST") and n not in UNAUTHORIZED]


def scan_of(name: str) -> int:
    """How the answer of a recording is read: by the path that was asked."""
    path = (WIRE / f"{name}.request.txt").read_bytes().split()[1].partition(b"?")[0]
    shape = at(path)
    return int(getattr(_native, f"SCAN_{(shape.scan if shape is not None else Scan.NONE).upper()}"))


async def parsed(raw: bytes) -> Answer:
    reader = asyncio.StreamReader(limit=1 << 26)
    reader.feed_data(raw.removeprefix(CONTINUE))
    reader.feed_eof()
    return await read_answer(reader)


async def replay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the recording that the request names, in the pieces that it asks for."""
    while True:
        _, body = await read_request(reader)
        wanted = json.loads(body)
        raw = whole(wanted["wire"])
        step = wanted.get("step")
        cuts = list(range(step, len(raw), step)) if step else [wanted.get("cut", len(raw))]
        for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            writer.write(raw[start:end])
            await asyncio.sleep(0.0003)
        if b"connection: close" in raw.lower():
            return


def same(got: Answer, expected: Answer) -> None:
    assert got.status == expected.status
    assert got.body == expected.body
    assert got.fields.get("content-type") == expected.fields.get("content-type")


def test_there_are_recordings() -> None:
    assert len(POSTED) >= 55


@pytest.mark.parametrize("name", NAMES)
def test_whole_and_byte_by_byte(name: str) -> None:
    async def main() -> None:
        expected = await parsed(whole(name))
        async with Rig(replay) as rig:
            rig.walk.plan = rig.make_plan(scan=scan_of(name))
            for how in ({}, {"step": 1}, {"step": 7}, {"step": 100}):
                reader, writer = await rig.client()
                writer.write(post({"wire": name} | how))
                same(await read_answer(reader), expected)
                writer.close()

    run(main())


@pytest.mark.parametrize("name", NAMES)
def test_split_in_two_at_every_byte(name: str) -> None:
    async def main() -> None:
        raw = whole(name)
        expected = await parsed(raw)
        cuts = iter(range(1, len(raw)))

        async def client(rig: Rig) -> None:
            reader, writer = await rig.client()
            for cut in cuts:
                writer.write(post({"wire": name, "cut": cut}))
                same(await read_answer(reader), expected)
            writer.close()

        async with Rig(replay) as rig:
            rig.walk.plan = rig.make_plan(scan=scan_of(name))
            await asyncio.gather(*(client(rig) for _ in range(32)))
            outcomes = {s["outcome"] for s in rig.walk.settled}
            assert outcomes == {"complete"}
            assert len(rig.walk.settled) == len(raw) - 1

    run(main())


def paths() -> dict[str, list[str]]:
    """Recordings by the path they were asked on."""
    by_path: dict[str, list[str]] = {}
    for name in POSTED:
        by_path.setdefault((WIRE / f"{name}.request.txt").read_bytes().split()[1].decode(), []).append(name)
    return by_path


@pytest.mark.parametrize("split", ["0", "1"])
def test_through_the_real_service_with_the_recorded_requests(tmp_path: Path, split: str) -> None:
    """Simulator, supervisor, worker, HTTPS: each recorded request with its model exchanged for the replay's name."""
    extra = ("--split", split) if split != "0" else ()

    def glob(document: dict) -> None:
        (route,) = document["routes"].values()
        route["models"] = ["sim-chat", "wire:*"]

    with first_light(tmp_path, "--recordings", str(WIRE), *extra, resources=glob) as (service, _):
        for path, names in paths().items():
            for name in names:
                expected = asyncio.run(parsed(whole(name)))
                raw = (WIRE / f"{name}.request.txt").read_bytes()
                body: dict = {}
                if b"chunked" not in raw.split(b"\r\n\r\n")[0].lower():
                    try:
                        body = json.loads(raw.split(b"\r\n\r\n", 1)[1])
                    except ValueError:  # the recording of a bad body: any good one asks for the same answer
                        body = {}
                status, fields, got = service.ask(path, body | {"model": f"wire:{name}"})
                assert (name, status) == (name, expected.status)
                assert (name, got) == (name, expected.body)
                assert fields["content-type"] == expected.fields["content-type"]
