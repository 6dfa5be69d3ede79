"""Failures as names, and what they do to the bytes of an answer."""

import pytest

from ascproxy.errors import UsageError
from ascproxy.sim.answer import Answer, chunk, render
from ascproxy.sim.failure import KINDS, End, Failure, Kind, Reply, damage

HEAD = b"HTTP/1.1 200 OK\r\na: b\r\n\r\n"


def spoil(name: str, *, stream: bool = True) -> tuple[bytes, Reply]:
    answer = (
        Answer(body=None, events=iter([(0, b"one"), (1, b"two"), (1, b"three")])) if stream else Answer(body=b"body")
    )
    failure = Failure.parse(name)
    reply = damage(failure, Reply(render(answer, HEAD), End.KEEP), HEAD, stream=stream)
    return b"".join(data for _, data in reply.pieces), reply


WHOLE = HEAD + chunk(b"one") + chunk(b"two") + chunk(b"three") + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("name", "sent", "end"),
    [
        ("stall:1", HEAD + chunk(b"one"), End.HANG),
        ("stall:0", HEAD, End.HANG),
        ("comments:1", HEAD + chunk(b"one"), End.COMMENT),
        ("truncate:2", HEAD + chunk(b"one") + chunk(b"two"), End.CLOSE),
        ("reset", b"", End.RESET),
        ("reset:1", HEAD + chunk(b"one"), End.RESET),
        ("hang", b"", End.HANG),
        ("malformed", b"HTTP/one.one 2OO fine" + WHOLE[15:], End.KEEP),
        ("bad-chunk:1", WHOLE.replace(b"3\r\ntwo", b"zz\r\nnot a chunk\r\n3\r\ntwo"), End.KEEP),
        ("extra-bytes:3", WHOLE + b"xxx", End.KEEP),
        ("busy", WHOLE, End.KEEP),
        ("slow-first-byte:2.5", WHOLE, End.KEEP),
        ("1xx:2", b"HTTP/1.1 103 Early Hints\r\nlink: </sim>; rel=preload\r\n\r\n" * 2 + WHOLE, End.KEEP),
    ],
)
def test_damage_to_a_stream(name: str, sent: bytes, end: End) -> None:
    made, reply = spoil(name)
    assert (made, reply.end) == (sent, end)
    assert reply.delay == (2.5 if name.startswith("slow") else 0)


@pytest.mark.parametrize(
    ("name", "sent", "end"),
    [("stall:2", b"bo", End.HANG), ("truncate:0", b"", End.CLOSE), ("reset:3", b"bod", End.RESET)],
)
def test_damage_to_a_body_counts_its_bytes(name: str, sent: bytes, end: End) -> None:
    made, reply = spoil(name, stream=False)
    assert (made, reply.end) == (HEAD + sent, end)


@pytest.mark.parametrize("size", [30, 100, 1001, 5000, 65536])
def test_filler_headers_have_the_size_asked_for(size: int) -> None:
    made, _ = spoil(f"headers:{size}")
    assert abs(len(made) - len(WHOLE) - size) < 30
    head = made.partition(b"\r\n\r\n")[0]
    assert all(b": " in line for line in head.split(b"\r\n")[1:])
    assert made.endswith(WHOLE[17:])


def test_every_kind_is_documented_and_parses() -> None:
    assert set(KINDS) == set(Kind)
    for kind in Kind:
        assert Failure.parse(kind.value).kind is kind
        assert Failure.parse(str(Failure.parse(f"{kind.value}:7"))) == Failure(kind, 7)


@pytest.mark.parametrize("text", ["", "nope", "stall:x", "stall:-1", "stall:nan", "stall:inf"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Failure.parse(text)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_chunks_of_a_fixed_size_carry_the_same_bytes(size: int) -> None:
    events = [(0, b"one"), (1, b"two"), (1, b"three")]
    pieces = list(render(Answer(body=None, events=iter(events)), HEAD, size))
    assert sum(tokens for tokens, _ in pieces) == 2
    bodies = [data.partition(b"\r\n")[2][:-2] for _, data in pieces[1:-1]]
    assert b"".join(bodies) == b"onetwothree"
    assert all(len(body) == size for body in bodies[:-1])
