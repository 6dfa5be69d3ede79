"""An indexing job: batches of texts to vectors, as fast as the answers come."""

from __future__ import annotations

import json

from caller import Caller
from locust import constant, task

BATCH = 16


class Indexer(Caller):
    """One batch after the other."""

    wait_time = constant(0)

    @task
    def embed(self) -> None:
        """As many vectors as there were texts, all of one length."""
        body = {"model": self.model, "input": [f"Text number {n} of a batch." for n in range(BATCH)]}
        with self.client.post("/v1/embeddings", json=body, name="embed", catch_response=True) as answer:
            if answer.status_code != 200:
                return answer.failure(f"status {answer.status_code}: {answer.text}")
            try:
                lengths = [len(row["embedding"]) for row in json.loads(answer.text or "")["data"]]
            except (ValueError, KeyError, TypeError) as error:
                return answer.failure(f"not a list of embeddings: {error}")
            if len(lengths) != BATCH or len(set(lengths)) != 1:
                return answer.failure(f"{len(lengths)} vectors of lengths {sorted(set(lengths))} for {BATCH} texts")
            return answer.success()
