"""Options become settings, or sentences."""

from pathlib import Path

import pytest

from ascproxy.errors import UsageError
from ascproxy.sim.failure import Failure
from ascproxy.sim.server import checked
from ascproxy.sim.settings import CHECKOUT_RECORDINGS, Options, options, settle


def test_defaults_are_fine() -> None:
    settings = settle(Options())
    assert (settings.type, settings.models, settings.tokens, settings.rate) == ("vllm", ("sim-chat",), 16, 100.0)
    assert settings.recordings == (CHECKOUT_RECORDINGS if CHECKOUT_RECORDINGS.is_dir() else None)


def test_all_findings_at_once(tmp_path: Path) -> None:
    wrong = Options(
        port=70000,
        type="x",
        model=(),
        tokens=0,
        rate=-1,
        api_key_file=tmp_path / "none",
        fail="nope",
        recordings=tmp_path / "none",
        split=-1,
        gap=-1,
        tls_key=tmp_path / "k",
        tls_client_ca=tmp_path / "c",
    )
    with pytest.raises(UsageError) as raised:
        settle(wrong)
    text = str(raised.value)
    named = (
        "--port --type --model --tokens --rate --api-key-file --fail --recordings --split --gap "
        "--tls-key --tls-client-ca"
    )
    for option in named.split():
        assert option in text
    assert len(text.splitlines()) == 12


def test_the_key_is_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-1\nmore\n")
    assert settle(Options(api_key_file=path)).api_key == "sk-1"
    path.write_text("\n")
    with pytest.raises(UsageError, match="first line is empty"):
        settle(Options(api_key_file=path))


def test_every_option_has_help() -> None:
    assert all(option.metadata["help"].endswith(".") for option in options().values())


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        {"nope": 1},
        {"split": -1},
        {"split": True},
        {"split": 1.5},
        {"tokens": 0},
        {"rate": "x"},
        {"fail": "nope"},
        {"wire": 1},
    ],
)
def test_impossible_changes_are_refused(wanted: object) -> None:
    with pytest.raises(UsageError):
        checked(wanted)


def test_changes() -> None:
    wanted = {"fail": "stall:3", "wire": None, "split": 1, "gap": 0.25, "chunk": 7, "tokens": 1, "rate": 0.5}
    assert checked(wanted) == {**wanted, "fail": Failure.parse("stall:3")}
    assert checked({"fail": None}) == {"fail": None}
