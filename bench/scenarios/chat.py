"""People who ask, read the answer, and ask again."""

from __future__ import annotations

from caller import Caller, content
from locust import between, task


class Chat(Caller):
    """One chat completion every one to three seconds."""

    wait_time = between(1, 3)

    @task
    def ask(self) -> None:
        """One answer, whole."""
        body, marker = self.chat()
        with self.client.post("/v1/chat/completions", json=body, name="chat", catch_response=True) as answer:
            if answer.status_code != 200:
                return answer.failure(f"status {answer.status_code}: {answer.text}")
            try:
                wrong = self.wrong(content(answer.text), marker)
            except ValueError as error:
                wrong = str(error)
            return answer.failure(wrong) if wrong else answer.success()
