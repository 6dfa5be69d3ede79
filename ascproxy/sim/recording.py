"""Recorded exchanges, replayed byte for byte.

A folder holds ``NAME.response.txt`` (the exact bytes of the response) and ``NAME.timing.json`` (did the server close?).
Names may be given without their ``vllm-`` prefix. Recordings with a cut in them cannot be replayed and are not offered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import orjson

CUT_MARK = b"...[cut]..."
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
SUFFIXES = (".response.txt", ".response-tail.txt")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Recording:
    """One response: its bytes, and whether the server closed the connection behind it."""

    name: str
    response: bytes
    closed: bool


class Shelf:
    """The recordings of one folder, read when first asked for."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._read: dict[str, Recording] = {}

    def find(self, name: str) -> Recording | None:
        """The recording ``name`` or ``vllm-name``; None if there is none, or none that is whole."""
        if self._folder is None or NAME.fullmatch(name) is None:
            return None
        if name not in self._read:
            found = self._load(self._folder, name) or self._load(self._folder, f"vllm-{name}")
            if found is None:
                return None
            self._read[name] = found
        return self._read[name]

    def names(self) -> list[str]:
        """Every recording that can be replayed, in order."""
        if self._folder is None:
            return []
        stems = sorted({path.name.partition(".")[0] for path in self._folder.glob("*.response*.txt")})
        return [stem for stem in stems if self.find(stem) is not None]

    @staticmethod
    def _load(folder: Path, name: str) -> Recording | None:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if not path.is_file():
                continue
            response = path.read_bytes()
            if CUT_MARK in response or not response.startswith(b"HTTP/1.1 "):
                return None
            timing = folder / f"{name}.timing.json"
            facts = orjson.loads(timing.read_bytes()) if timing.is_file() else {}
            closed = facts.get("server_closed") is True or facts.get("end") == "FIN"
            return Recording(name, response, closed)
        return None
