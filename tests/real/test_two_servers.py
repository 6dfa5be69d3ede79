"""Two real vLLM servers are one provider: load is spread over both, and the end of one is the end of its streams only.

Which of the two has answered is known by the name that its answers give the model; which was asked, by the access log.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.kit.rig import free_port
from tests.kit.service import Service, wait_for
from tests.real.access import access_lines
from tests.real.conftest import MODEL, Vllm

pytestmark = pytest.mark.timeout(400)

SECOND = "tiny-of-the-second"
SAID: Any = [{"role": "user", "content": "What is a gateway?"}]
STREAMS = 8
TOKENS = 1900
CALLERS = 4  # that ask all the time for something short
STANDSTILL_S = 2.0  # the SDKs give up connecting after 5 s, the gateway after 3 s
AFTERWARDS = 40  # requests that begin when the second server is gone
RUNNING = "vllm:num_requests_running"


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> int:
    """Of the second server, also when it has been started again."""
    return free_port()


@pytest.fixture(scope="module")
def pair(vllm: Vllm, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one provider that has two endpoints, before both are known to live."""

    def two(document: dict[str, Any]) -> None:
        (provider,) = document["providers"].values()
        provider["endpoints"] = [vllm.url, f"http://127.0.0.1:{port}"]
        provider["timeouts"] = {"between_tokens": "10s", "first_byte": "60s"}

    with Service(tmp_path_factory.mktemp("pair") / "d", upstream=vllm.url, models=[MODEL], resources=two) as service:
        yield service


@pytest.fixture(scope="module")
def started() -> Iterator[list[Vllm]]:
    """Every second server so far; the last one may be alive."""
    servers: list[Vllm] = []
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def second(started: list[Vllm], port: int, tmp_path: Path) -> Vllm:
    """The second server, started again where a test has ended it: the service finds it again at its address."""
    if not started or started[-1].process.poll() is not None:
        started.append(Vllm(tmp_path, name=SECOND, port=port))
        started[-1].warm()
    return started[-1]


@dataclass
class Sdks:
    """The SDKs as they come, but without retries: nothing is to be hidden."""

    ai: openai.AsyncOpenAI
    claude: anthropic.AsyncAnthropic


@asynccontextmanager
async def sdks(service: Service) -> AsyncIterator[Sdks]:
    verify = ssl.create_default_context(cafile=service.facts["ca"])
    url, key = service.facts["https_url"], service.key
    async with (
        openai.AsyncOpenAI(
            base_url=url + "/v1",
            api_key=key,
            http_client=openai.DefaultAsyncHttpxClient(verify=verify),
            max_retries=0,
        ) as ai,
        anthropic.AsyncAnthropic(
            base_url=url,
            api_key=key,
            http_client=anthropic.DefaultAsyncHttpxClient(verify=verify),
            max_retries=0,
        ) as claude,
    ):
        yield Sdks(ai, claude)


# ---- who asks --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One request: its name, who answered, whether it was whole, when it began and ended, and how it failed."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    server: str = ""
    whole: bool = False
    began: float = 0.0
    ended: float = 0.0
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or not self.whole

    @property
    def named(self) -> dict[str, str]:
        """The field that gives it its name."""
        return {"x-request-id": self.name}


async def stream_on(with_: Sdks, streams: list[Seen], enough: asyncio.Event) -> None:
    """One caller that always has a stream of many tokens under way."""
    while not enough.is_set():
        streams.append(Seen(began=time.monotonic()))
        await long_stream(with_, streams[-1])


async def long_stream(with_: Sdks, seen: Seen) -> None:
    """A stream of many tokens. Who answers is known from its first content on."""
    try:
        stream = await with_.ai.chat.completions.create(
            model=MODEL,
            messages=SAID,
            max_tokens=TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers=seen.named,
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                seen.server = chunk.model
            seen.whole = seen.whole or chunk.choices[0].finish_reason == "length"
    except openai.APIError as error:
        seen.error = repr(error)
    seen.ended = time.monotonic()


async def short(with_: Sdks, n: int) -> Seen:
    """A few tokens: in turn a chat in one piece, one as a stream, and a message of the other dialect."""
    seen = Seen(began=time.monotonic())
    chat, messages, named = with_.ai.chat.completions, with_.claude.messages, seen.named
    try:
        if n % 3 == 0:
            answer = await chat.create(model=MODEL, messages=SAID, max_tokens=4, extra_headers=named)
            seen.server, seen.whole = answer.model, answer.choices[0].finish_reason in ("length", "stop")
        elif n % 3 == 1:
            stream = await chat.create(model=MODEL, messages=SAID, max_tokens=4, stream=True, extra_headers=named)
            async for chunk in stream:
                seen.server = chunk.model
                seen.whole = seen.whole or chunk.choices[0].finish_reason in ("length", "stop")
        else:
            message = await messages.create(model=MODEL, max_tokens=4, messages=SAID, extra_headers=named)
            seen.server, seen.whole = message.model, message.stop_reason in ("max_tokens", "end_turn")
    except (openai.APIError, anthropic.APIError) as error:
        seen.error = repr(error)
    seen.ended = time.monotonic()
    return seen


async def ask_on(with_: Sdks, first: int, seen: list[Seen], enough: asyncio.Event) -> None:
    """One caller that asks for something short, again and again."""
    for n in itertools.count(first):
        if enough.is_set():
            return
        seen.append(await short(with_, n))


@dataclass
class Standstill:
    """The longest time for which nothing on this machine ran that was not a model server."""

    s: float = 0.0


@contextmanager
def standstill() -> Iterator[Standstill]:
    """Measured by a process of its own: the SDKs keep this one busy."""
    watch = (
        "import sys, threading, time\n"
        "over = threading.Event()\n"
        "threading.Thread(target=lambda: (sys.stdin.read(), over.set())).start()\n"
        "worst, last = 0.0, time.monotonic()\n"
        "while not over.wait(0.05):\n"
        "    now = time.monotonic()\n"
        "    worst, last = max(worst, now - last), now\n"
        "print(worst)\n"
    )
    found = Standstill()
    with subprocess.Popen([sys.executable, "-c", watch], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield found
        out, _ = process.communicate(b"")
        found.s = float(out)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def kill(server: Vllm) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)


def terminate(server: Vllm) -> None:
    server.process.send_signal(signal.SIGTERM)


# ---- what is seen ----------------------------------------------------------------------------------------------------


def test_load_is_spread_over_both(vllm: Vllm, second: Vllm, pair: Service) -> None:
    async def ask() -> Counter[str]:
        async with sdks(pair) as with_:
            return Counter([(await short(with_, n)).server for n in range(30)])

    wait_for(lambda: vllm.metric(RUNNING) == 0, "the first server rests")
    # One after the other: nothing is under way elsewhere, so they take turns.
    assert asyncio.run(ask()) == {MODEL: 15, SECOND: 15}
    assert second.metric("vllm:request_success_total") >= 15


@pytest.mark.parametrize("end", [kill, terminate])
def test_the_end_of_one_is_the_end_of_its_streams_only(
    vllm: Vllm, second: Vllm, pair: Service, end: Callable[[Vllm], None]
) -> None:
    """Long streams on both, and callers that ask on, while the second ends. What fails was under way on it then."""
    told = gone = 0.0

    streams: list[Seen] = []
    meanwhile: list[Seen] = []

    def both_busy() -> bool:
        streaming = {one.server for one in streams if not one.ended}
        return {one.server for one in meanwhile} >= {MODEL, SECOND} and streaming >= {MODEL, SECOND}

    async def load() -> list[Seen]:
        nonlocal told, gone
        enough = asyncio.Event()
        async with sdks(pair) as with_, asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(stream_on(with_, streams, enough))
            for n in range(CALLERS):
                group.create_task(ask_on(with_, n, meanwhile, enough))
            await asyncio.to_thread(wait_for, both_busy, "both have streams under way, and answer callers besides", 90)
            told = time.monotonic()
            end(second)
            await asyncio.to_thread(wait_for, lambda: refuses(second.port), "the second server is gone", 60)
            gone = time.monotonic()
            afterwards = [await short(with_, n) for n in range(AFTERWARDS)]
            enough.set()
        return afterwards

    wait_for(lambda: vllm.metric(RUNNING) == 0, "the first server rests")
    with standstill() as stood:
        afterwards = asyncio.run(load())
    if stood.s > STANDSTILL_S:
        second.process.wait(60)
        pytest.skip(
            f"a process that only sleeps stood still for {stood.s:.1f} s: too few cores for two servers and this"
        )

    # Every failure is one of the second server, which had the request when it ended: the access log says who was asked.
    every = [*streams, *meanwhile, *afterwards]
    failed = [one for one in every if one.failed]
    print(f"{end.__name__}: gone after {gone - told:.2f} s; {len(failed)} of {len(every)} failed")
    for one in failed:
        print(f"  {one.began - told:+.2f} s to {one.ended - told:+.2f} s: {one}")
    lines = wait_for(lambda: logged(pair, failed), "an access line of each that failed", 10)
    for one in failed:
        assert lines[one.name].get("endpoint") == f"127.0.0.1:{second.port}", (one, lines[one.name])
        assert one.began < gone, one
        assert one.ended > told, one
    # The streams that were under way: those that had begun on the second failed visibly, and no other.
    cut = [one for one in streams if one.began < told < one.ended and one.server]
    assert {one.server for one in cut} == {MODEL, SECOND}
    for one in cut:
        assert (one.whole, bool(one.error)) == ((True, False) if one.server == MODEL else (False, True)), one
    # New requests: all of them whole, all of them by the first.
    assert {(one.failed, one.server) for one in afterwards} == {(False, MODEL)}
    assert any(one.began > gone for one in meanwhile), "nobody asked on"
    second.process.wait(60)


def logged(service: Service, requests: list[Seen]) -> dict[str, dict[str, Any]] | None:
    """The access line of each by its name; None while one is missing."""
    lines = {line["request_id"]: line for line in access_lines(service)}
    return lines if all(one.name in lines for one in requests) else None
