"""Heads three ways: whole, byte by byte, and with the next message behind them."""

import pytest

from ascproxy import _parsers as native

REQUEST = b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: h:1\r\nX-API-Key: k\r\nContent-Length: 7\r\nx: a\tb \r\n\r\n"
RESPONSE = b"HTTP/1.1 429 Too Many\r\nretry-after: 3\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"


def grown(parse, data, **how):
    """Parse as bytes arrive one at a time, as a connection does."""
    for n in range(1, len(data) + 1):
        result = parse(data[:n], seen=n - 1, **how)
        if result is not None:
            return result, n
    return None, len(data)


@pytest.mark.parametrize(("parse", "head"), [(native.parse_request, REQUEST), (native.parse_response, RESPONSE)])
def test_three_ways(parse, head):
    whole = parse(head)
    assert grown(parse, head) == (whole, len(head))
    assert parse(head + b"\x00\r\n\x16GET") == whole
    assert whole["head_len"] == len(head)
    for n in range(len(head)):
        assert parse(head[:n]) is None


def test_request_says():
    head = native.parse_request(REQUEST)
    assert (head["method"], head["target"], head["path"], head["query"]) == (
        b"POST",
        b"/v1/messages?beta=true",
        b"/v1/messages",
        b"beta=true",
    )
    assert [(name, value) for name, value, _ in head["fields"]] == [
        (b"Host", b"h:1"),
        (b"X-API-Key", b"k"),
        (b"Content-Length", b"7"),
        (b"x", b"a\tb"),
    ]
    assert (head["framing"], head["content_length"], head["keep_alive"]) == (native.LENGTH, 7, True)


def test_response_says():
    head = native.parse_response(RESPONSE)
    assert (head["status"], head["framing"], head["keep_alive"]) == (429, native.CHUNKED, False)
    assert native.parse_response(RESPONSE, head_request=True)["framing"] == native.NO_BODY


@pytest.mark.parametrize("status", [100, 103, 199, 204, 304])
def test_statuses_without_a_body(status):
    assert native.parse_response(b"HTTP/1.1 %d x\r\n\r\n" % status)["framing"] == native.NO_BODY


@pytest.mark.parametrize(
    ("head", "reject"),
    [
        (b"GET / HTTP/2.0\r\n", native.BAD_VERSION),
        (b"GET /" + b"a" * 10000, native.LINE_TOO_LONG),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"a" * 18000, native.FIELDS_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 100, native.FIELDS_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + (b"x: " + b"y" * 8000 + b"\r\n") * 5, native.FIELDS_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", native.UNSUPPORTED_TE),
        (b"\x16\x03\x01\x02\x00", native.BAD_REQUEST),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else str(value),
)
def test_why_it_is_refused(head, reject):
    assert native.parse_request(head)[0] == reject
    assert grown(native.parse_request, head)[0][0] == reject
