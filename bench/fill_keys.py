"""Fills a gateway's store with API keys, by the product's own store, many in one transaction.

    python -m bench.fill_keys gateway/state --count 1000000 --callers 1000 --out callers

The texts of `--callers` of them, spread over the whole store, go to the file `--out` (mode 0600), one a line: what the
load calls with. The service must not run meanwhile: it is the only writer of its store.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ascproxy.auth import apikey
from ascproxy.errors import AscproxyError
from ascproxy.model.key import KeyRow
from ascproxy.store.env import open_store
from ascproxy.store.keys import KeyStore

# Each batch is sorted and then touches most pages of the table once: the fewer batches, the less is written twice.
BATCH = 200_000


def fill(
    state: Path, count: int, callers: int, tenant: str, told: Callable[[int], None], *, batch: int = BATCH
) -> list[str]:
    """Adds `count` new keys of `tenant` and returns the texts of `callers` of them (all, if there are fewer). `told`
    hears how many are stored after each transaction. Ids are random, so every n-th key that is made is anywhere in
    their order. Raises AscproxyError when the store cannot be written."""
    wanted = min(callers, count)
    texts: list[str] = []
    env = open_store(state, write=True)
    try:
        keys = KeyStore(env)
        stored = 0
        now_ms = time.time_ns() // 1_000_000
        while stored < count:
            rows: list[KeyRow] = []
            for number in range(stored, min(stored + batch, count)):
                text, row = apikey.mint(tenant, created_ms=now_ms, random=os.urandom)
                rows.append(row)
                if number * wanted // count != (number + 1) * wanted // count:
                    texts.append(text)
            rows.sort(key=lambda row: row.id)
            keys.put_all(rows)
            stored += len(rows)
            told(stored)
    finally:
        env.close()
    return texts


def main(argv: list[str] | None = None) -> int:
    """0 filled, 1 the store says no, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fill_keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("state", type=Path, help="the gateway's state directory")
    parser.add_argument("--count", type=int, required=True, help="keys to add")
    parser.add_argument("--callers", type=int, default=1000, help="how many of them are written to --out (1000)")
    parser.add_argument("--tenant", default="default", help="whose keys they are (default)")
    parser.add_argument("--out", type=Path, required=True, help="file for the callers' keys")
    chosen = parser.parse_args(argv)
    if chosen.count < 1 or chosen.callers < 1:
        parser.error("--count and --callers are positive")
    begin = time.monotonic()

    def told(stored: int) -> None:
        seconds = time.monotonic() - begin
        sys.stderr.write(f"  {stored:,} of {chosen.count:,} keys, {seconds:.0f} s\n")

    try:
        texts = fill(chosen.state, chosen.count, chosen.callers, chosen.tenant, told)
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    with os.fdopen(os.open(chosen.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write("".join(f"{text}\n" for text in texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
