"""The simulator's request reader: each case whole, byte by byte, and with the next request behind it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascproxy.sim.request import Malformed, Reader, Request

NEXT = b"GET /next HTTP/1.1\r\nHost: b\r\n\r\n"

GOOD = {
    "no body": (b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n", ("GET", "/a", "b=c", b"")),
    "length": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", ("POST", "/a", "", b"hello")),
    "chunked": (
        b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        ("POST", "/a", "", b"abcde"),
    ),
    "trailers": (
        b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nT: v\r\n\r\n",
        ("POST", "/a", "", b"a"),
    ),
    "1.0": (b"GET / HTTP/1.0\r\n\r\n", ("GET", "/", "", b"")),
    "escaped": (b"GET /a%20b HTTP/1.1\r\nhost:x\r\n\r\n", ("GET", "/a b", "", b"")),
}

BAD = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nbad trailer\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n",
    b"G" * 70000,
]


def facts(request: Request | None) -> tuple[str, str, str, bytes]:
    assert request is not None
    return request.method, request.path, request.query, request.body


@pytest.mark.parametrize("case", GOOD)
def test_whole(case: str) -> None:
    raw, wanted = GOOD[case]
    reader = Reader()
    reader.feed(raw)
    assert facts(reader.next()) == wanted
    assert reader.next() is None and not reader.pending


@pytest.mark.parametrize("case", GOOD)
def test_byte_by_byte(case: str) -> None:
    raw, wanted = GOOD[case]
    reader = Reader()
    for at in range(len(raw) - 1):
        reader.feed(raw[at : at + 1])
        assert reader.next() is None and reader.pending
    reader.feed(raw[-1:])
    assert facts(reader.next()) == wanted


@pytest.mark.parametrize("case", GOOD)
def test_with_the_next_request_behind(case: str) -> None:
    raw, wanted = GOOD[case]
    reader = Reader()
    reader.feed(raw + NEXT)
    assert facts(reader.next()) == wanted
    assert reader.pending
    assert facts(reader.next()) == ("GET", "/next", "", b"")


@given(st.lists(st.sampled_from(sorted(GOOD)), min_size=1, max_size=4), st.data())
def test_split_anywhere(cases: list[str], data: st.DataObject) -> None:
    raw = b"".join(GOOD[case][0] for case in cases)
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=6).map(sorted))
    reader, found = Reader(), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        reader.feed(raw[start:end])
        while (request := reader.next()) is not None:
            found.append(facts(request))
    assert found == [GOOD[case][1] for case in cases]
    assert not reader.pending


@pytest.mark.parametrize("raw", BAD)
def test_malformed(raw: bytes) -> None:
    reader = Reader()
    reader.feed(raw)
    with pytest.raises(Malformed):
        reader.next()


def test_expect_is_due_once_and_only_before_the_body() -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    reader = Reader()
    reader.feed(head)
    assert reader.next() is None
    assert reader.expects() and not reader.expects()
    reader.feed(b"x" + head + b"y")
    assert facts(reader.next())[3] == b"x"
    assert facts(reader.next())[3] == b"y"
    assert not reader.expects()


@pytest.mark.parametrize(
    ("line", "keeps"),
    [(b"HTTP/1.1\r\nHost: a", True), (b"HTTP/1.1\r\nHost: a\r\nConnection: Close", False), (b"HTTP/1.0", False)],
)
def test_keep_alive(line: bytes, keeps: bool) -> None:
    reader = Reader()
    reader.feed(b"GET / " + line + b"\r\n\r\n")
    request = reader.next()
    assert request is not None and request.keep_alive is keeps


def test_head_is_kept_to_the_byte() -> None:
    reader = Reader()
    reader.feed(b"GET / HTTP/1.1\r\nHoSt:   a  \r\nX: \xe9\r\n\r\n")
    request = reader.next()
    assert request is not None
    assert request.head == b"GET / HTTP/1.1\r\nHoSt:   a  \r\nX: \xe9"
    assert request.headers == [("host", "a"), ("x", "\xe9")]
