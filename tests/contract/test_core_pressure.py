"""Back-pressure, departure and deadlines of the native core (DESIGN 5; SEMANTICS 4; LIMITS 1)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import ssl
import struct
from pathlib import Path

import pytest

from ascproxy.clock import monotonic_ns
from tests.contract.test_core_tls import Pki
from tests.kit.rig import Rig, post, read_answer, read_request, run, settled_at, until

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
SECOND = 1_000_000_000


def marker(n: int, size: int) -> bytes:
    """Bytes that say where they belong: any loss, repeat or swap changes them."""
    line = b"".join(b"%010d;" % (n * size + i) for i in range(0, size, 11))
    return line[:size]


def small_client(port: int, rcvbuf: int) -> socket.socket:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    s.connect(("127.0.0.1", port))
    s.setblocking(False)
    return s


class Flood:
    """An upstream that sends numbered chunks as fast as it is let, and knows how much left its hands."""

    def __init__(self, chunks: int, size: int) -> None:
        self.chunks, self.size = chunks, size
        self.sent = 0
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)
        await read_request(reader)
        writer.write(CHUNKED)
        try:
            for n in range(self.chunks):
                writer.write(b"%x\r\n%s\r\n" % (self.size, marker(n, self.size)))
                await writer.drain()
                self.sent += self.size
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            assert await reader.read() == b""
        finally:
            self.gone.set()


def test_a_reader_that_does_not_read_is_felt_upstream_within_512_kib() -> None:
    async def main() -> None:
        flood = Flood(chunks=2000, size=10_000)
        async with Rig(flood, upstream_rcvbuf=65_536, upstream_sndbuf=16_384) as rig:
            client = small_client(rig.port, 4096)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, post(b"{}"))
            await until(lambda: rig.core.paused == 1, "the reader stalls")
            stalled = monotonic_ns()
            held = await settled_at(lambda: flood.sent)
            assert held <= 512 * 1024, held
            # another stream on the same core goes on meanwhile
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            answer = await read_answer(reader)
            assert len(answer.body) == 2000 * 10_000
            writer.close()
            assert rig.core.paused == 1
            # 25 s later it is still there, and then reads everything, right to the last byte
            rig.ticking = False
            for second in range(1, 26):
                rig.core.tick(max(monotonic_ns(), stalled + second * SECOND))
            rig.ticking = True
            assert rig.core.in_flight == 1
            digest = hashlib.sha256()
            client.setblocking(False)
            sreader, swriter = await asyncio.open_connection(sock=client, limit=1 << 26)
            slow = await read_answer(sreader)
            digest.update(slow.body)
            assert digest.digest() == hashlib.sha256(answer.body).digest()
            assert slow.body[:10_000] == marker(0, 10_000)
            swriter.close()

    run(main())


def test_a_reader_that_stays_away_longer_than_the_limit_is_cut_and_the_upstream_with_it() -> None:
    async def main() -> None:
        flood = Flood(chunks=2000, size=10_000)
        async with Rig(flood, upstream_rcvbuf=65_536, upstream_sndbuf=16_384) as rig:
            client = small_client(rig.port, 4096)
            await asyncio.get_running_loop().sock_sendall(client, post(b"{}"))
            await until(lambda: rig.core.paused == 1, "the reader stalls")
            await settled_at(lambda: flood.sent)
            rig.ticking = False
            start = monotonic_ns()
            for tenth in range(320):
                rig.core.tick(start + tenth * SECOND // 10)
            rig.ticking = True
            await asyncio.wait_for(flood.gone.wait(), 1)
            await until(lambda: rig.core.in_flight == 0, "settled")
            assert rig.walk.settled[0]["outcome"] == "write_stall"
            client.close()

    run(main())


def test_a_tiny_receive_buffer_drained_at_random_gets_every_byte_in_order() -> None:
    rng = random.Random(7)

    async def main() -> None:
        flood = Flood(chunks=3000, size=777)
        async with Rig(flood) as rig:
            client = small_client(rig.port, 4096)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, post(b"{}", "Connection: close"))
            got = bytearray()
            while True:
                data = await loop.sock_recv(client, rng.choice((1, 100, 4096, 65_536)))
                if not data:
                    break
                got += data
                if rng.random() < 0.05:
                    await asyncio.sleep(0.001)
            client.close()
            reader = asyncio.StreamReader(limit=1 << 26)
            reader.feed_data(bytes(got))
            reader.feed_eof()
            answer = await read_answer(reader)
            assert answer.body == b"".join(marker(n, 777) for n in range(3000))

    run(main())


def test_a_million_small_chunks() -> None:
    chunk = b"3\r\nabc\r\n"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED)
        for _ in range(1000):
            writer.write(chunk * 1000)
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def main() -> None:
        async with Rig(script) as rig:
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            answer = await read_answer(reader)
            assert answer.body == b"abc" * 1_000_000
            writer.close()

    run(main())


def test_a_slow_upstream_reader_gets_a_large_body_whole() -> None:
    body = b'"' + b"0123456789" * 500_000 + b'"'
    got = bytearray()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head
        while len(got) < len(body):
            got.extend(await reader.read(30_000))
            await asyncio.sleep(0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def main() -> None:
        async with Rig(script) as rig:
            reader, writer = await rig.client()
            writer.write(post(body))
            assert (await read_answer(reader)).body == b"ok"
            assert bytes(got) == body
            writer.close()

    run(main())


class Watching:
    """An upstream that notes when its peer has gone, in one of the states an exchange can be in."""

    def __init__(self, answer: bytes = b"") -> None:
        self.answer = answer
        self.requested = asyncio.Event()
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_request(reader)
            self.requested.set()
            if self.answer:
                writer.write(self.answer)
            await reader.read()
        finally:
            self.gone.set()


def leave(client: socket.socket, how: str) -> None:
    if how == "rst":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()


@pytest.mark.parametrize("how", ["fin", "rst", "half"])
@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", CHUNKED + b"5\r\nhello\r\n"],
    ids=["wait", "unary", "stream"],
)
def test_when_the_client_goes_the_upstream_connection_goes_within_100_ms(how: str, answer: bytes) -> None:
    async def main() -> None:
        upstream = Watching(answer)
        async with Rig(upstream) as rig:
            loop = asyncio.get_running_loop()
            client = small_client(rig.port, 65_536)
            await loop.sock_sendall(client, post(b"{}"))
            await upstream.requested.wait()
            if answer:
                assert await loop.sock_recv(client, 10) == b"HTTP/1.1 2"
            await asyncio.sleep(0.05)
            assert not upstream.gone.is_set(), "and only then"
            leave(client, how)
            await asyncio.wait_for(upstream.gone.wait(), 0.1)
            await until(lambda: len(rig.walk.settled) == 1, "settled")
            assert rig.walk.settled[0]["outcome"] == "client_gone"
            assert rig.walk.settled[0]["status"] == (200 if answer else 499)
            client.close()

    run(main())


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_client_that_leaves_during_its_upload_settles_and_nothing_is_forwarded(how: str) -> None:
    async def main() -> None:
        upstream = Watching()
        async with Rig(upstream) as rig:
            client = small_client(rig.port, 65_536)
            await asyncio.get_running_loop().sock_sendall(
                client, b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 1000\r\n\r\n{"
            )
            await until(lambda: rig.core.in_flight == 1, "under way")
            leave(client, how)
            await until(lambda: len(rig.walk.settled) == 1, "settled")
            assert rig.walk.settled[0]["outcome"] == "client_gone"
            assert rig.upstream_connections == 0

    run(main())


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_departure_behind_a_paused_read_is_found_by_the_probe(how: str) -> None:
    """More than 64 KiB sent early pauses reading: the FIN behind them is found by TCP_INFO."""

    async def main() -> None:
        upstream = Watching(CHUNKED + b"5\r\nhello\r\n")
        async with Rig(upstream) as rig:
            loop = asyncio.get_running_loop()
            client = socket.socket()
            client.connect(("127.0.0.1", rig.port))
            client.setblocking(False)
            await loop.sock_sendall(client, post(b"{}"))
            await upstream.requested.wait()
            await loop.sock_sendall(client, post(b'"' + b"x" * 1000 + b'"') * 150)
            await asyncio.sleep(0.3)
            assert not upstream.gone.is_set()
            leave(client, how)
            await asyncio.wait_for(upstream.gone.wait(), 0.3)
            await until(lambda: len(rig.walk.settled) == 1, "settled")

    run(main())


def test_ten_thousand_pipelined_requests() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async def main() -> None:
        async with Rig(script) as rig:
            reader, writer = await rig.client()

            async def send() -> None:
                for n in range(10_000 - 1):
                    writer.write(post(b'{"n":%d}' % n))
                    await writer.drain()

            sending = asyncio.create_task(send())
            for n in range(10_000 - 1):
                assert (await read_answer(reader)).body == b'{"n":%d}' % n
            await sending
            assert rig.upstream_connections == 1
            writer.close()

    run(main())


def test_connections_beyond_the_limit_are_closed() -> None:
    async def main() -> None:
        async with Rig(Watching(), max_connections=5) as rig:
            kept = [await rig.client() for _ in range(5)]
            await until(lambda: rig.core.connections == 5, "accepted")
            reader, writer = await rig.client()
            with pytest.raises(ConnectionError):
                if await reader.read() == b"":
                    raise ConnectionResetError
            writer.close()
            for _, w in kept:
                w.close()

    run(main())


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
def test_a_reader_that_stalls_and_then_says_goodbye_is_let_go(tmp_path: Path, tls: bool) -> None:
    """Its FIN is departure (SEMANTICS 4): what it did not take is not waited for, though its end stays open."""
    pki = Pki(tmp_path)

    async def main() -> None:
        flood = Flood(chunks=20_000, size=10_000)
        async with Rig(flood, server_tls=pki.server() if tls else None) as rig:
            client = small_client(rig.port, 4096)
            loop = asyncio.get_running_loop()
            if tls:
                client = await loop.run_in_executor(None, shake_hands, client, pki)
                await loop.run_in_executor(None, client.sendall, post(b"{}"))
            else:
                await loop.sock_sendall(client, post(b"{}"))
            await until(lambda: rig.core.paused == 1, "the reader stalls")
            rig.ticking = False  # no deadline is needed
            with contextlib.suppress(OSError):
                socket.socket.shutdown(client, socket.SHUT_WR)
            await until(lambda: rig.core.connections == 0, "it is gone")
            await flood.gone.wait()
            assert [s["outcome"] for s in rig.walk.settled] == ["client_gone"]
            assert rig.core.paused == 0
            rig.ticking = True
            client.close()

    run(main())


def shake_hands(client: socket.socket, pki: Pki) -> ssl.SSLSocket:
    client.setblocking(True)
    return pki.trusting().wrap_socket(client, server_hostname="localhost")
