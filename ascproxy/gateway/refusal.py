"""The one map from error codes to answers (SEMANTICS 5), and the one place that sends them.

An answer is in the dialect of the path that was asked, so that the caller's SDK raises what it always raises. Messages
say what to do. They never hold a secret, an address of an upstream, or anything of the client's but the name of the
model it asked for, cut and escaped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ascproxy.gateway.meter import NONE, Meter
from ascproxy.wire import anthropic, openai, tgi
from ascproxy.wire.operation import Dialect, at, dialect_of

if TYPE_CHECKING:
    from ascproxy._native import Stream

NAME_MAX = 100  # characters of a model name that are shown


@dataclass(frozen=True, slots=True)
class Entry:
    """One code. ``message`` may hold ``{detail}``; ``again``: asking again unchanged can help, so that SDKs may retry
    (else ``x-should-retry: false`` tells them not to); ``after``: seconds for ``Retry-After``; ``cause`` is for the
    documentation."""

    status: int
    again: bool
    message: str
    cause: str
    after: int | None = None
    headers: bytes = b""


CATALOGUE: dict[str, Entry] = {
    "invalid_request": Entry(
        400,
        False,
        "The request cannot be served as it is: {detail}.",
        "The request breaks HTTP, has a member of the wrong type, exceeds a limit of JSON (depth, members, digits) or "
        "of chunks (extensions, trailers), is compressed, has an unknown query string, or names no model where the key "
        "has more than one route.",
    ),
    "invalid_json": Entry(
        400, False, "The request body is not a JSON object: {detail}.", "The body is empty or is not one JSON object."
    ),
    "duplicate_field": Entry(
        400,
        False,
        "The request body has a top-level member twice: send each member once.",
        "Two readers of such a body may see two different requests.",
    ),
    "two_credentials": Entry(
        400,
        False,
        "The request carries two different credentials: send Authorization or x-api-key, or the same key in both.",
        "`Authorization: Bearer` and `x-api-key` differ, or one of them is there twice.",
    ),
    "invalid_api_key": Entry(
        401,
        False,
        "The API key is missing or not valid: send a current one as Authorization: Bearer KEY or as x-api-key: KEY.",
        "No key, a malformed, unknown, expired or revoked one: the answer does not tell which.",
        headers=b"www-authenticate: Bearer\r\n",
    ),
    "model_not_allowed": Entry(
        403,
        False,
        "This API key may not use {detail}: ask for a key with that scope.",
        "The key's scope has neither the model nor the operation that was asked for.",
    ),
    "model_not_found": Entry(
        404,
        False,
        "There is no model {detail} here: GET /v1/models lists those that this API key can use.",
        "No route of the caller's tenant has that model.",
    ),
    "unknown_path": Entry(
        404,
        False,
        "Nothing is served at this path: check the base URL (it ends before /v1/...).",
        "The path is not one of an operation. Paths are compared byte for byte.",
    ),
    "operation_not_supported": Entry(
        404,
        False,
        "The model {detail} does not serve this operation: use another operation or another model.",
        "No target of the route is of a provider type that serves the operation, or the route excludes it.",
    ),
    "method_not_allowed": Entry(
        405, False, "This path is not served with that method: the Allow header says which are.", "See `Allow`."
    ),
    "request_timeout": Entry(
        408,
        True,
        "The request did not arrive in time: send it faster, or in one piece.",
        "The body stalled, came too slowly or took too long (`body_idle`, `body_min_rate`, `body_total`).",
    ),
    "body_too_large": Entry(
        413,
        False,
        "The request body is too large: {detail}.",
        "The route's `max_body`, or the bound for a body whose sender has not shown a valid key.",
    ),
    "uri_too_long": Entry(
        414, False, "The request line is too long: shorten the URL.", "The request line is over `max_request_line`."
    ),
    "headers_too_large": Entry(
        431,
        False,
        "The request headers are too large or too many: send fewer.",
        "A header field, all of them, or their number is over `max_field`, `max_head` or `max_fields`.",
    ),
    "internal_error": Entry(
        500,
        True,
        "The gateway failed at this request: quote the x-request-id to whoever runs it.",
        "A defect. The log has a traceback.",
    ),
    "upstream_unreachable": Entry(
        502,
        True,
        "No model server for this model could be reached: try again, or tell whoever runs this gateway.",
        "Every target refused the connection, could not be resolved or verified, or cut it before an answer. The log "
        "has the address and the reason.",
        after=1,
    ),
    "upstream_malformed": Entry(
        502,
        True,
        "The model server sent an answer that is not valid HTTP.",
        "The answer broke HTTP, or no address of ours was at the other end.",
    ),
    "upstream_credential": Entry(
        502,
        False,
        "The model server refused the gateway's own credential: tell whoever runs this gateway.",
        "401 or 403 from the provider. It is never passed on as if it were the caller's. Renew the provider's "
        "credential; the log names the provider.",
    ),
    "overloaded": Entry(
        503,
        True,
        "The gateway holds as much as it may: try again shortly.",
        "The bodies being collected by a worker are at `max_bodies`, its connections and requests under way (HTTP/2) "
        "are twice `max_connections`, or the memory of the service is at 92 % of `memory_limit`.",
        after=1,
    ),
    "draining": Entry(
        503,
        True,
        "The gateway is stopping and could not wait for this answer any longer: ask again.",
        "A stop waited for `drain_unary` or `drain_stream`, and nothing of the answer had come by then. It is "
        "not known whether the model server does the work.",
        after=1,
    ),
    "upstream_timeout": Entry(
        504,
        True,
        "The model server did not answer in time. It may have done the work.",
        "`first_byte`, or the deadline over all attempts (`total`), passed. It is not known whether the server served "
        "the request, so it was not sent again.",
    ),
    "version_not_supported": Entry(
        505, False, "This version of HTTP is not served: use HTTP/1.1.", "HTTP/1.0 and HTTP/1.1 are served."
    ),
}

_ERROR = {Dialect.OPENAI: openai.error, Dialect.ANTHROPIC: anthropic.error, Dialect.TGI: tgi.error}


def shown(name: bytes) -> str:
    """A model name as a message may show it: quoted, cut after :data:`NAME_MAX` characters, nothing but printables."""
    text = name.decode("utf-8", "replace")
    cut = text if len(text) <= NAME_MAX else text[:NAME_MAX] + "..."
    return '"' + "".join(c if c.isprintable() and c not in '"\\<>' else f"\\u{ord(c):04x}" for c in cut) + '"'


def refuse(stream: Stream, meter: Meter, code: str, *, detail: str = "", headers: bytes = b"", block: int = 0) -> None:
    """Answer with ``code``, unless the client is gone. ``detail`` completes the message; ``headers`` are further lines;
    ``block`` is the meter block that counts the answer, where the request got as far as a route. Raises KeyError for a
    code that the catalogue does not have."""
    entry = CATALOGUE[code]
    if stream.done:
        return
    meter.refused(code)
    shape = at(stream.path) if stream.path is not None else None
    if stream.attempts:
        block = 0  # its plan has a block, and counts the status when the exchange is settled
    elif not block:
        block = meter.block(stream.listener.name, NONE, NONE, NONE if shape is None else shape.operation)
    lines = [b"content-type: application/json\r\nx-ascproxy-error: ", code.encode(), b"\r\n", entry.headers, headers]
    if not entry.again:
        lines.append(b"x-should-retry: false\r\n")
    if entry.after is not None:
        lines.append(b"retry-after: %d\r\n" % entry.after)
    message = entry.message.replace("{detail}", detail)
    dialect = dialect_of(stream.path)
    if dialect is Dialect.ANTHROPIC:  # its SDKs read the id here
        lines.append(b"request-id: %b\r\n" % stream.request_id)
    body = _ERROR[dialect](entry.status, code, message, stream.request_id.decode("ascii"))
    stream.respond(entry.status, b"".join(lines), body, code=code, block=block)


def page() -> str:
    """The text of ``docs/errors.md``."""
    rows = [
        "# Errors",
        "",
        "Every error that the gateway itself answers carries `x-ascproxy-error: CODE` and comes in the shape of the",
        "path's dialect: OpenAI's, Anthropic's at `/v1/messages`, TGI's on `/generate` and `/generate_stream`. Where",
        "asking again cannot help it carries `x-should-retry: false`, which the SDKs obey. An error without",
        "`x-ascproxy-error` is the model server's own and is passed on as it was.",
        "",
        "Generated by `python -m ascproxy.gateway.refusal` from the catalogue in `ascproxy/gateway/refusal.py`.",
        "",
    ]
    for code, entry in sorted(CATALOGUE.items(), key=lambda item: (item[1].status, item[0])):
        retry = "retry may help" if entry.again else "do not retry"
        after = f", `Retry-After: {entry.after}`" if entry.after is not None else ""
        message = entry.message.replace("{detail}", "...")
        rows += [f"## {entry.status} `{code}`", "", f"{retry}{after}", "", f"> {message}", "", entry.cause, ""]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(page())
