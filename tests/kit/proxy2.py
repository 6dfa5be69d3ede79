"""PROXY v2 headers (haproxy.org, proxy-protocol.txt, 2.2), good ones and, by name, some that are not."""

from __future__ import annotations

import ipaddress
import struct

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21
TCP4, TCP6, UNIX_STREAM, UNSPEC = 0x11, 0x21, 0x31, 0x00
NOOP, CRC32C = 0x04, 0x03
SERVER = {4: "192.0.2.1", 6: "2001:db8::1"}


def raw(command: int, family: int, block: bytes, *, length: int | None = None) -> bytes:
    """A header of these parts, whatever they are."""
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


def block(source: str, port: int = 40_000) -> bytes:
    """The addresses of a connection from ``source`` to port 443."""
    address = ipaddress.ip_address(source)
    server = ipaddress.ip_address(SERVER[address.version])
    return address.packed + server.packed + struct.pack("!HH", port, 443)


def header(source: str, port: int = 40_000, *, tlvs: bytes = b"", checksum: bool = False) -> bytes:
    """A good header for a caller from ``source``."""
    family = TCP4 if ipaddress.ip_address(source).version == 4 else TCP6
    start = block(source, port) + tlvs
    if not checksum:
        return raw(PROXY, family, start)
    empty = raw(PROXY, family, start + tlv(CRC32C, bytes(4)))
    return empty[:-4] + struct.pack("!I", crc32c(empty))


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def crc32c(data: bytes) -> int:
    """RFC 4960, appendix B."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def malformed() -> dict[str, tuple[bytes, str]]:
    """What a listener with ``proxy_protocol`` closes at once: the bytes, and a part of the reason."""
    good = header("203.0.113.7")
    summed = header("203.0.113.7", checksum=True)
    return {
        "HTTP": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", "there is none"),
        "TLS": (bytes.fromhex("16030100c8010000c40303") + bytes(190), "there is none"),
        "empty lines, then HTTP": (b"\r\n\r\nGET / HTTP/1.1\r\n\r\n", "there is none"),
        "version 1": (b"PROXY TCP4 203.0.113.7 192.0.2.1 40000 443\r\nGET / HTTP/1.1\r\n\r\n", "version 1"),
        "signature with another end": (good[:11] + b"\r" + good[12:], "there is none"),
        "version 3": (good[:12] + b"\x31" + good[13:], "version"),
        "command 2": (good[:12] + b"\x22" + good[13:], "command"),
        "family 4": (good[:13] + b"\x41" + good[14:], "family"),
        "transport 3": (good[:13] + b"\x13" + good[14:], "transport"),
        "address cut off": (raw(PROXY, TCP4, block("203.0.113.7")[:-1]), "cut off"),
        "IPv6 in an IPv4 block": (raw(PROXY, TCP6, block("203.0.113.7")), "cut off"),
        "Unix address cut off": (raw(PROXY, UNIX_STREAM, bytes(215)), "cut off"),
        "as long as can be": (raw(PROXY, TCP4, block("203.0.113.7"), length=0xFFFF), "longer than 4096"),
        "LOCAL as long as can be": (raw(LOCAL, UNSPEC, b"", length=0xFFFF), "longer than 4096"),
        "TLV cut off": (header("203.0.113.7", tlvs=b"\x04\x00"), "TLV"),
        "TLV beyond the end": (header("203.0.113.7", tlvs=b"\x04\x00\x05abcd"), "TLV"),
        "TLV far beyond the end": (header("203.0.113.7", tlvs=b"\x04\xff\xff"), "TLV"),
        "checksum of another header": (summed[:-1] + bytes([summed[-1] ^ 1]), "checksum"),
        "address changed below the checksum": (summed[:19] + b"\x08" + summed[20:], "checksum"),
        "short checksum": (header("203.0.113.7", tlvs=tlv(CRC32C, b"abc")), "checksum"),
        "two checksums": (header("203.0.113.7", tlvs=tlv(CRC32C, bytes(4)) * 2), "checksums"),
    }
