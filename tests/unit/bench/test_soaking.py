"""What the soak reads from /proc and from the command line."""

import os
import socket
from pathlib import Path

import pytest

from bench.soaking import anonymous_kib, callers, descriptors, options, signals_caught, socket_inodes, upgrade_of

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def row(local: int, remote: int, inode: int) -> str:
    return f"   0: 0100007F:{local:04X} 0100007F:{remote:04X} 01 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"


def test_callers_are_of_this_process_and_of_these_ports() -> None:
    table = HEAD + row(8443, 50001, 7) + row(8443, 50002, 8) + row(9000, 50003, 7) + row(8080, 50004, 9)
    assert callers(table, frozenset({7, 9}), {8443, 8080}) == {50001, 50004}


def test_a_listening_socket_is_no_caller() -> None:
    assert callers(HEAD + row(8443, 0, 7), frozenset({7}), {8443}) == frozenset()


def test_the_caller_of_a_real_connection_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            with accepted:
                found = callers(Path("/proc/net/tcp").read_text(), socket_inodes(os.getpid()), {port})
                assert found == {client.getsockname()[1]}


def test_descriptors_and_memory_of_this_process_are_read_and_of_a_gone_one_not() -> None:
    before = descriptors(os.getpid())
    with Path("/dev/null").open("rb"):
        assert descriptors(os.getpid()) == (before or 0) + 1
    assert (anonymous_kib(os.getpid()) or 0) > 1000
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert anonymous_kib(pid) is None
    assert descriptors(pid) is None


@pytest.mark.parametrize(
    ("help_text", "caught", "how"),
    [
        ("│ serve   Run it.   │\n│ upgrade   Take a new version in.   │", 0, "command"),
        ("│ serve   Run it.   │", 1 << 11, "signal"),
        ("│ serve   Run it, upgrade it.   │", 1 << 10 | 1 << 12, ""),
    ],
)
def test_how_to_upgrade_is_asked_from_the_service(help_text: str, caught: int, how: str) -> None:
    assert upgrade_of(help_text, caught) == how


def test_the_signals_that_a_process_handles_are_known() -> None:
    assert signals_caught(os.getpid()) >> 1 & 1, "Python handles SIGINT"


@pytest.mark.parametrize(
    "argv",
    [["--for", "14"], ["--share", "1.1"], ["--share", "0"], ["--rate", "0"], ["--markers", "0"], ["--kill", "-1"]],
)
def test_options_that_prove_nothing_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        options(argv)
    assert exit_.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_an_hour_at_seventy_percent_is_what_is_run_unless_something_else_is_said() -> None:
    chosen = options([])
    assert (chosen.seconds, chosen.share, chosen.rate, chosen.kill) == (3600, 0.7, None, 0)
