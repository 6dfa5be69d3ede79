"""OpenAI's shapes: what its SDKs parse out of an error, and lists of models."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

# ``error.type`` by status, as the API's reference lists them; SDKs choose the exception by status.
_TYPES = {429: "rate_limit_error", 500: "server_error", 502: "server_error", 503: "server_error", 504: "server_error"}


def error(status: int, code: str, message: str, request_id: str) -> bytes:  # noqa: ARG001 (one signature for all)
    """The body of an error answer. The request id is in a header here, not in the body."""
    kind = _TYPES.get(status, "invalid_request_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def last_event(code: str, message: str) -> bytes:
    """The event of a chat or completions stream that ends with an error, in place of ``[DONE]``: SDKs raise it."""
    return b"data: %b\n\n" % error(500, code, message, "")


def last_response_event(code: str, message: str) -> bytes:
    """The same for a stream of ``/v1/responses``. A NUL stands where the number of the event goes."""
    failed = {
        "id": "",
        "object": "response",
        "status": "failed",
        "output": [],
        "error": {"code": code, "message": message},
    }
    head = b'event: response.failed\ndata: {"type":"response.failed","sequence_number":\0,"response":'
    return head + orjson.dumps(failed) + b"}\n\n"


def model(name: str) -> dict[str, object]:
    """One model. Its age is not known here: ``created`` is 0 (the field is required)."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "ascproxy"}


def model_list(names: Iterable[str]) -> dict[str, object]:
    """The answer of ``GET /v1/models``."""
    return {"object": "list", "data": [model(name) for name in names]}
