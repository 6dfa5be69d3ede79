"""HTTP/2 clients that others wrote, through the real service: curl, Python's httpx, Node.js, nghttp2's h2load.

Whichever of the programs is there is used; the contract is tested without any of them (tests/contract/test_core_h2.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.kit.service import Service, Simulator, first_light, wait_for

CHAT = {"model": "sim-chat", "messages": [{"role": "user", "content": "Say something about light."}]}
STREAM = CHAT | {"stream": True}


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Simulator]]:
    with first_light(tmp_path_factory.mktemp("h2"), "--rate", "0") as pair:
        yield pair


@pytest.fixture(scope="module")
def service(running: tuple[Service, Simulator]) -> Service:
    return running[0]


def curl(service: Service, url: str, *more: str, body: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            "curl", "-sS", "--cacert", service.facts["ca"], "-H", f"Authorization: Bearer {service.key}",
            "-w", "\n%{http_version} %{http_code}", *more, url,
        ],
        input=body, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@needs("curl")
def test_curl_speaks_what_it_is_told_to(service: Service) -> None:
    https, http = service.facts["https_url"], service.facts["http_url"]
    for url, option, version in (
        (https, "--http2", "2"),
        (https, "--http1.1", "1.1"),
        (http, "--http2-prior-knowledge", "2"),
        (http, "--http1.1", "1.1"),
    ):
        done = curl(service, f"{url}/v1/models", option)
        body, _, said = done.stdout.rpartition("\n")
        assert said == f"{version} 200", (option, done)
        assert json.loads(body)["data"][0]["id"] == "sim-chat"


@needs("curl")
def test_curl_streams_a_chat(service: Service) -> None:
    done = curl(
        service, service.facts["https_url"] + "/v1/chat/completions", "--http2", "-N",
        "-H", "Content-Type: application/json", "-d", json.dumps(STREAM),
    )  # fmt: skip
    body, _, said = done.stdout.rpartition("\n")
    assert said == "2 200", done
    events = body.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert len(events) > 10


@needs("curl")
def test_curl_sends_a_long_body_and_is_refused_before_its_end(service: Service) -> None:
    done = curl(
        service, service.facts["https_url"] + "/v1/chat/completions", "--http2",
        "-H", "Content-Type: application/json", "-d", "@-", body=json.dumps(CHAT | {"user": "u" * 2_000_000}),
    )  # fmt: skip
    assert done.stdout.endswith("\n2 200"), done.stderr
    done = subprocess.run(
        [
            "curl", "-sS", "--http2", "--cacert", service.facts["ca"], "-w", "\n%{http_version} %{http_code}",
            "-H", "Authorization: Bearer wrong", "-d", "@-", service.facts["https_url"] + "/v1/chat/completions",
        ],
        input="x" * 2_000_000, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("\n2 401"), done
    assert "invalid_api_key" in done.stdout


def test_httpx_has_many_streams_on_one_connection(service: Service) -> None:
    async def main() -> None:
        verify = ssl.create_default_context(cafile=service.facts["ca"])
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(
            http2=True, verify=verify, base_url=service.facts["https_url"], limits=limits, timeout=30,
            headers={"Authorization": f"Bearer {service.key}"},
        ) as client:  # fmt: skip

            async def stream(n: int) -> str:
                async with client.stream(
                    "POST", "/v1/chat/completions", json=STREAM | {"user": f"caller-{n}"}
                ) as answer:
                    assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
                    text = "".join([piece async for piece in answer.aiter_text()])
                    assert text.endswith("data: [DONE]\n\n")
                    return text

            for n, text in enumerate(await asyncio.gather(*(stream(n) for n in range(50)))):
                said = "".join(
                    json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    for line in text.split("\n\n")
                    if line.startswith("data: {") and json.loads(line[6:])["choices"]
                )
                assert f"caller-{n}" in said, "an answer that belongs to another stream"
            answer = await client.post("/v1/chat/completions", json=CHAT | {"model": "unknown"})
            assert (answer.http_version, answer.status_code) == ("HTTP/2", 404)
            assert answer.json()["error"]["code"] == "model_not_found"

    asyncio.run(main())


NODE = """
const http2 = require('http2'), fs = require('fs');
const [url, ca, key, count] = process.argv.slice(2);
const session = http2.connect(url, {ca: fs.readFileSync(ca)});
let open = Number(count), whole = 0;
session.on('error', e => { console.log('error', e.message); process.exit(1); });
for (let n = 0; n < Number(count); n++) {
  const r = session.request({':method': 'POST', ':path': '/v1/chat/completions',
    'authorization': 'Bearer ' + key, 'content-type': 'application/json'});
  let text = '', status = 0;
  r.setEncoding('utf8');
  r.on('response', h => { status = h[':status']; });
  r.on('data', d => { text += d; });
  r.on('end', () => {
    if (status === 200 && text.endsWith('data: [DONE]\\n\\n')) whole++;
    if (--open === 0) { console.log(session.alpnProtocol, whole); session.close(); }
  });
  r.end(JSON.stringify({model: 'sim-chat', stream: true, messages: [{role: 'user', content: 'hi'}]}));
}
"""


@needs("node")
def test_node_streams_chats(service: Service, tmp_path: Path) -> None:
    script = tmp_path / "client.js"
    script.write_text(NODE)
    done = subprocess.run(
        ["node", script, service.facts["https_url"], service.facts["ca"], service.key, "40"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("h2 40\n", "")


LEAVES = """
const http2 = require('http2'), fs = require('fs');
const [url, ca, key] = process.argv.slice(2);
const session = http2.connect(url, {ca: fs.readFileSync(ca)});
const ask = (more) => {
  const r = session.request({':method': 'POST', ':path': '/v1/chat/completions',
    'authorization': 'Bearer ' + key, 'content-type': 'application/json'});
  r.end(JSON.stringify({model: 'sim-chat', messages: [{role: 'user', content: 'hi'}], ...more}));
  return r;
};
const first = ask({stream: true, max_tokens: 100000});
first.once('data', () => first.close(http2.constants.NGHTTP2_CANCEL));
first.once('close', () => {
  const second = ask({max_tokens: 1});
  second.on('response', h => console.log(h[':status']));
  second.on('data', () => {});
  second.on('end', () => session.close());
});
"""


@needs("node")
def test_a_stream_that_node_leaves_is_cancelled(running: tuple[Service, Simulator], tmp_path: Path) -> None:
    service, simulator = running
    script = tmp_path / "leaves.js"
    script.write_text(LEAVES)
    before = simulator.stats()["aborted"]
    simulator.set(rate=20)
    try:
        done = subprocess.run(
            ["node", script, service.facts["https_url"], service.facts["ca"], service.key],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("200\n", ""), "the connection goes on"
        wait_for(lambda: simulator.stats()["aborted"] == before + 1, "the simulator noticed")
    finally:
        simulator.set(rate=0)


@needs("h2load")
def test_h2load_gets_every_answer(service: Service, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps(CHAT))
    done = subprocess.run(
        [
            "h2load", "-n", "2000", "-c", "4", "-m", "16", "-d", body, "-H", "content-type: application/json",
            "-H", f"authorization: Bearer {service.key}", service.facts["https_url"] + "/v1/chat/completions",
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Application protocol: h2" in done.stdout, done
    assert re.search(r"2000 succeeded, 0 failed, 0 errored, 0 timeout", done.stdout), done.stdout
    assert re.search(r"status codes: 2000 2xx, 0 3xx, 0 4xx, 0 5xx", done.stdout), done.stdout


def test_a_listener_may_do_without(tmp_path: Path) -> None:
    def node(file: dict[str, object]) -> None:
        for listener in file["listeners"]:  # type: ignore[attr-defined]
            listener["http2"] = False

    with (
        Simulator("--rate", "0") as simulator,
        Service(tmp_path / "node", upstream=simulator.url, models=["sim-chat"], node=node) as service,
    ):
        verify = ssl.create_default_context(cafile=service.facts["ca"])
        with httpx.Client(http2=True, verify=verify, headers={"Authorization": f"Bearer {service.key}"}) as client:
            answer = client.get(service.facts["https_url"] + "/v1/models")
            assert (answer.http_version, answer.status_code) == ("HTTP/1.1", 200)
