"""Asking the running service over the control socket in its run directory."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from ascproxy.errors import AscproxyError, NotRunningError, UsageError

CONTROL_SOCKET = "control.sock"
LOCK = "lock"
TIMEOUT_S = 5.0


class LocalConnection(http.client.HTTPConnection):
    """HTTP over the control socket of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = run_dir / CONTROL_SOCKET

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


def ask(run_dir: Path, method: str, path: str, body: Any = None) -> Any:
    """The JSON answer of the service that runs in ``run_dir``.

    Raises :class:`NotRunningError` when none does, and AscproxyError with its reason when it refuses.
    """
    try:
        try:
            status, reason, document = _exchange(run_dir, method, path, body)
        except http.client.RemoteDisconnected:
            if method != "GET":
                raise
            status, reason, document = _exchange(run_dir, method, path, body)  # control has just been replaced
    except PermissionError as error:
        raise AscproxyError(f"{run_dir} belongs to another user: run this as the user of the service") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        if _is_locked(run_dir):  # its workers serve, and would not hear of what is done behind control's back
            raise AscproxyError(f"the service in {run_dir} is starting or stopping: try again in a moment") from error
        raise NotRunningError(f"nothing runs in {run_dir}: start it with: ascproxy serve DIR") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AscproxyError(f"the service in {run_dir} does not answer: {error or type(error).__name__}") from error
    if status >= 400:
        kind = UsageError if status == 400 else AscproxyError
        raise kind(str(document.get("error", reason)))
    return document


def tell(run_dir: Path, number: signal.Signals) -> int:
    """Send a signal to the supervisor of a service that has just answered; its pid. Raises AscproxyError."""
    try:
        pid = int((run_dir / LOCK).read_text())
    except (OSError, ValueError) as error:
        raise AscproxyError(f"{run_dir / LOCK} does not say who runs there: {error}") from error
    try:
        os.kill(pid, number)
    except PermissionError as error:
        raise AscproxyError(f"pid {pid} belongs to another user: run this as the user of the service") from error
    except ProcessLookupError as error:
        raise NotRunningError(f"nothing runs in {run_dir}: start it with: ascproxy serve DIR") from error
    return pid


def document(run_dir: Path, name: str) -> dict[str, Any] | None:
    """What the supervisor says in a file of its run directory; None if it has said nothing."""
    try:
        found = json.loads((run_dir / name).read_bytes())
    except FileNotFoundError:
        return None
    return found if isinstance(found, dict) else None


def _exchange(run_dir: Path, method: str, path: str, body: Any) -> tuple[int, str, Any]:
    connection = LocalConnection(run_dir)
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, response.reason, json.loads(response.read())
    finally:
        connection.close()


def _is_locked(run_dir: Path) -> bool:
    """Whether a supervisor holds the run directory (ascproxy/supervisor/rundir.py)."""
    try:
        with (run_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
