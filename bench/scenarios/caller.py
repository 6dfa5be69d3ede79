"""What all scenarios share: who calls, with which key, for which model, and how an answer is judged.

The environment is the one that the SDKs read and that `make run` prints: OPENAI_BASE_URL, OPENAI_API_KEY and
SSL_CERT_FILE. Every request carries a marker of its own in `user`. The simulator says it back; with `--markers` a
scenario fails an answer without it, which is another request's. A real model does not say it back.
"""

from __future__ import annotations

import itertools
import json
import os
import ssl
from typing import Any, ClassVar

from locust import FastHttpUser, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

MODELS = "/v1/models"
BASE = os.environ.get("OPENAI_BASE_URL", "").rstrip("/").removesuffix("/v1")


@events.init_command_line_parser.add_listener
def arguments(parser: LocustArgumentParser) -> None:
    """What a scenario can be told besides locust's own options; each also by an environment variable."""
    parser.add_argument(
        "--model", env_var="ASCPROXY_MODEL", default="", help="the model to ask for; else the first served"
    )
    parser.add_argument("--tokens", env_var="ASCPROXY_TOKENS", type=int, default=64, help="max_tokens of a request")
    parser.add_argument("--requests", type=int, default=0, help="end after so many requests; 0: never")
    parser.add_argument(
        "--markers", action="store_true", help="answers must carry their request's marker: simulator only"
    )


@events.init.add_listener
def check(environment: Environment, **_: Any) -> None:
    """Says what is missing before the first user comes."""
    if not os.environ.get("OPENAI_API_KEY"):
        raise SystemExit("OPENAI_API_KEY is not set: export the lines that `make run` prints, or a key of your gateway")
    if not (environment.host or BASE):
        raise SystemExit("no target: export OPENAI_BASE_URL as `make run` prints it, or give -H https://HOST:PORT")
    wanted = environment.parsed_options.requests if environment.parsed_options else 0
    if wanted:
        seen = itertools.count(1)

        def count(name: str, **_: Any) -> None:
            if name != MODELS and next(seen) == wanted and environment.runner:
                environment.runner.quit()

        environment.events.request.add_listener(count)


class Caller(FastHttpUser):
    """A user of the gateway: one kept connection, over TLS with the certificate verified."""

    abstract = True
    host = BASE or None
    insecure = False
    ssl_context_factory = staticmethod(ssl.create_default_context)  # honours SSL_CERT_FILE
    connection_timeout = 10.0
    network_timeout = 120.0
    numbers: ClassVar[itertools.count[int]] = itertools.count()
    model: ClassVar[str] = ""

    def on_start(self) -> None:
        """Presents the key; the first user finds out which model is served."""
        self.client.auth_header = f"Bearer {os.environ['OPENAI_API_KEY']}"
        if not Caller.model:
            Caller.model = self.environment.parsed_options.model or self.first_model()

    def first_model(self) -> str:
        """The first of the list of models."""
        answer = self.client.get(MODELS)
        try:
            return str(json.loads(answer.text or "")["data"][0]["id"])
        except (ValueError, KeyError, IndexError) as error:
            raise SystemExit(
                f"GET /v1/models names no model ({answer.status_code}: {answer.text}); give --model"
            ) from error

    def chat(self, **more: Any) -> tuple[dict[str, Any], str]:
        """The body of a chat request, and its marker."""
        marker = f"marker-{os.getpid()}-{next(self.numbers)}"
        body = {
            "model": self.model,
            "user": marker,
            "max_tokens": self.environment.parsed_options.tokens,
            "messages": [{"role": "user", "content": "What does a gateway do?"}],
        }
        return body | more, marker

    def wrong(self, said: str, marker: str) -> str:
        """What is wrong with the text of an answer; "" when nothing is."""
        if not said:
            return "an empty answer"
        if self.environment.parsed_options.markers and marker not in said:
            return "another request's answer"
        return ""


def content(text: str | None) -> str:
    """The text of a chat completion. ValueError when it is none."""
    try:
        return str(json.loads(text or "")["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("not a chat completion") from error
