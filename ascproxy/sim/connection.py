"""One connection of the simulator: requests in, answers out at their pace, and an end at once when the client goes.

One connection handles one request at a time and keeps what was pipelined. While it answers it goes on reading, because
a FIN from the client must stop generation at once: vLLM takes even a half-close for an abort (seen on the wire).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from ascproxy.sim.answer import Event
from ascproxy.sim.failure import End, Reply
from ascproxy.sim.recording import CONTINUE
from ascproxy.sim.request import Malformed, Reader, Request

if TYPE_CHECKING:
    from ascproxy.sim.server import Server

BURST = 64  # pieces joined into one write when no pace is asked for
COMMENT_EVERY_S = 0.1
COMMENT = b"3\r\n:\n\n\r\n"
MALFORMED_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n\r\n"
    b"Invalid HTTP request received."
)


class Connection(asyncio.Protocol):
    """One client connection. ``_pieces`` is the answer under way; None means that a request is awaited."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._gauges = server.gauges
        self._reader = Reader()
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.request: Request | None = None
        self._pieces: Iterator[Event] | None = None
        self._held: Event | None = None
        self._end = End.KEEP
        self._rate = 0.0
        self._generates = False
        self._made = 0  # tokens sent
        self._clock = 0.0  # loop time at which the token after them began
        self._unsent = b""  # what --split still has to send, from _sent on
        self._sent = 0
        self._paused = False
        self._lost = False
        self._private = False  # speaks to /sim/ only
        self._fresh = True
        self._continued = False
        self._timer: asyncio.Handle | None = None

    # -- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.connections.add(self)
        self._gauges.connections += 1
        self._gauges.connections_open += 1

    def data_received(self, data: bytes) -> None:
        self._gauges.bytes_received += len(data)
        self._reader.feed(data)
        if self._pieces is None and not self._lost:
            self._stop_timer()
            self._serve()

    def eof_received(self) -> bool:
        self._leave()
        return False  # the transport flushes and closes: a client that half-closes gets nothing more

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the reason does not matter
        self._leave()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._pieces is not None and self._timer is None and not self._lost:
            self._go_on()

    # -- requests

    def _serve(self) -> None:
        """Answer requests as long as whole ones are here and each is answered at once."""
        while self._pieces is None and not self._lost:
            try:
                request = self._reader.next()
            except Malformed:
                self._gauges.malformed += 1
                self._transport.write(MALFORMED_ANSWER)
                self._close()
                return
            if request is None:
                if self._reader.expects():
                    self._continued = True
                    self._transport.write(CONTINUE)
                return
            self._note(request)
            self.request = request
            reply, generates = self._server.reply(request, continued=self._continued)
            self._continued = False
            if not self._lost:
                self._begin(reply, generates)

    def _note(self, request: Request) -> None:
        gauges = self._gauges
        if request.path.startswith("/sim/"):
            gauges.bytes_received -= len(request.head) + 4 + len(request.body)
            if self._fresh:
                self._private = True
                gauges.connections -= 1
                gauges.connections_open -= 1
        else:
            gauges.requests += 1
            gauges.last = request
        self._fresh = False

    def _begin(self, reply: Reply, generates: bool) -> None:
        self._pieces, self._end = reply.pieces, reply.end
        self._generates = generates
        self._rate = self._server.settings.rate if generates else 0.0
        self._made = 0
        self._clock = self._loop.time()
        self._gauges.running += generates
        if reply.delay > 0:
            self._timer = self._loop.call_later(reply.delay, self._first)
        else:
            self._go_on()

    def _first(self) -> None:
        self._clock = self._loop.time()
        self._go_on()

    def progress(self) -> int:
        """Tokens that the running generation has made by now, sent or not."""
        if not self._generates or self._pieces is None:
            return 0
        made = self._made
        if self._held is not None and self._rate > 0:
            made += max(0, min(self._held[0], int((self._loop.time() - self._clock) * self._rate)))
        return made

    # -- answers

    def _go_on(self) -> None:
        """Send what is due; come back when the next piece is, when the peer reads again, or never."""
        self._timer = None
        if self._sent < len(self._unsent):
            self._drip()
            return
        ready: list[bytes] = []
        pieces = self._pieces
        assert pieces is not None
        while not self._paused:
            event = self._held or next(pieces, None)
            self._held = None
            if event is None:
                self._send(b"".join(ready), last=True)
                return
            tokens, data = event
            if tokens and self._rate > 0:
                # The pace is kept against the clock of the last token, so that late wake-ups do not add up.
                due = self._clock + tokens / self._rate
                if due > self._loop.time():
                    self._held = event
                    if self._send(b"".join(ready), last=False):
                        self._timer = self._loop.call_at(due, self._go_on)
                    return
                self._clock = due
            self._made += tokens
            ready.append(data)
            if len(ready) == BURST:
                if self._send(b"".join(ready), last=False):
                    self._timer = self._loop.call_soon(self._go_on)
                return
        self._send(b"".join(ready), last=False)

    def _send(self, data: bytes, *, last: bool) -> bool:
        """Write ``data``, or begin to drip it. Returns whether it is written; then ``last`` ends the answer."""
        split = self._server.settings.split
        if split and len(data) > split and not self._private:
            self._unsent, self._sent = data, 0
            self._drip()
            return False
        if data:
            self._transport.write(data)
        if last:
            self._finish()
        return True

    def _drip(self) -> None:
        """One piece per turn of the loop, because the transport joins the writes of one turn into one send."""
        self._timer = None
        if self._paused:
            return
        end = self._sent + max(1, self._server.settings.split)
        self._transport.write(self._unsent[self._sent : end])
        self._sent = end
        if self._sent >= len(self._unsent):
            self._unsent, self._sent = b"", 0
        gap = self._server.settings.gap
        self._timer = self._loop.call_later(gap, self._go_on) if gap else self._loop.call_soon(self._go_on)

    def _finish(self) -> None:
        """The last piece is written: end the answer as it was planned."""
        match self._end:
            case End.HANG:
                return  # running until the client goes
            case End.COMMENT:
                self._comment()
                return
            case End.RESET:
                self._flush_then_reset()
                return
        self._settle()
        self.request = None
        if self._end is End.CLOSE:
            self._close()
            return
        idle = self._server.dialect.idle_close_s
        if self._reader.pending:
            self._timer = None
            self._loop.call_soon(self._serve)  # not from here: _serve may be what called us
        elif idle is not None:
            self._timer = self._loop.call_later(idle, self._close)

    def _comment(self) -> None:
        if not self._paused:
            self._transport.write(COMMENT)
        self._timer = self._loop.call_later(COMMENT_EVERY_S, self._comment)

    def _flush_then_reset(self) -> None:
        if self._transport.get_write_buffer_size() > 0:
            self._timer = self._loop.call_later(0.001, self._flush_then_reset)
            return
        self.reset()

    # -- ends

    def _settle(self) -> None:
        """Count the generation, whole or not, and forget the answer."""
        if self._generates:
            self._gauges.finished_tokens += self.progress()
            self._gauges.running -= 1
            self._generates = False
        self._pieces = self._held = None
        self._unsent, self._sent = b"", 0

    def _leave(self) -> None:
        """The client is gone, or we are: stop at once."""
        if self._lost:
            return
        self._lost = True
        self._stop_timer()
        self._server.connections.discard(self)
        if not self._private:
            self._gauges.connections_open -= 1
        if self._pieces is not None:
            self._gauges.aborted += not self._private
            self._settle()
        elif self._reader.pending:
            self._gauges.incomplete += 1

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._leave()
        self._transport.close()

    def reset(self) -> None:
        """End the connection with RST (SO_LINGER of 0 seconds, then close)."""
        if self._pieces is not None:
            self._settle()
        self._leave()
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
