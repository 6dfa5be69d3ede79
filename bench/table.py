"""From samples to the table: medians, ratios, and a word about each figure that should not be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from bench.lines import INTERVAL_MS, LINES, STREAMS, Sample

REFERENCES = ("nginx", "haproxy")
FULL = 0.9  # below this share of its core a subject under a closed loop was not saturated


def of(samples: Iterable[Sample], line: str, subject: str) -> list[Sample]:
    """The samples of one cell."""
    return [s for s in samples if s.line == line and s.subject == subject]


def cost_us(samples: Iterable[Sample], line: str, subject: str) -> float | None:
    """Median CPU microseconds per unit; None without one."""
    values = [s.cpu_us for s in of(samples, line, subject) if s.cpu_us is not None]
    return median(values) if values else None


def added_us(samples: list[Sample], subject: str, percentile: str) -> float | None:
    """Median over rounds of what the subject adds to the bare latency of the same round."""
    bare = {s.round: s.latency_us[percentile] for s in of(samples, "latency", "bare")}
    values = [s.latency_us[percentile] - bare[s.round] for s in of(samples, "latency", subject) if s.round in bare]
    return median(values) if values else None


def memory_mib(samples: Iterable[Sample], subject: str) -> tuple[float, float, float, float] | None:
    """Medians in MiB: RSS idle and loaded, PSS idle and loaded."""
    pairs = [(s.idle, s.loaded) for s in of(samples, "memory", subject)]
    kept = [(i, j) for i, j in pairs if i is not None and j is not None]
    if not kept:
        return None
    columns = zip(*((i.rss_kib, j.rss_kib, i.pss_kib, j.pss_kib) for i, j in kept), strict=True)
    a, b, c, d = (median(column) / 1024 for column in columns)
    return a, b, c, d


def aligned(rows: list[list[str]]) -> str:
    """Rows as a Markdown table: the first is the head, the first column is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def summary(samples: list[Sample], lines: list[str], subjects: list[str]) -> str:
    """One row a subject: CPU microseconds per request or event, and the columns that are not CPU."""
    head = ["CPU us"]
    for line in lines:
        head += {
            "W1": ["W1", "W1 /s"],
            "latency": ["added p50/p99 us"],
            "memory": ["RSS MB idle/+500", "PSS MB idle/+500"],
        }.get(line, [line])
    rows = [head]
    for subject in subjects:
        row = [subject]
        for line in lines:
            row += _cells(samples, line, subject)
        rows.append(row)
    return aligned(rows)


def _cells(samples: list[Sample], line: str, subject: str) -> list[str]:
    if line == "latency":
        p50, p99 = added_us(samples, subject, "p50"), added_us(samples, subject, "p99")
        return ["-" if p50 is None or p99 is None or subject == "bare" else f"{p50:.0f}/{p99:.0f}"]
    if line == "memory":
        mib = memory_mib(samples, subject)
        return ["-", "-"] if mib is None else [f"{mib[0]:.0f}/{mib[1]:.0f}", f"{mib[2]:.0f}/{mib[3]:.0f}"]
    cost = cost_us(samples, line, subject)
    cell = "-" if cost is None else f"{cost:.1f}"
    if line == "W1":
        rates = [s.per_second for s in of(samples, line, subject)]
        return [cell, f"{median(rates):,.0f}" if rates else "-"]
    return [cell]


def ratios(samples: list[Sample], lines: list[str], subjects: list[str]) -> str:
    """Each subject's median over each reference's, per line that is CPU: what carries over to another machine."""
    counted = [line for line in lines if line not in ("latency", "memory")]
    rows = [["ratio of medians", *counted]]
    for subject in subjects:
        for reference in REFERENCES:
            if subject in (reference, "bare") or reference not in subjects:
                continue
            row = [f"{subject} / {reference}"]
            for line in counted:
                cost, base = cost_us(samples, line, subject), cost_us(samples, line, reference)
                row.append("-" if cost is None or not base else f"{cost / base:.2f}")
            rows.append(row)
    return aligned(rows) if len(rows) > 1 and counted else ""


def detail(samples: list[Sample], lines: list[str], subjects: list[str]) -> str:
    """Every cell with its spread, how busy the subject was, and what the ends of the measurement cost.

    p50 and p99 are of the whole answer, for streams of the gap between two events.
    """
    rows = [
        [
            "line, subject",
            "CPU us",
            "min",
            "max",
            "per second",
            "busy",
            "stub us",
            "load us",
            "p50 us",
            "p99 us",
            "errors",
        ]
    ]
    for line in lines:
        for subject in subjects:
            cell = of(samples, line, subject)
            if not cell:
                continue
            costs = [s.cpu_us for s in cell if s.cpu_us is not None]
            busy = [s.busy for s in cell if s.busy is not None]
            rows.append(
                [
                    f"{line} {subject}",
                    *([f"{f(costs):.1f}" for f in (median, min, max)] if costs else ["-"] * 3),
                    f"{median(s.per_second for s in cell):,.0f}",
                    f"{median(busy):.0%}" if busy else "-",
                    f"{median(s.stub_us for s in cell):.1f}",
                    f"{median(s.load_us for s in cell):.1f}",
                    *(f"{median(s.latency_us[p] for s in cell):.0f}" for p in ("p50", "p99")),
                    str(sum(s.errors for s in cell)),
                ]
            )
    return aligned(rows)


def doubts(samples: list[Sample]) -> list[str]:
    """Sentences about samples that do not mean what their column says."""
    found = []
    for s in samples:
        where = f"{s.line} {s.subject}, round {s.round}"
        line = LINES[s.line]
        if s.errors:
            found.append(f"{where}: {s.errors} errors; the first: {s.first_error}")
        if s.units == 0:
            found.append(f"{where}: nothing was answered")
        if line.saturates and s.busy is not None and s.busy < FULL:
            found.append(f"{where}: only {s.busy:.0%} of its core was used; requests per second are not its limit")
        if line.unit == "events":
            share = s.per_second / (STREAMS * 1000 / INTERVAL_MS)
            if share < 0.98:
                found.append(f"{where}: only {share:.0%} of the events that were due came")
            if s.latency_us["p99"] > 3000 * INTERVAL_MS:
                found.append(
                    f"{where}: events came gathered or late, up to {s.latency_us['p99'] / 1000:.0f} ms apart (p99)"
                )
        if s.stub_late > s.units / 100:
            found.append(f"{where}: {s.stub_late} events of the stub were late or skipped")
    return found
