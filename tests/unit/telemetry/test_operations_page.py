"""docs/operations.md has the table of metrics as ascproxy.telemetry.metrics has it.

``python -m tests.unit.telemetry.test_operations_page`` writes it.
"""

from __future__ import annotations

from pathlib import Path

from ascproxy.telemetry import metrics

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
MARK = "<!-- metrics:"


def table() -> str:
    rows = ["| metric | kind | labels | is |", "|---|---|---|---|"]
    for metric in metrics.table():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        rows.append(f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.help} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    head, mark, rest = page.partition(MARK)
    return f"{head}{mark}{rest.partition(chr(10))[0]}\n\n{table()}"


def test_the_page_has_the_table_as_it_is() -> None:
    page = PAGE.read_text()
    assert MARK in page
    assert written(page) == page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
