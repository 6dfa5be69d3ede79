"""Text Generation Inference's shape of an error: ``{"error", "error_type"}`` (TGI 3.3.6, router/src/lib.rs)."""

from __future__ import annotations

import orjson

# huggingface_hub raises by ``error_type``; the ones it knows are used where they mean the same as our code.
_TYPES = {400: "validation", 413: "validation", 429: "overloaded", 503: "overloaded"}


def error(status: int, code: str, message: str, request_id: str) -> bytes:  # noqa: ARG001 (one signature for all)
    """The body of an error answer."""
    return orjson.dumps({"error": message, "error_type": _TYPES.get(status, code)})
