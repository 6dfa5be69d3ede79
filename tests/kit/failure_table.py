"""What a client sees of every failure of a model server, as one table; and the page of it, ``docs/failures.md``.

``tests/process/test_upstreams.py`` holds the gateway to each cell. After a change here: ``python -m
tests.kit.failure_table``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from tests.kit.failures import CHAT, COMPLETIONS, DIALECTS, MESSAGES, RESPONSES, TGI, Dialect

PAGE = Path(__file__).parents[2] / "docs" / "failures.md"


class Moment(StrEnum):
    """When a server fails: in an answer that is no stream, in a stream before its first content, or after it."""

    UNARY = "unary"
    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True)
class Seen:
    """What a client gets. ``code`` is ours, "" when the answer is the server's own; ``whole`` as framing says.

    ``error``: the code of the event of ours that ends a stream, "theirs" where the server's own ends it.
    ``asked``: how often the server saw the request, where a connection to it waits; ``kept``: that connection is used
    again. ``next``: the next target answers, where there is one; ``anyway``: the same with ``retry_ambiguous``.
    """

    status: int = 200
    code: str = ""
    error: str = ""
    whole: bool = True
    asked: int = 1
    kept: bool = False
    next: bool = False
    anyway: bool = False


def _definite(status: int, code: str = "", error: str = "", *, asked: int = 1, kept: bool = True) -> Seen:
    return Seen(status, code, error, asked=asked, kept=kept, next=True, anyway=True)


GOOD = Seen(kept=True)
GOOD_ONCE = Seen()  # the answer is whole, the connection is not trusted any more
CUT = Seen(whole=False)
TRUNCATED = Seen(error="truncated")
FELL_SILENT = Seen(error="upstream_timeout")
ABORTED = Seen(error="upstream_aborted", kept=True)
THEIRS = Seen(error="theirs", kept=True)
NOT_CONNECTED = _definite(502, "upstream_unreachable", asked=0)  # what waits elsewhere is not touched
LIMITED = _definite(429)
BUSY = _definite(503)
ERROR = _definite(500)
CREDENTIAL = _definite(502, "upstream_credential", kept=False)
ERROR_EVENT = _definite(200, error="theirs")
BROKEN_OFF = Seen(502, "upstream_unreachable", anyway=True)
# A connection that had waited and was closed before a byte came back: once more on a new one, but never elsewhere.
CLOSED = replace(BROKEN_OFF, asked=2)
TIMEOUT = Seen(504, "upstream_timeout", anyway=True)
MALFORMED = Seen(502, "upstream_malformed")


@dataclass(frozen=True)
class Failure:
    """One row. ``ways`` are failures of the simulator, ``{n}`` in them the moment's number: of events in a stream, of
    ``bytes`` in a body. ``at`` is the provider, see ``Place.resources``. A cell that is None cannot happen. ``but`` is
    what differs in a dialect."""

    title: str
    ways: tuple[str, ...]
    unary: Seen | None
    before: Seen | None
    after: Seen | None = None
    at: str = "first"
    bytes: int = 3
    but: dict[tuple[Dialect, Moment], Seen | None] = field(default_factory=dict)

    def seen(self, dialect: Dialect, moment: Moment) -> Seen | None:
        """The cell."""
        if (dialect, moment) in self.but:
            return self.but[dialect, moment]
        seen: Seen | None = getattr(self, moment)
        if seen is not None and seen.error not in ("", "theirs") and not dialect.tells:
            return replace(seen, error="", whole=False)  # no event of ours in this dialect: framing must say it
        return seen

    def orders(self, dialect: Dialect, moment: Moment) -> list[str]:
        """What the simulator is told, behind the model's name: one for each way in which this can happen."""
        n = {Moment.UNARY: self.bytes, Moment.BEFORE: dialect.before, Moment.AFTER: dialect.after}[moment]
        ways = [way for way in self.ways if way != "reset:{n}" or n]  # reset:0 is the row "closes without an answer"
        return [way and "!" + way.format(n=n) for way in ways]


FAILURES = (
    Failure("refuses connections", ("",), NOT_CONNECTED, NOT_CONNECTED, at="refuse"),
    Failure("shows a certificate that cannot be verified", ("",), NOT_CONNECTED, NOT_CONNECTED, at="tls"),
    Failure("closes without an answer", ("reset",), CLOSED, CLOSED),
    Failure("is slow, but answers within `first_byte`", ("slow-first-byte:0.1",), GOOD, GOOD),
    Failure("does not answer within `first_byte`", ("hang",), TIMEOUT, TIMEOUT, at="hung"),
    Failure(
        "falls silent for `between_tokens`, or sends only comments",
        ("stall:{n}", "comments:{n}"),
        CUT,
        TIMEOUT,
        FELL_SILENT,
        at="stalled",
    ),
    Failure("sends a head, then nothing of a body in one piece", ("stall:0",), TIMEOUT, None, at="stalled"),
    Failure("sends a head and closes, without a body in one piece", ("truncate:0",), BROKEN_OFF, None),
    Failure("breaks off: closed or reset", ("truncate:{n}", "reset:{n}"), CUT, BROKEN_OFF, TRUNCATED),
    Failure("limits the rate: 429", ("rate-limited:7",), LIMITED, LIMITED),
    Failure(
        "is busy: 503 of vLLM, 429 of TGI",
        ("busy",),
        BUSY,
        BUSY,
        but={(TGI, Moment.UNARY): LIMITED, (TGI, Moment.BEFORE): ERROR_EVENT},
    ),
    Failure(
        "fails: 500 of vLLM, 424 of TGI",
        ("error",),
        ERROR,
        ERROR,
        but={(TGI, Moment.UNARY): _definite(424), (TGI, Moment.BEFORE): ERROR_EVENT},
    ),
    Failure("refuses our credential: 401, 403", ("unauthorized",), CREDENTIAL, CREDENTIAL),
    Failure("sends an error event in a stream of status 200", ("error-frame:{n}",), None, ERROR_EVENT, THEIRS),
    Failure(
        "gives an answer up: `finish_reason` is `abort`",
        ("abort",),
        GOOD,
        None,
        ABORTED,
        but={
            (TGI, Moment.UNARY): ERROR,
            (TGI, Moment.AFTER): THEIRS,
        },
    ),
    Failure("sends a head that is none", ("malformed",), MALFORMED, MALFORMED),
    Failure("sends a bad chunk first, for a body in one piece", ("bad-chunk:0",), MALFORMED, None),
    Failure("sends a bad chunk", ("bad-chunk:{n}",), CUT, MALFORMED, TRUNCATED, bytes=1),
    Failure("sends bytes behind its answer", ("extra-bytes", "extra-bytes:70000"), GOOD_ONCE, None, GOOD_ONCE),
    Failure("sends a few informational heads", ("1xx:3",), GOOD, GOOD),
    Failure("sends informational heads without end", ("1xx:1000",), MALFORMED, MALFORMED),
    Failure("sends 2 KB of header fields", ("headers:2000",), GOOD, GOOD),
    Failure("sends 64 KiB or 200 KB of header fields", ("headers:65536", "headers:200000"), MALFORMED, MALFORMED),
)


@dataclass(frozen=True)
class Case:
    """One cell, one way."""

    failure: Failure
    order: str
    dialect: Dialect
    moment: Moment
    seen: Seen

    @property
    def stream(self) -> bool:
        return self.moment is not Moment.UNARY

    @property
    def id(self) -> str:
        return f"{self.order[1:] or self.failure.at}-{self.dialect.name}-{self.moment}"


def cases() -> list[Case]:
    """All of them."""
    return [
        Case(failure, order, dialect, moment, seen)
        for failure in FAILURES
        for dialect in DIALECTS
        for moment in Moment
        if (seen := failure.seen(dialect, moment)) is not None
        for order in failure.orders(dialect, moment)
    ]


# ---- the page --------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# When a model server fails

<!-- made by python -m tests.kit.failure_table from the table there, which tests/process/test_upstreams.py proves -->

What a caller sees of each failure, by dialect and by moment. Every cell is a test against the simulator, and after
each of them the next request is served clean: on the caller's own connection where it was left open, and on whatever
connection to the model server is used for it.

*Unary* is an answer that is not streamed; where a server fails in the middle of one, the beginning of its body has been
passed on. *Before content*: role and lifecycle events may have come, but no text and no tool call. They are held back,
so that the caller has seen nothing yet and another target can still answer. *After content* nobody else is asked: the
failure is made visible.

| in a cell | means |
|---|---|
| whole | the answer, complete |
| 502 `code` | our answer, with `x-ascproxy-error: code`: see [errors](errors.md) |
| the server's 503 | its answer as it was, `retry-after` included |
| event `code` | the stream ends with an error event of ours, without its terminator; the connection stays open |
| the server's event | the stream ends with the server's own error event, without its terminator; the same |
| cut | HTTP framing is broken (too few bytes, or no last chunk) and the caller's connection is closed |
| **next** | where the route has another target, the caller gets that one's answer instead |
| *next if ambiguous* | the same if the route says `retry_ambiguous: true`: the server may have worked on the request |
| - | cannot happen |
"""

SECTIONS = """\
## How a stream says it

| dialect | the event, in place of the terminator | what the SDK does |
|---|---|---|
| `/v1/chat/completions`, `/v1/completions` | `data: {"error": {..., "code": CODE}}`, no `[DONE]` \
| OpenAI's raises `openai.APIError` out of the iteration, its `code` is CODE |
| `/v1/responses` | `event: response.failed`, CODE is in `response.error.code`, `sequence_number` follows on \
| OpenAI's does not raise: this event is the last one, `response.completed` never comes, and \
`get_final_response()` of `responses.stream` raises `RuntimeError` |
| `/v1/messages` | `event: error`, no `message_stop`; without a code, `error.type` is TYPES \
| Anthropic's raises `anthropic.APIStatusError` out of the iteration, `body["error"]["type"]` tells |
| `/generate_stream` | none in this dialect: the answer is cut | HTTP clients report a body that ended early |

A cut answer raises `openai.APIConnectionError` and `anthropic.APIConnectionError`. Before that the SDKs ask again by
themselves (`max_retries`), as they do after 429 and 5xx; a stream that has begun they never ask for again.

## Sent once more

A connection that had waited in the pool and is closed before a byte of the answer has most likely been closed before
the server saw the request. So it is sent once more, on a new connection to the same server, if the budget for retries
allows it (a tenth of all requests). The row "closes without an answer" is what follows when that one is closed too.
"""

PATHS = {
    CHAT: "`/v1/chat/completions`",
    COMPLETIONS: "`/v1/completions`",
    RESPONSES: "`/v1/responses`",
    MESSAGES: "`/v1/messages`",
    TGI: "TGI's `/generate`, `/generate_stream`",
}
COLUMNS = {Moment.UNARY: "unary", Moment.BEFORE: "before content", Moment.AFTER: "after content"}


def shown(seen: Seen | None) -> str:
    """A cell in words."""
    if seen is None:
        return "-"
    if seen.code:
        text = f"{seen.status} `{seen.code}`"
    elif seen.status != 200:
        text = f"the server's {seen.status}"
    elif seen.error == "theirs":
        text = "the server's event"
    elif seen.error:
        text = f"event `{seen.error}`"
    else:
        text = "whole" if seen.whole else "cut"
    return text + (", **next**" if seen.next else ", *next if ambiguous*" if seen.anyway else "")


def differences() -> list[str]:
    """A row for each cell that is another one than chat's, of dialects that say the same joined."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for dialect in DIALECTS:
        for failure in FAILURES:
            for moment in Moment:
                usual, seen = failure.seen(CHAT, moment), failure.seen(dialect, moment)
                if seen != usual:
                    words = shown(seen) if seen is not None else "not settled yet"
                    rows.setdefault((failure.title, COLUMNS[moment], words), []).append(PATHS[dialect])
    return [f"| {', '.join(paths)} | {title} | {column} | {words} |" for (title, column, words), paths in rows.items()]


def page() -> str:
    """The text of ``docs/failures.md``."""
    types = ", ".join(f"`{kind}` (`{code}`)" for code, kind in MESSAGES.tells.items())
    return (
        "\n".join(
            [
                INTRODUCTION,
                "## What is seen\n",
                "| the server | unary | before content | after content |",
                "|---|---|---|---|",
                *(f"| {f.title} | " + " | ".join(shown(f.seen(CHAT, m)) for m in Moment) + " |" for f in FAILURES),
                "\nThis holds for every dialect, but for these cells:\n",
                "| dialect | the server | moment | seen |",
                "|---|---|---|---|",
                *differences(),
                "",
                SECTIONS.replace("TYPES", types),
            ]
        ).rstrip("\n")
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
