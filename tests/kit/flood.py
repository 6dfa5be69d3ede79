"""A model server that talks as fast as it is let: ``python -m tests.kit.flood PORT``.

Every POST that asks for a stream gets an endless one of 16 KB events, each with the request's ``user`` and its number,
until the peer goes away (or ``max_tokens`` of them); any other gets one answer of as many times 16 KB. The simulator
makes tokens one by one; this fills a thousand sockets in seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%b %08d %b"},"finish_reason":null}]}\n\n'
FILL = b"x" * 16_000
UNARY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n",
    b'{"choices":[{"index":0,"message":{"role":"assistant","content":"',
    b'"},"finish_reason":"stop"}]}',
)


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
            request = json.loads(await reader.readexactly(length))
            user = request.get("user", "nobody").encode()
            if not request.get("stream"):
                await say(writer, request.get("max_tokens") or 64)
                continue
            writer.write(HEAD)
            for number in range(request.get("max_tokens") or 1 << 30):
                event = EVENT % (user, number, FILL)
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    except (ConnectionError, asyncio.IncompleteReadError):
        writer.close()


async def say(writer: asyncio.StreamWriter, times: int) -> None:
    """One answer of ``times`` 16 KB."""
    head, before, behind = UNARY
    writer.write(head % (len(before) + times * len(FILL) + len(behind)) + before)
    for _ in range(times):
        writer.write(FILL)
        await writer.drain()
    writer.write(behind)


async def main(port: int) -> None:
    server = await asyncio.start_server(talk, "127.0.0.1", port, backlog=2048)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
