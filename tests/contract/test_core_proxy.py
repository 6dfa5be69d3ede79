"""Whom a connection speaks for: the PROXY header at its beginning and X-Forwarded-For in its requests, believed from
trusted peers only; what is counted by address, written in access lines and told to the walk.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from ascproxy import _native
from tests.contract.test_core_limits import CHAT, answers, lines, trips
from tests.contract.test_core_tls import Pki
from tests.kit import proxy2
from tests.kit.proxy2 import header
from tests.kit.rig import Forwarder, Rig, post, read_answer, run, until

CALLER = "203.0.113.7"
LOCAL_NET = ("127.0.0.0/8",)


class Asked(Forwarder):
    """Remembers whom the walk was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[str] = []

    def on_request(self, s: _native.Stream) -> None:
        self.peers.append(s.peer)
        super().on_request(s)


def proxied(**more: Any) -> Rig:
    """A listener that takes PROXY headers from loopback."""
    return Rig(answers, walk=Asked(), proxy_protocol=True, **({"trusted": LOCAL_NET} | more))


def told(rig: Rig) -> list[str]:
    assert isinstance(rig.walk, Asked)
    return rig.walk.peers


async def gone(reader: asyncio.StreamReader) -> bool:
    """Whether the other end closes without a byte."""
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


def unread(port: int) -> int:
    """Bytes that wait in the kernel for whoever listens at ``port``."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].split(":")[1], 16) for row in rows if int(row[1].split(":")[1], 16) == port)


async def taken(rig: Rig, writer: asyncio.StreamWriter) -> None:
    """What was sent so far was read: what is sent from now on comes in another piece."""

    def all_of_it() -> bool:
        sent = writer.transport.get_write_buffer_size() == 0
        return sent and rig.core.connections == 1 and unread(rig.port) == 0

    await until(all_of_it, "it is read")


GOOD = {
    "IPv4": (header(CALLER), f"{CALLER}:40000"),
    "IPv6": (header("2001:db8::7", 1), "[2001:db8::7]:1"),
    "TLVs": (header(CALLER, tlvs=proxy2.tlv(0x05, b"id") + proxy2.tlv(0xEE, bytes(300))), f"{CALLER}:40000"),
    "checksum": (header(CALLER, tlvs=proxy2.tlv(proxy2.NOOP, b""), checksum=True), f"{CALLER}:40000"),
    "Unix": (proxy2.raw(proxy2.PROXY, proxy2.UNIX_STREAM, bytes(216)), "unix"),
}
REAL = {
    "LOCAL": proxy2.raw(proxy2.LOCAL, proxy2.UNSPEC, b""),
    "LOCAL with an address": proxy2.raw(proxy2.LOCAL, proxy2.TCP4, proxy2.block(CALLER)),
    "LOCAL with anything": proxy2.raw(proxy2.LOCAL, 0xFF, b"what"),
    "UNSPEC": proxy2.raw(proxy2.PROXY, proxy2.UNSPEC, b"\xff\xff\xff"),
}


@pytest.mark.parametrize("pieces", ["whole", "bytes", "request behind"])
@pytest.mark.parametrize("name", GOOD)
def test_a_header_says_who_the_caller_is(name: str, pieces: str) -> None:
    data, client = GOOD[name]

    async def main() -> None:
        async with proxied(header_timeout_ms=60_000) as rig:
            reader, writer = await rig.client()
            if pieces == "bytes":
                one_by_one = 32  # over all parts of a header with IPv4; the rest at once
                for i in range(min(len(data), one_by_one)):
                    writer.write(data[i : i + 1])
                    await taken(rig, writer)
                writer.write(data[one_by_one:])
            elif pieces == "whole":
                writer.write(data)
                await taken(rig, writer)
            writer.write((data if pieces == "request behind" else b"") + post(CHAT) + post(CHAT))
            for _ in range(2):
                assert (await read_answer(reader)).status == 200
            name = writer.get_extra_info("sockname")
            assert [(line["client"], line["peer"]) for line in lines(rig)] == [(client, f"127.0.0.1:{name[1]}")] * 2
            assert told(rig) == [client] * 2
            assert trips(rig) == {}
            assert rig.listener.take_refused() is None
            writer.close()

    run(main())


@pytest.mark.parametrize("name", REAL)
def test_without_an_address_the_peer_is_the_caller(name: str) -> None:
    async def main() -> None:
        async with proxied() as rig:
            reader, writer = await rig.client()
            writer.write(REAL[name] + post(CHAT))
            assert (await read_answer(reader)).status == 200
            (line,) = lines(rig)
            assert "client" not in line
            assert told(rig) == [line["peer"]]
            writer.close()

    run(main())


def hello(context: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """A client's end of TLS without a socket: its ClientHello is in the third."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return client, incoming, outgoing


@pytest.mark.parametrize("cut", [0, 5, 16, 28, 40])
def test_a_header_before_tls(tmp_path: Path, cut: int) -> None:
    """In one piece with the ClientHello, and cut where it is awkward."""
    pki = Pki(tmp_path)

    async def main() -> None:
        async with proxied(server_tls=pki.server()) as rig:
            reader, writer = await rig.client()
            client, incoming, outgoing = hello(pki.trusting())
            data = header(CALLER) + outgoing.read()
            for piece in (data[:cut], data[cut:]):
                if piece:
                    writer.write(piece)
                    await taken(rig, writer)

            async def step(what: Any) -> Any:
                while True:
                    try:
                        result = what()
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await reader.read(65536))
                    else:
                        writer.write(outgoing.read())
                        return result

            await step(client.do_handshake)
            await step(lambda: client.write(post(CHAT)))
            assert (await step(lambda: client.read(65536))).startswith(b"HTTP/1.1 200 ")
            assert [line["client"] for line in lines(rig)] == [f"{CALLER}:40000"]
            assert trips(rig) == {}
            writer.close()

    run(main())


@pytest.mark.parametrize("name", proxy2.malformed())
def test_a_header_that_is_none_closes_the_connection_at_once(name: str) -> None:
    data, reason = proxy2.malformed()[name]

    async def main() -> None:
        async with proxied() as rig:
            reader, writer = await rig.client()
            writer.write(data + post(CHAT))
            assert await gone(reader)
            assert trips(rig) == {"proxy_header": 1}
            refused = rig.listener.take_refused()
            assert refused is not None
            count, why, peer = refused
            assert (count, peer) == (1, f"127.0.0.1:{writer.get_extra_info('sockname')[1]}")
            assert reason in why
            assert rig.listener.take_refused() is None
            assert (rig.walk.heads, told(rig), rig.core.take_log()) == (0, [], b"")
            writer.close()

    run(main())


def test_only_trusted_peers_may_connect() -> None:
    async def main() -> None:
        async with proxied(trusted=("192.0.2.0/24", "2001:db8::/32")) as rig:
            for n in range(2):  # loopback is exempt from the caps and not trusted with this
                reader, writer = await rig.client()
                writer.write(header(CALLER) + post(CHAT))
                assert await gone(reader)
                assert trips(rig) == {"proxy_untrusted": n + 1}
                writer.close()
            assert (rig.listener.take_refused() or ("", ""))[:2] == (2, "it is none of trusted_peers")
            assert (told(rig), rig.core.take_log()) == ([], b"")

    run(main())


@pytest.mark.parametrize("start", [b"", header(CALLER)[:1], header(CALLER)[:20]], ids=["nothing", "a byte", "a part"])
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
def test_a_header_has_a_deadline(tmp_path: Path, tls: bool, start: bytes) -> None:
    pki = Pki(tmp_path)
    limit = "tls_handshake" if tls else "header_timeout"

    async def main() -> None:
        async with proxied(server_tls=pki.server() if tls else None, **{f"{limit}_ms": 200}) as rig:
            reader, writer = await rig.client()
            writer.write(start)
            assert await gone(reader)
            assert trips(rig) == {limit: 1}
            assert "in time" in (rig.listener.take_refused() or ("", ""))[1]
            assert rig.core.take_log() == b""
            writer.close()

    run(main())


def test_who_leaves_before_the_header_is_no_offender() -> None:
    """A check of a load balancer that only connects."""

    async def main() -> None:
        async with proxied() as rig:
            for start in (b"", header(CALLER)[:20]):
                _, writer = await rig.client()
                writer.write(start)
                await taken(rig, writer)
                writer.close()
                await until(lambda: rig.core.connections == 0, "it is gone")
            assert trips(rig) == {}
            assert rig.listener.take_refused() is None

    run(main())


def test_caps_count_the_caller_and_not_the_load_balancer() -> None:
    async def main() -> None:
        async with proxied(max_connections_per_ip=2, max_unauthenticated_per_ip=2) as rig:
            opened = []

            async def comes(data: bytes) -> bool:
                reader, writer = await rig.client()
                writer.write(data + post(CHAT))
                opened.append(writer)
                try:
                    return (await read_answer(reader)).status == 200
                except (asyncio.IncompleteReadError, ConnectionResetError):
                    return False

            assert [await comes(header(CALLER)) for _ in range(3)] == [True, True, False]
            assert trips(rig) == {"max_connections_per_ip": 1}
            assert await comes(header("203.0.113.8")), "another caller has a share of its own"
            assert [await comes(header(f"2001:db8::{n}")) for n in (1, 2, 3)] == [True, True, False], "one /64"
            assert all([await comes(REAL["LOCAL"]) for _ in range(5)]), "the load balancer itself is exempt"
            assert all([await comes(header("127.0.0.1")) for _ in range(5)]), "a caller that is exempt stays so"
            opened[0].close()
            await until(lambda: rig.core.connections == 15 - 1, "a place is free")
            assert await comes(header(CALLER))
            assert rig.listener.take_refused() is None, "a cap is no fault of the header"
            for writer in opened:
                writer.close()

    run(main())


def test_a_header_where_none_is_wanted_is_a_bad_request() -> None:
    async def main() -> None:
        async with Rig(answers, trusted=LOCAL_NET) as rig:
            reader, writer = await rig.client()
            writer.write(header(CALLER) + post(CHAT))
            assert (await read_answer(reader)).status == 400
            assert "client" not in lines(rig)[0]
            writer.close()

    run(main())


def test_a_second_header_is_a_bad_request() -> None:
    async def main() -> None:
        async with proxied() as rig:
            reader, writer = await rig.client()
            writer.write(header(CALLER) + header("198.51.100.1") + post(CHAT))
            assert (await read_answer(reader)).status == 400
            assert [line["client"] for line in lines(rig)] == [f"{CALLER}:40000"]
            writer.close()

    run(main())


def test_a_unix_socket_takes_a_header_of_everybody_who_may_open_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with proxied(trusted=()) as rig:
            path = str(tmp_path / "s")
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path)
                listening.listen()
                server = rig.core.listen(rig.listener, listening.fileno())
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(header(CALLER) + post(CHAT))
            assert (await read_answer(reader)).status == 200
            (line,) = lines(rig)
            assert (line["peer"], line["client"]) == ("unix", f"{CALLER}:40000")
            writer.close()
            server.close()

    run(main())


# what is trusted besides loopback, the fields, and who the caller is then ("" the peer itself)
FORWARDED: dict[str, tuple[tuple[str, ...], list[str], str]] = {
    "one": ((), ["X-Forwarded-For: 203.0.113.7"], "203.0.113.7"),
    "the right-most": ((), ["X-Forwarded-For: 192.0.2.66, 203.0.113.7"], "203.0.113.7"),
    "right of it all trusted": (
        ("10.0.0.0/8",),
        ["x-forwarded-for: 192.0.2.66, 203.0.113.7,10.0.0.1:80 , 10.255.0.1"],
        "203.0.113.7",
    ),
    "over several fields": (
        ("10.0.0.0/8",),
        ["X-Forwarded-For: 192.0.2.66", "X-Forwarded-For: 203.0.113.7", "Accept: a/b", "X-FORWARDED-FOR: 10.0.0.1"],
        "203.0.113.7",
    ),
    "all trusted": (("10.0.0.0/8",), ["X-Forwarded-For: 10.0.0.1, 10.0.0.2"], "10.0.0.1"),
    "IPv6": ((), ["X-Forwarded-For: [2001:DB8::7]:443"], "2001:db8::7"),
    "a word": (("10.0.0.0/8",), ["X-Forwarded-For: 203.0.113.7, unknown, 10.0.0.1"], ""),
    "empty": ((), ["X-Forwarded-For: , ,"], ""),
    "none": ((), [], ""),
    "another field": ((), ["Forwarded: for=203.0.113.7", "X-Real-IP: 203.0.113.7"], ""),
    "longer than anybody's chain": (("10.0.0.0/8",), ["X-Forwarded-For: 203.0.113.7" + ",10.0.0.1" * 64], ""),
}


@pytest.mark.parametrize("name", FORWARDED)
def test_a_trusted_peer_names_the_caller_of_each_request(name: str) -> None:
    trusted, fields, client = FORWARDED[name]

    async def main() -> None:
        async with Rig(answers, walk=Asked(), trusted=LOCAL_NET + trusted) as rig:
            reader, writer = await rig.client()
            writer.write(post(CHAT, *fields) + post(CHAT))
            for _ in range(2):
                assert (await read_answer(reader)).status == 200
            first, second = lines(rig)
            assert first.get("client", "") == client
            assert "client" not in second, "a field is of its request"
            assert told(rig) == [client or first["peer"], second["peer"]]
            writer.close()

    run(main())


def test_nobody_else_names_a_caller() -> None:
    async def main() -> None:
        async with Rig(answers, walk=Asked(), trusted=("10.0.0.0/8",)) as rig:
            reader, writer = await rig.client()
            writer.write(post(CHAT, "X-Forwarded-For: 203.0.113.7"))
            assert (await read_answer(reader)).status == 200
            (line,) = lines(rig)
            assert "client" not in line
            assert told(rig) == [line["peer"]]
            writer.close()

    run(main())


@pytest.mark.parametrize(("behind", "client"), [(CALLER, f"{CALLER}:40000"), ("10.0.0.9", "198.51.100.1")])
def test_behind_a_header_the_one_whom_it_names_has_to_be_trusted(behind: str, client: str) -> None:
    """A load balancer of connections before one of requests; a caller of the first alone cannot name anybody."""

    async def main() -> None:
        async with proxied(trusted=(*LOCAL_NET, "10.0.0.0/8")) as rig:
            reader, writer = await rig.client()
            writer.write(header(behind) + post(CHAT, "X-Forwarded-For: 198.51.100.1"))
            assert (await read_answer(reader)).status == 200
            assert [line["client"] for line in lines(rig)] == [client]
            assert told(rig) == [client]
            writer.close()

    run(main())


def test_a_drain_lets_a_header_come() -> None:
    """A connection that was accepted before the drain is served."""

    async def main() -> None:
        async with proxied() as rig:
            reader, writer = await rig.client()
            writer.write(header(CALLER)[:20])
            await taken(rig, writer)
            rig.core.drain(2**62, 2**62, 10_000_000_000)
            writer.write(header(CALLER)[20:] + post(CHAT))
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            writer.close()

    run(main())


def test_the_last_bytes_of_a_header_with_a_whole_read_behind_them() -> None:
    """What was held and what follows come in one piece, longer than a read."""

    async def main() -> None:
        async with proxied() as rig:
            reader, writer = await rig.client()
            body = {"model": "m", "messages": [], "user": "x" * 200_000}
            writer.write(header(CALLER)[:27])
            await taken(rig, writer)
            writer.write(header(CALLER)[27:] + post(body))
            assert (await read_answer(reader)).status == 200
            assert [line["client"] for line in lines(rig)] == [f"{CALLER}:40000"]
            writer.close()

    run(main())
