"""Operations: the families of paths that the gateway serves, in one table.

A path that is not in :data:`OPERATIONS` does not exist on the data plane (LIMITS 2, path confusion: there is no default
route). Which provider types serve an operation is said by their wire, not by configuration: no dialect is translated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Dialect(StrEnum):
    """Whose SDK is calling: the shape of errors and lists. Chosen by path alone, so known before the body."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    TGI = "tgi"


class Scan(StrEnum):
    """What counts as usage, error, content and end in an answer: the names of the native scanners' ``SCAN_*``."""

    NONE = "none"
    OPENAI = "openai"
    MESSAGES = "messages"
    RESPONSES = "responses"
    TGI = "tgi"


class Streams(StrEnum):
    """Whether an answer is a stream of events: never, where the body says ``"stream": true``, or always."""

    NEVER = "never"
    ASKED = "asked"
    ALWAYS = "always"


class Operation(StrEnum):
    """The name of an operation: in scopes of keys, in routes, in metrics and in logs."""

    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    RESPONSES = "responses"
    MESSAGES = "messages"
    COUNT_TOKENS = "count_tokens"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    GENERATE = "generate"
    GENERATE_STREAM = "generate_stream"
    MODELS = "models"


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of the table.

    ``methods`` in the order that ``Allow`` lists them. ``served_by`` are names of provider types
    (:class:`ascproxy.model.provider.ProviderType`); empty: the gateway answers itself. ``queries`` are the query
    strings that pass to the upstream as they are, besides none at all (see ``docs/walk.md``).
    """

    operation: Operation
    methods: tuple[bytes, ...]
    path: str
    dialect: Dialect
    served_by: frozenset[str]
    streams: Streams
    scan: Scan
    queries: frozenset[bytes] = frozenset()


def _post(
    operation: Operation,
    path: str,
    served_by: str,
    scan: Scan,
    *,
    streams: Streams = Streams.NEVER,
    dialect: Dialect = Dialect.OPENAI,
    queries: frozenset[bytes] = frozenset(),
) -> Shape:
    return Shape(operation, (b"POST",), path, dialect, frozenset(served_by.split()), streams, scan, queries)


# Anthropic's SDKs mark their beta interface in the query; the header anthropic-beta says what it means.
_BETA = frozenset({b"beta=true"})

# What each type serves: vLLM 0.32.0 as recorded, TGI 3.3.6 from its source (POST /tokenize takes ``inputs`` there),
# OpenAI and Anthropic from their references. /tokenize and /detokenize are vLLM's first, hence OpenAI's error shape.
OPERATIONS: dict[Operation, Shape] = {
    shape.operation: shape
    for shape in (
        _post(
            Operation.CHAT_COMPLETIONS, "/v1/chat/completions", "vllm tgi openai", Scan.OPENAI, streams=Streams.ASKED
        ),
        _post(Operation.COMPLETIONS, "/v1/completions", "vllm tgi openai", Scan.OPENAI, streams=Streams.ASKED),
        _post(Operation.EMBEDDINGS, "/v1/embeddings", "vllm openai", Scan.OPENAI),
        _post(Operation.RERANK, "/v1/rerank", "vllm", Scan.OPENAI),
        _post(Operation.RESPONSES, "/v1/responses", "vllm openai", Scan.RESPONSES, streams=Streams.ASKED),
        _post(
            Operation.MESSAGES,
            "/v1/messages",
            "vllm anthropic",
            Scan.MESSAGES,
            streams=Streams.ASKED,
            dialect=Dialect.ANTHROPIC,
            queries=_BETA,
        ),
        _post(
            Operation.COUNT_TOKENS,
            "/v1/messages/count_tokens",
            "vllm anthropic",
            Scan.NONE,
            dialect=Dialect.ANTHROPIC,
            queries=_BETA,
        ),
        _post(Operation.TOKENIZE, "/tokenize", "vllm tgi", Scan.NONE),
        _post(Operation.DETOKENIZE, "/detokenize", "vllm", Scan.NONE),
        _post(Operation.GENERATE, "/generate", "tgi", Scan.TGI, dialect=Dialect.TGI),
        _post(
            Operation.GENERATE_STREAM,
            "/generate_stream",
            "tgi",
            Scan.TGI,
            streams=Streams.ALWAYS,
            dialect=Dialect.TGI,
        ),
        Shape(
            Operation.MODELS,
            (b"GET", b"HEAD"),
            "/v1/models",
            Dialect.OPENAI,
            frozenset(),
            Streams.NEVER,
            Scan.NONE,
        ),
    )
}

# Keyed as the native core hands out paths. "/v1/models/{id}" is the one path with a variable part.
BY_PATH: dict[bytes, Shape] = {shape.path.encode(): shape for shape in OPERATIONS.values()}
MODEL_PREFIX = b"/v1/models/"


def at(path: bytes) -> Shape | None:
    """The operation at ``path`` (without its query), or None where there is nothing."""
    shape = BY_PATH.get(path)
    if shape is None and path.startswith(MODEL_PREFIX) and len(path) > len(MODEL_PREFIX):
        return OPERATIONS[Operation.MODELS]
    return shape


def dialect_of(path: bytes | None) -> Dialect:
    """The dialect in which to answer a request for ``path``, which may be unknown or unparsable: OpenAI's then."""
    shape = at(path) if path is not None else None
    if shape is not None:
        return shape.dialect
    # A mistyped path below /v1/messages still comes from an Anthropic SDK.
    return Dialect.ANTHROPIC if path is not None and path.startswith(b"/v1/messages/") else Dialect.OPENAI
