"""People who read along. Three rows: `stream` until the head, `first token`, `last token`."""

from __future__ import annotations

import json
import time

from caller import Caller
from locust import between, task


class Reader(Caller):
    """One streamed chat every one to three seconds."""

    wait_time = between(1, 3)

    @task
    def read(self) -> None:
        """One stream to its [DONE]."""
        body, marker = self.chat(stream=True)
        begin = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, name="stream", stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                return answer.failure(f"status {answer.status_code}: {answer.text}")
            try:
                said = self.follow(answer.stream, begin)
            except (ValueError, KeyError, TypeError, OSError) as error:
                return answer.failure(f"{type(error).__name__}: {error}")
            wrong = self.wrong(said, marker)
            return answer.failure(wrong) if wrong else answer.success()

    def follow(self, lines, begin: float) -> str:
        """Reads the events as they come and notes when; the whole text. ValueError when the stream breaks off."""
        said: list[str] = []
        while line := lines.readline(b"\n"):
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                self.note("last token", begin)
                lines.read()  # to the end of the body, so that the connection is kept
                return "".join(said)
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(f"an error in the stream: {event['error']}")
            for choice in event["choices"]:
                piece = choice["delta"].get("content")
                if piece and not said:
                    self.note("first token", begin)
                said += [piece] if piece else []
        raise ValueError("the stream ended without [DONE]")

    def note(self, name: str, begin: float) -> None:
        """A row of its own in the statistics."""
        passed_ms = (time.perf_counter() - begin) * 1000
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=passed_ms, response_length=0, exception=None, context={}
        )
