"""Embeddings and reranking: vectors and scores that depend on the text alone."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence
from math import sqrt

DIMENSIONS = 64


def embed(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """A unit vector of float32 values; equal texts have equal vectors."""
    raw = struct.unpack(f"<{dimensions}h", hashlib.shake_128(text.encode()).digest(2 * dimensions))
    norm = sqrt(sum(x * x for x in raw)) or 1.0
    return list(struct.unpack(f"<{dimensions}f", struct.pack(f"<{dimensions}f", *(x / norm for x in raw))))


def packed(vector: Sequence[float]) -> str:
    """A vector as vLLM sends it for ``encoding_format: base64``: little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def score(query: str, document: str) -> float:
    """Relevance in 0..1: the share of the query's words that the document has."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / len(words) if words else 0.0
