"""The catalogue: complete, in the words of each SDK, and the page that is generated from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest

from ascproxy.gateway.meter import Meter
from ascproxy.gateway.refusal import CATALOGUE, page, refuse, shown
from tests.kit.streams import Answer, FakeClock, FakeCore, FakePage

ROOT = Path(__file__).parents[3]


class Refuses:
    """A walk that refuses everything with one code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def on_request(self, stream: Any) -> None:
        refuse(stream, Meter(FakePage()), self.code, detail="this and that")

    def on_settle(self, stream: Any) -> None:
        pass


def answer(code: str, path: str) -> Answer:
    """What a client gets."""
    core = FakeCore(Refuses(code), FakeClock())
    answer = core.request(path, {}).answer
    assert answer is not None
    return answer


def answered(code: str, path: str, response: Any = httpx.Response) -> Any:
    """The same in the words of an HTTP client."""
    a = answer(code, path)
    return response(a.status, headers=a.headers, content=a.body)


OPENAI = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
}
ANTHROPIC = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    403: anthropic.PermissionDeniedError,
    404: anthropic.NotFoundError,
    413: anthropic.RequestTooLargeError,
    429: anthropic.RateLimitError,
    503: anthropic.ServiceUnavailableError,
    504: anthropic.DeadlineExceededError,
}


@pytest.mark.parametrize("code", CATALOGUE)
def test_openai_raises_what_it_should_with_message_and_code(code: str) -> None:
    tries = 0

    def serve(_: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        return answered(code, "/v1/chat/completions")

    client = openai.OpenAI(
        api_key="k",
        base_url="http://gateway/v1",
        http_client=httpx.Client(transport=httpx.MockTransport(serve)),
        max_retries=1,
    )
    client._sleep_for_retry = lambda **_: None  # type: ignore[method-assign]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="m", messages=[])
    entry, error = CATALOGUE[code], caught.value
    expected = OPENAI.get(entry.status, openai.InternalServerError if entry.status >= 500 else openai.APIStatusError)
    assert type(error) is expected
    assert error.code == code
    assert isinstance(error.body, dict)
    assert error.body["message"] == entry.message.replace("{detail}", "this and that")
    assert error.response.headers["x-ascproxy-error"] == code
    sdk_retries = entry.status in (408, 409, 429) or entry.status >= 500
    assert tries == (2 if entry.again and sdk_retries else 1), "x-should-retry is obeyed"


@pytest.mark.parametrize("code", CATALOGUE)
def test_anthropic_raises_what_it_should_with_message_and_request_id(code: str) -> None:
    transport = httpx2.MockTransport(lambda _: answered(code, "/v1/messages", httpx2.Response))
    client = anthropic.Anthropic(
        api_key="k", base_url="http://gateway", http_client=httpx2.Client(transport=transport), max_retries=0
    )
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(model="m", messages=[], max_tokens=1)
    entry, error = CATALOGUE[code], caught.value
    assert isinstance(error, ANTHROPIC.get(entry.status, anthropic.APIStatusError))
    assert error.status_code == entry.status
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error"
    assert error.body["error"]["message"] == entry.message.replace("{detail}", "this and that")
    assert error.body["request_id"] == error.request_id == "0" * 32


@pytest.mark.parametrize("code", CATALOGUE)
def test_tgi_clients_get_a_string_and_a_type(code: str) -> None:
    response = answered(code, "/generate")
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error"] == CATALOGUE[code].message.replace("{detail}", "this and that")


@pytest.mark.parametrize("code", CATALOGUE)
def test_headers_say_whether_asking_again_helps(code: str) -> None:
    """SEMANTICS 5: x-should-retry: false where a retry cannot help."""
    entry, headers = CATALOGUE[code], answered(code, "/nowhere").headers
    assert headers.get("x-should-retry") == (None if entry.again else "false")
    assert headers.get("retry-after") == (None if entry.after is None else str(entry.after))
    assert headers["content-type"] == "application/json"
    assert (headers.get("www-authenticate") == "Bearer") == (entry.status == 401)


@pytest.mark.parametrize("code", CATALOGUE)
def test_every_message_is_sentences_that_end(code: str) -> None:
    entry = CATALOGUE[code]
    assert entry.message.endswith(".")
    assert entry.message.count("{detail}") <= 1
    assert entry.cause
    if entry.after is not None:
        assert entry.again


def test_a_code_outside_of_the_catalogue_is_a_defect() -> None:
    with pytest.raises(KeyError):
        answered("no_such_code", "/v1/models")


def test_nobody_is_refused_who_is_gone() -> None:
    core = FakeCore(Refuses("overloaded"), FakeClock())
    stream = core.stream("/v1/models")
    stream.done = True
    refuse(stream, Meter(FakePage()), "overloaded")  # type: ignore[arg-type]
    assert stream.answer is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"llama-3", '"llama-3"'),
        (b"a/b c", '"a/b c"'),
        (b'a"b\\', '"a\\u0022b\\u005c"'),
        (b"\x00\r\n\x1b[31m", '"\\u0000\\u000d\\u000a\\u001b[31m"'),
        ("\u202eevil".encode(), '"\\u202eevil"'),
        (b"\xff", '"\ufffd"'),
        (b"x" * 101, '"' + "x" * 100 + '..."'),
    ],
)
def test_names_are_shown_harmlessly(name: bytes, text: str) -> None:
    assert shown(name) == text


def test_the_page_of_errors_is_current() -> None:
    assert (ROOT / "docs/errors.md").read_text() == page(), "run python -m ascproxy.gateway.refusal > docs/errors.md"
