"""What is sent in place of what came: allow-lists, request lines, credentials (SEMANTICS 5)."""

from __future__ import annotations

import pytest

from ascproxy.errors import AscproxyError
from ascproxy.gateway import rewrite
from ascproxy.gateway.router import Match
from ascproxy.model.provider import Credential, UpstreamTimeouts
from ascproxy.model.route import Target
from ascproxy.wire.operation import OPERATIONS, Operation
from tests.kit.snapshots import endpoint, provider, route
from tests.kit.streams import FakeNative, Names, Plan, Secret, SecretArena

NATIVE = FakeNative()

PASSES = [
    "content-type", "accept", "user-agent", "anthropic-version", "anthropic-beta", "openai-organization",
    "openai-project", "x-stainless-lang", "x-stainless-retry-count", "traceparent", "tracestate",
]  # fmt: skip
STAYS = [
    "authorization", "x-api-key", "api-key", "x-goog-api-key", "xi-api-key", "cookie", "proxy-authorization",
    "host", "te", "connection", "content-length", "transfer-encoding", "expect", "accept-encoding",
    "idempotency-key", "x-forwarded-for", "x-ascproxy-model", "content-encoding", "x-unknown",
]  # fmt: skip
COMES_BACK = [
    "content-type", "retry-after", "x-ratelimit-limit-requests", "anthropic-ratelimit-tokens-reset",
    "openai-processing-ms", "x-prompt-tokens", "x-generated-tokens", "x-total-time", "x-queue-time",
    "content-encoding",
]  # fmt: skip
STAYS_BACK = ["set-cookie", "server", "alt-svc", "via", "x-powered-by", "strict-transport-security", "x-time-per-token"]


@pytest.mark.parametrize("name", PASSES)
def test_fields_that_pass_to_the_provider(name: str) -> None:
    assert name in rewrite.request_names(NATIVE, provider("p", 1))


@pytest.mark.parametrize("name", STAYS)
def test_fields_that_do_not(name: str) -> None:
    assert name not in rewrite.request_names(NATIVE, provider("p", 1))


@pytest.mark.parametrize("name", COMES_BACK)
def test_fields_that_come_back(name: str) -> None:
    assert name in Names(rewrite.RESPONSE_HEADERS)


@pytest.mark.parametrize("name", STAYS_BACK)
def test_fields_that_do_not_come_back(name: str) -> None:
    assert name not in Names(rewrite.RESPONSE_HEADERS)


def test_a_configuration_may_add_fields() -> None:
    names = rewrite.request_names(NATIVE, provider("p", 1, request_headers=("X-Tenant-Trace", "helicone-*")))
    assert "x-tenant-trace" in names
    assert "helicone-user" in names


@pytest.mark.parametrize("name", ["authorization", "Cookie", "*", "x-*", "*-key", "proxy-*", "host", "accept-*"])
def test_but_none_that_would_pass_a_credential_or_frame_the_request(name: str) -> None:
    with pytest.raises(AscproxyError, match=r"^provider p: request_headers would pass "):
        rewrite.request_names(NATIVE, provider("p", 1, request_headers=(name,)))


def test_a_name_that_is_none_is_a_finding() -> None:
    with pytest.raises(AscproxyError, match=r"^provider p: request_headers: not a lower-case header name"):
        rewrite.request_names(NATIVE, provider("p", 1, request_headers=("a b",)))


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("http://127.0.0.1:8000", b"127.0.0.1:8000", b"/v1/messages"),
        ("http://gpu:80", b"gpu", b"/v1/messages"),
        ("https://api.anthropic.com", b"api.anthropic.com", b"/v1/messages"),
        ("https://gpu:8443/base/", b"gpu:8443", b"/base/v1/messages"),
    ],
)
def test_the_request_line_and_host(url: str, host: bytes, target: bytes) -> None:
    head = rewrite.head(endpoint(1, url), "/v1/messages", b"")
    assert head == b"POST " + target + b" HTTP/1.1\r\nhost: " + host + b"\r\naccept-encoding: identity\r\n"


def test_an_ipv6_host_is_in_brackets() -> None:
    from dataclasses import replace

    assert rewrite.authority(replace(endpoint(1), host="::1")) == "[::1]:8001"


def plan(type_: str, operation: Operation = Operation.MESSAGES, secret: Secret | None = None) -> Plan:
    p = provider("p", 1, type=type_, timeouts=UpstreamTimeouts(first_byte_ms=1, between_tokens_ms=2, total_ms=3))
    r = route("r", to=("p",), between_tokens_ms=20)
    names = (Names(()), Names(()))
    match = Match(r, OPERATIONS[operation], ((Target("p", "alias"), p),))
    made: Plan = rewrite.plan(  # type: ignore[assignment]
        NATIVE, match, match.targets[0][0], p, p.endpoints[0], query=b"", names=names, secret=secret, block=5
    )
    return made


@pytest.mark.parametrize(
    ("type_", "prefix"),
    [
        ("vllm", b"authorization: Bearer "),
        ("tgi", b"authorization: Bearer "),
        ("openai", b"authorization: Bearer "),
        ("anthropic", b"x-api-key: "),
    ],
)
def test_the_credential_is_sent_as_the_provider_reads_it(type_: str, prefix: bytes) -> None:
    secret = Secret("f", b"s")
    assert (plan(type_, secret=secret).secret, plan(type_, secret=secret).secret_prefix) == (secret, prefix)
    assert (plan(type_).secret, plan(type_).secret_prefix) == (None, b"")


def test_deadlines_of_the_route_go_before_those_of_the_provider() -> None:
    made = plan("vllm")
    assert (made.first_byte_ms, made.idle_ms, made.total_ms) == (1, 20, 3)


@pytest.mark.parametrize(
    ("operation", "scan"),
    [
        (Operation.CHAT_COMPLETIONS, FakeNative.SCAN_OPENAI),
        (Operation.MESSAGES, FakeNative.SCAN_MESSAGES),
        (Operation.RESPONSES, FakeNative.SCAN_RESPONSES),
        (Operation.GENERATE_STREAM, FakeNative.SCAN_TGI),
        (Operation.TOKENIZE, FakeNative.SCAN_NONE),
    ],
)
def test_answers_are_scanned_in_their_dialect(operation: Operation, scan: int) -> None:
    assert plan("vllm", operation).scan == scan


def test_the_access_line_names_where_it_went() -> None:
    assert plan("vllm").log == (
        b'"route":"r","provider":"p","endpoint":"127.0.0.1:8001","operation":"messages","target_model":"alias"'
    )


# ---- credentials (DESIGN D14) -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "place", "origin"),
    [("file", "/keys/a", "/keys/a"), ("systemd", "rack-a", "/run/credentials/u/rack-a"), ("env", "RACK_A", "put")],
)
def test_credentials_are_read_into_the_arena(scheme: str, place: str, origin: str) -> None:
    arena = SecretArena({"/keys/a": b"s", "/run/credentials/u/rack-a": b"s"})
    environ = {"CREDENTIALS_DIRECTORY": "/run/credentials/u", "RACK_A": "s"}
    assert rewrite.secret_of(Credential("c", scheme, place), arena, environ) == Secret(origin, b"s")  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("scheme", "place", "sentence"),
    [
        ("file", "/nowhere", "credential c: cannot read /nowhere: No such file or directory"),
        ("systemd", "x",
         "credential c: $CREDENTIALS_DIRECTORY is not set: systemd:x needs a unit with LoadCredential=x:PATH, "
         "use file:PATH elsewhere"),
        ("env", "NOT_SET", "credential c: environment variable NOT_SET is not set"),
        ("vault", "x", "credential c: no scheme 'vault': use file, systemd or env"),
    ],
)  # fmt: skip
def test_a_credential_that_cannot_be_read_is_an_error_and_never_its_own_value(
    scheme: str, place: str, sentence: str
) -> None:
    """SEMANTICS 8: an unresolved reference is an error."""
    with pytest.raises(AscproxyError) as caught:
        rewrite.secret_of(Credential("c", scheme, place), SecretArena(), {})  # type: ignore[arg-type]
    assert str(caught.value) == sentence
