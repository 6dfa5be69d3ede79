"""Requests that nobody should send, by name, each with the status that answers it (0: closed without a word).

They are aimed: but for the one thing that is wrong, each is a good chat request with a valid key, so that whatever is
forgiven here is served, and reaches the model server.
"""

from __future__ import annotations

import gzip
import json

MODEL = "m"
GOOD_BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}).encode()
LINE = b"POST /v1/chat/completions HTTP/1.1"
CHUNKED = b"Transfer-Encoding: chunked"
GOOD_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD_BODY), GOOD_BODY)
N = len(GOOD_BODY)
HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(190))


class Aim:
    """Requests with ``key``."""

    def __init__(self, key: str) -> None:
        self.key = b"Authorization: Bearer " + key.encode()

    def raw(self, *fields: bytes, line: bytes = LINE, body: bytes = b"", end: bytes = b"\r\n") -> bytes:
        """Exactly these fields and this body, besides the credential."""
        return end.join((line, self.key, *fields, b"", body))

    def head(self, *fields: bytes, line: bytes = LINE) -> bytes:
        """A good body and its length, a Host, and ``fields`` (or another request line)."""
        return self.raw(b"Host: gateway", *fields, b"Content-Length: %d" % N, line=line, body=GOOD_BODY)

    def framed(self, *fields: bytes, body: bytes = GOOD_BODY, line: bytes = LINE) -> bytes:
        """``fields`` say how long the body is."""
        return self.raw(b"Host: gateway", *fields, line=line, body=body)

    def chunks(self, body: bytes, *fields: bytes) -> bytes:
        return self.framed(CHUNKED, *fields, body=body)

    def body(self, body: bytes, *fields: bytes) -> bytes:
        return self.framed(*fields, b"Content-Length: %d" % len(body), body=body)

    def member(self, member: bytes) -> bytes:
        """A good body with one more member, first."""
        return self.body(b"{" + member + b"," + GOOD_BODY[1:])

    def good(self) -> bytes:
        return self.head()


def closed(aim: Aim) -> dict[str, tuple[int, bytes]]:
    """After these the connection is of no use: where the next request begins, nobody can say."""
    line, head, framed, chunks, raw = (lambda x: aim.head(line=x)), aim.head, aim.framed, aim.chunks, aim.raw
    bad = {
        # the request line
        "line: two spaces": line(b"POST  /v1/chat/completions HTTP/1.1"),
        "line: two spaces before the version": line(b"POST /v1/chat/completions  HTTP/1.1"),
        "line: a tab": line(b"POST\t/v1/chat/completions HTTP/1.1"),
        "line: begins with a space": line(b" " + LINE),
        "line: ends with a space": line(LINE + b" "),
        "line: ends with a tab": line(LINE + b"\t"),
        "line: without a version": line(b"POST /v1/chat/completions"),
        "line: HTTP/0.9": b"GET /v1/models\r\n\r\n",
        "line: lower-case protocol": line(b"POST /v1/chat/completions http/1.1"),
        "line: version with two digits": line(b"POST /v1/chat/completions HTTP/1.10"),
        "line: version with leading zero": line(b"POST /v1/chat/completions HTTP/01.1"),
        "line: version without minor": line(b"POST /v1/chat/completions HTTP/1."),
        "line: version with a comma": line(b"POST /v1/chat/completions HTTP/1,1"),
        "line: no protocol name": line(b"POST /v1/chat/completions /1.1"),
        "line: another protocol": line(b"POST /v1/chat/completions ICAP/1.0"),
        "line: no method": line(b" /v1/chat/completions HTTP/1.1"),
        "line: method with a colon": line(b"PO:ST /v1/chat/completions HTTP/1.1"),
        "line: method with NUL": line(b"PO\x00ST /v1/chat/completions HTTP/1.1"),
        "line: method beyond ASCII": line(b"P\xc3\x96ST /v1/chat/completions HTTP/1.1"),
        "target: NUL": line(b"POST /v1/chat/completions\x00 HTTP/1.1"),
        "target: a space": line(b"POST /v1/chat /completions HTTP/1.1"),
        "target: DEL": line(b"POST /v1/chat/completions\x7f HTTP/1.1"),
        "target: beyond ASCII": line(b"POST /v1/chat/completions\xe2\x80\xae HTTP/1.1"),
        "target: a fragment": line(b"POST /v1/chat/completions#x HTTP/1.1"),
        "target: a backslash": line(b"POST \\v1\\chat\\completions HTTP/1.1"),
        "target: no slash": line(b"POST v1/chat/completions HTTP/1.1"),
        "target: none": line(b"POST HTTP/1.1"),
        "target: bare carriage return": line(b"POST /v1/chat/completions\r HTTP/1.1"),
        # line ends
        "ends: bare line feeds": raw(
            b"Host: gateway", b"Content-Length: %d" % N, body=GOOD_BODY, end=b"\n"),
        "ends: a bare line feed after the request line": line(LINE + b"\nX-A: b"),
        "ends: a bare line feed in a field": head(b"X-A: b\nX-B: c"),
        "ends: a bare carriage return in a field": head(b"X-A: b\rX-B: c"),
        "ends: two carriage returns": head(b"X-A: b\r"),
        "ends: a bare line feed before the body": (
            LINE + b"\r\nHost: gateway\r\n" + aim.key + b"\r\nContent-Length: %d\r\n\n" % N + GOOD_BODY + b"\r\n\r\n"),
        # Host
        "host: none": raw(b"Content-Length: %d" % N, body=GOOD_BODY),
        "host: twice": head(b"Host: other"),
        "host: twice the same": head(b"Host: gateway"),
        "host: a list": raw(b"Host: a, b", b"Content-Length: %d" % N, body=GOOD_BODY),
        "host: a path": raw(b"Host: a/b", b"Content-Length: %d" % N, body=GOOD_BODY),
        "host: userinfo": raw(b"Host: user@a", b"Content-Length: %d" % N, body=GOOD_BODY),
        "host: a space": raw(b"Host: a b", b"Content-Length: %d" % N, body=GOOD_BODY),
        # fields
        "field: folded": head(b"X-A: b\r\n c"),
        "field: folded with a tab": head(b"X-A: b\r\n\tc"),
        "field: the first folded": line(LINE + b"\r\n X-A: b"),
        "field: a space before the colon": head(b"X-A : b"),
        "field: a tab before the colon": head(b"X-A\t: b"),
        "field: no colon": head(b"X-A"),
        "field: no name": head(b": b"),
        "field: a space in the name": head(b"X A: b"),
        "field: NUL in the name": head(b"X\x00A: b"),
        "field: brackets in the name": head(b"X(A): b"),
        "field: beyond ASCII in the name": head(b"X-\xc3\x84: b"),
        "field: NUL in the value": head(b"X-A: b\x00c"),
        "field: a control in the value": head(b"X-A: b\x01c"),
        "field: DEL in the value": head(b"X-A: b\x7fc"),
        "field: escape in the value": head(b"X-A: \x1b[2J"),
        # framing
        "length: not a number": framed(b"Content-Length: many"),
        "length: empty": framed(b"Content-Length:"),
        "length: with a sign": framed(b"Content-Length: +%d" % N),
        "length: negative": framed(b"Content-Length: -1"),
        "length: hexadecimal": framed(b"Content-Length: 0x%x" % N),
        "length: with an exponent": framed(b"Content-Length: 1e2"),
        "length: with a point": framed(b"Content-Length: %d.0" % N),
        "length: with an underscore": framed(b"Content-Length: 1_0"),
        "length: two numbers": framed(b"Content-Length: %d %d" % (N, N)),
        "length: a list": framed(b"Content-Length: %d, %d" % (N, N)),
        "length: quoted": framed(b'Content-Length: "%d"' % N),
        "length: with a semicolon": framed(b"Content-Length: %d;" % N),
        "length: digits of another script": framed("Content-Length: ٤٢".encode()),
        "length: over 64 bits": framed(b"Content-Length: 18446744073709551617"),
        "length: hundred digits": framed(b"Content-Length: " + b"9" * 100),
        "length: twice": framed(b"Content-Length: %d" % N, b"Content-Length: 0"),
        "length: twice the same": framed(b"Content-Length: %d" % N, b"Content-Length: %d" % N),
        "length: with a coding": framed(b"Content-Length: %d" % len(GOOD_CHUNKS), CHUNKED, body=GOOD_CHUNKS),
        "length: behind a coding": framed(CHUNKED, b"Content-Length: 4", body=GOOD_CHUNKS),
        "length: disguised by an underscore": head(b"Content_Length: 3"),
        "length: disguised by no hyphen": head(b"ContentLength: 3"),
        "length: disguised by a space": framed(b"Content-Length : %d" % N),
        "coding: in disguise": head(b"Transfer_Encoding: chunked"),
        "coding: a space before the colon": framed(b"Transfer-Encoding : chunked", body=GOOD_CHUNKS),
        "coding: empty": framed(b"Transfer-Encoding:", body=GOOD_CHUNKS),
        "coding: gzip": framed(b"Transfer-Encoding: gzip", body=GOOD_CHUNKS),
        "coding: identity": framed(b"Transfer-Encoding: identity", body=GOOD_CHUNKS),
        "coding: gzip, chunked": framed(b"Transfer-Encoding: gzip, chunked", body=GOOD_CHUNKS),
        "coding: chunked, identity": framed(b"Transfer-Encoding: chunked, identity", body=GOOD_CHUNKS),
        "coding: chunked twice": framed(b"Transfer-Encoding: chunked, chunked", body=GOOD_CHUNKS),
        "coding: two fields": framed(CHUNKED, CHUNKED, body=GOOD_CHUNKS),
        "coding: nearly chunked": framed(b"Transfer-Encoding: xchunked", body=GOOD_CHUNKS),
        "coding: quoted": framed(b'Transfer-Encoding: "chunked"', body=GOOD_CHUNKS),
        "coding: with a parameter": framed(b"Transfer-Encoding: chunked;q=1", body=GOOD_CHUNKS),
        "coding: a vertical tab": framed(b"Transfer-Encoding: \x0bchunked", body=GOOD_CHUNKS),
        "coding: folded": framed(b"Transfer-Encoding:\r\n chunked", body=GOOD_CHUNKS),
        "coding: in HTTP/1.0": framed(CHUNKED, line=LINE[:-1] + b"0", body=GOOD_CHUNKS),
        # chunks
        "chunk: no size": chunks(b"\r\n" + GOOD_BODY + b"\r\n0\r\n\r\n"),
        "chunk: not hexadecimal": chunks(b"zz\r\n" + GOOD_BODY + b"\r\n0\r\n\r\n"),
        "chunk: 0x": chunks(b"0x%x\r\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: a sign": chunks(b"+%x\r\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: negative": chunks(b"-1\r\n%b\r\n0\r\n\r\n" % GOOD_BODY),
        "chunk: a leading space": chunks(b" %x\r\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: over 64 bits": chunks(b"10000000000000000\r\n" + GOOD_BODY),
        "chunk: a hundred zeros first": chunks(b"0" * 100 + b"%x\r\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: a bare line feed behind the size": chunks(b"%x\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: a bare carriage return behind the size": chunks(b"%x\r%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: a bare line feed behind the data": chunks(b"%x\r\n%b\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: nothing behind the data": chunks(b"%x\r\n%b0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: more data than its size": chunks(b"%x\r\n%b\r\n0\r\n\r\n" % (N - 1, GOOD_BODY)),
        "chunk: less data than its size": chunks(b"%x\r\n%b\r\n0\r\n\r\n" % (N + 3, GOOD_BODY) + b"x" * 9),
        "chunk: a long extension": chunks(b"%x;a=%b\r\n%b\r\n0\r\n\r\n" % (N, b"b" * 300, GOOD_BODY)),
        "chunk: extensions without end": chunks(
            b"".join(b"1;a=%b\r\n \r\n" % (b"b" * 200) for _ in range(90)) + GOOD_CHUNKS),
        "chunk: NUL in an extension": chunks(b"%x;a\x00\r\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: a bare line feed in an extension": chunks(b"%x;a\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "chunk: a bare carriage return in an extension": chunks(b"%x;a\rb\r\n%b\r\n0\r\n\r\n" % (N, GOOD_BODY)),
        "trailer: no colon": chunks(GOOD_CHUNKS[:-2] + b"nonsense\r\n\r\n"),
        "trailer: a bare line feed": chunks(GOOD_CHUNKS[:-2] + b"a: b\n\r\n"),
        "trailer: folded": chunks(GOOD_CHUNKS[:-2] + b"a: b\r\n c\r\n\r\n"),
        "trailer: NUL": chunks(GOOD_CHUNKS[:-2] + b"a: \x00\r\n\r\n"),
        "trailer: too large": chunks(GOOD_CHUNKS[:-2] + b"a: %b\r\n\r\n" % (b"b" * 9000)),
        # not HTTP
        "not HTTP: a TLS hello": HELLO + b"\r\n\r\n",
        "not HTTP/1.1: the preface of what comes after HTTP/2": b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "not HTTP: SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "not HTTP: a proxy's line": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + aim.good(),
        "not HTTP: a proxy's binary line": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12) + b"\r\n\r\n",
        "not HTTP: SOCKS": b"\x05\x01\x00\r\n\r\n",
        "not HTTP: zeros": bytes(64) + b"\r\n\r\n",
        "not HTTP: all bytes": bytes(range(256)) + b"\r\n\r\n",
        "not HTTP: JSON": GOOD_BODY + b"\r\n\r\n",
    }  # fmt: skip
    others = {
        "line: too long": (414, line(b"POST /v1/chat/completions?" + b"a" * 9000 + b" HTTP/1.1")),
        "line: without an end": (414, b"GET /" + b"a" * 50_000),
        "line: HTTP/1.2": (505, line(b"POST /v1/chat/completions HTTP/1.2")),
        "line: HTTP/2.0": (505, line(b"POST /v1/chat/completions HTTP/2.0")),
        "line: HTTP/0.9 in full": (505, line(b"POST /v1/chat/completions HTTP/0.9")),
        "field: too long": (431, head(b"X-A: " + b"b" * 17_000)),
        "field: a name without an end": (431, LINE + b"\r\n" + b"a" * 50_000),
        "fields: too large together": (431, head(*(b"X-%d: %b" % (n, b"b" * 900) for n in range(40)))),
        "fields: too many": (431, head(*(b"X-%d: b" % n for n in range(120)))),
        "length: too large": (413, framed(b"Content-Length: 99999999999", body=b"")),
        "chunk: larger than comes": (408, chunks(b"fffffffff\r\n" + GOOD_BODY)),
        "length: more than comes": (408, framed(b"Content-Length: %d" % (N + 1))),
        "chunk: the last one does not come": (408, chunks(GOOD_CHUNKS[:-5])),
        "chunk: no end behind the last": (408, chunks(GOOD_CHUNKS[:-2])),
        "line: half of one": (408, LINE[:20]),
        "fields: no empty line": (408, LINE + b"\r\nHost: gateway\r\n"),
    }
    return {name: (400, data) for name, data in bad.items()} | others


def kept(aim: Aim) -> dict[str, tuple[int, bytes]]:
    """Well framed, but not to be served."""
    line, head, body, member = (lambda x: aim.head(line=x)), aim.head, aim.body, aim.member
    tail = GOOD_BODY[1:]
    bad = {
        # the body
        "body: none": aim.framed(body=b""),
        "body: empty": body(b""),
        "body: white space": body(b"  \r\n "),
        "body: an array": body(b"[" + GOOD_BODY + b"]"),
        "body: a string": body(b'"model"'),
        "body: a number": body(b"1"),
        "body: null": body(b"null"),
        "body: cut": body(GOOD_BODY[:-1]),
        "body: cut in a string": body(GOOD_BODY[: N // 2]),
        "body: more behind it": body(GOOD_BODY + b"x"),
        "body: two objects": body(GOOD_BODY + GOOD_BODY),
        "body: NUL behind it": body(GOOD_BODY + b"\x00"),
        "body: a byte order mark": body(b"\xef\xbb\xbf" + GOOD_BODY),
        "body: UTF-16": body(GOOD_BODY.decode().encode("utf-16")),
        "body: a form": body(b"model=m&messages=hello"),
        "body: compressed": body(gzip.compress(GOOD_BODY), b"Content-Encoding: gzip"),
        "json: a comma too many": body(GOOD_BODY[:-1] + b",}"),
        "json: no comma": body(b'{"a":1 ' + tail),
        "json: no colon": member(b'"a" 1'),
        "json: single quotes": member(b"'a':1"),
        "json: a name without quotes": member(b"a:1"),
        "json: a comment": member(b'/* a */"a":1'),
        "json: NaN": member(b'"a":NaN'),
        "json: Infinity": member(b'"a":-Infinity'),
        "json: a leading zero": member(b'"a":01'),
        "json: a plus": member(b'"a":+1'),
        "json: a point without digits": member(b'"a":1.'),
        "json: hexadecimal": member(b'"a":0x1'),
        "json: True": member(b'"a":True'),
        "json: a line feed in a string": member(b'"a":"b\nc"'),
        "json: NUL in a string": member(b'"a":"b\x00c"'),
        "json: an unknown escape": member(b'"a":"\\x41"'),
        "json: half an escape": member(b'"a":"\\u12"'),
        "json: not UTF-8": member(b'"a":"\xff\xfe"'),
        "json: an overlong slash": member(b'"a":"\xc0\xaf"'),
        "json: a surrogate in UTF-8": member(b'"a":"\xed\xa0\x80"'),
        "json: beyond Unicode": member(b'"a":"\xf5\x80\x80\x80"'),
        "json: brackets that do not fit": member(b'"a":[1}'),
        "json: as deep as a bomb": member(b'"a":' + b"[" * 10_000 + b"]" * 10_000),
        "json: deep objects": member(b'"a":' + b'{"a":' * 100 + b"1" + b"}" * 100),
        "json: deep and never closed": body(b"[" * 60_000),
        "json: too many members": member(b'"a":{' + b",".join(b'"%d":1' % n for n in range(10_001)) + b"}"),
        "json: a number of 65 digits": member(b'"a":' + b"1" * 65),
        "json: a fraction of 500 digits": member(b'"a":0.' + b"1" * 500),
        "model: twice": member(b'"model":"other"'),
        "model: twice, once escaped": member(b'"mod\\u0065l":"other"'),
        "model: twice the same": member(b'"model":"m"'),
        "messages: twice": member(b'"messages":[]'),
        "stream: twice": member(b'"stream":true,"stream":false'),
        "model: a number": body(b'{"model":1,"messages":[]}'),
        "model: a list": body(b'{"model":["m"],"messages":[]}'),
        "model: an object": body(b'{"model":{"m":"m"},"messages":[]}'),
        "stream: a string": member(b'"stream":"true"'),
        "stream: a number": member(b'"stream":1'),
        # who asks
        "credential: two": head(b"X-Api-Key: another"),
        "credential: Authorization twice": head(b"Authorization: Bearer another"),
        "query: not the operation's": line(b"POST /v1/chat/completions?api_base=http://evil HTTP/1.1"),
    }
    nowhere = {
        "path: dots": line(b"POST /v1/./chat/completions HTTP/1.1"),
        "path: up and down": line(b"POST /v1/x/../chat/completions HTTP/1.1"),
        "path: two slashes": line(b"POST //v1/chat/completions HTTP/1.1"),
        "path: a slash at the end": line(b"POST /v1/chat/completions/ HTTP/1.1"),
        "path: escaped": line(b"POST /v1/chat%2fcompletions HTTP/1.1"),
        "path: escaped letters": line(b"POST /%76%31/chat/completions HTTP/1.1"),
        "path: a parameter": line(b"POST /v1/chat/completions;x=1 HTTP/1.1"),
        "path: capitals": line(b"POST /V1/Chat/Completions HTTP/1.1"),
        "path: an escaped NUL": line(b"POST /v1/chat/completions%00 HTTP/1.1"),
        "path: the simulator's": line(b"POST /sim/settings HTTP/1.1"),
        "path: another engine's": line(b"POST /v1/load_lora_adapter HTTP/1.1"),
        "path: metrics": aim.raw(b"Host: gateway", line=b"GET /metrics HTTP/1.1"),
        "path: health": aim.raw(b"Host: gateway", line=b"GET /healthz/live HTTP/1.1"),
        "path: keys": aim.raw(b"Host: gateway", line=b"GET /keys HTTP/1.1"),
        "model: unknown": body(b'{"model":"n","messages":[]}'),
        "model: as a pattern": body(b'{"model":"*","messages":[]}'),
        "model: with NUL": body(b'{"model":"m\\u0000","messages":[]}'),
    }
    methods = {
        f"method: {name.decode()}": line(name + b" /v1/chat/completions HTTP/1.1")
        for name in (b"PUT", b"DELETE", b"PATCH", b"TRACE", b"post", b"BREW")
    }
    return (
        {name: (400, data) for name, data in bad.items()}
        | {name: (404, data) for name, data in nowhere.items()}
        | {name: (405, data) for name, data in methods.items()}
    )
