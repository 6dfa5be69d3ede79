"""The keys of both files: names, kinds, defaults, and the sentences of the reference page. Shape only.

Field descriptions end up in ``docs/reference/configuration.md`` and in the JSON Schemas. Every default that is a number
comes from :mod:`ascproxy.model`, so that there is one place to read it.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ascproxy.config.units import parse_memory, parse_size, parse_time
from ascproxy.model.node import CLIENT_DEPTH
from ascproxy.model.provider import ProviderType

MAX_WORKERS = 256
MAX_MODEL = 256  # bytes: JSON_MODEL_MAX of native/jsonscan.h
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"  # one line, nothing a terminal obeys


def _workers(value: object) -> int | None:
    if value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WORKERS:
        return value
    raise ValueError(f"write auto (one per core) or a number from 1 to {MAX_WORKERS}")


def _model(value: str) -> str:
    if len(value.encode()) > MAX_MODEL:
        raise ValueError(f"is longer than {MAX_MODEL} bytes, the most that a model's name can be")
    return value


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"{value!r} is no network ({error}): write 10.0.0.0/8, 2001:db8::/32 or one address") from None


Time = Annotated[
    int, BeforeValidator(parse_time), WithJsonSchema({"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"})
]
Size = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"})
]
Memory = Annotated[
    int, BeforeValidator(parse_memory), WithJsonSchema({"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"})
]
Network = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_network)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=PRINTABLE)]
Model = Annotated[str, Field(min_length=1, pattern=PRINTABLE), AfterValidator(_model)]
HeaderName = Annotated[str, Field(pattern=r"^[a-z0-9_-]*\*?[a-z0-9_-]*$", min_length=2, max_length=64)]
Workers = Annotated[
    int | None,
    BeforeValidator(_workers),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MAX_WORKERS}]}),
]


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ListenerLimitsSection(Section):
    """Limits on what callers may do. A listener's own value wins over the node's, which wins over the default."""

    tls_handshake: Time | None = Field(None, description="the TLS handshake, from accepting the connection")
    header_timeout: Time | None = Field(None, description="a whole request head, from its first byte; then 408")
    idle_timeout: Time | None = Field(None, description="a connection without a request")
    connection_age: Time | None = Field(None, description="a connection, whatever it does; varied by 10 %")
    connection_requests: int | None = Field(None, ge=1, le=1_000_000_000, description="requests on one connection")
    body_idle: Time | None = Field(None, description="no byte of a request body")
    body_min_rate: Size | None = Field(None, description="bytes a second that a request body must reach, over 10 s")
    body_total: Time | None = Field(None, description="a whole request body")
    write_stall: Time | None = Field(None, description="a client that takes no byte of its answer")
    max_request_line: Size | None = Field(None, le=32_768, description="a request line; then 414")
    max_field: Size | None = Field(None, le=32_768, description="one header field; then 431")
    max_head: Size | None = Field(None, le=40_960, description="a whole request head; then 431")
    max_fields: int | None = Field(None, ge=4, le=128, description="header fields; then 431")
    max_body: Size | None = Field(None, description="a request body, where the route says nothing; then 413")
    max_unauthenticated_body: Size | None = Field(None, description="a request body before its credential is checked")
    max_chunk_extension: Size | None = Field(None, le=65_536, description="extensions of one chunk of a body; then 400")
    max_chunk_extensions: Size | None = Field(None, le=1 << 24, description="extensions of all its chunks; then 400")
    max_trailers: Size | None = Field(None, le=65_536, description="its trailers, which are never passed on; then 400")
    json_depth: int | None = Field(None, ge=2, le=64, description="nesting of a JSON request body; then 400")
    json_keys: int | None = Field(None, ge=16, le=10_000_000, description="members of all its objects; then 400")
    json_digits: int | None = Field(None, ge=16, le=4_096, description="digits of one number; then 400")
    h2_streams: int | None = Field(None, ge=1, le=1_000, description="requests at a time on one HTTP/2 connection")
    h2_stream_window: Size | None = Field(
        None, ge=1_024, le=1 << 24, description="bytes of one HTTP/2 request body that may be on their way"
    )
    h2_connection_window: Size | None = Field(
        None, ge=65_535, le=1 << 28, description="bytes of all request bodies of an HTTP/2 connection, likewise"
    )
    h2_frame: Size | None = Field(None, ge=16_384, le=1 << 20, description="an HTTP/2 frame's payload")
    h2_table: Size | None = Field(None, ge=0, le=65_536, description="a client's table of header fields (HPACK)")
    h2_resets: int | None = Field(
        None, ge=1, le=1_000_000, description="HTTP/2 streams that a client resets, or makes us reset, at once"
    )
    h2_resets_rate: int | None = Field(None, ge=1, le=1_000_000, description="how many of them are forgiven a second")
    h2_continuations: int | None = Field(
        None, ge=1, le=1_000, description="CONTINUATION frames of one head; an empty one is too many"
    )
    h2_settings: int | None = Field(None, ge=1, le=1_000_000, description="SETTINGS frames in 10 s")
    h2_settings_entries: int | None = Field(None, ge=8, le=1_000, description="settings in one frame")
    h2_pings: int | None = Field(None, ge=1, le=1_000_000, description="PING frames in 10 s")
    h2_priorities: int | None = Field(
        None, ge=0, le=1_000_000, description="PRIORITY frames, besides one for each stream of the connection"
    )
    h2_empty_data: int | None = Field(None, ge=1, le=1_000_000, description="DATA frames without data, in a row")
    h2_glitches: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="frames that ask for nothing, at once: unknown ones, those of closed streams, WINDOW_UPDATE that "
        "no answer called for",
    )
    h2_glitches_rate: int | None = Field(None, ge=1, le=1_000_000, description="how many of them are forgiven a second")
    h2_queued: int | None = Field(
        None, ge=16, le=100_000, description="frames of ours that wait because the client reads nothing"
    )


class LimitsSection(ListenerLimitsSection):
    """The same for every listener, and what counts for the whole node."""

    max_bodies: Size | None = Field(None, description="all request bodies that a worker holds; then 503")
    max_connections: int | None = Field(None, ge=1, le=1_000_000, description="connections of a worker")
    max_connections_per_ip: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="connections of a worker from one address (IPv6: from 64 bits of it); loopback, Unix sockets and "
        "`trusted_peers` are exempt",
    )
    max_unauthenticated_per_ip: int | None = Field(
        None, ge=1, le=1_000_000, description="the same while no request from that address had a valid key"
    )
    trusted_peers: list[Network] | None = Field(
        None,
        max_length=64,
        description="networks of load balancers: the two limits above leave them alone, and they may say who is behind "
        "them (`proxy_protocol`, `X-Forwarded-For`)",
    )
    memory_limit: Memory | None = Field(
        None,
        description="memory of all processes of the service: at 85 % answers close their connections, at 92 % requests "
        "get 503, at 97 % nobody accepts; default: the cgroup's limit, else 80 % of the machine's memory",
    )
    drain_unary: Time | None = Field(None, description="how long a stop or restart waits for unary requests")
    drain_stream: Time | None = Field(None, description="how long a stop or restart waits for streams")


class CertificateSection(Section):
    """One more certificate of a listener."""

    certificate: Text = Field(description="certificate chain, the server's own first")
    key: Text = Field(description="its private key, without a passphrase")


class ListenerTlsSection(Section):
    """The certificates that a listener shows, and those that it wants to see. Files are PEM."""

    certificate: Text = Field(description="certificate chain, the server's own first")
    key: Text = Field(description="its private key, without a passphrase")
    certificates: list[CertificateSection] = Field(
        default_factory=list,
        max_length=15,
        description="further ones, for callers that name one of their hosts, or take another kind of key (RSA beside "
        "ECDSA); who names an unknown host, or none, is shown the first",
    )
    min_version: Literal["1.2", "1.3"] = Field("1.2", description="oldest version of TLS, in quotes")
    client_ca: Text | None = Field(
        None, description="asks for a client certificate of these CAs (mTLS), whose roots must be among them"
    )
    client_auth: Literal["required", "optional", "off"] | None = Field(
        None,
        description="whether it must be shown: `required`, `optional` or `off`; default: `required` with `client_ca`",
    )
    client_crl: Text | None = Field(
        None, description="revocation lists, a current one of every CA in `client_ca`; read again on reload"
    )
    client_depth: int = Field(
        CLIENT_DEPTH, ge=1, le=CLIENT_DEPTH, description="most CA certificates above a client's own, its root included"
    )
    ticket_keys: Text | None = Field(
        None,
        description="keys of session tickets that several nodes share: lines of 64 hexadecimal digits, the first "
        "encrypts; default: keys of this node's own, renewed every 8 h",
    )


class ListenerSection(Section):
    """An address that callers connect to."""

    address: Text = Field(
        description="`host:port`, `[v6]:port` or `unix:PATH`. Without `tls` only loopback addresses and Unix sockets"
    )
    name: Name | None = Field(None, description="its name in metrics and logs; default: the address")
    tls: ListenerTlsSection | None = Field(None, description="serves HTTPS")
    http2: bool = Field(
        True, description="serves HTTP/2 beside HTTP/1.1: by ALPN over TLS, to clients that know it in plaintext"
    )
    proxy_protocol: bool = Field(
        False,
        description="each connection begins with a PROXY header of version 2, and comes from `trusted_peers` or over a "
        "Unix socket; others are closed",
    )
    limits: ListenerLimitsSection = Field(ListenerLimitsSection(), description="limits of this listener")


class MetricsSection(Section):
    """Where `/metrics` and `/healthz/*` are served."""

    address: Text = Field("127.0.0.1:9464", description="a loopback address or `unix:PATH`")


class NodeFile(Section):
    """`ascproxy.yaml`: what differs from machine to machine. Relative paths start at this file's folder."""

    node: Name = Field(description="the name of this machine")
    state_dir: Text = Field("state", description="durable state: the key store")
    run_dir: Text | None = Field(
        None,
        description="volatile state and local sockets, on a tmpfs; default: the systemd unit's RuntimeDirectory, "
        "else `/dev/shm/ascproxy-NODE-HASH`, HASH of this file's path",
    )
    workers: Workers = Field(None, description="worker processes; `auto` is one per core")
    listeners: Annotated[list[ListenerSection], Field(min_length=1)] = Field(description="where callers connect")
    metrics: MetricsSection = Field(MetricsSection(), description="metrics and health")
    limits: LimitsSection = Field(LimitsSection(), description="limits of all listeners and of the node")
    access_log: Text = Field("stdout", description="one JSON line per request: `stdout`, `none` or a file")
    resources: Text | None = Field(None, description="the resources file, read again on reload")


class TenantSection(Section):
    """Who owns keys and traffic. A tenant is its name: write `{}`."""


class CredentialSection(Section):
    """What a provider is shown. The value itself is never written here."""

    from_: Text = Field(
        alias="from",
        description="`file:PATH`, `systemd:NAME` (LoadCredential of the unit) or, for trying out, `env:VARIABLE`",
    )


class UpstreamTlsSection(Section):
    """How a provider's certificate is verified, and which one it is shown. Files are PEM."""

    ca: Text | None = Field(None, description="CA of the provider's certificate; default: the system's")
    certificate: Text | None = Field(None, description="client certificate chain")
    key: Text | None = Field(None, description="its private key, without a passphrase")


class TimeoutsSection(Section):
    """Deadlines towards a provider."""

    connect: Time | None = Field(None, description="the TCP connection")
    tls: Time | None = Field(None, description="the TLS handshake")
    first_byte: Time | None = Field(None, description="from the request to the first byte of its answer")
    between_tokens: Time | None = Field(None, description="no event in a stream; comments do not count")
    total: Time | None = Field(None, description="a whole exchange")


class ProviderSection(Section):
    """A model server, or a group of equal ones."""

    type: Annotated[ProviderType, Field(strict=False)] = Field(
        description="the wire it speaks: `vllm`, `tgi`, `openai` or `anthropic`"
    )
    endpoints: Annotated[list[Text], Field(min_length=1)] = Field(description="base URLs, without `/v1`")
    credential: Name | None = Field(None, description="the credential that it is shown")
    region: Name | None = Field(None, description="where it runs")
    tls: UpstreamTlsSection = Field(UpstreamTlsSection(), description="for `https` endpoints")
    timeouts: TimeoutsSection = Field(TimeoutsSection(), description="deadlines")
    pool_idle: Time | None = Field(
        None, description="how long an idle connection is kept; default: 4s for vllm (which closes after 5s), else 30s"
    )
    request_headers: list[HeaderName] = Field([], description="more request headers to pass on; one `*` is allowed")


class TargetSection(Section):
    """A provider to ask."""

    provider: Name = Field(description="the provider's name")
    model: Model | None = Field(
        None, description="what the provider calls the model; default: what the caller asked for"
    )


class RouteLimitsSection(Section):
    """Limits of a route; they win over those of node and provider."""

    max_body: Size | None = Field(None, description="a request body; then 413")
    first_byte: Time | None = Field(None, description="from the request to the first byte of its answer")
    between_tokens: Time | None = Field(None, description="no event in a stream")
    total: Time | None = Field(None, description="a whole exchange")


class RouteSection(Section):
    """What callers ask for, and who may answer."""

    models: Annotated[list[Model], Field(min_length=1)] = Field(description="model names; `*` and `?` are globs")
    targets: Annotated[list[TargetSection], Field(min_length=1)] = Field(description="tried in order")
    operations: list[str] = Field([], description="operations that the route serves; default: all")
    tenants: list[Name] = Field([], description="tenants that may use it; default: all")
    limits: RouteLimitsSection = Field(RouteLimitsSection(), description="limits of this route")
    usage: Literal["asked", "final"] = Field(
        default="asked",
        description="token usage of a stream is shown to a caller that `asked` for it, or to all at its end (`final`)",
    )
    retry_ambiguous: bool = Field(
        False, description="also try the next target when the request may already have run (timeout or reset)"
    )


class ResourcesFile(Section):
    """`resources.yaml`: what all machines of a cluster agree on."""

    tenants: dict[Name, TenantSection] = Field({}, description="who owns keys and traffic, by name")
    credentials: dict[Name, CredentialSection] = Field({}, description="what providers are shown, by name")
    providers: dict[Name, ProviderSection] = Field({}, description="model servers, by name")
    routes: dict[Name, RouteSection] = Field({}, description="models to targets, by name")
