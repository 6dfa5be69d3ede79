"""The stub finds where requests end, however they come; the load tells good answers from bad ones."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import machine, native

BODY = b'{"model":"bench","stream":true}'
PLAIN = b'{"model":"bench","stream_options":null,"stream":false,"x":true}'


@contextmanager
def running_stub(*arguments: str) -> Iterator[int]:
    port = machine.free_port()
    argv = [str(native.program("stub")), "--port", str(port), *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["event"] == "ready"
        try:
            yield port
        finally:
            child.terminate()


@pytest.fixture(scope="module")
def stub() -> Iterator[int]:
    with running_stub("--interval-ms", "1", "--count", "3") as port:
        yield port


def by_length(body: bytes, fields: bytes = b"") -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: s\r\n%sContent-Length: %d\r\n\r\n%s" % (
        fields,
        len(body),
        body,
    )


def by_chunks(*pieces: bytes) -> bytes:
    framed = b"".join(b"%X;x=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%s0\r\nTrailer: x\r\n\r\n" % framed


def answers(port: int, sends: list[bytes]) -> bytes:
    """Everything the stub says before it closes; the last request asks it to."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for data in sends:
            s.sendall(data)
        return b"".join(iter(lambda: s.recv(65536), b""))


LAST = by_length(PLAIN, b"Connection: close\r\n")


@pytest.mark.parametrize("byte_by_byte", [False, True], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("request_bytes", [by_length(PLAIN), by_chunks(PLAIN)], ids=["length", "chunked"])
def test_unary_requests_and_the_one_behind_are_answered(stub: int, request_bytes: bytes, byte_by_byte: bool) -> None:
    data = request_bytes + LAST
    said = answers(stub, [data[i : i + 1] for i in range(len(data))] if byte_by_byte else [data])
    assert said.count(b"HTTP/1.1 200 OK\r\n") == 2
    head, _, rest = said.partition(b"\r\n\r\n")
    assert b"content-length: 1500" in head
    assert json.loads(rest[:1500])["object"] == "chat.completion"


@pytest.mark.parametrize("cut", range(1, len(BODY)))
def test_a_stream_is_recognised_across_any_split(stub: int, cut: int) -> None:
    said = answers(stub, [by_chunks(BODY[:cut], BODY[cut:]) + LAST])
    assert b"text/event-stream" in said


def test_a_stream_of_three_events_ends_as_vllm_ends_and_the_connection_lives(stub: int) -> None:
    said = answers(stub, [by_length(BODY.replace(b":true", b": true")) + LAST])
    stream, _, rest = said.partition(b"0\r\n\r\n")
    # first event, three of fixed size, finish reason, [DONE]
    assert stream.count(b"data: ") == 6
    assert stream.count(b"\r\nb4\r\ndata: ") == 3
    assert stream.endswith(b"\r\ne\r\ndata: [DONE]\n\n\r\n")
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_larger_than_the_buffer_is_consumed(stub: int) -> None:
    said = answers(stub, [by_length(b"x" * 300_000), by_chunks(b"y" * 70_000, b"z" * 70_000), LAST])
    assert said.count(b"HTTP/1.1 200 OK\r\n") == 3


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1x\r\n\r\n",
    ],
)
def test_framing_that_cannot_be_followed_closes(stub: int, data: bytes) -> None:
    assert answers(stub, [data]) == b""


MARKED = b'{"model":"bench","user":"m-mark marmarker-0123456789abcdef","n":1}'


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    with running_stub("--echo") as port:
        yield port


@pytest.mark.parametrize("cut", range(1, len(MARKED)))
def test_a_marker_is_said_back_across_any_split(echo: int, cut: int) -> None:
    said = answers(echo, [by_chunks(MARKED[:cut], MARKED[cut:]) + LAST])
    contents = [json.loads(body[:1500])["choices"][0]["message"]["content"] for body in said.split(b"\r\n\r\n")[1:]]
    assert [content[:23] for content in contents] == ["marker-0123456789abcdef", "marker-" + 16 * "0"]


# ---- the load ----


def run_load(port: int, *arguments: str) -> list[dict[str, object]]:
    argv = [str(native.program("load")), "--port", str(port), "--connections", "4", *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", ["unary", "sse", "rate"])
def test_a_window_has_a_begin_and_an_end_without_errors(mode: str) -> None:
    with running_stub() as port:
        events = run_load(port, "--mode", mode, "--seconds", "0.2")
    assert [e["event"] for e in events] == ["ready", "begin", "end"]
    assert events[-1]["errors"] == {"status": 0, "length": 0, "connect": 0, "broken": 0, "marker": 0, "first": ""}
    assert (events[-1]["failures"], events[-1]["failed"]) == (0, [])
    assert events[-1]["events" if mode == "sse" else "requests"]


@pytest.mark.parametrize("mode", ["unary", "rate"])
def test_each_request_has_a_marker_and_its_answer_says_it(mode: str) -> None:
    with running_stub("--echo") as port:
        events = run_load(port, "--mode", mode, "--marked", "--expect-bytes", "1500", "--seconds", "0.2")
    assert [e["event"] for e in events] == ["ready", "begin", "end"]
    assert events[-1]["requests"]
    assert (events[-1]["failures"], events[-1]["failed"]) == (0, [])


def test_an_answer_without_the_marker_is_an_error() -> None:
    with running_stub() as port:
        (event,) = run_load(port, "--mode", "unary", "--marked", "--seconds", "1")
    assert "an answer without a marker" in str(event["reason"])


def marker_of(connection: socket.socket) -> bytes:
    """Of the next request, which comes in one piece or in a few."""
    data = connection.recv(65536)
    while b'"}]}' not in data:
        data += connection.recv(65536)
    return data.partition(b"marker-")[2][:16]


def said(marker: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\nmarker-" + marker


def test_each_failure_is_told_with_its_port_and_the_life_of_its_connection() -> None:
    """A good answer, somebody else's, one that breaks off, and a kept connection that is closed under a request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        argv = [str(native.program("load")), "--port", str(listener.getsockname()[1]), "--connections", "1"]
        before = time.monotonic()
        with subprocess.Popen([*argv, "--marked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            first, (_, first_port) = listener.accept()
            with first:
                marker = marker_of(first)
                first.sendall(said(marker))
                assert json.loads(child.stdout.readline())["event"] == "ready"
                other = marker_of(first)
                assert other != marker
                child.stdin.write(b"begin\n")
                child.stdin.flush()
                assert json.loads(child.stdout.readline())["event"] == "begin"
                first.sendall(said(marker))  # the answer of the request before
                first.sendall(said(marker_of(first)))
                marker_of(first)
            # It was closed under a request that had no byte of an answer: that is sent again.
            second, (_, second_port) = listener.accept()
            with second:
                second.sendall(said(marker_of(second))[:-1])
            third, _ = listener.accept()
            with third:
                marker_of(third)
                child.stdin.write(b"end\n")
                child.stdin.flush()
                told = json.loads(child.stdout.readline())
            child.kill()
    after = time.monotonic()
    assert (told["requests"], told["lost"], told["failures"]) == (1, 1, 3)
    assert (told["errors"]["marker"], told["errors"]["broken"]) == (1, 1)
    assert [(one["port"], one["foreign"], one["error"]) for one in told["failed"]] == [
        (first_port, True, "another request's answer"),
        (first_port, False, "lost with its connection, and sent again"),
        (second_port, False, "connection lost before the answer was complete"),
    ]
    opened = [one["opened"] for one in told["failed"]]
    ended = [one["ended"] for one in told["failed"]]
    assert before <= opened[0] == opened[1] < ended[0] < ended[1] <= opened[2] < ended[2] <= after


def test_an_answer_of_another_length_is_an_error() -> None:
    with running_stub("--unary-bytes", "1400") as port:
        (event,) = run_load(port, "--mode", "unary", "--expect-bytes", "1500", "--seconds", "1")
    assert event["event"] == "failed"
    assert "a body of 1400 bytes instead of 1500" in str(event["reason"])


def test_nobody_listens_is_told_at_once() -> None:
    (event,) = run_load(machine.free_port(), "--mode", "unary", "--seconds", "1")
    assert "Connection refused" in str(event["reason"])


def test_a_refusal_is_an_error_and_shows_its_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            while True:
                try:
                    s, _ = listener.accept()
                except OSError:
                    return
                with s:
                    s.recv(65536)
                    s.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        (event,) = run_load(listener.getsockname()[1], "--mode", "unary", "--seconds", "1")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert "401 Unauthorized" in str(event["reason"])


def test_requests_take_keys_and_models_in_turn(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("".join(f"key-{n}\n" for n in range(4)))
    (tmp_path / "models").write_text("model-0\nmodel-1\n")
    seen: list[tuple[bytes, bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
            with connection:
                while (data := connection.recv(65536)) and len(seen) < 8:
                    key = data.partition(b"Bearer ")[2].partition(b"\r\n")[0]
                    seen.append((key, data.partition(b'"model":"')[2].partition(b'"')[0]))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        argv = [str(native.program("load")), "--port", str(listener.getsockname()[1]), "--connections", "1"]
        argv += ["--keys", str(tmp_path / "keys"), "--models", str(tmp_path / "models")]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        thread.join(20)
        child.kill()
        child.wait()
        assert child.stdin is not None
        child.stdin.close()
    assert seen == [(b"key-%d" % (n % 4), b"model-%d" % (n % 2)) for n in range(8)]


def test_no_more_connections_than_asked_for_are_in_the_making() -> None:
    """The second connection comes once the first has had an answer's head, and not before."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        argv = [str(native.program("load")), "--port", str(listener.getsockname()[1]), "--connections", "2"]
        child = subprocess.Popen([*argv, "--opening", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        first, _ = listener.accept()
        with first:
            assert first.recv(65536).startswith(b"POST ")
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
            listener.settimeout(20)
            first.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            second, _ = listener.accept()
            second.close()
        child.kill()
        child.communicate()


@pytest.mark.parametrize(("content", "said"), [("", "no line in it"), ("k" * 201 + "\n", "more than 200 bytes")])
def test_a_file_of_keys_that_cannot_be_used_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "keys").write_text(content)
    (event,) = run_load(1, "--keys", str(tmp_path / "keys"))
    assert said in str(event["reason"])
