"""Providers, their endpoints, and the credential that is sent to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ProviderType(StrEnum):
    """Which wire a provider speaks: it decides operations, credential header and how answers are scanned."""

    VLLM = "vllm"
    TGI = "tgi"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """How to verify a provider, and how to show who we are. Absolute paths; ``ca`` None means the system's store."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of a provider. ``id`` is unique in a snapshot and numbers pools and in-flight counts."""

    id: int
    url: str
    scheme: str
    host: str
    port: int
    base_path: str


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Deadlines towards an upstream (LIMITS 1), milliseconds."""

    connect_ms: int = 3_000
    tls_ms: int = 5_000
    first_byte_ms: int = 300_000
    between_tokens_ms: int = 120_000
    total_ms: int = 3_600_000


@dataclass(frozen=True, slots=True)
class Provider:
    """A model server or a group of equal ones."""

    name: str
    type: ProviderType
    endpoints: tuple[Endpoint, ...]
    credential: str | None = None
    region: str | None = None
    tls: UpstreamTls = UpstreamTls()
    timeouts: UpstreamTimeouts = UpstreamTimeouts()
    pool_idle_ms: int = 4_000
    request_headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Credential:
    """Where a provider credential is read from: ``file`` (absolute path), ``systemd`` (name) or ``env`` (variable)."""

    name: str
    scheme: str
    place: str
