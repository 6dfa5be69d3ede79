"""The classified requests of http-desync-guardian at the head parser: what an attack could hide in is refused.

The vectors name a request line and fields; ``Host`` and a body that fits are added here. Each expectation is the tier
of the vector, except for those listed below by name with the reason.
"""

import os
import pathlib

import pytest
import yaml

from ascproxy import _parsers as native

ROOT = pathlib.Path(__file__).resolve().parents[2]

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


def folder():
    """Where the vectors lie: $ASCPROXY_SHARED, or a folder named shared beside this repository or above it."""
    places = [pathlib.Path(p) for p in [os.environ.get("ASCPROXY_SHARED")] if p]
    places += [parent / "shared" for parent in ROOT.parents]
    return next((p for p in (place / "vectors/http-desync" for place in places) if p.is_dir()), None)


def vectors():
    """One parameter per vector, or one that is skipped for all to see."""
    where = folder()
    if where is None:
        yield pytest.param(None, marks=pytest.mark.skip(reason="vectors/http-desync not found; set ASCPROXY_SHARED"))
        return
    for path in sorted(where.glob("*.yaml")):
        for n, vector in enumerate(yaml.safe_load(path.read_bytes())):
            yield pytest.param(vector, id=f"{path.stem}-{n}-{vector['name'][:40]}")


def wire(text):
    """Code points below 256 are bytes in these files, others are UTF-8."""
    try:
        return str(text).encode("latin-1")
    except UnicodeEncodeError:
        return str(text).encode()


def request(vector):
    """The bytes of the head, and of a body that fits its framing."""
    fields = [(wire(h["name"]), wire(h["value"])) for h in vector["headers"] or []]
    if not any(name.strip().lower() == b"host" for name, _ in fields):
        fields.insert(0, (b"Host", b"example.com"))
    line = b" ".join(wire(vector[part]) for part in ("method", "uri", "version"))
    head = line + b"\r\n" + b"".join(b"%b:%b\r\n" % field for field in fields) + b"\r\n"
    lengths = [value.strip() for name, value in fields if name.strip().lower() == b"content-length"]
    if any(b"transfer-encoding" in name.lower() for name, _ in fields):
        return head, b"1\r\nx\r\n0\r\n\r\n"
    return head, b"x" * min(int(lengths[0]), 1 << 20) if lengths and lengths[0].isdigit() else b""


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


@pytest.mark.skipif(folder() is None, reason="vectors/http-desync not found; set ASCPROXY_SHARED")
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
