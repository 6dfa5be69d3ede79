"""Configurations as short texts in which a marker stands where a finding must point to.

``workers: »0`` means: the file says ``workers: 0``, and there is a finding about the place of that 0.
"""

from __future__ import annotations

from pathlib import Path

from ascproxy.config.check import check
from ascproxy.config.finding import Finding
from ascproxy.config.load import load

MARK = "»"
NODE = "node: n\nlisteners: [{address: '127.0.0.1:8080'}]\n"


def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its markers, and their places: line and column from 1."""
    places = []
    while (at := text.find(MARK)) >= 0:
        before = text[:at]
        places.append((before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1))
        text = before + text[at + len(MARK) :]
    return text, places


def write(folder: Path, node: str, resources: str | None = None) -> list[tuple[str, int, int]]:
    """Both files, and the marked places of both: file, line, column."""
    marked = []
    for name, text in (("ascproxy.yaml", node), ("resources.yaml", resources)):
        if text is not None:
            clean, places = unmarked(text)
            (folder / name).write_text(clean)
            marked += [(str(folder / name), *place) for place in places]
    return marked


def findings(
    folder: Path, environ: dict[str, str] | None = None, *, starting: bool = True, secrets: bool = True
) -> list[Finding]:
    """Everything that loading and checking find."""
    sheets = load(folder)
    check(sheets, environ or {}, starting=starting, secrets=secrets)
    return sheets.findings


def places(found: list[Finding]) -> list[tuple[str, int, int]]:
    return [(f.file, f.line, f.column) for f in found]
