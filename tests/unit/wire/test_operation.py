"""The table of operations: complete, unambiguous, and in step with the provider types and the SDKs' paths."""

from __future__ import annotations

import pytest

from ascproxy.model.provider import ProviderType
from ascproxy.wire.operation import BY_PATH, OPERATIONS, Dialect, Operation, Streams, at, dialect_of


def test_every_operation_has_one_path() -> None:
    assert set(OPERATIONS) == set(Operation)
    assert len(BY_PATH) == len(OPERATIONS)


def test_operations_are_served_by_known_provider_types_only() -> None:
    types = set(ProviderType)
    for shape in OPERATIONS.values():
        assert shape.served_by <= types, shape
        assert bool(shape.served_by) == (shape.operation is not Operation.MODELS)
    assert frozenset().union(*(shape.served_by for shape in OPERATIONS.values())) == types


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        (b"/v1/chat/completions", Operation.CHAT_COMPLETIONS),
        (b"/v1/messages/count_tokens", Operation.COUNT_TOKENS),
        (b"/generate_stream", Operation.GENERATE_STREAM),
        (b"/v1/models", Operation.MODELS),
        (b"/v1/models/a/b", Operation.MODELS),
    ],
)
def test_paths_that_exist(path: bytes, operation: Operation) -> None:
    shape = at(path)
    assert shape is not None
    assert shape.operation is operation


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"/v1",
        b"/v1/models/",
        b"/v1/chat/completions/",
        b"//v1/chat/completions",
        b"/V1/chat/completions",
        b"/v1/chat/../chat/completions",
        b"/v1/chat%2fcompletions",
        b"/metrics",
        b"/health",
        b"*",
    ],
)
def test_paths_that_do_not_exist(path: bytes) -> None:
    assert at(path) is None


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        (b"/v1/chat/completions", Dialect.OPENAI),
        (b"/v1/messages", Dialect.ANTHROPIC),
        (b"/v1/messages/count_tokens", Dialect.ANTHROPIC),
        (b"/v1/messages/batches", Dialect.ANTHROPIC),
        (b"/generate", Dialect.TGI),
        (b"/generate_stream", Dialect.TGI),
        (b"/tokenize", Dialect.OPENAI),
        (b"/nowhere", Dialect.OPENAI),
        (None, Dialect.OPENAI),
    ],
)
def test_the_dialect_of_errors_is_chosen_by_path(path: bytes | None, dialect: Dialect) -> None:
    """SEMANTICS 5: OpenAI's shape, Anthropic's on /v1/messages, TGI's on its paths."""
    assert dialect_of(path) is dialect


def test_only_generate_stream_always_streams() -> None:
    assert [s.operation for s in OPERATIONS.values() if s.streams is Streams.ALWAYS] == [Operation.GENERATE_STREAM]
