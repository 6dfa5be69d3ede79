"""A real simulator process on loopback: both SDKs, sockets, the pace, departures, every failure as a client sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import h11
import httpx
import openai
import pytest
import trustme

from ascproxy.sim.failure import Kind
from ascproxy.sim.settings import options

WIRE = Path(__file__).parents[1] / "wire"
TIMEOUT_S = 10.0


@dataclass
class Sim:
    process: subprocess.Popen[bytes]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/sim/stats", timeout=TIMEOUT_S).json()
        return answer

    def set(self, **changes: object) -> None:
        httpx.put(f"{self.url}/sim/settings", json=changes, timeout=TIMEOUT_S).raise_for_status()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Sim]:
    command = [sys.executable, "-m", "ascproxy.sim", "--json", "--recordings", os.fspath(WIRE), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["pid"] == process.pid
        yield Sim(process, line["url"])
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


@pytest.fixture(scope="module")
def fast() -> Iterator[Sim]:
    with running("--rate", "0", "--model", "sim-chat", "--model", "other") as sim:
        yield sim


@pytest.fixture(scope="module")
def tgi() -> Iterator[Sim]:
    with running("--type", "tgi", "--rate", "0", "--model", "sim-tgi") as sim:
        yield sim


@pytest.fixture
def slow() -> Iterator[Sim]:
    with running("--rate", "50", "--tokens", "10000") as sim:
        yield sim


def until(condition: Callable[[], bool]) -> float:
    """Ask until ``condition`` (each asking is a request to the simulator); the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < TIMEOUT_S, "waited in vain"
    return time.monotonic() - start


def post(path: str, body: dict[str, Any], *headers: str) -> bytes:
    raw = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: sim",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def chat(stream: bool = True, model: str = "sim-chat", **more: Any) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream, **more}
    return post("/v1/chat/completions", body)


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        more = sock.recv(65536)
        assert more, f"closed after {data[-200:]!r}"
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while more := sock.recv(65536):
        data += more
    return data


def exchange(sock: socket.socket, raw: bytes) -> tuple[h11.Response, bytes, list[h11.InformationalResponse]]:
    """Send and read one response, with h11 as the judge of its framing."""
    sock.sendall(raw)
    judge = h11.Connection(h11.CLIENT)
    judge.send(h11.Request(method="POST", target="/", headers=[("host", "sim"), ("content-length", "0")]))
    judge.send(h11.EndOfMessage())
    informational, body = [], b""
    response: h11.Response | None = None
    while True:
        event = judge.next_event()
        if event is h11.NEED_DATA:
            judge.receive_data(sock.recv(65536))
        elif isinstance(event, h11.InformationalResponse):
            informational.append(event)
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert response is not None
            assert judge.trailing_data[0] == b""
            return response, body, informational


# -- SDKs


def openai_client(sim: Sim, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{sim.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)


def anthropic_client(sim: Sim) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=sim.url, api_key="none", max_retries=0, timeout=TIMEOUT_S)


USER = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def test_openai_chat(fast: Sim) -> None:
    answer: Any = openai_client(fast).chat.completions.create(
        model="sim-chat", messages=USER, max_tokens=7, user="caller-1", n=2
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert all(choice.message.content.startswith("caller-1") for choice in answer.choices)
    assert answer.usage.completion_tokens == 14


def test_openai_chat_stream(fast: Sim) -> None:
    frames: list[Any] = list(
        openai_client(fast).chat.completions.create(
            model="other",
            messages=USER,
            max_tokens=5,
            stream=True,
            user="caller-2",
            stream_options={"include_usage": True},
        )
    )
    said = "".join(frame.choices[0].delta.content for frame in frames if frame.choices)
    assert said.startswith("caller-2")
    assert frames[-2].choices[0].finish_reason == "length"
    assert (
        frames[-1].usage.completion_tokens == 5 and frames[-1].usage.total_tokens == frames[-1].usage.prompt_tokens + 5
    )
    assert {frame.model for frame in frames} == {"other"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_openai_tools(fast: Sim, choice: Any) -> None:
    create: Any = openai_client(fast).chat.completions.create
    asked = {"model": "sim-chat", "messages": USER, "tools": [TOOL], "tool_choice": choice, "user": "oslo"}
    call = create(**asked).choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "oslo"}
    deltas = [frame.choices[0].delta for frame in create(**asked, stream=True)]
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert calls[0].function.name == "weather"
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "oslo"}


def test_openai_completions_embeddings_models_responses(fast: Sim) -> None:
    client: Any = openai_client(fast)
    assert client.completions.create(model="sim-chat", prompt=["a", "b"], max_tokens=3).usage.completion_tokens == 6
    texts = [frame.choices[0].text for frame in client.completions.create(model="sim-chat", prompt="a", stream=True)]
    assert len(texts) == 16
    packed = client.embeddings.create(model="sim-chat", input=["a", "b"])
    plain = client.embeddings.create(model="sim-chat", input=["a", "b"], encoding_format="float")
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    assert len(packed.data[0].embedding) == 64 and packed.data[0].embedding != packed.data[1].embedding
    assert [model.id for model in client.models.list()] == ["sim-chat", "other"]
    assert client.responses.create(model="sim-chat", input="hi", max_output_tokens=4).usage.output_tokens == 4
    kinds = [event.type for event in client.responses.create(model="sim-chat", input="hi", stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_openai_errors(fast: Sim) -> None:
    client: Any = openai_client(fast)
    with pytest.raises(openai.NotFoundError, match="Valid aliases: sim-chat, other"):
        client.chat.completions.create(model="nope", messages=USER)
    with pytest.raises(openai.BadRequestError, match="non-negative"):
        client.chat.completions.create(model="sim-chat", messages=USER, temperature=-1)


def test_anthropic_messages(fast: Sim) -> None:
    client: Any = anthropic_client(fast)
    answer = client.messages.create(model="sim-chat", max_tokens=6, messages=USER, metadata={"user_id": "caller-3"})
    assert answer.content[0].text.startswith("caller-3") and answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 6
    with client.messages.stream(model="sim-chat", max_tokens=100, messages=USER) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 16
    assert client.messages.count_tokens(model="sim-chat", messages=USER).input_tokens == answer.usage.input_tokens


def test_anthropic_tools(fast: Sim) -> None:
    client: Any = anthropic_client(fast)
    asked = {
        "model": "sim-chat",
        "max_tokens": 100,
        "messages": USER,
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
    }
    answer = client.messages.create(**asked)
    assert answer.stop_reason == "tool_use" and answer.content[0].input == {"city": "sim"}
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[0].input == {"city": "sim"}


def test_tokenize_and_back_and_rerank(fast: Sim) -> None:
    with httpx.Client(base_url=fast.url, timeout=TIMEOUT_S) as client:
        tokens = client.post("/tokenize", json={"prompt": "The gateway, tier 2"}).json()
        assert tokens["count"] == len(tokens["tokens"]) == 5
        assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "The gateway, tier 2"}
        ranked = client.post("/v1/rerank", json={"query": "a b", "documents": ["x", "b a", "a"], "top_n": 2}).json()
        assert [result["index"] for result in ranked["results"]] == [1, 2]


# -- TGI


def test_tgi_generate(tgi: Sim) -> None:
    asked = {"inputs": "hi there", "parameters": {"max_new_tokens": 3, "details": True}}
    answer = httpx.post(f"{tgi.url}/generate", json=asked, timeout=TIMEOUT_S)
    assert list(answer.json()["details"]) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert answer.json()["details"]["finish_reason"] == "length"
    assert answer.headers["x-generated-tokens"] == "3" and answer.headers["x-prompt-tokens"] == "2"
    assert httpx.post(tgi.url, json=asked, timeout=TIMEOUT_S).json()[0] == answer.json()


def test_tgi_stream_ends_without_done(tgi: Sim) -> None:
    answer = httpx.post(f"{tgi.url}/generate_stream", json={"inputs": "hi"}, timeout=TIMEOUT_S)
    events = [json.loads(event.removeprefix("data: ")) for event in answer.text.strip().split("\n\n")]
    assert answer.headers["x-accel-buffering"] == "no"
    assert [event["generated_text"] is None for event in events] == [True] * 15 + [False]
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 16,
        "seed": None,
        "input_length": 1,
    }
    assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events)


def test_tgi_errors(tgi: Sim) -> None:
    bad = {"inputs": "hi", "parameters": {"max_new_tokens": 0}}
    unary = httpx.post(f"{tgi.url}/generate", json=bad, timeout=TIMEOUT_S)
    assert (unary.status_code, unary.json()["error_type"]) == (422, "validation")
    stream = httpx.post(f"{tgi.url}/generate_stream", json=bad, timeout=TIMEOUT_S)
    assert stream.status_code == 200 and json.loads(stream.text.removeprefix("data: ")) == unary.json()
    with httpx.Client(base_url=tgi.url, headers={"x-sim-fail": "busy"}, timeout=TIMEOUT_S) as client:
        assert client.post("/generate", json={"inputs": "a"}).status_code == 429
        assert '"overloaded"' in client.post("/generate_stream", json={"inputs": "a"}).text


def test_tgi_chat_with_the_sdk(tgi: Sim) -> None:
    client: Any = openai_client(tgi)
    answer = client.chat.completions.create(model="tgi", messages=USER, max_tokens=4, user="caller-4")
    assert answer.choices[0].message.content.startswith("caller-4") and answer.usage.completion_tokens == 4
    frames = list(
        client.chat.completions.create(model="tgi", messages=USER, stream=True, stream_options={"include_usage": True})
    )
    assert frames[-1].usage.completion_tokens == 16 and frames[-2].choices[0].finish_reason == "stop"
    call = client.chat.completions.create(model="tgi", messages=USER, tools=[TOOL], tool_choice="required").choices[0]
    assert call.finish_reason == "tool_calls" and json.loads(call.message.tool_calls[0].function.arguments) == {
        "city": "sim"
    }
    dead = httpx.post(
        f"{tgi.url}/v1/chat/completions",
        json={"messages": USER, "stream": True},
        headers={"x-sim-fail": "error-frame:1"},
        timeout=TIMEOUT_S,
    )
    assert '"http_status_code":422' in dead.text and dead.text.endswith("data: [DONE]\n\n")


def test_tgi_has_no_idle_close_and_probes_answer(tgi: Sim) -> None:
    with httpx.Client(base_url=tgi.url, timeout=TIMEOUT_S) as client:
        assert [client.get(path).status_code for path in ("/", "/health", "/ping", "/metrics")] == [200] * 4
        assert client.get("/info").json()["model_id"] == "sim-tgi"
        assert client.get("/v1/models").json()["data"][0]["id"] == "sim-tgi"
        assert client.get("/nope").status_code == 404
        assert client.get("/generate").status_code == 405


# -- connections


def test_keep_alive_pipelining_and_close(fast: Sim) -> None:
    with fast.connect() as sock:
        for _ in range(3):
            assert exchange(sock, chat(stream=False))[0].status_code == 200
        sock.sendall(chat() + chat(stream=False) + post("/v1/completions", {"prompt": "a"}, "Connection: close"))
        data = read_all(sock)
        assert data.count(b"HTTP/1.1 200 OK") == 3
        assert b"[DONE]" in data and b"connection: close" in data.rpartition(b"HTTP/1.1")[2]


def test_expect_100_continue(fast: Sim) -> None:
    raw = chat(stream=False).replace(b"Host: sim", b"Host: sim\r\nExpect: 100-continue")
    head, _, body = raw.partition(b"\r\n\r\n")
    with fast.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert exchange(sock, body)[0].status_code == 200


def test_malformed_request_is_answered_closed_and_counted(fast: Sim) -> None:
    before = fast.stats()["malformed"]
    with fast.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
    assert fast.stats()["malformed"] == before + 1


def test_idle_connection_is_closed_after_five_seconds(fast: Sim) -> None:
    with fast.connect() as sock:
        exchange(sock, chat(stream=False))
        start = time.monotonic()
        assert sock.recv(1) == b""
        assert 4.9 < time.monotonic() - start < 6.0


@pytest.mark.parametrize("split", [1, 7, 1000])
def test_replay_is_exact_in_pieces_of_any_size(fast: Sim, split: int) -> None:
    fast.set(split=split)
    try:
        with fast.connect() as sock:
            for name in ("vllm-chat-stream", "vllm-err-404", "vllm-messages-stream"):
                wanted = (WIRE / f"{name}.response.txt").read_bytes()
                sock.sendall(post("/v1/chat/completions", {"model": f"wire:{name}"}))
                got = b""
                while len(got) < len(wanted):
                    got += sock.recv(len(wanted) - len(got))
                assert got == wanted
            sock.sendall(post("/", {"model": "wire:chat-unary-conn-close"}))
            assert read_all(sock) == (WIRE / "vllm-chat-unary-conn-close.response.txt").read_bytes()
    finally:
        fast.set(split=0)


def test_chunks_of_a_fixed_size(fast: Sim) -> None:
    fast.set(chunk=10)
    try:
        with fast.connect() as sock:
            sock.sendall(chat())
            data = read_until(sock, b"0\r\n\r\n")
            assert data.partition(b"\r\n\r\n")[2].startswith(b'a\r\ndata: {"id\r\na\r\n')
            assert exchange(sock, chat())[1].endswith(b"data: [DONE]\n\n")
    finally:
        fast.set(chunk=0)


def test_generation_waits_for_a_reader_that_does_not_read(fast: Sim) -> None:
    before = fast.stats()["generated_tokens"]
    with fast.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(chat(ignore_eos=True, max_tokens=100_000))
        read_until(sock, b"\r\n\r\n")
        seen = [fast.stats()["generated_tokens"]]

        def settled() -> bool:
            seen.append(fast.stats()["generated_tokens"])
            return len(seen) >= 20 and len(set(seen[-20:])) == 1

        until(settled)
        assert fast.stats()["running"] == 1
        assert seen[-1] - before < 50_000  # 11 MB of frames: far more than the kernel's buffers take
    until(lambda: fast.stats()["running"] == 0)


# -- pace and departure


def test_rate_is_kept(slow: Sim) -> None:
    with slow.connect() as sock:
        start = time.monotonic()
        exchange(sock, chat(max_tokens=20))
        assert 0.38 < time.monotonic() - start < 2.0
        start = time.monotonic()
        exchange(sock, chat(stream=False, max_tokens=20))
        assert 0.38 < time.monotonic() - start < 2.0


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize("stream", [True, False])
def test_departure_stops_generation(slow: Sim, leave: Callable[[socket.socket], None], stream: bool) -> None:
    with slow.connect() as sock:
        sock.sendall(chat(stream=stream, max_tokens=5000))
        until(lambda: slow.stats()["generated_tokens"] >= 3)
        metrics = httpx.get(f"{slow.url}/metrics", timeout=TIMEOUT_S).text
        assert 'vllm:num_requests_running{engine="0",model_name="sim-chat"} 1.0' in metrics
        leave(sock)
        assert until(lambda: slow.stats()["running"] == 0) < 1.0
        stats = slow.stats()
        assert stats["aborted"] == 1 and 3 <= stats["generated_tokens"] < 200
        assert slow.stats()["generated_tokens"] == stats["generated_tokens"]
        metrics = httpx.get(f"{slow.url}/metrics", timeout=TIMEOUT_S).text
        assert (
            f'vllm:generation_tokens_total{{engine="0",model_name="sim-chat"}} {stats["generated_tokens"]}.0' in metrics
        )


def test_departure_during_upload_is_counted(fast: Sim) -> None:
    before = fast.stats()["incomplete"]
    with fast.connect() as sock:
        sock.sendall(chat()[:-1])
    until(lambda: fast.stats()["incomplete"] == before + 1)


def test_stats_show_what_arrived_and_not_the_asking(fast: Sim) -> None:
    before = fast.stats()
    raw = chat(stream=False, user="é")
    with fast.connect() as sock:
        exchange(sock, raw)
        after = fast.stats()
        assert after["requests"] == before["requests"] + 1
        assert after["connections"] == before["connections"] + 1
        assert after["connections_open"] >= 1
        assert after["bytes_received"] == before["bytes_received"] + len(raw)
        head, _, body = raw.partition(b"\r\n\r\n")
        assert after["last"] == {"head": head.decode(), "body": body.decode("latin-1"), "length": len(body)}


# -- failures


def test_refusals(fast: Sim) -> None:
    with fast.connect() as sock:
        wanted = {"busy": 503, "error": 500, "unauthorized": 401, "rate-limited:7": 429}
        for name, status in wanted.items():
            response, body, _ = exchange(sock, chat(model=f"sim-chat!{name}"))
            assert response.status_code == status
            assert ("retry-after", "7") in [(k.decode(), v.decode()) for k, v in response.headers] or status != 429
            assert json.loads(body)["error"]


def test_reset_hang_stall_truncate(fast: Sim) -> None:
    with fast.connect() as sock:
        sock.sendall(chat(model="sim-chat!reset"))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    for name, frames in (("hang", 0), ("stall:3", 3)):
        with fast.connect() as sock:
            sock.sendall(chat(model=f"sim-chat!{name}"))
            if frames:
                read = read_until(sock, b'"content":" gateway"}')
                assert read.count(b"data: ") == frames
            until(lambda: fast.stats()["running"] == 1)
            sock.setblocking(False)
            leftover = b""
            with contextlib.suppress(BlockingIOError):
                leftover = sock.recv(65536)
            assert b"data:" not in leftover and (b"0\r\n\r\n" not in leftover)
        until(lambda: fast.stats()["running"] == 0)
    with fast.connect() as sock:
        sock.sendall(chat(model="sim-chat!truncate:3"))
        data = read_all(sock)
        assert data.count(b"data: ") == 3 and not data.endswith(b"0\r\n\r\n")


def test_damaged_bytes(fast: Sim) -> None:
    damaged = [
        ("malformed", True),
        ("malformed", False),
        ("bad-chunk", True),
        ("bad-chunk", False),
        ("bad-chunk:3", True),
    ]
    for name, stream in damaged:
        with fast.connect() as sock, pytest.raises(h11.RemoteProtocolError):
            exchange(sock, chat(stream=stream, model=f"sim-chat!{name}"))
    with fast.connect() as sock:
        sock.sendall(chat(model="sim-chat!extra-bytes:5"))
        assert read_until(sock, b"0\r\n\r\nxxxxx").endswith(b"0\r\n\r\nxxxxx")
    with fast.connect() as sock:
        response, _, informational = exchange(sock, chat(model="sim-chat!1xx:3"))
        assert len(informational) == 3 and response.status_code == 200
    with fast.connect() as sock:
        sock.sendall(chat(model="sim-chat!headers:70000"))
        assert 70000 < len(read_until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")[0]) < 71000
    with fast.connect() as sock:
        start = time.monotonic()
        exchange(sock, chat(model="sim-chat!slow-first-byte:0.2"))
        assert time.monotonic() - start >= 0.2


def test_comments_go_on(fast: Sim) -> None:
    with fast.connect() as sock:
        sock.sendall(chat(model="sim-chat!comments:1"))
        assert read_until(sock, b"3\r\n:\n\n\r\n3\r\n:\n\n\r\n").count(b"data: ") == 1


def test_error_frame_and_abort(fast: Sim) -> None:
    with pytest.raises(openai.APIError, match="EngineCore"):
        list(openai_client(fast).chat.completions.create(model="sim-chat!error-frame:3", messages=USER, stream=True))  # type: ignore[call-overload]
    client: Any = openai_client(fast)
    assert client.chat.completions.create(model="sim-chat!abort", messages=USER).choices[0].finish_reason == "abort"
    events = httpx.post(
        f"{fast.url}/v1/messages",
        json={"model": "sim-chat!error-frame", "messages": USER, "max_tokens": 9, "stream": True},
        timeout=TIMEOUT_S,
    ).text
    assert "event: error\n" in events and "message_stop" not in events
    events = httpx.post(
        f"{fast.url}/v1/responses",
        json={"model": "sim-chat!error-frame", "input": "a", "stream": True},
        timeout=TIMEOUT_S,
    ).text
    assert "event: response.failed\n" in events and "response.completed" not in events


def test_refuse_closes_the_port_and_it_can_be_opened_again(slow: Sim) -> None:
    with slow.connect() as idle, httpx.Client(base_url=slow.url, timeout=TIMEOUT_S) as steering:
        steering.put("/sim/settings", json={"fail": "refuse"}).raise_for_status()
        with pytest.raises(ConnectionRefusedError):
            slow.connect().close()
        with pytest.raises(ConnectionResetError):
            idle.recv(1)
        steering.put("/sim/settings", json={"fail": None}).raise_for_status()
        assert steering.get("/health").status_code == 200
    slow.connect().close()


def test_refuse_from_the_start() -> None:
    with running("--fail", "refuse") as sim, pytest.raises(ConnectionRefusedError):
        sim.connect().close()


# -- the process


def test_api_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-sim\n")
    with running("--api-key-file", os.fspath(key), "--rate", "0") as sim:
        client: Any = openai_client(sim, "sk-sim")
        assert client.chat.completions.create(model="sim-chat", messages=USER).usage.completion_tokens == 16
        with pytest.raises(openai.AuthenticationError):
            openai_client(sim, "sk-wrong").models.list()
        assert httpx.get(f"{sim.url}/health", timeout=TIMEOUT_S).status_code == 200


def test_it_is_up_fast_on_a_low_port_and_stops_on_sigint() -> None:
    with running() as sim:
        assert 20000 <= sim.port < 32000
        sim.process.send_signal(signal.SIGINT)
        assert sim.process.wait(TIMEOUT_S) == 0


def test_the_command_line_s_libraries_are_not_loaded() -> None:
    code = "import sys, ascproxy.sim.__main__; print(sorted({'typer', 'rich', 'click', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--fail", "nope", "--tokens", "0"], 2, ["known failures are", "--tokens must be 1 or more"]),
        (["--type", "x"], 2, ["vllm and tgi"]),
        (["--host", "192.0.2.1", "--port", "21000"], 1, ["cannot listen on 192.0.2.1:21000"]),
    ],
)
def test_a_wrong_command_line_says_what_to_do(arguments: list[str], code: int, words: list[str]) -> None:
    command = [sys.executable, "-m", "ascproxy.sim", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == code and done.stdout == ""
    assert all(word in done.stderr for word in words)


def test_the_command_has_the_same_options_and_serves() -> None:
    """``ascproxy.cli.sim`` on an application of its own has the options of ``python -m ascproxy.sim``."""
    code = (
        "import typer; from ascproxy.cli.sim import register\n"
        "app = typer.Typer(); app.callback()(lambda: None); register(app); app()"
    )
    command = [sys.executable, "-c", code, "sim"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    for name in options():
        assert f"--{name.replace('_', '-')}" in shown
    for kind in Kind:
        assert f"{kind.value}:" in shown
    process = subprocess.Popen([*command, "--json", "--model", "a", "--model", "b"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["models"] == ["a", "b"] and line["pid"] == process.pid
        assert httpx.get(f"{line['url']}/health", timeout=TIMEOUT_S).status_code == 200
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    ca, other = trustme.CA(), trustme.CA()
    certificate = ca.issue_cert("127.0.0.1")
    paths = {name: tmp_path / f"{name}.pem" for name in ("chain", "key", "ca")}
    certificate.cert_chain_pems[0].write_to_path(paths["chain"])
    certificate.private_key_pem.write_to_path(paths["key"])
    ca.cert_pem.write_to_path(paths["ca"])
    given = [
        *("--tls-certificate", os.fspath(paths["chain"])),
        *("--tls-key", os.fspath(paths["key"])),
        *("--tls-client-ca", os.fspath(paths["ca"])),
    ]

    def client(issuer: trustme.CA | None) -> httpx.Client:
        context = ssl.create_default_context()
        ca.configure_trust(context)
        if issuer is not None:
            issuer.issue_cert("client@sim").configure_cert(context)
        return httpx.Client(verify=context, timeout=TIMEOUT_S)

    with running("--rate", "50", "--tokens", "10000", *given) as sim:
        assert sim.url.startswith("https://127.0.0.1:")
        with client(ca) as good:
            body = {"model": "sim-chat", "messages": USER, "max_tokens": 3, "stream": True}
            assert good.post(f"{sim.url}/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
            with (
                client(ca) as leaver,
                leaver.stream("POST", f"{sim.url}/v1/chat/completions", json={**body, "max_tokens": 5000}) as answer,
            ):
                next(answer.iter_lines())
            until(lambda: good.get(f"{sim.url}/sim/stats").json()["running"] == 0)
            assert good.get(f"{sim.url}/sim/stats").json()["aborted"] == 1
        for stranger in (None, other):
            with client(stranger) as bad, pytest.raises(httpx.TransportError):
                bad.get(f"{sim.url}/health")
