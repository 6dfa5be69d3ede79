"""What a simulator is told to do: every option with its help, default and unit, once for all front ends."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ascproxy.errors import UsageError
from ascproxy.sim.failure import Failure

# A source checkout carries the recordings beside the package; an installed package does not.
CHECKOUT_RECORDINGS = Path(__file__).parents[2] / "tests" / "wire"


@dataclass(slots=True)
class Options:
    """The command line of ``ascproxy sim``, unchecked."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=0, metadata={"help": "Port to listen on; 0 takes a free one below 32768."})
    type: str = field(default="vllm", metadata={"help": "Wire to speak: vllm or tgi."})
    model: tuple[str, ...] = field(default=("sim-chat",), metadata={"help": "Model name to serve; repeatable."})
    tokens: int = field(
        default=16,
        metadata={"help": "Tokens of an answer, unless the request asks for fewer (or for more with ignore_eos)."},
    )
    rate: float = field(
        default=100.0, metadata={"help": "Tokens per second of one answer; 0 means as fast as possible."}
    )
    api_key_file: Path | None = field(
        default=None, metadata={"help": "File whose first line is the API key that callers must send."}
    )
    fail: str | None = field(default=None, metadata={"help": "Failure for every request: KIND or KIND:ARG."})
    recordings: Path | None = field(
        default=None, metadata={"help": "Folder of recorded exchanges (default: tests/wire of a source checkout)."}
    )
    wire: str | None = field(default=None, metadata={"help": "Answer every request with this recording."})
    split: int = field(
        default=0,
        metadata={"help": "Send answers in pieces of this many bytes, one send each; 0 sends whatever is ready."},
    )
    gap: float = field(default=0.0, metadata={"help": "Seconds between the pieces of --split."})
    chunk: int = field(
        default=0, metadata={"help": "Size in bytes of the HTTP chunks of a stream; 0 makes one chunk of each event."}
    )
    max_model_len: int = field(default=131072, metadata={"help": "Context length of the models, in tokens."})
    request_ids: bool = field(
        default=True, metadata={"help": "Send x-request-id, as vLLM does with --enable-request-id-headers."}
    )
    tls_certificate: Path | None = field(
        default=None, metadata={"help": "PEM file with the server's certificate chain: serve HTTPS."}
    )
    tls_key: Path | None = field(default=None, metadata={"help": "PEM file with the private key of --tls-certificate."})
    tls_client_ca: Path | None = field(
        default=None, metadata={"help": "PEM file with the CA that client certificates must come from (mTLS)."}
    )


def options() -> dict[str, Field[Any]]:
    """The options by name, in the order of the command line; ``metadata["help"]`` is the help text."""
    return {f.name: f for f in fields(Options)}


@dataclass(slots=True)
class Settings:
    """What the running server obeys. Written by ``PUT /sim/settings`` (server) and nobody else once it runs."""

    type: str = "vllm"
    models: tuple[str, ...] = ("sim-chat",)
    tokens: int = 16
    rate: float = 100.0
    api_key: str | None = None
    fail: Failure | None = None
    recordings: Path | None = None
    wire: str | None = None
    split: int = 0
    gap: float = 0.0
    chunk: int = 0
    max_model_len: int = 131072
    request_ids: bool = True


def settle(options: Options) -> Settings:
    """Check ``options`` and read the key file. Raises UsageError with every finding, one a line."""
    findings: list[str] = []
    if options.type not in ("vllm", "tgi"):
        findings.append(f"--type {options.type}: the simulator speaks vllm and tgi")
    if not options.model:
        findings.append("--model: at least one name is needed")
    for name in ("tokens", "max_model_len"):
        if getattr(options, name) < 1:
            findings.append(f"--{name.replace('_', '-')} must be 1 or more")
    for name in ("rate", "split", "gap", "chunk"):
        if getattr(options, name) < 0:
            findings.append(f"--{name} must be 0 or more")
    if not 0 <= options.port <= 65535:
        findings.append(f"--port {options.port}: ports are 0 to 65535")
    if (options.tls_certificate is None) != (options.tls_key is None):
        findings.append("--tls-certificate and --tls-key go together")
    if options.tls_client_ca is not None and options.tls_certificate is None:
        findings.append("--tls-client-ca needs --tls-certificate and --tls-key")
    api_key = _first_line(options.api_key_file, findings) if options.api_key_file is not None else None
    fail = None
    if options.fail is not None:
        try:
            fail = Failure.parse(options.fail)
        except UsageError as error:
            findings.append(f"--fail {error}")
    recordings = options.recordings
    if recordings is None and CHECKOUT_RECORDINGS.is_dir():
        recordings = CHECKOUT_RECORDINGS
    elif recordings is not None and not recordings.is_dir():
        findings.append(f"--recordings {recordings}: there is no such folder")
    if findings:
        raise UsageError("\n".join(findings))
    return Settings(
        type=options.type,
        models=tuple(options.model),
        tokens=options.tokens,
        rate=options.rate,
        api_key=api_key,
        fail=fail,
        recordings=recordings,
        wire=options.wire,
        split=options.split,
        gap=options.gap,
        chunk=options.chunk,
        max_model_len=options.max_model_len,
        request_ids=options.request_ids,
    )


def _first_line(path: Path, findings: list[str]) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        findings.append(f"--api-key-file {path}: cannot be read: {error}")
        return None
    line = text.partition("\n")[0].strip()
    if not line:
        findings.append(f"--api-key-file {path}: the first line is empty; write the key there")
        return None
    return line
