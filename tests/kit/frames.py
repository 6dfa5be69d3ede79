"""An HTTP/2 client for tests: the h2 library on an asyncio connection, or frames by hand."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hyperframe.frame as frames

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Headers = list[tuple[str, str]]


class Answered:
    """What came for one stream: ``status``, ``fields``, ``body``; ``reset`` is the code of an RST_STREAM."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}
        self.body = b""
        self.informational: list[int] = []
        self.ended = False
        self.reset: int | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class Client:
    """``async with Client(port) as c``: ``c.streams`` fills up while :meth:`until` reads."""

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        window: int = 65_535,
        acknowledge: bool = True,
        rcvbuf: int = 0,
    ) -> None:
        self.rcvbuf = rcvbuf
        self.port, self.tls, self.window, self.acknowledge = port, tls, window, acknowledge
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=True,
        )
        self.h2 = h2.connection.H2Connection(config)
        self.streams: dict[int, Answered] = {}
        self.goaway: int | None = None
        self.goaways: list[tuple[int, int]] = []  # last stream, code
        self.closed = False
        self.partial = b""
        self.rude = False
        self.before = b""  # sent first: the header of a proxy
        self.events: list[Any] = []

    async def __aenter__(self) -> Client:
        sock = socket.socket()
        if self.rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.rcvbuf)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        self.reader, self.writer = await asyncio.open_connection(
            sock=sock, ssl=self.tls, server_hostname="localhost" if self.tls else None
        )
        self.writer.write(self.before)
        self.h2.initiate_connection()
        if self.window != 65_535:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: self.window})
        self.flush()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.close()

    def flush(self) -> None:
        """Send what the library has to say."""
        data = self.h2.data_to_send()
        if data:
            self.writer.write(data)

    def raw(self, *frames_: frames.Frame | bytes) -> None:
        """Send what the library would not, which is confused by some of the answers from then on."""
        self.rude = True
        self.writer.write(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames_))

    def head(self, path: str = "/v1/chat/completions", method: str = "POST", **fields: str) -> Headers:
        head = [(":method", method), (":scheme", "http"), (":authority", "gateway"), (":path", path)]
        return head + [(name.replace("_", "-"), value) for name, value in fields.items()]

    def begin(self, head: Headers, *, end: bool = False) -> int:
        stream = self.h2.get_next_available_stream_id()
        self.streams[stream] = Answered()
        self.h2.send_headers(stream, head, end_stream=end)
        self.flush()
        return stream

    def ask(self, body: bytes | dict[str, Any], head: Headers | None = None) -> int:
        """A whole request; its stream."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        stream = self.h2.get_next_available_stream_id()
        self.streams[stream] = Answered()
        self.h2.send_headers(stream, head or self.head(content_length=str(len(data))), end_stream=not data)
        for at in range(0, len(data), 16_384):
            self.h2.send_data(stream, data[at : at + 16_384], end_stream=at + 16_384 >= len(data))
        self.flush()
        return stream

    def take(self, data: bytes) -> None:
        """Frames from the server. The library takes any GOAWAY for the end, so it is not told of one."""
        self.partial += data
        rest = b""
        while len(self.partial) >= 9:
            frame, length = frames.Frame.parse_frame_header(memoryview(self.partial[:9]))
            if len(self.partial) < 9 + length:
                break
            whole, self.partial = self.partial[: 9 + length], self.partial[9 + length :]
            if isinstance(frame, frames.GoAwayFrame):
                frame.parse_body(memoryview(whole[9:]))
                self.goaway = frame.error_code
                self.goaways.append((frame.last_stream_id, frame.error_code))
            else:
                rest += whole
        try:
            events = self.h2.receive_data(rest)
        except h2.exceptions.ProtocolError:
            if not self.rude:
                raise
            self.h2.clear_outbound_data_buffer()  # its GOAWAY
            return
        for event in events:
            self.events.append(event)
            match event:
                case h2.events.ResponseReceived():
                    answer = self.streams[event.stream_id]
                    answer.fields = dict(event.headers)
                    answer.status = int(answer.fields.pop(":status"))
                case h2.events.InformationalResponseReceived():
                    self.streams[event.stream_id].informational.append(int(dict(event.headers)[":status"]))
                case h2.events.DataReceived():
                    self.streams[event.stream_id].body += event.data
                    if self.acknowledge:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    self.streams[event.stream_id].ended = True
                case h2.events.StreamReset() if event.stream_id in self.streams:
                    self.streams[event.stream_id].reset = int(event.error_code)

    async def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Read until the condition holds or the connection ends; then it must hold."""
        while not condition() and not self.closed:
            try:
                data = await asyncio.wait_for(self.reader.read(65_536), 10)
            except TimeoutError:
                raise AssertionError(f"never came: {what}") from None
            except ConnectionError:
                data = b""
            if not data:
                self.closed = True
                break
            self.take(data)
            self.flush()
        assert condition(), f"the connection ended before: {what}"

    async def answer(self, stream: int) -> Answered:
        await self.until(lambda: self.streams[stream].over, f"the end of stream {stream}")
        return self.streams[stream]

    async def ended(self) -> int | None:
        """Read to the end of the connection; the code of its GOAWAY."""
        while not self.closed:
            try:
                data = await asyncio.wait_for(self.reader.read(65_536), 10)
            except ConnectionError:
                data = b""
            if not data:
                self.closed = True
            else:
                self.take(data)
                self.flush()
        return self.goaway
