"""The life of control: commands of the supervisor in, HTTP out. It ends by SIGTERM, or when the supervisor has gone.

It is the supervisor's child (:func:`run`), or a unit of its own that looks for the gateway (:func:`attach`).

LOAD may come before anything is served: it is how the service starts, and how an upgrade does, which brings the first
snapshot with it. SERVE says which revision is in force and, the first time, brings the two listening sockets, which the
supervisor holds, so that a control that is replaced leaves no gap in which a probe is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from ascproxy.control.actions import KeyActions
from ascproxy.control.node import Node, SharedPage
from ascproxy.control.running import applicable
from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot as snapshots
from ascproxy.model.snapshot import Snapshot
from ascproxy.net import memfile, tls
from ascproxy.net.mailbox import Frame, FrameError, Kind, Mailbox
from ascproxy.net.meeting import GATEWAY_SOCKET, PeerError, join
from ascproxy.net.notify import Notifier
from ascproxy.store.env import open_store
from ascproxy.store.keys import KeyStore
from ascproxy.telemetry.log import Log

if TYPE_CHECKING:
    from ascproxy.control.app import Keys, Service

BEAT_S = 1.0
BEATS_PER_TIDY = 10
JOIN_S = 0.2  # between two attempts to find the gateway
REFUSED_S = 5.0  # after somebody else was found there: that does not pass by itself, and each attempt is in two logs
MAX_FINDINGS_BYTES = 65_536
STOP_S = 3.0  # how long answers that are under way may take at the end


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checked configuration. ``restart``: sentences about what differs from the running node and needs a restart."""

    snapshot: Snapshot
    warnings: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


class LoadError(AscproxyError):
    """The configuration cannot be used; ``findings`` are sentences, ``exit_code`` is the command's."""

    def __init__(self, findings: tuple[str, ...], exit_code: int = 1) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings
        self.exit_code = exit_code


Load = Callable[[Snapshot | None], Loaded]  # given the snapshot that the service started with, None at its start
# Opens the store of a node: given its snapshot, the tenants in force, and what to call after each write.
OpenKeys = Callable[[Snapshot, Callable[[], Collection[str]], Callable[[], None]], "Keys"]


@dataclass(slots=True)
class Control:
    """A running control process."""

    mailbox: Mailbox
    load: Load
    open_keys: OpenKeys
    log: Log
    stop: asyncio.Event
    service: Service | None = None
    shared: SharedPage | None = None
    boot: Snapshot | None = None
    separation: str = "none"
    notifier: Notifier | None = None
    gone: bool = False  # whether the supervisor is
    keys: Keys | None = None
    tenants: frozenset[str] = frozenset()
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Obey until told to stop."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.add_reader(self.mailbox.fileno(), self.read_mailbox)
        self.start(self.beat())
        await self.stop.wait()
        loop.remove_reader(self.mailbox.fileno())
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=STOP_S)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.error("control ends on an unexpected error", error=repr(error))
            self.stop.set()

    async def beat(self) -> None:
        """Tell the supervisor every second that this loop turns; every tenth, tidy the store."""
        for turn in itertools.count():
            if self.stop.is_set():
                return
            self.mailbox.send(Frame(Kind.BEAT))
            if self.notifier is not None:
                self.notifier.watchdog()
            if turn % BEATS_PER_TIDY == 0 and self.keys is not None:
                self.keys.tidy()
            try:
                await asyncio.wait_for(self.stop.wait(), BEAT_S)
            except TimeoutError:
                continue

    def read_mailbox(self) -> None:
        """Take every command that waits."""
        while True:
            try:
                frame = self.mailbox.receive()
            except FrameError as error:
                self.log.error("not a frame", reason=str(error))
                continue
            except EOFError:
                self.gone = True
                self.stop.set()
                return
            if frame is None:
                return
            self.start(self.obey(frame))

    async def obey(self, frame: Frame) -> None:
        """Carry out one command and acknowledge it."""
        match frame.kind:
            case Kind.LOAD:
                await self.answer_load(frame)
            case Kind.SERVE:
                try:
                    self.serve(frame)
                except (AscproxyError, OSError, LookupError, ValueError) as error:
                    self.mailbox.send(Frame(Kind.FAILED, frame.request, {"reason": str(error)}))
                else:
                    self.mailbox.send(Frame(Kind.DONE, frame.request))
            case other:
                self.mailbox.send(Frame(Kind.FAILED, frame.request, {"reason": f"control does not know {other.name}"}))

    async def answer_load(self, frame: Frame) -> None:
        """Check and compile the configuration on a thread: a beat must not wait for it."""
        request = frame.request
        try:
            self.take_boot(frame.descriptors)
            loaded = await asyncio.to_thread(self.load, self.boot)
            self.keys_of(self.boot or loaded.snapshot)
        except LoadError as error:
            payload = {"findings": _fitting(error.findings), "exit_code": error.exit_code}
            self.mailbox.send(Frame(Kind.FAILED, request, payload))
            return
        except AscproxyError as error:
            payload = {"findings": _fitting((str(error),)), "exit_code": error.exit_code}
            self.mailbox.send(Frame(Kind.FAILED, request, payload))
            return
        taken = loaded.snapshot if self.boot is None else applicable(self.boot, loaded.snapshot)
        descriptor = memfile.seal(f"ascproxy-{taken.revision}", snapshots.encode(taken))
        payload = {
            "revision": taken.revision,
            "warnings": _fitting(loaded.warnings),
            "restart": _fitting(loaded.restart),
            "trust": await asyncio.to_thread(tls.trust_of, taken.node),
        }
        self.mailbox.send(Frame(Kind.DONE, request, payload, (descriptor,)))
        os.close(descriptor)

    def take_boot(self, descriptors: tuple[int, ...]) -> None:
        """Know the first snapshot of a service that runs already: an upgrade is no restart. Raises AscproxyError."""
        for descriptor in descriptors:
            try:
                self.boot = snapshots.decode(memfile.read(descriptor))
            finally:
                os.close(descriptor)

    def keys_of(self, snapshot: Snapshot) -> Keys:
        """The keys in the store, which is opened once, and before any worker is: workers only read it."""
        if self.keys is None:
            self.keys = self.open_keys(snapshot, lambda: self.tenants, self.keys_changed)
        return self.keys

    def keys_changed(self) -> None:
        """Make workers forget the keys that they know."""
        if self.shared is not None:
            self.shared.bump_key_epoch()

    def serve(self, frame: Frame) -> None:
        """Take a revision as the one in force; the first time, start to answer."""
        snapshot, boot, metrics, local, page = frame.descriptors
        try:
            found = snapshots.decode(memfile.read(snapshot))
            self.boot = snapshots.decode(memfile.read(boot))
            self.shared = self.shared or SharedPage(page)
        finally:
            for descriptor in (snapshot, boot, page):
                os.close(descriptor)
        if self.service is None:
            from ascproxy.control import app, serving  # an HTTP server is 0.2 s of imports, and LOAD comes first

            node = Node(Path(frame.payload["run_dir"]), separation=self.separation)
            self.service = app.Service(node, self.keys_of(self.boot))
            self.start(serving.answer(app.public(self.service), metrics, self.stop))
            self.start(serving.answer(app.local(self.service), local, self.stop))
        else:
            os.close(metrics)
            os.close(local)
        self.service.revision = found.revision
        self.tenants = frozenset(tenant.name for tenant in found.tenants)
        self.shared.set_revision(found.revision)


def run(descriptor: int, load: Load, open_keys: OpenKeys) -> int:
    """Be control, with the mailbox at ``descriptor``. The exit status."""

    async def live() -> None:
        control = Control(Mailbox.inherited(descriptor), load, open_keys, Log("control"), asyncio.Event())
        await control.run()

    asyncio.run(live())
    return 0


def attach(run_dir: Path, peer: int, load: Load, open_keys: OpenKeys, environment: Mapping[str, str]) -> int:
    """Be the control of the gateway that ``peer`` runs in ``run_dir``, once it is there. The exit status.

    It ends when the gateway does: whoever keeps it alive starts it anew, for the next one.
    """
    log = Log("control")
    notifier = Notifier(environment, os.getpid())
    mailbox = _join(run_dir / GATEWAY_SOCKET, peer, notifier, log)
    separation = "units" if peer != os.geteuid() else "none"

    async def live() -> None:
        notifier.status(f"attached to the gateway in {run_dir}")
        control = Control(mailbox, load, open_keys, log, asyncio.Event(), separation=separation, notifier=notifier)
        await control.run()
        log.info("control ends", reason="the gateway has gone" if control.gone else "SIGTERM")

    asyncio.run(live())
    return 0


def _join(path: Path, peer: int, notifier: Notifier, log: Log) -> Mailbox:
    """The mailbox of the gateway at ``path``, as soon as there is one. A signal ends the waiting, and the process."""
    said = ""
    notifier.ready(f"waiting for the gateway at {path}")
    while True:
        try:
            return join(path, peer)
        except (OSError, PeerError) as error:
            reason = str(error) if isinstance(error, PeerError) else (error.strerror or str(error)).lower()
            report = log.error if isinstance(error, PeerError | PermissionError) else log.info
            pause_s = REFUSED_S if isinstance(error, PeerError) else JOIN_S
        if reason != said:
            report("waiting for the gateway", socket=str(path), reason=reason)
            said = reason
        notifier.watchdog()
        time.sleep(pause_s)


class StoredKeys(KeyActions):
    """Keys in a store that is kept tidy."""

    def __init__(
        self, env: lmdb.Environment, tenants: Callable[[], Collection[str]], wrote: Callable[[], None]
    ) -> None:
        super().__init__(KeyStore(env), tenants, wrote=wrote)
        self._env = env

    def tidy(self) -> None:
        """Free the reader slots of workers that died while they read: they would hold old pages for ever."""
        self._env.reader_check()


def stored_keys(
    snapshot: Snapshot, tenants: Callable[[], Collection[str]], wrote: Callable[[], None], *, shared: bool = False
) -> Keys:
    """The keys of ``state_dir/store.lmdb``, which is made if it is not there. ``shared``: workers have another user of
    our group. Raises AscproxyError."""
    return StoredKeys(open_store(Path(snapshot.node.state_dir), write=True, shared=shared), tenants, wrote)


def _fitting(sentences: tuple[str, ...]) -> list[str]:
    """As many sentences as a frame holds, and how many more there are."""
    kept: list[str] = []
    size = 0
    for sentence in sentences:
        size += 2 * len(sentence.encode())
        if size > MAX_FINDINGS_BYTES and kept:
            return [*kept, f"and {len(sentences) - len(kept)} more"]
        kept.append(sentence)
    return kept
