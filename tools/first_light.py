"""``make run``: a model server, the gateway over HTTPS in front of it, and one streamed answer through both.

Starts the bundled simulator (or takes ``--upstream``), makes a gateway directory with a fresh key by ``ascproxy init``,
serves it, waits until it is ready, and streams one chat with nothing but the standard library, the certificate
verified. Then it prints what to try and stays up until Ctrl-C. Everything it made is gone afterwards.

It drives the command line as an operator would, and imports nothing of the product.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

READY_SECONDS = 20.0
ANSWER_SECONDS = 120.0
STOP_SECONDS = 15.0
LOG_LINES = 40
PROMPT = "Say something about light."
# Below the range that Linux hands to outgoing connections: a port that was free a moment ago stays free.
PORTS = range(20000, 32000)


class Trouble(Exception):
    """What went wrong, as a sentence for the person who typed ``make run``."""


class Service:
    """A process of ours in its own process group (Ctrl-C reaches only this driver), with its output in a file."""

    def __init__(self, name: str, arguments: list[str], log: Path, *, stdout: int | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=output,
                process_group=0,
            )

    def stop(self) -> None:
        """Interrupts it as Ctrl-C would. Trouble if it does not go by itself, or not with 0."""
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Trouble(f"The {self.name} did not stop within {STOP_SECONDS:.0f} s and was killed.") from None
        if code:
            raise Trouble(f"The {self.name} ended with exit code {code}.")


def say(text: str = "") -> None:
    print(text, flush=True)


def free_port() -> int:
    """A loopback port that nobody listens on. Trouble if fifty tries found none."""
    for port in random.sample(PORTS, 50):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise Trouble(f"No free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}.")


def first_line(service: Service, source: IO[bytes]) -> dict[str, Any]:
    """The JSON object that a command prints when it is up."""
    line = source.readline()
    if not line:
        raise Trouble(f"The {service.name} ended with exit code {service.process.wait()} before it was up.")
    found: dict[str, Any] = json.loads(line)
    return found


def init(folder: Path, *, upstream: str, model: str | None, https_port: int, metrics_port: int) -> dict[str, Any]:
    """``ascproxy init``: a complete gateway directory. Returns what it printed (DESIGN 8)."""
    arguments = ["init", str(folder), "--upstream", upstream]
    arguments += ["--model", model] if model else []
    arguments += ["--https-port", str(https_port), "--metrics-port", str(metrics_port), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ascproxy", *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        raise Trouble((done.stderr or done.stdout).decode(errors="replace").strip())
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def wait_until_ready(gateway: Service, metrics_url: str) -> None:
    """Asks the health address until it says 200. Trouble when the gateway has gone, or is not ready in time."""
    url = urlsplit(metrics_url)
    deadline = time.monotonic() + READY_SECONDS
    reason = "it does not answer"
    while time.monotonic() < deadline:
        if gateway.process.poll() is not None:
            raise Trouble(f"The gateway ended with exit code {gateway.process.returncode} before it was ready.")
        health = http.client.HTTPConnection(url.hostname or "", url.port, timeout=2)
        try:
            health.request("GET", "/healthz/ready")
            answer = health.getresponse()
            if answer.status == http.client.OK:
                return
            reason = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
        finally:
            health.close()
        time.sleep(0.02)
    raise Trouble(f"The gateway is not ready after {READY_SECONDS:.0f} s: {reason}")


def stream_chat(made: dict[str, Any]) -> Iterator[str]:
    """The pieces of one streamed answer, as they arrive. Trouble if it is refused, breaks, or ends early."""
    url = urlsplit(made["https_url"])
    context = ssl.create_default_context(cafile=made["ca"])
    connection = http.client.HTTPSConnection(url.hostname or "", url.port, context=context, timeout=ANSWER_SECONDS)
    body = {"model": made["models"][0], "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    body |= {"max_tokens": 48}
    head = {"Authorization": f"Bearer {made['api_key']}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
        response = connection.getresponse()
        if response.status != http.client.OK:
            answer = response.read().decode(errors="replace")
            raise Trouble(f"The chat was answered with {response.status} {response.reason}: {answer}")
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            frame = json.loads(data)
            if "error" in frame:
                raise Trouble(f"The stream broke off: {data.decode()}")
            for choice in frame["choices"]:
                yield choice["delta"].get("content") or ""
    raise Trouble("The stream ended without [DONE].")


def show_chat(made: dict[str, Any]) -> None:
    """Streams one chat onto the terminal. Trouble if no text came."""
    say(f'\n  "{PROMPT}"')
    print("  ", end="", flush=True)
    pieces = 0
    try:
        for piece in stream_chat(made):
            print(piece, end="", flush=True)
            pieces += bool(piece)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Trouble(f"The chat failed: {type(error).__name__}: {error}") from error
    finally:
        say()
    if not pieces:
        raise Trouble("The answer was empty.")
    say(f"\n  {pieces} pieces, streamed over HTTPS, the certificate verified.")


def show_next(made: dict[str, Any]) -> None:
    """The lines to try in another terminal."""
    url, key, ca = made["https_url"], made["api_key"], shlex.quote(made["ca"])
    chat = {"model": made["models"][0], "messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps(chat | {"stream": True})
    openai = f"""from openai import OpenAI
for chunk in OpenAI().chat.completions.create(**{json.dumps(chat)}, stream=True):
    print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
print()"""
    anthropic = f"""from anthropic import Anthropic
with Anthropic().messages.stream(**{json.dumps(chat)}, max_tokens=48) as stream:
    for text in stream.text_stream: print(text, end="", flush=True)
print()"""
    say(f"""
Try, in another terminal:

curl -N --cacert {ca} {url}/v1/chat/completions \\
  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
  -d {shlex.quote(body)}

curl --cacert {ca} -H 'Authorization: Bearer {key}' {url}/v1/models
curl {made["metrics_url"]}/metrics

or an SDK, with nothing but its environment set (pip install openai anthropic):

export SSL_CERT_FILE={ca}
export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}
export ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={key}
python3 -c {shlex.quote(openai)}
python3 -c {shlex.quote(anthropic)}
""")


def serve(options: argparse.Namespace, folder: Path, services: list[Service]) -> None:
    """Starts everything, in order, into ``services``; returns when it is time to stop."""
    upstream, model = options.upstream, options.model
    if not upstream:
        named = ["--model", model] if model else []
        simulator = Service(
            "simulator", ["ascproxy.sim", "--json", *named], folder / "simulator.log", stdout=subprocess.PIPE
        )
        services.append(simulator)
        assert simulator.process.stdout is not None
        up = first_line(simulator, simulator.process.stdout)
        upstream, model = up["url"], up["models"][0]
        say(f"simulator  {upstream}, model {model}")
    made = init(
        folder / "gateway",
        upstream=upstream,
        model=model,
        https_port=options.https_port or free_port(),
        metrics_port=options.metrics_port or free_port(),
    )
    gateway = Service("gateway", ["ascproxy", "serve", str(folder / "gateway")], folder / "gateway.log")
    services.append(gateway)
    wait_until_ready(gateway, made["metrics_url"])
    say(f"gateway    {made['https_url']} in front of {upstream}")
    show_chat(made)
    if options.once:
        return
    show_next(made)
    say("Up until Ctrl-C.")
    gone = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    assert gone is not None
    raise Trouble(*(f"The {s.name} went away." for s in services if s.process.pid == gone.si_pid))


def show_logs(services: list[Service]) -> None:
    for service in services:
        lines = service.log.read_text(errors="replace").splitlines()
        print(f"\n--- the last lines of the {service.name}'s log ---", *lines[-LOG_LINES:], sep="\n", file=sys.stderr)


def interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """0 after a clean stop, 1 after trouble, which is told on standard error with the logs of what was running."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--upstream", metavar="URL", help="a real model server instead of the simulator")
    parser.add_argument("--model", metavar="NAME", help="the model to ask for")
    parser.add_argument("--https-port", type=int, default=0, metavar="N")
    parser.add_argument("--metrics-port", type=int, default=0, metavar="N")
    parser.add_argument("--once", action="store_true", help="end after the answer")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)

    services: list[Service] = []
    troubles: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ascproxy-run-") as folder:
        try:
            serve(options, Path(folder), services)
        except KeyboardInterrupt:
            say()
        except Trouble as trouble:
            troubles.append(str(trouble))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # stopping is bounded: STOP_SECONDS each
        for service in reversed(services):  # the gateway before what it talks to
            if service.process.poll() is None:
                try:
                    service.stop()
                except Trouble as trouble:
                    troubles.append(str(trouble))
        if troubles:
            print(*troubles, sep="\n", file=sys.stderr)
            show_logs(services)
            return 1
    say("Stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
