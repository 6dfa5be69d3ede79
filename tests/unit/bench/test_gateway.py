"""The gateway as a subject, against a stand-in that keeps the contract of its command line, or breaks it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bench import gateway, machine
from bench.subject import Place

STAND_IN = """
import http.server, json, pathlib, sys, yaml

def init(folder, *options):
    given = dict(zip(options[::2], options[1::2]))
    assert given["--upstream"] == "http://127.0.0.1:1" and given["--model"] == "bench"
    pathlib.Path(folder).mkdir()
    metrics = {"address": "127.0.0.1:" + given["--metrics-port"]}
    node = {"workers": "auto", "metrics": metrics, "limits": {"header_timeout": "10s"}}
    pathlib.Path(folder, "ascproxy.yaml").write_text(yaml.safe_dump(node))
    urls = {name + "_url": f"{scheme}://127.0.0.1:{given[option]}" for name, scheme, option in (
        ("https", "https", "--https-port"), ("http", "http", "--http-port"), ("metrics", "http", "--metrics-port"))}
    print(json.dumps({**urls, "api_key": "asc_x_y", "tenant": "default"}))

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz/ready" else 404)
        self.end_headers()

def serve(folder):
    node = yaml.safe_load(pathlib.Path(folder, "ascproxy.yaml").read_text())
    assert node["workers"] == 1 and node["limits"] == {"header_timeout": "10s"}
    host, _, port = node["metrics"]["address"].partition(":")
    http.server.HTTPServer((host, int(port)), Health).serve_forever()

if sys.argv[1] == "init":
    init(sys.argv[2], *(o for o in sys.argv[3:] if o != "--json"))
else:
    serve(sys.argv[2])
"""

Make = Callable[[str], gateway.Gateway]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A subject whose `python -m ascproxy` is the given text."""

    def with_main(text: str) -> gateway.Gateway:
        (tmp_path / "ascproxy").mkdir()
        (tmp_path / "ascproxy" / "__init__.py").touch()  # or a regular package elsewhere on the path would win
        (tmp_path / "ascproxy" / "__main__.py").write_text(text)
        (tmp_path / "state").mkdir()
        monkeypatch.setattr(gateway, "ROOT", tmp_path)
        core = min(os.sched_getaffinity(0))
        return gateway.Gateway(Place(core=core, upstream_port=1, logs=tmp_path, state=tmp_path / "state"))

    return with_main


def test_it_serves_with_one_worker_and_takes_key_and_ports_from_init(make: Make) -> None:
    subject = make(STAND_IN)
    try:
        subject.start()
        assert subject.key == "asc_x_y"
        assert 20000 <= subject.port < 32768
        assert 20000 <= subject.tls_port < 32768
        assert subject.port != subject.tls_port
        assert subject.pid is not None
    finally:
        subject.stop()
    assert subject.pid is None


def test_a_directory_that_was_made_before_is_served_again(make: Make, tmp_path: Path) -> None:
    first = make(STAND_IN)
    try:
        first.start()
    finally:
        first.stop()
    again = gateway.Gateway(first.place, first.directory)
    try:
        again.start()  # the stand-in's init would fail on a folder that is there
        assert (again.port, again.key) == (first.port, first.key)
        assert again.ready_s > 0
        assert again.answers_within_s >= 60, "how soon it was ready says nothing about how soon thousands are answered"
    finally:
        again.stop()


def test_routes_are_copies_of_the_first_each_for_a_model_of_its_own() -> None:
    target = [{"provider": "upstream"}]
    made = gateway.routes({"routes": {"model-1": {"models": ["bench"], "targets": target}}}, 3)
    assert [route["models"] for route in made.values()] == [["bench"], ["bench-1"], ["bench-2"]]
    assert all(route["targets"] == target for route in made.values())


@pytest.mark.parametrize(("count", "asked"), [(1, 1), (3, 3), (1000, 1000), (2500, 1250)])
def test_the_models_that_are_asked_for_are_spread_over_the_routes(tmp_path: Path, count: int, asked: int) -> None:
    (tmp_path / "resources.yaml").write_text("routes: {model-1: {models: [bench], targets: [{provider: p}]}}")
    directory = gateway.Directory(tmp_path, {})
    gateway.add_routes(directory, count)
    models = directory.models.read_text().split()
    assert len(models) == len(set(models)) == asked
    assert len(yaml.safe_load((tmp_path / "resources.yaml").read_text())["routes"]) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit('the upstream is not there')", "`ascproxy init` ended with exit code 1:\nthe upstream"),
        ("print('hello')", "did not print JSON"),
        ("print('{}')", "does not name api_key, http_url, https_url, metrics_url"),
        (
            STAND_IN.replace("    serve(sys.argv[2])", "    sys.exit('port in use')"),
            "before it was ready:\nport in use",
        ),
    ],
)
def test_a_start_that_fails_says_why(make: Make, text: str, said: str) -> None:
    subject = make(text)
    try:
        with pytest.raises(machine.StartError) as raised:
            subject.start()
    finally:
        subject.stop()
    assert said in str(raised.value)
