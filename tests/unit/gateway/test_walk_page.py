"""docs/walk.md names code that exists."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs/walk.md"


def test_links_lead_to_files_that_hold_the_name() -> None:
    links = re.findall(r"\[`?([\w.]+)`?\]\(([^)]+)\)", PAGE.read_text())
    assert len(links) > 10
    for name, target in links:
        path = PAGE.parent / target
        assert path.is_file(), target
        if target.endswith(".py"):
            last = name.split(".")[-1]
            assert last == path.stem or re.search(rf"^\s*(class|def) {last}\b", path.read_text(), re.M), (name, target)
