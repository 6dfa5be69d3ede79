"""Callers that ask twice under one Idempotency-Key, as a client does that has lost an answer.

Each pair must get one and the same answer (its `id` is looked at). A gateway, or a provider's direct address, that does
not know the header answers each request anew, and every second one is a failure here: that is what it is.
"""

from __future__ import annotations

import json
import uuid

from caller import Caller
from locust import between, task


class Repeater(Caller):
    """A request and its repetition, every one to three seconds."""

    wait_time = between(1, 3)

    @task
    def repeat(self) -> None:
        """The second answer is the first one's."""
        body, _ = self.chat()
        key = {"Idempotency-Key": str(uuid.uuid4())}
        first = ""
        for name in ("first", "duplicate"):
            with self.client.post(
                "/v1/chat/completions", json=body, headers=key, name=name, catch_response=True
            ) as answer:
                if answer.status_code != 200:
                    return answer.failure(f"status {answer.status_code}: {answer.text}")
                try:
                    found = str(json.loads(answer.text or "")["id"])
                except (ValueError, KeyError, TypeError) as error:
                    return answer.failure(f"not a chat completion: {error}")
                if first and found != first:
                    return answer.failure("answered anew")
                answer.success()
                first = found
        return None
