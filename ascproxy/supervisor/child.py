"""Starting children: fork, harden, hand over. A child is watched by its pidfd and never addressed by a stored pid.

Workers are forked from the supervisor's preloaded heap and run a function; control is executed fresh. Both get default
signal handling, die with the supervisor (PR_SET_PDEATHSIG, closed against the race with a getppid check), and dump no
core. Fork happens before any loop, thread, TLS object or LMDB environment exists in the supervisor, and it never
makes one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ascproxy.errors import UsageError
from ascproxy.supervisor.handover import DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
MAILBOX_FD = 3  # where an executed child finds its mailbox
# What the service manager and an earlier program said to the supervisor is not for its children.
PRIVATE_ENVIRONMENT = frozenset(
    {
        "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES",
        DESCRIPTOR_VARIABLE, REHEARSAL_VARIABLE,
    }
)  # fmt: skip
# Sent to a whole process group by a terminal or a service manager; a child obeys its mailbox.
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2, signal.SIGPIPE)
CRASHED = 70  # EX_SOFTWARE: a worker's function raised

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Child:
    """A running process. ``pid`` is for people; ``pidfd`` is what we wait for and signal."""

    pid: int
    pidfd: int

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if the process has gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs. Closes the pidfd at the end."""
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if found is None:
            return None
        os.close(self.pidfd)
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def fork(run: Callable[[], int]) -> Child:
    """A child of our own heap. ``run`` gets a hardened process; what it returns is the exit status."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = CRASHED
        try:
            harden(parent, signal.SIGKILL, dumpable=False)
            status = run()
        except BaseException:  # noqa: BLE001 - the last frame of a process: nothing may unwind into the supervisor's
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    return Child(pid, os.pidfd_open(pid))


def execute(arguments: list[str], mailbox: int, environment: Mapping[str, str]) -> Child:
    """A fresh ``python -m ...`` with its mailbox at descriptor 3. It ends by SIGTERM when the supervisor does."""
    clean = {name: value for name, value in environment.items() if name not in PRIVATE_ENVIRONMENT}

    def run() -> None:
        if mailbox == MAILBOX_FD:
            os.set_inheritable(mailbox, True)
        else:
            os.dup2(mailbox, MAILBOX_FD)
        os.execve(sys.executable, [sys.executable, *arguments], clean)  # noqa: S606 - our own interpreter, no shell is wanted

    return _execute(run)


def execute_program(
    command: Sequence[str], environment: Mapping[str, str], more: Mapping[str, str], descriptors: Iterable[int]
) -> Child:
    """Another program with these descriptors under their numbers, and ``more`` in its environment."""
    clean = {name: value for name, value in environment.items() if name not in PRIVATE_ENVIRONMENT}

    def run() -> None:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        os.execve(command[0], list(command), {**clean, **more})  # noqa: S606 - no shell is wanted

    return _execute(run)


def _execute(run: Callable[[], None]) -> Child:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            harden(parent, signal.SIGTERM, dumpable=True)
            run()
        except OSError as error:
            os.write(2, f"cannot execute: {error}\n".encode())
        finally:
            os._exit(CRASHED)
    return Child(pid, os.pidfd_open(pid))


def end(running: Child, number: int = signal.SIGTERM) -> None:
    """Stop a child and wait for it."""
    running.signal(number)
    waiting = select.poll()
    waiting.register(running.pidfd, select.POLLIN)
    if not waiting.poll(1_000):
        running.signal(signal.SIGKILL)
        waiting.poll()
    running.reap()


def status_words(status: int) -> str:
    """An exit status for people."""
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name


def harden(parent: int, death_signal: int, *, dumpable: bool) -> None:
    """What every child does first. Exits when ``parent`` has died meanwhile."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise_descriptors()
    if not dumpable:
        _prctl(PR_SET_DUMPABLE, 0)


def raise_descriptors() -> None:
    """Let this process open as many descriptors as it may: the soft limit is for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def entry(name: str) -> Callable[..., int]:
    """The function ``module:function``, imported now so that its modules are in the heap that workers share."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"no worker program {name}: {error}") from error
    if not callable(found):
        raise UsageError(f"no worker program {name}: it is not a function")
    return found  # type: ignore[no-any-return]


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
