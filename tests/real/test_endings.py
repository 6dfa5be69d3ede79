"""What a caller sees when a real vLLM ends in the middle of an answer, and what vLLM sees when a caller does.

The model is tiny and its weights are random; how things end is real.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.kit.rig import post
from tests.kit.service import Service, wait_for
from tests.real.access import access_line
from tests.real.conftest import MODEL, Vllm

pytestmark = pytest.mark.timeout(400)

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SAID = [{"role": "user", "content": "What is a gateway?"}]
TOKENS = 1900
SEQUENCES = 16  # --max-num-seqs: what comes after these waits in vLLM's queue
LONG: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": SAID, "max_tokens": TOKENS, "ignore_eos": True},
    MESSAGES: {"model": MODEL, "messages": SAID, "max_tokens": TOKENS, "temperature": 0},
    RESPONSES: {"model": MODEL, "input": "light", "max_output_tokens": TOKENS, "temperature": 0},
}
GENERATED, RUNNING, WAITING = "vllm:generation_tokens_total", "vllm:num_requests_running", "vllm:num_requests_waiting"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


def ending(data: bytes) -> str:
    """The code of the error event that a stream ends with, which has no terminator then."""
    assert b"[DONE]" not in data
    return str(json.loads(data.rstrip(b"\n").split(b"\n")[-1].removeprefix(b"data: "))["error"]["code"])


class Caller:
    """One request over plaintext by a socket that can be closed in the ways that clients close."""

    def __init__(self, service: Service, path: str, *, stream: bool, **members: Any) -> None:
        self.name = uuid.uuid4().hex
        body = LONG[path] | {"stream": stream} | members
        self.socket = socket.create_connection(("127.0.0.1", service.http_port), timeout=60)
        fields = f"authorization: Bearer {service.key}", f"x-request-id: {self.name}", "content-type: application/json"
        self.socket.sendall(post(body, *fields, path=path))

    def leave(self, way: str) -> None:
        if way == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()

    def read(self, first: Callable[[bytes], Any] = lambda _: None) -> tuple[int, bytes, bool]:
        """Status, what could be read of the body, and whether it was whole; ``first`` sees the first bytes of it."""
        answer = http.client.HTTPResponse(self.socket)
        answer.begin()
        data, whole = b"", True
        try:
            data = answer.read1(65536)
            first(data)
            data += answer.read()
        except http.client.IncompleteRead as error:
            data, whole = data + error.partial, False
        except ConnectionResetError:
            whole = False
        self.socket.close()
        return answer.status, data, whole


def impatient(**timeouts: str) -> Callable[[dict[str, Any]], None]:
    """Resources whose providers have these deadlines."""

    def edit(document: dict[str, Any]) -> None:
        for provider in document["providers"].values():
            provider["timeouts"] = timeouts

    return edit


def engine(vllm: Vllm) -> int:
    """The process that generates: vLLM names it so."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = os.getpgid(int(folder.name)) == vllm.process.pid
            if ours and (folder / "cmdline").read_bytes().startswith(b"VLLM::EngineCore"):
                return int(folder.name)
    raise AssertionError("this vLLM has no engine process")


# ---- the caller goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "unary"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_caller_that_leaves_stops_its_generation(
    service: Service, vllm: Vllm, path: str, stream: bool, way: str
) -> None:
    wait_for(lambda: vllm.metric(RUNNING) == 0, "vLLM rests")
    before = vllm.metric(GENERATED)
    caller = Caller(service, path, stream=stream)
    wait_for(lambda: vllm.metric(RUNNING) == 1 and vllm.metric(GENERATED) > before, "it generates")
    caller.leave(way)
    wait_for(lambda: vllm.metric(RUNNING) == 0, "nothing is generated for nobody", 1)
    assert vllm.metric(GENERATED) - before < TOKENS
    assert access_line(service, caller.name)["outcome"] == "client_gone"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "unary"])
def test_a_caller_that_leaves_vllms_queue_is_out_of_it(service: Service, vllm: Vllm, stream: bool) -> None:
    wait_for(lambda: vllm.metric(RUNNING) == 0, "vLLM rests")
    running = [Caller(service, CHAT, stream=True) for _ in range(SEQUENCES)]
    wait_for(lambda: vllm.metric(RUNNING) == SEQUENCES, "vLLM is full")
    late = Caller(service, CHAT, stream=stream)
    wait_for(lambda: vllm.metric(WAITING) == 1, "one waits")
    late.leave("fin")
    wait_for(lambda: vllm.metric(WAITING) == 0, "nobody waits any more", 1)
    assert vllm.metric(RUNNING) == SEQUENCES  # it did not leave the queue by being served, and nobody else was cut
    before = vllm.metric(GENERATED)
    wait_for(lambda: vllm.metric(GENERATED) > before, "the others go on")
    for caller in running:
        caller.leave("fin")
    wait_for(lambda: vllm.metric(RUNNING) == 0, "nothing is generated for nobody", 1)
    assert access_line(service, late.name)["outcome"] == "client_gone"


# ---- vLLM goes silent, and comes back -------------------------------------------------------------------------------


def test_a_server_that_goes_silent_is_cut(vllm: Vllm, tmp_path: Path) -> None:
    """Its engine is stopped, so that its connections stay and nothing comes: the deadline between tokens ends it."""

    pid = engine(vllm)
    resources = impatient(between_tokens="1s", first_byte="3s")
    with Service(tmp_path / "d", upstream=vllm.url, models=[MODEL], resources=resources) as service:
        streamed, unary = Caller(service, CHAT, stream=True), Caller(service, CHAT, stream=False)
        try:
            status, data, whole = streamed.read(lambda _: os.kill(pid, signal.SIGSTOP))
            assert (status, whole, ending(data)) == (200, True, "upstream_timeout")
            assert access_line(service, streamed.name)["outcome"] == "upstream_timeout"
            status, data, whole = unary.read()
            assert (status, whole) == (504, True)
            assert json.loads(data)["error"]["code"] == "upstream_timeout"
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: vllm.metric(RUNNING) == 0, "vLLM drops what was cut")
        assert service.ask(CHAT, LONG[CHAT] | {"max_tokens": 4})[0] == 200


# ---- vLLM ends ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[tuple[Vllm, Service]]:
    """A vLLM of its own, that the test may kill, and a service before it."""
    server = Vllm(tmp_path)
    try:
        server.warm()
        resources = impatient(between_tokens="5s", first_byte="20s")
        with Service(tmp_path / "d", upstream=server.url, models=[MODEL], resources=resources) as service:
            yield server, service
    finally:
        server.stop()


def middle(vllm: Vllm, service: Service, act: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stream and a unary request under way, ``act`` when both generate; what became of each, with its access line."""
    callers = {stream: Caller(service, CHAT, stream=stream) for stream in (True, False)}
    wait_for(lambda: vllm.metric(RUNNING) == 2, "both run")
    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        reading = {stream: pool.submit(caller.read, lambda _: begun.set()) for stream, caller in callers.items()}
        assert begun.wait(30)
        act()
        seen = []
        for stream in (True, False):
            status, data, whole = reading[stream].result(60)
            line = access_line(service, callers[stream].name)
            seen.append({"status": status, "data": data, "whole": whole, "line": line})
    return seen[0], seen[1]


def refused_afterwards(vllm: Vllm, service: Service) -> None:
    """Nobody is there any more, and callers are told so in time."""
    vllm.process.wait(60)
    status, headers, _ = service.ask(CHAT, LONG[CHAT] | {"max_tokens": 4})
    assert (status, headers["x-ascproxy-error"]) == (502, "upstream_unreachable")
    assert service.health("live")[0] == 200


def test_a_server_killed_in_the_middle_truncates_visibly(mortal: tuple[Vllm, Service]) -> None:
    vllm, service = mortal
    streamed, unary = middle(vllm, service, lambda: os.killpg(vllm.process.pid, signal.SIGKILL))
    assert (streamed["status"], streamed["whole"], ending(streamed["data"])) == (200, True, "truncated")
    assert streamed["line"]["outcome"] == "truncated"
    assert streamed["line"]["usage_source"] == "partial"
    assert (unary["status"], unary["whole"]) == (502, True)
    assert json.loads(unary["data"])["error"]["code"] == "upstream_unreachable"
    refused_afterwards(vllm, service)


def test_an_engine_killed_in_the_middle_is_an_error_that_callers_see(mortal: tuple[Vllm, Service]) -> None:
    """vLLM 0.32 sends an error event and then ends the stream as if it were whole, ``[DONE]`` and all: the error
    passes, the rest does not. Now and then it is gone before it has sent it."""
    vllm, service = mortal
    streamed, unary = middle(vllm, service, lambda: os.kill(engine(vllm), signal.SIGKILL))
    assert (streamed["status"], streamed["whole"]) == (200, True)
    assert b'data: {"error"' in streamed["data"]
    assert b"[DONE]" not in streamed["data"]
    assert streamed["line"]["outcome"] == (
        "truncated" if ending(streamed["data"]) == "truncated" else "upstream_failed"
    )
    assert unary["status"] >= 500
    assert unary["whole"]
    assert "error" in json.loads(unary["data"])
    refused_afterwards(vllm, service)


def test_a_server_that_is_told_to_end_leaves_nobody_waiting(mortal: tuple[Vllm, Service]) -> None:
    """On SIGTERM vLLM 0.32 ends what runs with ``finish_reason: "abort"``, or, at times, falls silent with its
    connections open: then the deadlines end it, as they do for any server that goes silent."""
    vllm, service = mortal
    streamed, unary = middle(vllm, service, lambda: vllm.process.send_signal(signal.SIGTERM))
    for seen, silent in ((streamed, 200), (unary, 504)):
        aborted = b'"finish_reason":"abort"' in seen["data"]
        assert seen["line"].get("finish") == ("abort" if aborted else None)
        if aborted:
            assert (seen["status"], seen["whole"]) == (200, True)
            assert seen["line"]["outcome"] == "upstream_aborted"
            assert seen is unary or ending(seen["data"]) == "upstream_aborted"
        elif seen["line"].get("code") == "upstream_timeout" or seen["line"]["outcome"] == "upstream_timeout":
            assert seen["status"] == silent
            assert b"[DONE]" not in seen["data"]
        else:
            assert not seen["whole"] or seen["status"] >= 500
