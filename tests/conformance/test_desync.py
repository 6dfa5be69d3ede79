"""The classified requests of http-desync-guardian at the head parser: what an attack could hide in is refused.

Each expectation is the tier of the vector, except for those listed below by name with the reason.
"""

import pytest

from ascproxy import _parsers as native
from tests.kit.desync import MISSING, folder, request, vectors

CODINGS = "a transfer coding other than exactly chunked"
TARGET = "a target that is not a path of RFC 3986"
REFUSED_COMPLIANT = {
    "Correct TE OK": CODINGS,
    "Transfer-Encoding: identity and chunked OK": CODINGS,
    "Multiple transfer encoding headers in a single request OK": CODINGS,
    "TE with custom parameters OK": CODINGS,
    "Different Transfer-Encoding headers": CODINGS,
    "Different Transfer-Encoding headers combined": CODINGS,
    "Transfer-Encoding with a param: chunked;custom_param": CODINGS,
    "Compliant URL": TARGET,
    "International in URI": TARGET,
    "Empty URI": TARGET,
}
# The tier between: harmless deviations. All but these are refused, because they are not HTTP/1.x or not its grammar.
SERVED_ACCEPTABLE = {"Get with a body and Content-Length:0"}


def served(vector):
    head, body = request(vector)
    result = native.parse_request(head + body)
    return isinstance(result, dict), result


@pytest.mark.parametrize("vector", list(vectors()))
def test_vector(vector):
    accepted, result = served(vector)
    tier, name = vector["expected"]["tier"], vector["name"]
    if tier in {"Ambiguous", "Severe"}:
        assert not accepted, result
    elif tier == "Compliant":
        assert accepted == (name not in REFUSED_COMPLIANT), result
    else:
        assert tier == "Acceptable"
        assert accepted == (name in SERVED_ACCEPTABLE), result


@pytest.mark.skipif(folder() is None, reason=MISSING)
def test_every_listed_name_is_a_vector():
    names = {p.values[0]["name"] for p in vectors()}
    assert names >= REFUSED_COMPLIANT.keys() | SERVED_ACCEPTABLE


@pytest.mark.parametrize(
    "field",
    [
        b"Content_Length: 5",
        b"content--length: 5",
        b"ContentLength: 5",
        b"-content-length: 5",
        b"Transfer_Encoding: chunked",
        b"transferencoding: chunked",
        b"Transfer-Encoding_: chunked",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked;q=1",
        b"Transfer-Encoding: ",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: 0x5",
        b"Content-Length: 5 ;",
        b"Content-Length: ",
    ],
)
def test_framing_in_disguise(field):
    for version in (b"1.0", b"1.1"):
        assert isinstance(native.parse_request(b"POST / HTTP/%b\r\nHost: a\r\n%b\r\n\r\n" % (version, field)), tuple)


def test_transfer_encoding_needs_http_1_1():
    head = b"POST / HTTP/1.%d\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert isinstance(native.parse_request(head % 0), tuple)
    assert native.parse_request(head % 1)["framing"] == native.CHUNKED
