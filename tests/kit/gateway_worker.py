"""The real data path in a worker, with one key that is known without a store: :data:`CREDENTIAL`, tenant acme."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

from ascproxy.model.key import KeyRow
from ascproxy.worker.datapath import GatewayPath
from ascproxy.worker.process import Place, serve

KEY_ID = "k" * 16
SECRET = "s" * 43
CREDENTIAL = f"asc_{KEY_ID}_{SECRET}"


def look_up(key_id: str) -> KeyRow | None:
    return KeyRow(KEY_ID, "acme", hashlib.sha256(SECRET.encode()).digest()) if key_id == KEY_ID else None


def run(**given: Any) -> int:
    return serve(Place(**given), partial(GatewayPath, key_lookup=look_up))
