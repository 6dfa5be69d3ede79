"""The walk against fakes of the core: each rule of SEMANTICS 3 to 5 that is decided in Python."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ascproxy.errors import AscproxyError
from ascproxy.gateway.exchange import Exchange
from ascproxy.model.key import KeyRow
from ascproxy.model.node import Limits
from ascproxy.model.provider import Credential, UpstreamTimeouts, UpstreamTls
from ascproxy.model.route import Target
from ascproxy.model.snapshot import Snapshot
from ascproxy.upstream.connection import ConnectError, ConnectTimeout
from tests.kit.snapshots import KEY, endpoint, key_row, provider, route, snapshot
from tests.kit.streams import FakeClock, FakeConnector, FakeCore, FakeLog, FakeNative, FakePage, FakeStream, SecretArena

pytestmark = pytest.mark.anyio

CHAT = {"model": "chat", "messages": []}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A worker's walk, its core, and what surrounds them."""

    def __init__(self, snap: Snapshot, *, keys: tuple[KeyRow, ...] = (), files: dict[str, bytes] | None = None) -> None:
        self.clock = FakeClock()
        self.keys = {row.id: row for row in keys or (key_row(),)}
        self.epoch = 1
        self.page = FakePage()
        self.log = FakeLog()
        self.exchange = Exchange(
            asyncio.get_running_loop(),
            native=FakeNative(),
            arena=SecretArena(files),
            key_lookup=self.keys.get,
            key_epoch=lambda: self.epoch,
            page=self.page,
            log=self.log,
            environ={},
            monotonic_ns=self.clock.monotonic_ns,
            wall_ns=self.clock.wall_ns,
        )
        self.core = FakeCore(self.exchange, self.clock)
        self.connector = FakeConnector(self.core)
        self.exchange.bind(self.core, self.connector)
        self.exchange.adopt(snap)

    def ask(
        self, body: Any = CHAT, path: str = "/v1/chat/completions", key: str | None = KEY, **more: Any
    ) -> FakeStream:
        return self.core.request(path, body, key=key, **more)

    async def sent(self, *args: Any, **more: Any) -> FakeStream:
        """A request that reached an upstream."""
        stream = self.ask(*args, **more)
        await turn(stream)
        assert stream.phase == "wait", stream.answer
        return stream

    def in_flight(self) -> list[int]:
        return [pool.in_flight for pool in self.exchange._runtime.pools]


async def turn(stream: FakeStream) -> None:
    """Let the stream's task run to its end."""
    while stream.task is not None and not stream.task.done():
        await asyncio.sleep(0)
    if stream.task is not None and not stream.task.cancelled():
        stream.task.result()


Make = Callable[..., World]


@pytest.fixture
async def world() -> AsyncIterator[Make]:
    made: list[World] = []

    def make(*args: Any, **kwargs: Any) -> World:
        made.append(World(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        await one.exchange.close()
        assert one.in_flight() == [0] * len(one.in_flight()), "an exchange was not settled"


def one(**members: Any) -> Snapshot:
    """One route, one provider, one endpoint."""
    return snapshot((route("chat", **members),), (provider("rack-a", 1),))


def two(**members: Any) -> Snapshot:
    """One route with two targets."""
    return snapshot(
        (route("chat", to=("rack-a", "rack-b"), **members),), (provider("rack-a", 1), provider("rack-b", 2))
    )


# ---- the happy path ------------------------------------------------------------------------------------------------


async def test_a_request_with_a_waiting_connection_makes_two_calls_and_no_task(world: Make) -> None:
    """Issue 2, Show 4: no task or future on a request with a pooled connection."""
    w = world(one())
    w.core.answer(await w.sent())
    w.core.calls.clear()
    stream = w.ask()
    assert stream.phase == "wait"
    assert stream.task is None
    w.core.answer(stream)
    assert w.core.calls == ["on_request", "on_settle"]
    assert len(w.core.connections) == 1
    assert stream.outcome == "complete"


async def test_the_plan_says_all_that_is_sent(world: Make) -> None:
    w = world(
        snapshot(
            (route("chat", "chat", to=(Target("rack-a", "meta/Llama"),), first_byte_ms=7, total_ms=9_000),),
            (
                provider(
                    "rack-a",
                    endpoint(1, "http://gpu:8000/base"),
                    credential="c",
                    timeouts=UpstreamTimeouts(between_tokens_ms=8),
                ),
            ),
            credentials=(Credential("c", "file", "/keys/c"),),
        ),
        files={"/keys/c": b"sk-upstream"},
    )
    stream = await w.sent(headers={"x-stainless-lang": "python"})
    plan = stream.plans[0]
    assert plan.head == b"POST /base/v1/chat/completions HTTP/1.1\r\nhost: gpu:8000\r\naccept-encoding: identity\r\n"
    assert (plan.secret_prefix, plan.secret.value) == (b"authorization: Bearer ", b"sk-upstream")
    assert plan.model == "meta/Llama"
    assert plan.scan == FakeNative.SCAN_OPENAI
    assert (plan.first_byte_ms, plan.idle_ms, plan.total_ms) == (7, 8, 9_000)
    assert w.page.labels(plan.block) == ("exchange", "public", "chat", "rack-a", "chat_completions")
    assert b'"route":"chat","provider":"rack-a"' in plan.log
    assert stream.log == b'"tenant":"acme","key":"k1"'
    w.core.answer(stream)


async def test_plans_are_made_once(world: Make) -> None:
    w = world(one())
    first = await w.sent()
    w.core.answer(first)
    second = await w.sent()
    assert second.plans[0] is first.plans[0]
    w.core.answer(second)


async def test_connections_are_kept_as_long_as_the_server_keeps_them(world: Make) -> None:
    """SEMANTICS 3: vLLM closes idle connections after 5.0 s, ours expire at 4 s."""
    w = world(one())
    w.core.answer(await w.sent())
    w.clock.sleep_ms(3_999)
    w.core.answer(await w.sent())
    assert len(w.core.connections) == 1
    w.clock.sleep_ms(4_000)
    w.core.answer(await w.sent())
    assert len(w.core.connections) == 2
    assert not w.core.connections[0].open


async def test_a_connection_that_cannot_be_reused_is_not_kept(world: Make) -> None:
    w = world(one())
    w.core.answer(await w.sent(), keep=False)
    assert len(w.exchange._runtime.pools[0]) == 0
    w.core.answer(await w.sent())
    assert len(w.core.connections) == 2


async def test_waiting_connections_are_swept(world: Make) -> None:
    w = world(one())
    w.core.answer(await w.sent())
    w.clock.sleep_ms(4_000)
    w.exchange._sweep()
    assert not w.core.connections[0].open


async def test_idle_endpoints_take_turns(world: Make) -> None:
    w = world(snapshot((route("chat"),), (provider("rack-a", 1, 2),)))
    asked = []
    for _ in range(4):
        stream = await w.sent()
        asked.append(stream.upstream.endpoint)
        w.core.answer(stream)
    assert sorted(asked[:2]) == sorted(asked[2:]) == [1, 2]


async def test_an_https_endpoint_is_verified_as_its_provider_says(world: Make) -> None:
    both = provider("rack-a", endpoint(1, "https://gpu:8443"), endpoint(2), tls=UpstreamTls(ca="/ca.pem"))
    w = world(snapshot((route("chat"),), (both,)))
    for _ in range(2):
        await w.sent()
    secure, plain = sorted(w.connector.addresses, key=lambda a: a.endpoint)
    assert secure.tls.files == {"ca": "/ca.pem", "certificate": None, "key": None}
    assert (secure.server_name, secure.port) == ("gpu", 8443)
    assert plain.tls is None
    for upstream in w.core.connections:
        w.core.answer(upstream.stream)


async def test_endpoints_take_turns_and_the_busy_one_comes_last(world: Make) -> None:
    w = world(snapshot((route("chat"),), (provider("rack-a", 1, 2, 3),)))
    streams = [await w.sent() for _ in range(6)]
    assert sorted(s.upstream.endpoint for s in streams) == [1, 1, 2, 2, 3, 3]
    idle = streams[0].upstream.endpoint
    w.core.answer(streams[0])
    again = await w.sent()
    assert again.upstream.endpoint == idle
    for stream in [*streams[1:], again]:
        w.core.answer(stream)


# ---- refusals ------------------------------------------------------------------------------------------------------

SCOPED = key_row("scoped", models=("chat",), operations=("chat_completions",))
EXPIRED = key_row("expired", expires_ms=1)
REVOKED = key_row("revoked", revoked_ms=1)
GONE = key_row("gone", tenant="nobody")


def key_of(key_id: str) -> str:
    return KEY.replace("k1", key_id)


@pytest.mark.parametrize(
    ("path", "body", "key", "more", "status", "code"),
    [
        ("/nowhere", CHAT, KEY, {}, 404, "unknown_path"),
        ("/v1/chat/completions/", CHAT, KEY, {}, 404, "unknown_path"),
        ("/nowhere", CHAT, None, {}, 404, "unknown_path"),
        ("/v1/chat/completions", None, KEY, {"method": "GET"}, 405, "method_not_allowed"),
        ("/v1/models", None, KEY, {"method": "DELETE"}, 405, "method_not_allowed"),
        ("/v1/chat/completions", CHAT, None, {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, "sk-nonsense", {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, key_of("unknown"), {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, KEY[:-1] + "B", {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, key_of("expired"), {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, key_of("revoked"), {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, key_of("gone"), {}, 401, "invalid_api_key"),
        ("/v1/chat/completions", CHAT, KEY, {"headers": {"x-api-key": "other"}}, 400, "two_credentials"),
        ("/v1/chat/completions", b"", KEY, {}, 400, "invalid_json"),
        ("/v1/chat/completions", b"{", KEY, {}, 400, "invalid_json"),
        ("/v1/chat/completions", b'{"model":"chat","model":"x"}', KEY, {}, 400, "duplicate_field"),
        ("/v1/chat/completions", {"model": 7}, KEY, {}, 400, "invalid_request"),
        ("/v1/chat/completions", b"\x1f\x8b", KEY, {"headers": {"content-encoding": "gzip"}}, 400, "invalid_request"),
        ("/v1/chat/completions?api-version=1", CHAT, KEY, {}, 400, "invalid_request"),
        ("/v1/chat/completions?beta=true", CHAT, KEY, {}, 400, "invalid_request"),
        ("/v1/chat/completions", {"model": "nobody-has-it"}, KEY, {}, 404, "model_not_found"),
        ("/generate", {"model": "chat"}, KEY, {}, 404, "operation_not_supported"),
        ("/v1/chat/completions", {"model": "other"}, key_of("scoped"), {}, 403, "model_not_allowed"),
        ("/v1/embeddings", {"model": "chat"}, key_of("scoped"), {}, 403, "model_not_allowed"),
        ("/v1/models", None, key_of("scoped"), {"method": "GET"}, 403, "model_not_allowed"),
        ("/v1/models/nobody-has-it", None, KEY, {"method": "GET"}, 404, "model_not_found"),
        ("/v1/chat/completions", {"messages": []}, KEY, {}, 400, "invalid_request"),
    ],
)
async def test_refusals(
    world: Make, *, path: str, body: Any, key: str | None, more: dict[str, Any], status: int, code: str
) -> None:
    """SEMANTICS 5: the codes, each with its status, and nothing at the upstream."""
    snap = snapshot((route("chat"), route("other")), (provider("rack-a", 1),))
    w = world(snap, keys=(key_row(), SCOPED, EXPIRED, REVOKED, GONE))
    stream = w.ask(body, path, key, **more)
    assert stream.answer is not None
    assert (stream.answer.status, stream.answer.code) == (status, code)
    assert stream.answer.headers["x-ascproxy-error"] == code
    assert stream.answer.headers["x-should-retry"] == "false"
    assert w.connector.asked == []
    assert w.page.count("refusals", code) == 1
    kind, listener, *labels = w.page.labels(stream.answer.block)
    assert (kind, listener, labels[:2]) == ("exchange", "public", ["-", "-"])


async def test_why_a_key_is_not_valid_cannot_be_told(world: Make) -> None:
    w = world(one(), keys=(key_row(), EXPIRED, REVOKED, GONE))
    keys = [None, "x", "asc_", key_of("unknown"), KEY[:-1] + "B", key_of("expired"), key_of("revoked"), key_of("gone")]
    answers = {
        (a.status, a.body, tuple(a.headers.items())) for a in (w.ask(key=k).answer for k in keys) if a is not None
    }
    assert len(answers) == 1


async def test_a_405_says_what_is_allowed(world: Make) -> None:
    w = world(one())
    assert w.ask(path="/v1/models").answer.headers["allow"] == "GET, HEAD"  # type: ignore[union-attr]
    assert w.ask(method="PUT").answer.headers["allow"] == "POST"  # type: ignore[union-attr]


async def test_a_message_shows_a_model_name_cut_and_escaped(world: Make) -> None:
    w = world(one())
    stream = w.ask({"model": '<script>"\n\u202e' + "x" * 300})
    message = stream.answer.json["error"]["message"]  # type: ignore[union-attr]
    assert '"\\u003cscript\\u003e\\u0022\\u000a\\u202exxx' in message
    assert len(message) < 300


async def test_messages_hold_no_address_and_no_secret(world: Make) -> None:
    w = world(
        snapshot(
            (route("chat"),), (provider("rack-a", 1, credential="c"),), credentials=(Credential("c", "file", "/c"),)
        ),
        files={"/c": b"sk-upstream"},
    )
    w.connector.down[1] = ConnectError("127.0.0.1:8001 refused the connection")
    stream = w.ask()
    await turn(stream)
    text = stream.answer.body.decode()  # type: ignore[union-attr]
    assert stream.answer.code == "upstream_unreachable"  # type: ignore[union-attr]
    assert w.page.labels(stream.answer.block)[2:] == ("chat", "rack-a", "chat_completions")  # type: ignore[union-attr]
    assert w.log.lines == [
        (
            "warning",
            "no connection to a provider",
            {"provider": "rack-a", "reason": "127.0.0.1:8001 refused the connection"},
        )
    ]
    assert not any(secret in text for secret in ("127.0.0.1", "8001", "sk-upstream", KEY, "rack-a"))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("request_timeout", 408),
        ("body_too_large", 413),
        ("uri_too_long", 414),
        ("headers_too_large", 431),
        ("internal_error", 500),
        ("overloaded", 503),
        ("version_not_supported", 505),
    ],
)
async def test_what_the_core_cannot_serve_is_refused_in_our_words(world: Make, code: str, status: int) -> None:
    w = world(one())
    stream = w.core.stream("/v1/messages", CHAT)
    if code in ("uri_too_long", "headers_too_large", "version_not_supported"):
        stream.path = stream.method = None  # the head could not be parsed
    w.core.reject(stream, code)
    assert stream.answer.status == status  # type: ignore[union-attr]
    assert stream.answer.headers["x-ascproxy-error"] == code  # type: ignore[union-attr]
    assert ("type" in stream.answer.json) == (stream.path is not None)  # type: ignore[union-attr]


# ---- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "length", "expected"),
    [
        (KEY, 20_000_000, 1_000_000),
        (KEY, -1, 1_000_000),
        (None, 65_536, 65_536),
        (None, 65_537, "invalid_api_key"),
        (None, -1, "invalid_api_key"),
        ("wrong", 65_537, "invalid_api_key"),
    ],
)
async def test_a_long_body_needs_a_key_on_its_head(
    world: Make, key: str | None, length: int, expected: int | str
) -> None:
    """LIMITS 1: more than 64 KiB only with a valid credential, before any of it is read."""
    w = world(one(max_body=1_000_000))
    stream = w.core.stream("/v1/chat/completions", CHAT, key=key)
    w.core.head(stream, length)
    if isinstance(expected, int):
        assert stream.answer is None
        assert stream.body_limit == expected
        w.core.client_gone(stream)
    else:
        assert stream.answer is not None
        assert stream.answer.code == expected
        assert stream.trips == ["max_unauthenticated_body"]


async def test_a_listener_bounds_bodies_besides_the_routes(world: Make) -> None:
    w = world(snapshot((route("chat"),), (provider("rack-a", 1),), limits=Limits(max_body=5_000)))
    stream = w.core.stream("/v1/chat/completions", CHAT, key=KEY)
    w.core.head(stream, -1)
    assert stream.body_limit == 5_000


async def test_a_route_refuses_a_body_over_its_own_bound(world: Make) -> None:
    w = world(snapshot((route("chat", max_body=30), route("big")), (provider("rack-a", 1),)))
    stream = w.ask({"model": "chat", "messages": ["x" * 30]})
    assert stream.answer.status == 413  # type: ignore[union-attr]
    assert stream.trips == ["max_body"]
    assert "30 bytes" in stream.answer.json["error"]["message"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "method", "headers", "code"),
    [
        ("/nowhere", "POST", {}, "unknown_path"),
        ("/v1/models", "POST", {}, "method_not_allowed"),
        ("/v1/chat/completions", "POST", {"x-api-key": "other"}, "two_credentials"),
    ],
)
async def test_a_head_that_cannot_be_served_is_refused_before_its_body(
    world: Make, path: str, method: str, headers: dict[str, str], code: str
) -> None:
    w = world(one())
    stream = w.core.stream(path, None, method=method, key=KEY, headers=headers)
    w.core.head(stream, 100)
    assert stream.answer.code == code  # type: ignore[union-attr]


# ---- models and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_models_in_both_shapes(world: Make, method: str) -> None:
    """SEMANTICS 5: OpenAI's shape, with anthropic-version Anthropic's."""
    w = world(snapshot((route("chat"), route("x", "a/b", "g-*")), (provider("rack-a", 1),)))
    plain = w.ask(None, "/v1/models", method=method)
    assert [m["id"] for m in plain.answer.json["data"]] == ["chat", "a/b"]  # type: ignore[union-attr]
    assert plain.answer.json["object"] == "list"  # type: ignore[union-attr]
    claude = w.ask(None, "/v1/models?limit=1", method=method, headers={"anthropic-version": "2023-06-01"})
    assert [m["type"] for m in claude.answer.json["data"]] == ["model", "model"]  # type: ignore[union-attr]
    assert claude.answer.json["has_more"] is False  # type: ignore[union-attr]
    single = w.ask(None, "/v1/models/a%2Fb", method=method)
    assert single.answer.json == {"id": "a/b", "object": "model", "created": 0, "owned_by": "ascproxy"}  # type: ignore[union-attr]
    assert w.ask(None, "/v1/models/g-9", method=method).answer.json["id"] == "g-9"  # type: ignore[union-attr]


async def test_a_request_without_model_is_routed_by_header_or_by_the_only_route(world: Make) -> None:
    """SEMANTICS 5, TGI's /generate."""
    tgi = (provider("t1", 1, type="tgi"), provider("t2", 2, type="tgi"))
    w = world(snapshot((route("one", to=("t1",)), route("two", to=("t2",))), tgi))
    assert w.ask({"inputs": "x"}, "/generate").answer.code == "invalid_request"  # type: ignore[union-attr]
    named = await w.sent({"inputs": "x"}, "/generate", headers={"x-ascproxy-model": "two"})
    assert named.upstream.endpoint == 2
    w.core.answer(named)
    missing = w.ask({"inputs": "x"}, "/generate", headers={"x-ascproxy-model": "three"})
    assert missing.answer.json == {  # type: ignore[union-attr]
        "error": 'There is no model "three" here: GET /v1/models lists those that this API key can use.',
        "error_type": "model_not_found",
    }
    single = world(snapshot((route("one", to=("t1",)),), tgi))
    stream = await single.sent({"inputs": "x"}, "/generate")
    single.core.answer(stream)


async def test_the_query_of_anthropics_beta_interface_passes(world: Make) -> None:
    w = world(one())
    stream = await w.sent({"model": "chat"}, "/v1/messages?beta=true")
    assert stream.plans[0].head.startswith(b"POST /v1/messages?beta=true HTTP/1.1\r\n")
    w.core.answer(stream)
    plain = await w.sent({"model": "chat"}, "/v1/messages")
    assert plain.plans[0].head.startswith(b"POST /v1/messages HTTP/1.1\r\n")
    w.core.answer(plain)


# ---- retry and fallback (SEMANTICS 3) ------------------------------------------------------------------------------


async def test_a_reused_connection_that_was_closed_is_replaced_once_by_a_fresh_one(world: Make) -> None:
    w = world(one())
    first, second = await w.sent(), await w.sent()
    w.core.answer(first)
    w.core.answer(second)
    stream = await w.sent()
    assert stream.reused
    w.core.fail(stream, "closed")
    await turn(stream)
    assert stream.attempts == 2
    assert not stream.reused, "the retry goes over a fresh connection, not over another that waited"
    w.core.answer(stream)
    assert stream.status == 200


async def test_a_retry_happens_at_most_once(world: Make) -> None:
    w = world(one())
    w.core.answer(await w.sent())
    stream = await w.sent()
    w.core.fail(stream, "closed")
    await turn(stream)
    w.core.fail(stream, "closed")
    assert (stream.attempts, stream.answer.code) == (2, "upstream_unreachable")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        ("closed", "upstream_unreachable", 502),
        ("reset", "upstream_unreachable", 502),
        ("truncated", "upstream_unreachable", 502),
        ("timeout", "upstream_timeout", 504),
        ("malformed", "upstream_malformed", 502),
    ],
)
async def test_an_ambiguous_failure_on_a_fresh_connection_is_not_sent_again(
    world: Make, failure: str, code: str, status: int
) -> None:
    w = world(two())
    stream = await w.sent()
    w.core.fail(stream, failure)
    assert (stream.attempts, stream.answer.code, stream.answer.status) == (1, code, status)  # type: ignore[union-attr]
    assert stream.answer.block == 0, "the plan's block counts it already"  # type: ignore[union-attr]


@pytest.mark.parametrize("failure", ["closed", "reset", "timeout"])
async def test_a_route_may_ask_again_after_ambiguous_failures(world: Make, failure: str) -> None:
    w = world(two(retry_ambiguous=True))
    stream = await w.sent()
    w.core.fail(stream, failure)
    await turn(stream)
    assert stream.upstream.endpoint == 2
    w.core.fail(stream, failure)
    await turn(stream)
    assert (stream.upstream.endpoint, stream.attempts) == (2, 3), "the last target is tried once more"
    w.core.fail(stream, failure)
    assert stream.answer is not None


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_a_definite_failure_goes_to_the_next_target_and_the_last_answer_is_passed_on(
    world: Make, status: int
) -> None:
    w = world(two())
    stream = await w.sent()
    w.core.answer(stream, status)
    await turn(stream)
    assert stream.upstream.endpoint == 2
    w.core.answer(stream, status)
    assert (stream.status, stream.answer, stream.attempts) == (status, None, 2)


async def test_a_fallback_uses_a_waiting_connection_at_once(world: Make) -> None:
    w = world(two())
    stream = await w.sent()
    w.core.answer(stream, 503)
    await turn(stream)
    w.core.answer(stream)
    stream = await w.sent()
    w.core.answer(stream, 503)
    assert (stream.phase, stream.task, stream.reused) == ("wait", None, True)
    w.core.answer(stream)


@pytest.mark.parametrize("status", [400, 404, 422, 424])
async def test_client_errors_of_a_provider_are_passed_on(world: Make, status: int) -> None:
    w = world(two())
    stream = await w.sent()
    w.core.answer(stream, status)
    assert (stream.status, stream.attempts) == (status, 1)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_credential_fault_is_an_alert_and_never_the_clients(world: Make, status: int) -> None:
    """SEMANTICS 2: upstream 401/403 is never passed to the client as its own."""
    w = world(two())
    stream = await w.sent()
    w.core.answer(stream, status)
    await turn(stream)
    w.core.answer(stream, status)
    assert (stream.answer.status, stream.answer.code) == (502, "upstream_credential")  # type: ignore[union-attr]
    alert = "a provider refused our credential: renew it and reload"
    assert w.log.lines == [("error", alert, {"provider": p, "status": status}) for p in ("rack-a", "rack-b")]
    again = await w.sent()
    w.core.answer(again, status)
    await turn(again)
    w.core.answer(again)
    assert len(w.log.lines) == 2, "an alert is not repeated for each request"


async def test_no_connection_falls_back_and_then_refuses(world: Make) -> None:
    w = world(two())
    w.connector.down[1] = ConnectError("no")
    stream = await w.sent()
    assert stream.upstream.endpoint == 2
    w.core.answer(stream)
    w.connector.down[2] = ConnectError("no")
    w.clock.sleep_ms(5_000)
    stream = w.ask()
    await turn(stream)
    assert (stream.answer.code, stream.attempts) == ("upstream_unreachable", 0)  # type: ignore[union-attr]


async def test_another_endpoint_of_the_target_is_tried_first_and_the_bad_one_last_for_a_second(world: Make) -> None:
    w = world(snapshot((route("chat"),), (provider("rack-a", 1, 2),)))
    w.connector.down[1] = ConnectError("no")
    for _ in range(4):
        stream = await w.sent()
        assert stream.upstream.endpoint == 2
        w.core.answer(stream, keep=False)
    assert [e for e, _ in w.connector.asked].count(1) == 1
    w.clock.sleep_ms(1_001)
    for _ in range(2):
        w.core.answer(await w.sent(), keep=False)
    assert [e for e, _ in w.connector.asked].count(1) == 2


async def test_retries_have_a_budget_of_a_tenth(world: Make) -> None:
    """SEMANTICS 3: a burst of ten, then one for every ten requests."""
    w = world(one())
    retried = 0
    for _ in range(200):
        w.core.answer(await w.sent())
        stream = await w.sent()
        assert stream.reused
        w.core.fail(stream, "closed")
        if stream.answer is None:
            await turn(stream)
            retried += 1
            w.core.answer(stream)
    assert retried == 10 + 400 // 10 - 1 or retried == 10 + 400 // 10


async def test_an_endpoint_that_stays_away_costs_no_request_however_long(world: Make) -> None:
    """It is asked again once a second; going on to the other one asks nobody twice, so it takes from no budget."""
    w = world(snapshot((route("chat"),), (provider("rack-a", 1, 2),)))
    w.connector.down[1] = ConnectError("no")
    for _ in range(100):
        stream = await w.sent()
        assert stream.upstream.endpoint == 2
        w.core.answer(stream, keep=False)
        w.clock.sleep_ms(1_001)
    assert [e for e, _ in w.connector.asked].count(1) >= 49


async def test_the_deadline_over_all_attempts_bounds_connecting(world: Make) -> None:
    w = world(two(total_ms=2_000))
    w.connector.gate = asyncio.Event()
    w.connector.down[1] = ConnectError("no")
    stream = w.ask()
    await asyncio.sleep(0)
    w.clock.sleep_ms(2_000)
    w.connector.gate.set()
    await turn(stream)
    assert (stream.answer.status, stream.answer.code) == (504, "upstream_timeout")  # type: ignore[union-attr]
    assert w.connector.asked == [(1, 2_000)]
    assert stream.trips == ["total"]


@pytest.mark.parametrize("limit", ["connect", "tls"])
async def test_a_server_that_takes_too_long_to_connect_to_is_counted_by_the_deadline(world: Make, limit: str) -> None:
    w = world(two())
    w.connector.down[1] = ConnectTimeout("too long", limit)
    stream = await w.sent()
    assert stream.upstream.endpoint == 2
    assert stream.trips == [limit]
    w.core.answer(stream)
    w.connector.down[1] = ConnectError("refused")
    w.clock.sleep_ms(5_000)
    stream = await w.sent()
    assert stream.trips == [], "a refusal is no limit"
    w.core.answer(stream)


@pytest.mark.parametrize("waiting", [False, True])
async def test_no_attempt_begins_after_the_deadline_over_all(world: Make, waiting: bool) -> None:
    w = world(two(total_ms=2_000))
    if waiting:
        w.core.answer(await w.sent())
    stream = await w.sent()
    assert stream.reused == waiting
    w.clock.sleep_ms(2_000)
    w.core.answer(stream, 503)
    assert (stream.status, stream.answer, stream.attempts) == (503, None, 1), "the answer that there is"


# ---- cancellation (SEMANTICS 4) ------------------------------------------------------------------------------------


async def test_a_client_that_leaves_while_we_connect_stops_the_task(world: Make) -> None:
    w = world(one())
    w.connector.gate = asyncio.Event()
    stream = w.ask()
    task = stream.task
    assert task is not None
    await asyncio.sleep(0)
    w.core.client_gone(stream)
    await asyncio.wait([task])
    assert task.cancelled()
    assert (stream.attempts, stream.answer, stream.status) == (0, None, 499)


async def test_a_connection_made_for_a_client_that_left_is_kept_for_the_next(world: Make) -> None:
    w = world(one())
    w.connector.gate = asyncio.Event()
    stream = w.ask()
    await asyncio.sleep(0)
    stream.done = True
    w.connector.gate.set()
    await turn(stream)
    assert stream.attempts == 0
    following = w.ask()
    assert following.task is None
    w.core.answer(following)


async def test_a_client_that_leaves_in_mid_answer_costs_the_connection(world: Make) -> None:
    w = world(one())
    stream = await w.sent()
    w.core.client_gone(stream)
    assert not w.core.connections[0].open
    assert w.in_flight() == [0]


async def test_a_defect_while_connecting_is_an_answer_and_a_traceback(world: Make) -> None:
    w = world(one())
    w.connector.down[1] = ZeroDivisionError()
    stream = w.ask()
    task = stream.task
    assert task is not None
    with pytest.raises(ZeroDivisionError):
        await task
    assert stream.answer.code == "internal_error"  # type: ignore[union-attr]


# ---- revisions -----------------------------------------------------------------------------------------------------


async def test_a_request_finishes_on_the_revision_it_began_with(world: Make) -> None:
    w = world(two())
    stream = await w.sent()
    w.exchange.adopt(snapshot((route("other", to=("rack-z",)),), (provider("rack-z", 9),)))
    assert w.ask().answer.code == "model_not_found"  # type: ignore[union-attr]
    w.core.answer(stream, 503)
    await turn(stream)
    assert stream.upstream.endpoint == 2, "the fallback of the old revision"
    w.core.answer(stream)
    assert not w.core.connections[-1].open, "nobody will use that pool again"


async def test_a_revision_that_is_gone_leaves_no_secret_behind(world: Make) -> None:
    """Its plans and credentials are freed at once, not when the garbage collector comes by."""
    snap = snapshot(
        (route("chat"),), (provider("rack-a", 1, credential="c"),), credentials=(Credential("c", "file", "/c"),)
    )
    w = world(snap, files={"/c": b"s"})
    stream = await w.sent()
    secret = weakref.ref(stream.plans[0].secret)
    w.core.answer(stream, 503)
    w.core.settled.clear()
    del stream
    gc.disable()
    try:
        w.exchange.adopt(snap)
        assert secret() is None
    finally:
        gc.enable()


async def test_a_reload_keeps_connections_of_endpoints_that_stay(world: Make) -> None:
    w = world(one())
    w.core.answer(await w.sent())
    w.exchange.adopt(snapshot((route("chat"),), (provider("rack-a", 1), provider("rack-b", 2)), revision="b"))
    stream = w.ask()
    assert stream.reused
    w.core.answer(stream)


async def test_connections_over_tls_do_not_outlive_their_revision(world: Make) -> None:
    secure = snapshot((route("chat"),), (provider("rack-a", endpoint(1, "https://gpu")),))
    w = world(secure)
    w.core.answer(await w.sent())
    w.exchange.adopt(secure)
    assert not w.core.connections[0].open
    w.core.answer(await w.sent())
    assert len(w.core.connections) == 2


async def test_a_revision_that_cannot_be_applied_changes_nothing_and_names_all_that_is_wrong(world: Make) -> None:
    w = world(one())
    bad = snapshot(
        (route("chat", to=("rack-b",)),),
        (provider("rack-a", 1, credential="c"), provider("rack-b", 2, request_headers=("x-*",))),
        credentials=(Credential("c", "file", "/nowhere"),),
    )
    with pytest.raises(AscproxyError) as caught:
        w.exchange.adopt(bad)
    assert "credential c: cannot read /nowhere: No such file or directory" in str(caught.value)
    assert "provider rack-b: request_headers would pass x-api-key, x-goog-api-key" in str(caught.value)
    stream = await w.sent()
    assert stream.upstream.endpoint == 1
    w.core.answer(stream)


async def test_a_certificate_that_cannot_be_read_is_a_sentence(world: Make) -> None:
    w = world(one())
    with pytest.raises(AscproxyError, match=r"^provider rack-a: tls: cannot read /missing$"):
        w.exchange.adopt(
            snapshot((), (provider("rack-a", endpoint(1, "https://gpu"), tls=UpstreamTls(ca="/missing")),))
        )


async def test_a_credential_that_no_provider_uses_is_not_read(world: Make) -> None:
    w = world(one())
    w.exchange.adopt(snapshot((), (provider("rack-a", 1),), credentials=(Credential("c", "file", "/nowhere"),)))


async def test_a_revoked_key_is_refused_on_the_next_request(world: Make) -> None:
    w = world(one())
    w.core.answer(await w.sent())
    w.keys["k1"] = key_row(revoked_ms=1)
    w.epoch += 1
    assert w.ask().answer.code == "invalid_api_key"  # type: ignore[union-attr]


async def test_close_closes_what_waits(world: Make) -> None:
    w = world(one())
    w.core.answer(await w.sent())
    await w.exchange.close()
    assert not w.core.connections[0].open
