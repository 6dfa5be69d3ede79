"""API keys: their text, and how one is made and recognised (DESIGN D12).

``asc_<id>_<secret>``: ``id`` is public, 12 characters of ``[a-z0-9]`` in keys that are made (1 to 32 are read),
``secret`` is 32 random bytes in unpadded base64url. Only the SHA-256 of the secret's text is stored: 256 random bits
need neither salt nor stretching.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Sequence

from ascproxy.model.key import KeyRow

ID_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_LENGTH = 12
SECRET_BYTES = 32
_FORM = re.compile(rb"asc_([a-z0-9]{1,32})_([A-Za-z0-9_-]{43})")


def mint(
    tenant: str,
    *,
    models: Sequence[str] = (),
    operations: Sequence[str] = (),
    created_ms: int,
    expires_ms: int | None = None,
    random: Callable[[int], bytes],
) -> tuple[str, KeyRow]:
    """A new key: the text to hand out once, and the row to store. ``random(n)`` gives ``n`` bytes (``os.urandom``)."""
    key_id = _id(random)
    secret = base64.urlsafe_b64encode(random(SECRET_BYTES)).rstrip(b"=")
    row = KeyRow(
        id=key_id,
        tenant=tenant,
        secret_sha256=hashlib.sha256(secret).digest(),
        models=tuple(models),
        operations=tuple(operations),
        created_ms=created_ms,
        expires_ms=expires_ms,
    )
    return f"asc_{key_id}_{secret.decode()}", row


def parse(credential: bytes) -> tuple[str, bytes] | None:
    """The id and the SHA-256 of the secret, or None if this is no key's text. Nothing is looked up."""
    found = _FORM.fullmatch(credential)
    return None if found is None else (found[1].decode(), hashlib.sha256(found[2]).digest())


def matches(row: KeyRow, secret_sha256: bytes) -> bool:
    """Whether the secret is this row's, in constant time."""
    return hmac.compare_digest(row.secret_sha256, secret_sha256)


def _id(random: Callable[[int], bytes]) -> str:
    characters: list[str] = []
    usable = 256 - 256 % len(ID_CHARACTERS)  # bytes above are dropped, so that no character is more likely
    while len(characters) < ID_LENGTH:
        characters += [ID_CHARACTERS[b % len(ID_CHARACTERS)] for b in random(2 * ID_LENGTH) if b < usable]
    return "".join(characters[:ID_LENGTH])
