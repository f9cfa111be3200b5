# SPDX-License-Identifier: Apache-2.0
"""Make a saved machine, and bring one back.

A machine is saved in the moment before it would become this rack's own: it has no keys and no name,
and uses no device but bridges and its network card. What it lacks it is told after it was restored,
by its agent's first connection (``guest_agent/resume.py``), which puts the devices in order. Until
then it waits, whosever it will be.
"""

from __future__ import annotations

import base64
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import (
    HostError,
    LaunchError,
    LinkLost,
    LostError,
    QmpError,
    RackGone,
    SetupError,
    TestbedError,
)
from testbed.guest import switch_router
from testbed.host import paths
from testbed.host.overlay import build_waiting_initrd
from testbed.machine import models, registry, saving, spawn
from testbed.machine.ahead import AnotherRack
from testbed.machine.client import Keeper
from testbed.machine.command import (
    CONSOLE_LOG,
    MACHINE_STATE,
    MODELS_SPEC,
    QEMU_LOG,
    QMP_SOCKET,
    NodeCommand,
)
from testbed.machine.console import Console
from testbed.machine.lifecycle import Watch
from testbed.rack import Rack, on_all
from testbed.rack_node import RackNode
from testbed.warm import memory
from testbed.warm.store import HOST_LACKS, MEMORY, STATE, Snapshot, Store
from testbed.warm.wanted import INITRD, Wanted

if TYPE_CHECKING:
    from testbed.host.keys import RackKeys
    from testbed.machine.qmp import Qmp

WAITING = "testbed: waiting"  # guest_agent/resume.py says one of them
UNFIT = "testbed: unfit"
REFUSED = "load of migration failed"  # QEMU's words (migration/migration.c)
SIZE_DIGITS = 6  # before the message
ENTROPY_BYTES = 64
PAUSE_S = 0.02
DISKS, WITHOUT_DISKS = b"disks", b"without_disks"  # the message's last word


class SnapshotUnfit(HostError):
    """A saved machine cannot be used; ``key`` is its entry, which is to go unless ``is_sound``."""

    def __init__(self, message: str, key: str, *, is_sound: bool = False) -> None:
        super().__init__(message)
        self.key = key
        self.is_sound = is_sound  # what was missing is the host's


def store() -> Store:
    """This user's saved machines."""
    return Store(paths.cache_dir() / "warm")


@dataclass(frozen=True)
class Saved:
    """A machine to be restored, and the command that does it."""

    snapshot: Snapshot
    command: NodeCommand


def ready(
    wanted: Mapping[str, Wanted],
    run_dir: Path,
    timeout_s: float,
    *,
    say: Callable[[str], None],
) -> dict[str, Saved]:
    """The saved machines of a rack, by node; those that are not there yet are made.

    :raises CapabilityMissing: a node cannot be saved.
    :raises LostError: it did not boot. :raises SetupError: no space.
    """
    found: dict[str, Saved] = {}
    for each in wanted.values():
        saving.check(each.plan, each.spec)
    kept = store()
    for name, each in wanted.items():
        key = each.key
        snapshot = kept.find(key)
        if snapshot is None:
            others = functools.partial(say, f"{name}: another testbed boots and saves it")
            with kept.exclusive(key, others):
                snapshot = kept.find(key)
                if snapshot is None:
                    say(f"{name}: booting once, to be saved")
                    _save(kept, key, each, run_dir / "saving", timeout_s)
                    snapshot = kept.find(key)
            kept.prune()
        if snapshot is None:
            raise SetupError(f"{kept.folder / key} went away as soon as it was there")
        found[name] = Saved(snapshot, _reading(each.restoring(), snapshot))
    return found


def _reading(command: NodeCommand, snapshot: Snapshot) -> NodeCommand:
    """The command, with the saved file for its guest's memory."""
    parts = (
        replace(part, file=snapshot.memory.place) if part.name == saving.RAM else part
        for part in command.memory
    )
    return replace(command, memory=tuple(parts))


def _save(kept: Store, key: str, wanted: Wanted, run_dir: Path, timeout_s: float) -> None:
    name = wanted.plan.name
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = wanted.command()
    base = paths.runtime_dir()
    with (
        kept.making(key) as partial,
        registry.reserve(base, f"saving-{key[:8]}", unique=True) as reservation,
    ):
        folder = reservation.folder / name
        folder.mkdir(mode=0o700)
        router = switch_router.built(wanted.spec.kernel) if wanted.has_router else None
        build_waiting_initrd(
            folder / INITRD,
            wanted.installation.image,
            wanted.installation.kernel(wanted.spec.kernel),
            agent=wanted.installation.agent,
            reset=wanted.reset,
            modules=[router] if router else [],
        )
        helpers = wanted.helpers()
        if models.has_models(wanted.plan):
            (folder / MODELS_SPEC).write_text(wanted.models_spec())
        keeper = spawn.start_keeper(reservation, [*helpers, command], run_folder=run_dir)
        try:
            qmp = _await_waiting(keeper, command, timeout_s)
            with qmp:
                saving.save(qmp, partial / STATE)
                with keeper.open_memory(f"{name}/{saving.RAM}") as guest:
                    runs = memory.pack(guest, partial / MEMORY)
        finally:
            keeper.shutdown()
            keeper.close()
        modules = (switch_router.MODULE,) if router else ()
        kept.describe(partial, runs, f"{name} ({wanted.spec.kernel})", modules)


def _await_waiting(keeper: Keeper, command: NodeCommand, timeout_s: float) -> Qmp:
    """Its control socket, when the guest waits to be told who it is."""
    from testbed.machine.qmp import Qmp  # noqa: PLC0415  (asyncio, slow to import)

    logs = keeper.run_folder / command.node
    console = Console(logs / CONSOLE_LOG)
    watch = Watch(
        command,
        console=console,
        qemu_log=logs / QEMU_LOG,
        exit_of=lambda: keeper.exit_of(command.node),
    )
    qmp = Qmp.connect(
        keeper.folder / command.node / QMP_SOCKET, node=command.node, check=watch.check
    )
    watch.control_answered = True
    deadline_s = time.monotonic() + timeout_s
    try:
        while WAITING not in console.tail():
            watch.check()
            if UNFIT in console.tail() or time.monotonic() > deadline_s:
                raise LinkLost(
                    f"{command.node}: it was not ready to be saved within {timeout_s:g} s",
                    node=command.node,
                    console_tail=console.tail(),
                )
            time.sleep(PAUSE_S)
    except BaseException:
        qmp.close()
        raise
    return qmp


def provide_state(snapshot: Snapshot, folder: Path) -> None:
    """Put the devices' state into the node's runtime folder, where QEMU looks for it.

    :raises HostError: it cannot be written.
    :raises AnotherRack: the rack was started ahead, of another state.
    """
    target = folder / MACHINE_STATE
    try:
        if target.exists():
            if target.read_bytes() != snapshot.state:
                raise AnotherRack
            return
        target.touch(mode=0o600)
        target.write_bytes(snapshot.state)
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror}") from error


class Checking:
    """The check that a saved machine's files are as they were written, beside what its guest does.

    :param snapshot: whose; it is read when this has begun.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._key = snapshot.key
        self._found: Future[str] = Future()
        self._thread = threading.Thread(
            target=_run, args=(snapshot.damage, self._found), daemon=True
        )

    def begin(self) -> None:
        """Once."""
        self._thread.start()

    def wait(self) -> None:
        """Begun or not. :raises SnapshotUnfit: they are damaged, or cannot be read."""
        if self._thread.ident is None:
            self.begin()
        try:
            problem = self._found.result()
        except OSError as error:
            sound = error.errno in HOST_LACKS
            raise SnapshotUnfit(str(error), self._key, is_sound=sound) from error
        if problem:
            raise SnapshotUnfit(problem, self._key)


def _run(part: Callable[[], str], future: Future[str]) -> None:
    try:
        future.set_result(part())
    except BaseException as error:  # raised where it is waited for
        future.set_exception(error)


def resume(
    rack: Rack,
    saved: Mapping[str, Saved],
    keys: Callable[[], RackKeys],
    timeout_s: float,
    *,
    disks: bool = True,
) -> None:
    """Tell the restored machines that they are this rack's nodes; returns when all said hello.

    :param keys: asked for while they get there.
    :param disks: give disks their driver again, as after a boot.
    :raises SnapshotUnfit: one cannot be used, whatever the reason.
    """

    def one(node: RackNode) -> None:
        if node.name in saved:
            _resume(node, saved[node.name].snapshot, keys, timeout_s, disks=disks)

    on_all(rack, one)


def _resume(
    node: RackNode,
    snapshot: Snapshot,
    keys: Callable[[], RackKeys],
    timeout_s: float,
    *,
    disks: bool,
) -> None:
    from testbed.guest import ship  # noqa: F401, PLC0415  before somebody waits for it

    checking = Checking(snapshot)
    try:
        saving.await_running(node.folder, node.name, node.watch.check)
        node.watch.control_answered = True
        node.introduce(_identity(node.name, keys, checking, disks=disks), timeout_s)
        checking.wait()  # nobody has heard of it before
    except (LostError, QmpError, HostError) as error:
        if isinstance(error, SnapshotUnfit | RackGone):  # nobody wants it any more
            raise
        checking.wait()  # files that are wrong are why, whatever QEMU made of them
        raise _unfit(error, snapshot.key) from error


def _unfit(error: TestbedError, key: str) -> SnapshotUnfit:
    """Why a machine whose files are as they were written did not go on."""
    if isinstance(error, LaunchError):
        words = error.output.strip().splitlines()[-1:]
        refused = any(REFUSED in word for word in words)  # else it did not come so far
        return SnapshotUnfit(": ".join((error.message, *words)), key, is_sound=not refused)
    # Who ends a rack ends its keeper; only a machine is killed by the kernel, short of memory.
    killed = isinstance(error, LostError) and error.exit_status == -signal.SIGKILL
    return SnapshotUnfit(error.message, key, is_sound=killed or isinstance(error, HostError))


def _identity(
    name: str, keys: Callable[[], RackKeys], checking: Checking, *, disks: bool
) -> Iterator[bytes]:
    """The message that ``guest_agent/resume.py`` reads after its hello: while the guest gets there,
    a processor has nothing else to do.
    """
    checking.begin()
    own = keys()
    body = b" ".join(
        (
            base64.b64encode(os.urandom(ENTROPY_BYTES)),
            str(time.time()).encode(),
            name.encode(),
            base64.b64encode(own.host_private),
            own.client_public.encode(),
            DISKS if disks else WITHOUT_DISKS,
        )
    )
    yield f"{len(body):0{SIZE_DIGITS}d}".encode() + body
