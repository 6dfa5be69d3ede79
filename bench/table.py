"""From samples to the table: medians, ratios, and a word about each figure that should not be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from bench.gateway import CALLERS
from bench.lines import LINES, STREAMS, Kind, Sample, Start
from bench.noise import FOREIGN_MAX, STEAL_MAX

REFERENCES = ("nginx", "haproxy")
FULL = 0.9  # below this share of its core a subject under a closed loop was not saturated


def of(samples: Iterable[Sample], line: str, subject: str, size: int | None = None) -> list[Sample]:
    """The samples of one cell."""
    return [s for s in samples if s.line == line and s.subject == subject and s.size == size]


def cost_us(
    samples: Iterable[Sample],
    line: str,
    subject: str,
    size: int | None = None,
    which: Callable[[list[float]], float] = median,
) -> float | None:
    """CPU microseconds per unit, the median of all windows unless another is asked for; None without one."""
    values = [s.cpu_us for s in of(samples, line, subject, size) if s.cpu_us is not None]
    return which(values) if values else None


def paired(samples: Iterable[Sample], line: str, subject: str, reference: str) -> float | None:
    """Median of the ratios of two windows that followed each other: what changes slowly on the machine met both."""
    bases = {(s.round, s.window): s.cpu_us for s in of(samples, line, reference)}
    found = []
    for s in of(samples, line, subject):
        base = bases.get((s.round, s.window))
        if s.cpu_us is not None and base:
            found.append(s.cpu_us / base)
    return median(found) if found else None


def added_us(samples: list[Sample], subject: str, percentile: str) -> float | None:
    """Median of what the subject adds to the bare latency of the window beside."""
    bare = {(s.round, s.window): s.latency_us[percentile] for s in of(samples, "latency", "bare")}
    values = [
        s.latency_us[percentile] - bare[s.round, s.window]
        for s in of(samples, "latency", subject)
        if (s.round, s.window) in bare
    ]
    return median(values) if values else None


def memory_mib(samples: Iterable[Sample], subject: str) -> dict[str, tuple[float, float]] | None:
    """Medians in MiB, idle and loaded: RSS and PSS of the tree, RSS and PSS of its workers (each, on average)."""
    kept = [
        (s.idle, s.loaded, s.worker_idle, s.worker_loaded)
        for s in of(samples, "memory", subject)
        if s.idle and s.loaded and s.worker_idle and s.worker_loaded
    ]
    if not kept:
        return None

    def pair(first: int, field: str, *, each: bool = False) -> tuple[float, float]:
        columns = zip(
            *(
                [getattr(m, field) / (max(1, m.processes) if each else 1) for m in row[first : first + 2]]
                for row in kept
            ),
            strict=True,
        )
        idle, loaded = (median(column) / 1024 for column in columns)
        return idle, loaded

    return {
        "rss": pair(0, "rss_kib"),
        "pss": pair(0, "pss_kib"),
        "worker_rss": pair(2, "rss_kib", each=True),
        "worker_pss": pair(2, "pss_kib", each=True),
    }


def stream_bytes(sample: Sample) -> float | None:
    """What the workers hold for each open stream: what they grew by, over the streams. In the process only; the kernel
    has its own."""
    if sample.worker_idle is None or sample.worker_loaded is None or not sample.connections:
        return None
    return (sample.worker_loaded.rss_kib - sample.worker_idle.rss_kib) * 1024 / sample.connections


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


def counted(lines: list[str]) -> list[str]:
    """Those that are CPU and have a column for each subject."""
    return [line for line in lines if LINES[line].kind is Kind.CPU and line != "latency"]


def summary(samples: list[Sample], lines: list[str], subjects: list[str]) -> str:
    """One row a subject: CPU microseconds per request or event, and the columns that are not CPU."""
    shown = [line for line in lines if line in (*counted(lines), "latency", "memory")]
    if not shown:
        return ""
    head = ["CPU us"]
    for line in shown:
        head += {
            "W1": ["W1", "W1 /s"],
            "latency": ["added p50/p99 us"],
            "memory": [f"RSS MB idle/+{STREAMS}", "PSS MB", "worker RSS MB", "worker PSS MB"],
        }.get(line, [line])
    rows = [head]
    for subject in subjects:
        row = [subject]
        for line in shown:
            row += _cells(samples, line, subject)
        rows.append(row)
    return aligned(rows)


def _cells(samples: list[Sample], line: str, subject: str) -> list[str]:
    if line == "latency":
        p50, p99 = added_us(samples, subject, "p50"), added_us(samples, subject, "p99")
        return ["-" if p50 is None or p99 is None or subject == "bare" else f"{p50:.0f}/{p99:.0f}"]
    if line == "memory":
        mib = memory_mib(samples, subject)
        return ["-"] * 4 if mib is None else [f"{idle:.0f}/{loaded:.0f}" for idle, loaded in mib.values()]
    cost = cost_us(samples, line, subject)
    cell = "-" if cost is None else f"{cost:.1f}"
    if line == "W1":
        rates = [s.per_second for s in of(samples, line, subject)]
        return [cell, f"{median(rates):,.0f}" if rates else "-"]
    return [cell]


def ratios(samples: list[Sample], lines: list[str], subjects: list[str]) -> str:
    """Each subject over each reference, per line that is CPU: what carries over to another machine. The contract is the
    ratio of medians; the ratio of the least costs (what both cost when nothing disturbed them) and the median of
    paired ratios say how far it can be trusted."""
    columns = counted(lines)
    rows = [["ratio", *columns]]
    for subject in subjects:
        for reference in REFERENCES:
            if subject in (reference, "bare") or reference not in subjects:
                continue
            for name, which in (("medians", median), ("minima", min)):
                row = [f"{subject} / {reference}, {name}"]
                for line in columns:
                    cost = cost_us(samples, line, subject, which=which)
                    base = cost_us(samples, line, reference, which=which)
                    row.append("-" if cost is None or not base else f"{cost / base:.2f}")
                rows.append(row)
            pairs = [paired(samples, line, subject, reference) for line in columns]
            rows.append([f"{subject} / {reference}, paired", *("-" if p is None else f"{p:.2f}" for p in pairs)])
    return aligned(rows) if len(rows) > 1 and columns else ""


def by_size(samples: list[Sample], lines: list[str]) -> str:
    """What a request costs with each number of keys, or of routes, and how far that is from the smallest."""
    rows = [["CPU us by size", "callers", "median", "min", "to the smallest", "paired"]]
    for line in lines:
        if LINES[line].kind is not Kind.SIZES:
            continue
        measured = sorted({s.size for s in samples if s.line == line and s.size is not None})
        for size in measured:
            subject = next(s.subject for s in samples if s.line == line and s.size == size)
            cost, least = (cost_us(samples, line, subject, size, which) for which in (median, min))
            base = cost_us(samples, line, subject, measured[0])
            rows.append(
                [
                    f"{line} {size:,}",
                    f"{min(size, CALLERS):,}",
                    *("-" if value is None else f"{value:.1f}" for value in (cost, least)),
                    "-" if cost is None or not base else f"{cost / base - 1:+.1%}",
                    _deviation(of(samples, line, subject, size), of(samples, line, subject, measured[0])),
                ]
            )
    return aligned(rows) if len(rows) > 1 else ""


def _deviation(these: list[Sample], smallest: list[Sample]) -> str:
    bases = {(s.round, s.window): s.cpu_us for s in smallest}
    found = [
        s.cpu_us / base for s in these if s.cpu_us is not None and (base := bases.get((s.round, s.window))) is not None
    ]
    return f"{median(found) - 1:+.1%}" if found else "-"


def streams(samples: list[Sample], lines: list[str], subjects: list[str]) -> str:
    """How many streams were held open, and what each of them takes in the workers."""
    rows = [["open streams", "streams", "worker RSS MB idle", "loaded", "bytes a stream", "errors"]]
    for line in lines:
        if LINES[line].kind is not Kind.MEMORY or line == "memory":
            continue
        for subject in subjects:
            for s in of(samples, line, subject):
                each = stream_bytes(s)
                if each is None or s.worker_idle is None or s.worker_loaded is None:
                    continue
                rows.append(
                    [
                        f"{line} {subject}",
                        f"{s.connections:,}",
                        *(f"{m.rss_kib / 1024:.0f}" for m in (s.worker_idle, s.worker_loaded)),
                        f"{each:,.0f}",
                        str(s.errors),
                    ]
                )
    return aligned(rows) if len(rows) > 1 else ""


def starts(found: list[Start]) -> str:
    """Start to ready, by the number of workers."""
    rows = [["start to ready", "median s", "min", "max"]]
    for subject, workers in sorted({(s.subject, s.workers) for s in found}):
        seconds = [s.seconds for s in found if (s.subject, s.workers) == (subject, workers)]
        rows.append([f"{subject}, {workers} workers", *(f"{f(seconds):.2f}" for f in (median, min, max))])
    return aligned(rows) if len(rows) > 1 else ""


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
            "steal",
            "foreign",
        ]
    ]
    for line in lines:
        sizes = sorted({s.size for s in samples if s.line == line and s.size is not None})
        for subject in subjects:
            for size in [None, *sizes]:
                cell = of(samples, line, subject, size)
                if cell:
                    rows.append(_detail_row(f"{line} {subject}" + (f" {size:,}" if size else ""), cell))
    return aligned(rows) if len(rows) > 1 else ""


def _detail_row(name: str, cell: list[Sample]) -> list[str]:
    costs = [s.cpu_us for s in cell if s.cpu_us is not None]
    busy = [s.busy for s in cell if s.busy is not None]
    noises = [s.noise for s in cell if s.noise is not None]
    return [
        name,
        *([f"{f(costs):.1f}" for f in (median, min, max)] if costs else ["-"] * 3),
        f"{median(s.per_second for s in cell):,.0f}",
        f"{median(busy):.0%}" if busy else "-",
        f"{median(s.stub_us for s in cell):.1f}",
        f"{median(s.load_us for s in cell):.1f}",
        *(_percentile(cell, p) for p in ("p50", "p99")),
        str(sum(s.errors for s in cell)),
        *([f"{median(n.steal for n in noises):.0%}", f"{median(n.foreign for n in noises):.0%}"] if noises else "--"),
    ]


def _percentile(cell: list[Sample], which: str) -> str:
    """A dash where the load tells none."""
    told = [s.latency_us[which] for s in cell if which in s.latency_us]
    return f"{median(told):.0f}" if told else "-"


def doubts(samples: list[Sample]) -> list[str]:
    """Sentences about cells that do not mean what their column says."""
    found = []
    disturbed = [s for s in samples if s.noise is not None and s.noise.useless]
    everywhere = len(disturbed) * 4 > len(samples)
    if everywhere:
        found.append(
            f"in {len(disturbed)} of {len(samples)} windows more than {FOREIGN_MAX:.0%} of the proxy's core went to "
            f"other processes or more than {STEAL_MAX:.0%} of it was stolen: measure again on a quiet machine"
        )
    for cell in {(s.line, s.subject, s.size): None for s in samples}:
        line, subject, size = cell
        where = f"{line} {subject}" + (f" {size:,}" if size else "")
        these = of(samples, line, subject, size)
        found += [f"{where}: {doubt}" for doubt in _doubts_of_cell(line, these)]
        busy = sum(s.noise is not None and s.noise.useless for s in these)
        if busy * 2 > len(these) and not everywhere:
            found.append(f"{where}: the machine was busy with other things in {busy} of {len(these)} windows")
    return found


def _doubts_of_cell(name: str, cell: list[Sample]) -> list[str]:
    line = LINES[name]
    found = []
    errors = sum(s.errors for s in cell)
    if errors:
        found.append(f"{errors} errors; the first: {next(s.first_error for s in cell if s.errors)}")
    silent = sum(s.units == 0 for s in cell)
    if silent:
        found.append(f"nothing was answered in {silent} of {len(cell)} windows")
    busy = [s.busy for s in cell if s.busy is not None]
    if line.saturates and busy and median(busy) < FULL:
        found.append(f"only {median(busy):.0%} of its core was used; requests per second are not its limit")
    if line.unit == "events":
        share = median(s.per_second for s in cell) / (line.connections * 1000 / line.interval_ms)
        if share < 0.98:
            found.append(f"only {share:.0%} of the events that were due came")
        p99 = median(s.latency_us["p99"] for s in cell)
        if p99 > 3000 * line.interval_ms:
            found.append(f"events came gathered or late, up to {p99 / 1000:.0f} ms apart (p99)")
    late = sum(s.stub_late for s in cell)
    if late > sum(s.units for s in cell) / 100:
        found.append(f"{late} events of the stub were late or skipped")
    return found
