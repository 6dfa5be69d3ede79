"""Model servers that break HTTP on purpose: nothing of it reaches a caller, and no answer reaches the wrong one.

LIMITS 2, "malicious upstream". The failures of an honest server are in ``tests/process/test_upstreams.py``.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.kit.service import Service, wait_for
from tests.kit.witness import BODY, GOOD, Witness

PLAIN = b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
IDLE = re.compile(r'^ascproxy_upstream_connections\{.*state="idle".*\} (\S+)$', re.MULTILINE)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
TYPE = b"Content-Type: application/json\r\n"


def ok(rest: bytes, line: bytes = b"HTTP/1.1 200 OK\r\n") -> bytes:
    return line + TYPE + rest


# The head cannot be believed: 502, and none of it is shown.
BAD_HEADS = {
    "two lengths": ok(b"Content-Length: 3\r\n" + PLAIN),
    "two equal lengths": ok(b"Content-Length: %d\r\n" % len(BODY) + PLAIN),
    "a list of lengths": ok(b"Content-Length: 3, 3\r\n\r\nabc"),
    "a signed length": ok(b"Content-Length: +3\r\n\r\nabc"),
    "a negative length": ok(b"Content-Length: -3\r\n\r\nabc"),
    "a length over 64 bits": ok(b"Content-Length: 18446744073709551619\r\n\r\nabc"),
    "a length and a coding": ok(CHUNKED + PLAIN),
    "a coding and a length": ok(b"Content-Length: 4\r\n" + CHUNKED + b"\r\n" + CHUNKS),
    "another coding": ok(b"Transfer-Encoding: gzip\r\n\r\n" + CHUNKS),
    "two codings": ok(b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS),
    "chunked twice": ok(CHUNKED + CHUNKED + b"\r\n" + CHUNKS),
    "a coding in disguise": ok(b"Transfer_Encoding: chunked\r\n\r\n" + CHUNKS),
    "a coding in HTTP/1.0": ok(CHUNKED + b"\r\n" + CHUNKS, b"HTTP/1.0 200 OK\r\n"),
    "a folded field": ok(b"X-Request-Id: a\r\n b\r\n" + PLAIN),
    "a space before the colon": ok(b"Retry-After : 1\r\n" + PLAIN),
    "no colon": ok(b"Retry-After\r\n" + PLAIN),
    "no name": ok(b": 1\r\n" + PLAIN),
    "NUL in a value": ok(b"Retry-After: 1\x00\r\n" + PLAIN),
    "a carriage return in a value": ok(b"Retry-After: 1\rSet-Cookie: a=b\r\n" + PLAIN),
    "bare line feeds": ok(PLAIN).replace(b"\r\n", b"\n"),
    "a bare line feed": ok(b"Retry-After: 1\nSet-Cookie: a=b\r\n" + PLAIN),
    "no version": ok(PLAIN, b"200 OK\r\n"),
    "another version": ok(PLAIN, b"HTTP/2 200 OK\r\n"),
    "lower case": ok(PLAIN, b"http/1.1 200 OK\r\n"),
    "ICY": ok(PLAIN, b"ICY 200 OK\r\n"),
    "two digits": ok(PLAIN, b"HTTP/1.1 20 OK\r\n"),
    "four digits": ok(PLAIN, b"HTTP/1.1 2000 OK\r\n"),
    "letters": ok(PLAIN, b"HTTP/1.1 2OO OK\r\n"),
    "status 099": ok(PLAIN, b"HTTP/1.1 099 OK\r\n"),
    "NUL in the reason": ok(PLAIN, b"HTTP/1.1 200 O\x00K\r\n"),
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    "informational for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + GOOD,
    "a line without end": b"HTTP/1.1 200 " + b"O" * 100_000,
    "a head without end": ok(b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1000) for n in range(200))),
    "too many fields": ok(b"".join(b"X-%d: x\r\n" % n for n in range(400)) + PLAIN),
    "TLS": bytes.fromhex("15030300020228") + bytes(40) + b"\r\n\r\n",
    "nothing like it": b"\x00\x01\x02\r\n\r\n",
}
# The head is good and on its way, then the body breaks: what the caller gets is visibly incomplete.
BAD_BODIES = {
    "a size that is none": b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a size with a sign": b"+%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
    "a size over 64 bits": b"10000000000000001\r\n" + BODY,
    "a bare line feed behind the size": b"%x\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
    "no line end behind the data": b"%x\r\n%b0\r\n\r\n" % (len(BODY), BODY),
    "extensions without end": b"%x;a=%b\r\n%b\r\n0\r\n\r\n" % (len(BODY), b"b" * 5000, BODY),
    "trailers without end": CHUNKS[:-2] + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1000) for n in range(50)) + b"\r\n",
    "a trailer that is none": CHUNKS[:-2] + b"nonsense\r\n\r\n",
}


class Place:
    def __init__(self, service: Service, witness: Witness) -> None:
        self.service, self.witness = service, witness
        self.client = http.client.HTTPConnection("127.0.0.1", service.http_port, timeout=10)

    def ask(self) -> tuple[int, dict[str, str], bytes]:
        headers = {"authorization": f"Bearer {self.service.key}"}
        self.client.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": []}), headers)
        answer = self.client.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def good(self) -> None:
        self.witness.answer = GOOD
        status, _, body = self.ask()
        assert (status, body) == (200, BODY)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        witness = stack.enter_context(Witness())
        folder = tmp_path_factory.mktemp("hostile") / "d"
        yield Place(stack.enter_context(Service(folder, upstream=witness.url, models=["m"], node=short)), witness)


@pytest.fixture
def place(running: Place) -> Place:
    running.client.close()  # whatever a failed test left
    return running


def short(document: dict[str, Any]) -> None:
    document["limits"] = {"drain_unary": "1s"}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_head_that_cannot_be_believed(place: Place, name: str) -> None:
    place.good()
    before = place.witness.connections
    place.witness.answer = BAD_HEADS[name]
    status, fields, body = place.ask()
    assert (status, fields["x-ascproxy-error"]) == (502, "upstream_malformed")
    assert "set-cookie" not in fields
    assert BODY not in body
    place.good()  # on the same connection of the client, over another one to the server
    assert place.witness.connections == before + 1


# Nothing of a body came before what is wrong with it: the head was not passed on either.
BAD_AT_ONCE = [
    "a size that is none",
    "a size with a sign",
    "a size over 64 bits",
    "a bare line feed behind the size",
    "extensions without end",
]


@pytest.mark.parametrize("name", BAD_AT_ONCE)
def test_a_body_that_is_bad_from_the_start(place: Place, name: str) -> None:
    place.good()
    before = place.witness.connections
    place.witness.answer = ok(CHUNKED + b"\r\n" + BAD_BODIES[name])
    status, fields, _ = place.ask()
    assert (status, fields["x-ascproxy-error"]) == (502, "upstream_malformed")
    place.good()
    assert place.witness.connections == before + 1


@pytest.mark.parametrize("name", sorted(BAD_BODIES.keys() - set(BAD_AT_ONCE)))
def test_a_body_that_breaks(place: Place, name: str) -> None:
    place.good()
    before = place.witness.connections
    place.witness.answer = ok(CHUNKED + b"\r\n" + BAD_BODIES[name])
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        place.ask()
    place.client.close()
    place.good()
    assert place.witness.connections == before + 1


@pytest.mark.parametrize(
    "behind", [GOOD, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison", b"x", b"\r\n", b"0\r\n\r\n"]
)
def test_an_answer_behind_an_answer_is_nobodys(place: Place, behind: bytes) -> None:
    place.good()
    before = place.witness.connections
    place.witness.answer = GOOD + behind
    assert place.ask()[2] == BODY
    place.good()
    assert place.witness.connections == before + 1


def test_an_answer_to_nothing_is_nobodys(place: Place) -> None:
    """Said while the connection waits in the pool, so that it would be the next caller's."""
    place.good()
    before = place.witness.connections
    wait_for(lambda: waiting(place) == 1, "the connection waits")
    assert place.witness.push(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison") >= 1
    wait_for(lambda: waiting(place) == 0, "the connection is cut")
    place.good()
    assert place.witness.connections == before + 1


def waiting(place: Place) -> int:
    """Connections to the server that are in the pool."""
    return sum(int(float(value)) for value in IDLE.findall(place.service.metrics()))


@pytest.mark.parametrize(
    "line", [b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 304 Not Modified\r\n", b"HTTP/1.1 204 No Content\r\nX: y\r\n"]
)
def test_a_status_without_a_body_has_none(place: Place, line: bytes) -> None:
    """What follows all the same is not taken for the next answer, nor passed on."""
    place.good()
    place.witness.answer = line + b"Content-Length: 6\r\n\r\npoison"
    status, _, body = place.ask()
    assert (status, body) == (int(line.split()[1]), b"")
    place.good()


def test_fields_that_are_not_the_callers_business(place: Place) -> None:
    place.witness.answer = ok(
        b"Set-Cookie: a=b\r\nServer: evil\r\nAlt-Svc: h2=evil\r\nX-Ascproxy-Error: none\r\nWww-Authenticate: Basic\r\n"
        b"Strict-Transport-Security: max-age=1\r\nLocation: http://evil\r\nConnection: x-secret\r\nX-Secret: 1\r\n"
        b"Access-Control-Allow-Origin: *\r\nKeep-Alive: timeout=1\r\nTrailer: x\r\nX-Request-Id: theirs\r\n"
        b"Retry-After: 3\r\nX-Ratelimit-Remaining: 1\r\n" + PLAIN
    )
    status, fields, body = place.ask()
    assert (status, body) == (200, BODY)
    assert fields.pop("x-request-id") != ""
    fields.pop("date")
    assert fields == {
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "retry-after": "3",
        "x-ratelimit-remaining": "1",
    }
    place.good()
