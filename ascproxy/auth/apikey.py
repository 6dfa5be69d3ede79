"""API keys: ``asc_<id>_<secret>`` (DESIGN D12).

``id`` is public: 1 to 32 of ``[a-z0-9]``. The secret is 32 random bytes in unpadded base64url, 43 characters; the store
has the SHA-256 of these characters and nothing else of it. 256 random bits need neither salt nor stretching.
"""

from __future__ import annotations

import hashlib
import hmac
import re

from ascproxy.model.key import KeyRow

_KEY = re.compile(rb"asc_([a-z0-9]{1,32})_([A-Za-z0-9_-]{43})")


def parse(credential: bytes) -> tuple[str, bytes] | None:
    """The id and the SHA-256 of the secret part, or None for what is not an API key."""
    found = _KEY.fullmatch(credential)
    return None if found is None else (found[1].decode("ascii"), hashlib.sha256(found[2]).digest())


def matches(row: KeyRow, secret_sha256: bytes) -> bool:
    """Whether that secret is the row's; takes the same time whatever differs."""
    return hmac.compare_digest(row.secret_sha256, secret_sha256)
