"""Anthropic's shapes: what its SDKs parse out of an error, and lists of models."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

# ``error.type`` by status, as the API's reference lists them.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


def error(status: int, code: str, message: str, request_id: str) -> bytes:  # noqa: ARG001 (one signature for all)
    """The body of an error answer. Anthropic has no member for a code: it is in the header ``x-ascproxy-error``."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def last_event(code: str, message: str) -> bytes:
    """The event of a messages stream that ends with an error, in place of ``message_stop``: SDKs raise it."""
    kind = {"upstream_timeout": "timeout_error", "draining": "overloaded_error"}.get(code, "api_error")
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return b"event: error\ndata: %b\n\n" % orjson.dumps(body)


def model(name: str) -> dict[str, object]:
    """One model. The reference allows an epoch value where the release date is not known."""
    return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


def model_list(names: Iterable[str]) -> dict[str, object]:
    """The answer of ``GET /v1/models`` with ``anthropic-version``: always one page."""
    data = [model(name) for name in names]
    return {
        "data": data,
        "has_more": False,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
