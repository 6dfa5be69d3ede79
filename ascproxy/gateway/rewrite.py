"""What is sent to a provider in place of what came: request line, header fields, credential, model name.

A :class:`ascproxy._native.Plan` holds all of it for one (listener, target, endpoint, operation). Fields pass by
allow-lists only, both ways (SEMANTICS 5): a deny-list forgets the next vendor's credential header (LIMITS 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import orjson

from ascproxy.errors import AscproxyError
from ascproxy.model.provider import Credential, Endpoint, Provider, ProviderType
from ascproxy.model.route import Target
from ascproxy.wire import anthropic, openai
from ascproxy.wire.operation import Operation, Scan

if TYPE_CHECKING:
    from ascproxy._native import Names, Plan, Secret, SecretArena, TlsContext, TlsError
    from ascproxy.gateway.router import Match

REQUEST_HEADERS = (
    "content-type",
    "accept",
    "user-agent",
    "anthropic-version",
    "anthropic-beta",
    "openai-organization",
    "openai-project",
    "x-stainless-*",
    "traceparent",
    "tracestate",
)
# content-encoding besides those of SEMANTICS 5: a server that encodes although it was asked for identity is to be
# understood. x-request-id is the core's.
RESPONSE_HEADERS = (
    "content-type",
    "content-encoding",
    "retry-after",
    "x-ratelimit-*",
    "anthropic-ratelimit-*",
    "openai-*",
    "x-*-tokens",
    "x-*-time",
)
# What a configuration cannot add to REQUEST_HEADERS: the caller's credentials in every spelling we know of, and fields
# that frame the request or are set here.
NEVER = (
    "authorization",
    "proxy-authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "xi-api-key",
    "cookie",
    "host",
    "connection",
    "content-length",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "accept-encoding",
    "x-ascproxy-model",
)

# What is asked of a stream whose caller did not ask for usage (SEMANTICS 4), by what each type documents.
_ASK = {
    ProviderType.VLLM: b'"include_usage":true,"continuous_usage_stats":true',
    ProviderType.OPENAI: b'"include_usage":true',
    ProviderType.TGI: b'"include_usage":true',
}
_ASK_FINAL = b'"include_usage":true'
_ASKED_OF = (Operation.CHAT_COMPLETIONS, Operation.COMPLETIONS)

# How a stream ends that breaks off after content, by its outcome. Other dialects have no event for it.
_ENDINGS = {
    "upstream_timeout": "The model server stopped sending. What came before is not the whole answer.",
    "truncated": "The model server broke off. What came before is not the whole answer.",
    "upstream_aborted": "The model server gave up this answer. What came before is not the whole answer.",
    "draining": "The gateway is stopping. What came before is not the whole answer: ask again.",
}
_LAST_EVENT: dict[Scan, Callable[[str, str], bytes]] = {
    Scan.OPENAI: openai.last_event,
    Scan.MESSAGES: anthropic.last_event,
    Scan.RESPONSES: openai.last_response_event,
}

_SECRET_PREFIX = {ProviderType.ANTHROPIC: b"x-api-key: "}
_BEARER = b"authorization: Bearer "


class Native(Protocol):
    """The part of :mod:`ascproxy._native` that makes values of a revision."""

    Plan: type[Plan]
    Names: type[Names]
    TlsContext: type[TlsContext]
    TlsError: type[TlsError]
    SCAN_NONE: int
    SCAN_OPENAI: int
    SCAN_MESSAGES: int
    SCAN_RESPONSES: int
    SCAN_TGI: int


def secret_of(credential: Credential, arena: SecretArena, environ: Mapping[str, str]) -> Secret:
    """Read a credential into the arena. Raises :class:`AscproxyError` with what to do, never with the value."""
    name, place = credential.name, credential.place
    try:
        if credential.scheme == "file":
            return arena.load(place)
        if credential.scheme == "systemd":
            folder = environ.get("CREDENTIALS_DIRECTORY")
            if not folder:
                raise AscproxyError(
                    f"credential {name}: $CREDENTIALS_DIRECTORY is not set: systemd:{place} needs a unit with "
                    f"LoadCredential={place}:PATH, use file:PATH elsewhere"
                )
            return arena.load(str(Path(folder) / place))
        if credential.scheme == "env":
            value = environ.get(place)
            if not value:
                raise AscproxyError(f"credential {name}: environment variable {place} is not set")
            return arena.put(bytearray(value.encode()))
    except OSError as error:
        where = error.filename if error.filename is not None else place
        raise AscproxyError(f"credential {name}: cannot read {where}: {error.strerror or error}") from error
    except (ValueError, MemoryError) as error:
        raise AscproxyError(f"credential {name}: {credential.scheme}:{place}: {error}") from error
    raise AscproxyError(f"credential {name}: no scheme {credential.scheme!r}: use file, systemd or env")


def request_names(native: Native, provider: Provider) -> Names:
    """The names that pass to ``provider``. Raises :class:`AscproxyError` if an addition would pass a credential."""
    try:
        added = native.Names(tuple(name.lower() for name in provider.request_headers))
        names = native.Names(REQUEST_HEADERS + tuple(name.lower() for name in provider.request_headers))
    except ValueError as error:
        raise AscproxyError(f"provider {provider.name}: request_headers: {error}") from error
    bad = [name for name in NEVER if name in added]
    if bad:
        raise AscproxyError(
            f"provider {provider.name}: request_headers would pass {', '.join(bad)}: name the fields that you mean"
        )
    return names


def authority(endpoint: Endpoint) -> str:
    """The value of ``host``: without the scheme's own port, IPv6 in brackets (RFC 9110 7.2)."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    default = 443 if endpoint.scheme == "https" else 80
    return host if endpoint.port == default else f"{host}:{endpoint.port}"


@lru_cache(maxsize=4096)  # one object for all routes of an endpoint: it stays in the processor's cache
def head(endpoint: Endpoint, path: str, query: bytes) -> bytes:
    """Request line and static fields, each line ended by CRLF."""
    target = (endpoint.base_path.rstrip("/") + path).encode("ascii") + (b"?" + query if query else b"")
    return b"POST %b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\n" % (
        target,
        authority(endpoint).encode("ascii"),
    )


def plan(
    native: Native,
    match: Match,
    target: Target,
    provider: Provider,
    endpoint: Endpoint,
    *,
    query: bytes,
    names: tuple[Names, Names],
    secret: Secret | None,
    block: int,
) -> Plan:
    """The plan of asking ``endpoint``. ``names`` pass to the provider and back; ``block`` is the meter's.

    Deadlines of the route go before those of the provider.
    """
    route, shape, timeouts = match.route, match.shape, provider.timeouts
    scan = {
        Scan.NONE: native.SCAN_NONE,
        Scan.OPENAI: native.SCAN_OPENAI,
        Scan.MESSAGES: native.SCAN_MESSAGES,
        Scan.RESPONSES: native.SCAN_RESPONSES,
        Scan.TGI: native.SCAN_TGI,
    }[shape.scan]
    members = {
        "route": route.name,
        "provider": provider.name,
        "endpoint": authority(endpoint),
        "operation": shape.operation,
    }
    if target.model is not None:
        members["target_model"] = target.model
    return native.Plan(
        endpoint=endpoint.id,
        head=head(endpoint, shape.path, query),
        request_headers=names[0],
        response_headers=names[1],
        secret=secret,
        secret_prefix=_SECRET_PREFIX.get(provider.type, _BEARER) if secret is not None else b"",
        model=target.model,
        scan=scan,
        first_byte_ms=_first(route.first_byte_ms, timeouts.first_byte_ms),
        idle_ms=_first(route.between_tokens_ms, timeouts.between_tokens_ms),
        total_ms=_first(route.total_ms, timeouts.total_ms),
        block=block,
        log=orjson.dumps(members)[1:-1],
        ask=_ask(match, provider),
        strip=route.usage == "asked",
        endings=endings(shape.scan),
    )


def _ask(match: Match, provider: Provider) -> bytes | None:
    if match.shape.operation not in _ASKED_OF:
        return None
    return _ASK_FINAL if match.route.usage == "final" else _ASK.get(provider.type)


def endings(scan: Scan) -> dict[str, bytes]:
    """The event for each way in which a stream of that kind can break off."""
    last_event = _LAST_EVENT.get(scan)
    return {} if last_event is None else {code: last_event(code, message) for code, message in _ENDINGS.items()}


def _first(of_route: int | None, of_provider: int) -> int:
    return of_provider if of_route is None else of_route
