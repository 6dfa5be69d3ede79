"""The walk on the native core, over sockets: the rules that tests/unit/gateway asks of fakes, asked of the real thing.

Time is handed to the core (``tick``), so that no test waits for a deadline.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.gateway.exchange import Exchange
from ascproxy.gateway.refusal import CATALOGUE
from ascproxy.model.provider import Credential
from ascproxy.model.route import Target
from ascproxy.model.snapshot import Snapshot
from ascproxy.telemetry import metrics
from tests.kit.rig import Answer, free_port, limits, post, read_answer, read_request, run, until
from tests.kit.snapshots import KEY, endpoint, key_row, provider, route, snapshot
from tests.kit.streams import FakeLog

CHAT = {"model": "chat", "messages": []}
AUTH = f"Authorization: Bearer {KEY}"


class Model:
    """A model server whose every request is answered by the next of ``answers`` (bytes), or not at all (None)."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.port = free_port()
        self.seen: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.gone = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                self.seen.append(await read_request(reader))
                answer = self.answers.pop(0) if self.answers else ok()
                if answer is not None:
                    writer.write(answer)
                    if answer == b"":
                        break
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone += 1
        finally:
            writer.close()


def ok(body: bytes = b'{"usage":{"prompt_tokens":2,"completion_tokens":3}}') -> bytes:
    return answer(200, body)


def answer(status: int, body: bytes = b"{}", *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} x", "Content-Type: application/json", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Gateway:
    """``async with Gateway(models, snapshot)``: everything that a worker has, in this process."""

    def __init__(self, *models: Model, snap: Snapshot | None = None, arena: _native.SecretArena | None = None) -> None:
        self.models = models
        self.snap = snap or chat(*models)
        self.keys = {"k1": key_row()}
        self.page = _native.Page(mmap.mmap(-1, 1 << 20))
        self.log = FakeLog()
        self.arena = arena or _native.SecretArena()
        self.tasks = 0

    async def __aenter__(self) -> Gateway:
        loop = asyncio.get_running_loop()
        self.exchange = Exchange(
            loop,
            page=self.page,
            arena=self.arena,
            key_lookup=self.keys.get,
            key_epoch=lambda: 1,
            log=self.log,  # type: ignore[arg-type]
            environ={},
        )
        self.core = _native.Core(walk=self.exchange, page=self.page, limits=limits())
        self.exchange.bind(self.core)
        self.exchange.adopt(self.snap)
        for model in self.models:
            await model.start()
        self.port = free_port()
        listener = _native.Listener(name="public", tls=None, limits=limits())
        self.core.attach(loop)
        with socket.create_server(("127.0.0.1", self.port)) as listening:
            self.server = self.core.listen(listener, listening.fileno())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.exchange.close()
        self.core.drain(0, 0)
        self.core.tick(monotonic_ns())
        await until(lambda: self.core.connections == 0, "every connection is closed")
        self.core.detach()
        for model in self.models:
            model.server.close()
            for writer in model.writers:
                writer.close()
        assert self.core.in_flight == 0
        assert [pool.in_flight for pool in self.exchange._runtime.pools] == [0] * len(self.exchange._runtime.pools)

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, body: Any = CHAT, *fields: str, path: str = "/v1/chat/completions", raw: bytes = b"") -> Answer:
        """One request on a connection of its own."""
        reader, writer = await self.client()
        writer.write(raw or post(body, AUTH, *fields, path=path))
        try:
            return await read_answer(reader)
        finally:
            writer.close()

    def later(self, seconds: float) -> None:
        """Let the core believe that this much time has passed."""
        self.core.tick(monotonic_ns() + int(seconds * 1e9))


def chat(*models: Model, **members: Any) -> Snapshot:
    """A route whose targets are the models, in order."""
    names = tuple(f"rack-{n}" for n in range(len(models)))
    providers = tuple(
        provider(name, endpoint(n, f"http://127.0.0.1:{model.port}"))
        for n, (name, model) in enumerate(zip(names, models, strict=True))
    )
    return snapshot((route("chat", to=names, **members),), providers)


def code(got: Answer) -> str | None:
    return got.fields.get("x-ascproxy-error")


def test_a_unary_request_costs_two_calls_and_no_task() -> None:
    """Issue 2, Show 4."""

    async def main() -> None:
        model = Model()
        async with Gateway(model) as g:
            await g.ask()
            loop, tasks = asyncio.get_running_loop(), 0

            def count(loop: Any, coroutine: Any, **more: Any) -> Any:
                nonlocal tasks
                tasks += 1
                return asyncio.Task(coroutine, loop=loop, **more)

            reader, writer = await g.client()
            before = g.core.calls
            loop.set_task_factory(count)
            for _ in range(50):
                writer.write(post(CHAT, AUTH))
                assert (await read_answer(reader)).status == 200
            loop.set_task_factory(None)
            assert g.core.calls - before == 100
            assert tasks == 0
            assert model.connections == 1
            writer.close()

    run(main())


def test_what_the_model_server_sees(tmp_path: Path) -> None:
    """SEMANTICS 5: the alias, the allow-list, the provider's credential last; nothing of the caller's own."""
    (tmp_path / "key").write_bytes(b"sk-provider\n")

    async def main() -> None:
        model = Model()
        base = chat(model)
        snap = replace(
            base,
            routes=(route("chat", to=(Target("rack-0", 'real"name'),)),),
            providers=(replace(base.providers[0], credential="c"),),
            credentials=(Credential("c", "file", str(tmp_path / "key")),),
        )
        async with Gateway(model, snap=snap) as g:
            secrets = [
                "Cookie: a=b",
                f"X-Api-Key: {KEY}",
                "X-Goog-Api-Key: g",
                "Idempotency-Key: i",
                "X-Forwarded-For: 1.1.1.1",
            ]
            passed = ["Content-Type: application/json", "User-Agent: t", "X-Stainless-Lang: python"]
            body = b'{"unknown": [1, 2],"model" : "chat" , "messages":[]}'
            got = await g.ask(body, *secrets, *passed, "X-Request-Id: r.1")
            assert got.status == 200
            assert got.fields["x-request-id"] == "r.1"
        head, body = model.seen[0]
        first, *fields = head.split(b"\r\n")[:-2]
        assert first == b"POST /v1/chat/completions HTTP/1.1"
        assert sorted(f.split(b":")[0].lower() for f in fields) == [
            b"accept-encoding", b"authorization", b"content-length", b"content-type", b"host", b"user-agent",
            b"x-request-id", b"x-stainless-lang",
        ]  # fmt: skip
        assert fields[-1] == b"authorization: Bearer sk-provider"
        assert b"accept-encoding: identity" in fields
        assert b"x-request-id: r.1" in fields
        assert body == b'{"unknown": [1, 2],"model" : "real\\"name" , "messages":[]}'

    run(main())


def test_what_comes_back() -> None:
    async def main() -> None:
        model = Model(
            answer(200, b"{}", "Set-Cookie: a=b", "Server: uvicorn", "OpenAI-Version: 7", "X-RateLimit-Limit: 5")
        )
        async with Gateway(model) as g:
            got = await g.ask()
            names = {"date", "x-request-id", "content-type", "content-length", "openai-version", "x-ratelimit-limit"}
            assert set(got.fields) == names

    run(main())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_definite_failure_goes_to_the_next_target_and_the_last_answer_is_passed_on(status: int) -> None:
    async def main() -> None:
        first, second = Model(answer(status), answer(status)), Model(ok(), answer(status, b'{"e":2}', "Retry-After: 7"))
        async with Gateway(first, second) as g:
            assert (await g.ask()).status == 200
            got = await g.ask()
            assert (got.status, got.body, got.fields["retry-after"], code(got)) == (status, b'{"e":2}', "7", None)
            assert (len(first.seen), len(second.seen)) == (2, 2)

    run(main())


def test_a_server_that_is_not_there_is_passed_over() -> None:
    async def main() -> None:
        absent, second = Model(), Model()
        async with Gateway(second, snap=chat(absent, second)) as g:
            assert (await g.ask()).status == 200
            second.server.close()
            for writer in second.writers:
                writer.close()
            g.exchange._runtime.pools[1].close()
            got = await g.ask()
            assert (got.status, code(got)) == (502, "upstream_unreachable")
            reasons = [fields["reason"] for _, _, fields in g.log.lines]
            assert f"127.0.0.1:{absent.port} refused the connection: Connection refused" in reasons

    run(main())


@pytest.mark.parametrize("status", [401, 403])
def test_a_credential_fault_is_never_the_clients(status: int) -> None:
    async def main() -> None:
        async with Gateway(Model(answer(status))) as g:
            got = await g.ask()
            assert (got.status, code(got), got.fields["x-should-retry"]) == (502, "upstream_credential", "false")

    run(main())


def test_a_connection_that_the_server_closed_under_a_request_is_replaced_by_a_fresh_one() -> None:
    """SEMANTICS 3, retry: the reused connection takes the request and is closed before any response byte."""

    async def main() -> None:
        model = Model(ok(), b"", ok(b'{"second":1}'))
        async with Gateway(model) as g:
            await g.ask()
            got = await g.ask()
            assert (got.status, got.body) == (200, b'{"second":1}')
            assert (model.connections, len(model.seen)) == (2, 3)

    run(main())


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        (b"", 502, "upstream_unreachable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 502, "upstream_malformed"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", 502, "upstream_malformed"),
        (None, 504, "upstream_timeout"),
    ],
)
def test_an_ambiguous_failure_is_told_and_not_sent_again(said: bytes | None, status: int, expected: str) -> None:
    async def main() -> None:
        first, second = Model(said), Model()
        async with Gateway(first, second, snap=chat(first, second, first_byte_ms=5_000)) as g:
            asking = asyncio.ensure_future(g.ask())
            await until(lambda: bool(first.seen), "the model server has the request")
            if said is None:
                g.later(6)
            got = await asking
            assert (got.status, code(got)) == (status, expected)
            assert second.seen == []

    run(main())


def test_a_route_may_ask_again_after_a_timeout() -> None:
    async def main() -> None:
        first, second = Model(None), Model(None, None)
        async with Gateway(first, second, snap=chat(first, second, first_byte_ms=5_000, retry_ambiguous=True)) as g:
            asking = asyncio.ensure_future(g.ask())
            for model, times in ((first, 1), (second, 1), (second, 2)):
                await until(lambda m=model, n=times: len(m.seen) == n, "the next attempt is under way")
                g.later(6)
            got = await asking
            assert (got.status, code(got)) == (504, "upstream_timeout")

    run(main())


def test_a_client_that_leaves_is_felt_by_the_model_server() -> None:
    """SEMANTICS 4."""

    async def main() -> None:
        model = Model(None)
        async with Gateway(model) as g:
            _, writer = await g.client()
            writer.write(post(CHAT, AUTH))
            await until(lambda: bool(model.seen), "the model server has the request")
            writer.close()
            await until(lambda: model.gone == 1, "its connection is gone")
            assert g.core.in_flight == 0

    run(main())


def test_a_long_body_needs_a_key_before_it_is_read() -> None:
    async def main() -> None:
        async with Gateway(Model()) as g:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 70000\r\n\r\n"
            got = await g.ask(raw=head)
            assert (got.status, code(got), got.fields["connection"]) == (401, "invalid_api_key", "close")
            over = head.replace(b"70000", b"%d" % (64 << 20)).replace(b"Host: g", b"Host: g\r\n" + AUTH.encode())
            got = await g.ask(raw=over)
            assert (got.status, code(got)) == (413, "body_too_large")

    run(main())


def test_a_request_finishes_on_the_revision_it_began_with() -> None:
    async def main() -> None:
        first, second, third = Model(None), Model(), Model(ok(b'{"third":1}'))
        async with Gateway(first, second, third, snap=chat(first, second)) as g:
            asking = asyncio.ensure_future(g.ask())
            await until(lambda: bool(first.seen), "it has begun")
            g.exchange.adopt(chat(third))
            assert (await g.ask()).body == b'{"third":1}'
            first.writers[0].write(answer(503))
            assert (await asking).status == 200
            assert len(second.seen) == 1

    run(main())


def test_each_answer_is_counted_once() -> None:
    async def main() -> None:
        model = Model(ok(), answer(401), answer(503))
        async with Gateway(model) as g:
            for body in (CHAT, CHAT, CHAT, {"model": "none"}):
                await g.ask(body)
            await until(lambda: g.core.in_flight == 0, "all are settled")
            g.core.tick(monotonic_ns())
            counted = {}
            for key, first, _ in g.page.records():
                kind, *labels = key.decode().split("\0")
                if kind == "exchange":
                    for n, status in enumerate(_native.METER_STATUSES):
                        if value := g.page.load(first + _native.METER_OFFSETS["status"] + n):
                            counted[*labels, status] = value
            chats = ("public", "chat", "rack-0", "chat_completions")
            assert counted == {
                (*chats, 200): 1,
                (*chats, 502): 1,
                (*chats, 503): 1,
                ("public", "-", "-", "chat_completions", 404): 1,
            }
            for refused in ("upstream_credential", "model_not_found"):
                assert g.page.load(metrics.refusal_cell(g.page, refused)) == 1

    run(main())


def test_the_access_line_says_who_and_where() -> None:
    async def main() -> None:
        async with Gateway(Model()) as g:
            g.core.access_log = True
            await g.ask()
            await until(lambda: g.core.in_flight == 0, "it is settled")
            line = json.loads(g.core.take_log())
            expected = {
                "tenant": "acme",
                "key": "k1",
                "route": "chat",
                "provider": "rack-0",
                "operation": "chat_completions",
            }
            assert {name: line[name] for name in expected} == expected
            assert (line["tokens_in"], line["tokens_out"]) == (2, 3)

    run(main())


def test_every_code_of_the_core_is_in_the_catalogue() -> None:
    import re

    native = Path(__file__).parents[2] / "native"
    source = "".join(path.read_text() for path in native.glob("py_*.c"))
    codes = set(re.findall(r'stream_reject\(\w+, "(\w+)"\)', source))
    codes |= set(re.findall(r'return "(\w+)";', re.search(r"reject_code\(.*?\n}", source, re.S)[0]))  # type: ignore[index]
    codes |= set(re.findall(r'return "(\w+)";', re.search(r"\bscan_code\(.*?\n}", source, re.S)[0]))  # type: ignore[index]
    assert {"body_too_large", "headers_too_large", "duplicate_field"} <= codes
    assert codes <= set(CATALOGUE)
