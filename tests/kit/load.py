"""A light open-loop load on a real service: unary and streamed, plaintext and TLS, fresh and kept connections.

Every answer must be whole and carry its own request's marker. As a program (``python -m tests.kit.load JSON``) it runs
until its standard input ends, then prints ``{"sent", "failures"}``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import sys
from dataclasses import dataclass, field
from typing import Any

from tests.kit.rig import post, read_answer

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
ANSWER_S = 30


@dataclass
class Load:
    """``rate`` requests a second. ``ca`` is the file that the service's certificate is verified with."""

    key: str
    http_port: int
    https_port: int
    ca: str
    rate: int = 60
    model: str = "sim-chat"
    sent: int = 0
    failures: list[str] = field(default_factory=list)
    _idle: dict[bool, list[Connection]] = field(default_factory=lambda: {False: [], True: []})
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, stop: asyncio.Event) -> None:
        """Send until ``stop``, then wait for what is under way."""
        loop = asyncio.get_running_loop()
        begin, verify = loop.time(), ssl.create_default_context(cafile=self.ca)
        for n in itertools.count():
            if stop.is_set():
                break
            await asyncio.sleep(max(0.0, begin + n / self.rate - loop.time()))
            task = loop.create_task(self._one(n, verify))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)
        for connections in self._idle.values():
            for _, writer in connections:
                writer.close()

    async def _one(self, n: int, verify: ssl.SSLContext) -> None:
        tls, stream, kept = n % 2 == 1, n % 4 >= 2, n % 8 >= 4
        self.sent += 1
        writer = None
        try:
            async with asyncio.timeout(ANSWER_S):
                if kept and self._idle[tls]:
                    reader, writer = self._idle[tls].pop()
                elif tls:
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", self.https_port, ssl=verify, server_hostname="localhost"
                    )
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.http_port)
                marker = f"marker-{n}-of-this-load"
                message = {"role": "user", "content": f"say {marker}"}
                body = {"model": self.model, "user": marker, "messages": [message], "stream": stream}
                writer.write(post(body, f"Authorization: Bearer {self.key}", "Content-Type: application/json"))
                answer = await read_answer(reader)
            text = _text(answer.body, stream) if answer.status == 200 else None
            if text is None or marker not in text:
                self.failures.append(f"{n} tls={tls} stream={stream}: {answer.status} {answer.body[-200:]!r}")
            elif answer.fields.get("connection") == "close" or not kept:
                writer.close()
            else:
                self._idle[tls].append((reader, writer))
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            self.failures.append(f"{n} tls={tls} stream={stream} kept={kept}: {type(error).__name__}: {error}")
            if writer is not None:
                writer.close()


def _text(body: bytes, stream: bool) -> str | None:
    """What a chat answer says; None for a stream without its end."""
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    frames = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    if not frames or frames[-1] != "[DONE]":
        return None
    choices: list[Any] = [choice for frame in frames[:-1] for choice in json.loads(frame)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def _until_input_ends(load: Load) -> None:
    stop = asyncio.Event()

    async def wait() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stop.set()

    await asyncio.gather(load.run(stop), wait())


if __name__ == "__main__":
    given = Load(**json.loads(sys.argv[1]))
    asyncio.run(_until_input_ends(given))
    sys.stdout.write(json.dumps({"sent": given.sent, "failures": given.failures}) + "\n")
