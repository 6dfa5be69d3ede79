"""What differs per machine: the checked node file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

CLIENT_DEPTH = 9  # a root and eight intermediates: CHAIN_MAX of native/tls_context.c


class ClientAuth(StrEnum):
    """Whether callers must show a certificate. ``off``: none is asked for."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """Absolute paths of a certificate and its key."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """Absolute paths. ``client_ca`` makes it mTLS: unless ``client_auth`` says otherwise, a certificate from that CA is
    required. ``certificates`` are further ones. ``client_depth`` counts the certificates above a client's own.
    ``ticket_keys`` is None where the supervisor makes them."""

    certificate: str
    key: str
    client_ca: str | None = None
    client_auth: ClientAuth = ClientAuth.REQUIRED
    client_crl: str | None = None
    client_depth: int = CLIENT_DEPTH
    certificates: tuple[CertificatePair, ...] = ()
    min_version: str = "1.2"
    ticket_keys: str | None = None

    @property
    def asks_clients(self) -> bool:
        """Whether callers are asked for a certificate."""
        return self.client_ca is not None and self.client_auth is not ClientAuth.OFF


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of LIMITS 1 that HTTP and upstreams need; milliseconds, bytes, counts.

    ``h2_settings`` and ``h2_pings`` are frames in ten seconds, ``h2_resets_rate`` and ``h2_glitches_rate`` a second's.
    ``trusted_peers`` are networks (``10.0.0.0/8``); ``memory_limit`` 0: the cgroup's, else 80 % of the machine's.
    """

    tls_handshake_ms: int = 10_000
    header_timeout_ms: int = 10_000
    idle_timeout_ms: int = 75_000
    connection_age_ms: int = 3_600_000
    connection_requests: int = 10_000
    body_idle_ms: int = 30_000
    body_min_rate: int = 1_024
    body_total_ms: int = 300_000
    write_stall_ms: int = 30_000
    max_request_line: int = 8_192
    max_field: int = 16_384
    max_head: int = 32_768
    max_fields: int = 100
    max_body: int = 32 * 1024 * 1024
    max_bodies: int = 256 * 1024 * 1024
    max_unauthenticated_body: int = 65_536
    max_chunk_extension: int = 256
    max_chunk_extensions: int = 16_384
    max_trailers: int = 8_192
    json_depth: int = 64
    json_keys: int = 10_000
    json_digits: int = 64
    h2_streams: int = 100
    h2_stream_window: int = 65_536
    h2_connection_window: int = 1_048_576
    h2_frame: int = 16_384
    h2_table: int = 4_096
    h2_resets: int = 200
    h2_resets_rate: int = 20
    h2_continuations: int = 8
    h2_settings: int = 20
    h2_settings_entries: int = 32
    h2_pings: int = 20
    h2_priorities: int = 100
    h2_empty_data: int = 10
    h2_glitches: int = 1_000
    h2_glitches_rate: int = 33
    h2_queued: int = 1_000
    max_connections: int = 16_384
    max_connections_per_ip: int = 2_048
    max_unauthenticated_per_ip: int = 512
    trusted_peers: tuple[str, ...] = ()
    memory_limit: int = 0
    drain_unary_ms: int = 30_000
    drain_stream_ms: int = 600_000


@dataclass(frozen=True, slots=True)
class Listener:
    """``address`` is ``host:port``, ``[v6]:port`` or ``unix:/path``; ``name`` is what the file calls it or it.

    ``proxy_protocol``: connections begin with a PROXY header, and come from ``trusted_peers`` or a Unix socket only.
    ``http2``: beside HTTP/1.1, by ALPN over TLS and by its preface in plaintext.
    """

    name: str
    address: str
    tls: ListenerTls | None = None
    limits: Limits = field(default_factory=Limits)
    proxy_protocol: bool = False
    http2: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """The node file with absolute paths and numbers. ``workers`` is at least 1; ``access_log`` is ``stdout``, ``none``
    or an absolute path."""

    name: str
    state_dir: str
    run_dir: str
    workers: int
    listeners: tuple[Listener, ...]
    metrics_address: str
    limits: Limits = field(default_factory=Limits)
    access_log: str = "stdout"
