"""Against h11 and httptools: what we accept, h11 accepts with the same meaning; where we are stricter is listed."""

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascproxy import _parsers as native

# What h11 accepts and we refuse, and why.
STRICTER = {
    "absolute-form target": b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk-form target": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment in the target": b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    "byte outside RFC 3986": b"GET /a|b HTTP/1.1\r\nHost: a\r\n\r\n",
    "escape that is none": b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "obs-fold": b"GET / HTTP/1.1\r\nHost: a\r\nx: a\r\n b\r\n\r\n",
    "Host that is a list": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "Host with userinfo": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "equal Content-Lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "list of equal Content-Lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 0\r\n\r\n",
    "Content-Length with Transfer-Encoding": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "Transfer-Encoding on HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "underscores in a framing name": b"POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 1\r\n\r\n",
    "unknown expectation": b"GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n",
    "GET with a body": b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
    "control byte in a value": b"GET / HTTP/1.1\r\nHost: a\r\nx: a\x01b\r\n\r\n",
}


def h11_request(head):
    """h11's Request, or None when it refuses or waits for more."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 16)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) else None


def h11_framing(request):
    """How h11 reads the body that follows."""
    fields = dict(request.headers)
    if b"transfer-encoding" in fields:
        return native.CHUNKED, 0
    return (native.LENGTH, int(fields[b"content-length"])) if b"content-length" in fields else (native.NO_BODY, 0)


class Seen:
    """What httptools reports."""

    def __init__(self):
        self.target, self.fields, self.done = b"", [], False

    def on_url(self, url):
        self.target += url

    def on_header(self, name, value):
        self.fields.append((name, value))

    def on_headers_complete(self):
        self.done = True


def httptools_request(head):
    """(parser, what it saw), or None when it refuses."""
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError:
        return None
    return (parser, seen) if seen.done else None


def same_meaning(head, ours):
    theirs = h11_request(head)
    assert theirs is not None, "h11 refuses what we accept"
    assert (theirs.method, theirs.target) == (ours["method"], ours["target"])
    assert theirs.http_version == b"1.%d" % ours["minor"]
    # h11 hands out the coding in lower case, whatever was sent (RFC 9112 7: names of codings have no case).
    fields = [(n, v.lower() if n.lower() == b"transfer-encoding" else v) for n, v, _ in ours["fields"]]
    assert list(theirs.headers.raw_items()) == fields
    assert h11_framing(theirs) == (ours["framing"], ours["content_length"])
    assert (b"close" in b",".join(v for n, v in theirs.headers if n == b"connection").lower()) <= (
        not ours["keep_alive"]
    )


def request(draw, line, fields):
    return draw(line) + b"\r\n" + b"".join(f + b"\r\n" for f in draw(fields)) + b"\r\n"


methods = st.sampled_from([b"GET ", b"POST ", b"get ", b"M-SEARCH ", b"GET  ", b" GET ", b"G\x00T ", b""])
targets = st.sampled_from(
    [b"/", b"/v1/x?y=z", b"/%41", b"/%4", b"//a", b"/a b", b"http://a/", b"*", b"/#", b"/\xc3\xa9", b""]
)
versions = st.sampled_from(
    [b" HTTP/1.1", b" HTTP/1.0", b" HTTP/1.2", b" HTTP/2.0", b" http/1.1", b"\tHTTP/1.1", b"  HTTP/1.1", b""]
)
names = st.sampled_from(
    [b"Host", b"host", b"Content-Length", b"Transfer-Encoding", b"transfer_encoding", b"Connection", b"Expect", b"X "]
)
field_values = st.sampled_from(
    [b" a", b"a:80", b" a, b", b"", b" 0", b"5 ", b" +5", b" 5, 5", b" chunked", b"\tCHUNKED\t", b" gzip, chunked"]
) | st.sampled_from(
    [b" close", b" keep-alive, x", b" 100-continue", b" \xe9", b" a\x00", b" a\rb", b" a\nb", b" a\r\n b", b" [::1]:8"]
)
# Mostly what may be accepted, so that acceptance is reached often.
line = st.builds(lambda m, t, v: m + t + v, methods, targets, versions) | st.sampled_from(
    [b"POST / HTTP/1.1", b"POST /a?%20 HTTP/1.0", b"get /~(x) HTTP/1.1"]
)
fields = st.lists(st.builds(lambda n, v: n + b":" + v, names, field_values), max_size=4)


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_what_we_accept_means_the_same_to_h11(data):
    head = request(data.draw, line, st.builds(lambda more: [b"Host: a", *more], fields) | fields)
    ours = native.parse_request(head)
    if isinstance(ours, dict) and ours["head_len"] == len(head):
        same_meaning(head, ours)


plain = st.sampled_from(
    [b"Host: a", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Connection: close", b"x: \xe9 y"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"GET /a?b HTTP/1.1", b"POST / HTTP/1.0", b"PUT /%20 HTTP/1.1"]),
    st.lists(plain, unique=True, max_size=4),
)
def test_httptools_agrees_on_what_we_accept(first, others):
    head = first + b"\r\nHost: a\r\n" + b"".join(f + b"\r\n" for f in others) + b"\r\n"
    ours = native.parse_request(head)
    if not isinstance(ours, dict):
        return
    parser, seen = httptools_request(head)
    assert (parser.get_method(), seen.target) == (ours["method"], ours["target"])
    assert parser.get_http_version() == f"1.{ours['minor']}"
    assert seen.fields == [(name, value) for name, value, _ in ours["fields"]]


@pytest.mark.parametrize("name", STRICTER)
def test_where_we_are_stricter(name):
    assert isinstance(native.parse_request(STRICTER[name]), tuple)
    assert h11_request(STRICTER[name]) or httptools_request(STRICTER[name])


def test_responses_mean_the_same_to_h11():
    for status, more in [
        (200, b"content-length: 5\r\n"),
        (200, b"transfer-encoding: chunked\r\n"),
        (200, b""),
        (204, b""),
        (404, b"Connection: close\r\n"),
    ]:
        head = b"HTTP/1.1 %d Some Reason\r\n%b\r\n" % (status, more)
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
        connection.receive_data(head)
        theirs, ours = connection.next_event(), native.parse_response(head)
        assert theirs.status_code == ours["status"]
        # h11 hands out the coding in lower case, whatever was sent (RFC 9112 7: names of codings have no case).
    fields = [(n, v.lower() if n.lower() == b"transfer-encoding" else v) for n, v, _ in ours["fields"]]
    assert list(theirs.headers.raw_items()) == fields


def test_chunked_bodies_decode_as_in_h11():
    body = b"5;x=y\r\nhello\r\n0a\r\n0123456789\r\n0\r\ntrailer: 1\r\n\r\n"
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    data = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        data += bytes(event.data) if isinstance(event, h11.Data) else b""
    assert native.chunk_decode([body])[:2] == (native.CHUNK_END, data)
