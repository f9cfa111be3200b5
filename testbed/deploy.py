# SPDX-License-Identifier: Apache-2.0
"""From a topology to a running rack: place, prepare, render, start, wait for every hello.

Every stage leaves its product in the run folder before the next one begins, so that a run that
ended anywhere can be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from testbed import run_products
from testbed.errors import HostError, LostError, QmpError
from testbed.guest import switch_router
from testbed.host import accelerator as accelerators
from testbed.host import paths
from testbed.host.clock import tsc_khz
from testbed.host.installation import Installation
from testbed.host.overlay import build_initrd
from testbed.machine import ahead, argv, models, own_devices, registry, spawn
from testbed.machine.ahead import AnotherRack
from testbed.machine.bells import bells_command
from testbed.machine.client import Keeper
from testbed.machine.command import MACHINE_STATE, MODELS_SPEC, LaunchContext, NodeCommand
from testbed.machine.processes import Command
from testbed.rack import KEYS_FILE, Rack, on_all, record_of
from testbed.rack_node import AccessKeys, RackNode
from testbed.topology import placement
from testbed.topology.model import Topology
from testbed.topology.plan import RackPlan
from testbed.warm import restore
from testbed.warm.restore import SnapshotUnfit
from testbed.warm.store import STATE
from testbed.warm.wanted import Wanted

if TYPE_CHECKING:
    from testbed.host.keys import RackKeys

T = TypeVar("T")

INITRD = "initrd.img"
QMP = "testbed.machine.qmp"

# Ten times what an emulated boot takes on two busy cores; a machine that is dead is noticed at
# once, so only one that hangs is waited for that long.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


@dataclasses.dataclass(frozen=True)
class StartOptions:
    """How a rack is started.

    ``name``          as `ps` shows it; taken already: an error, unless ``unique``.
    ``accelerator``   ``tcg`` or ``kvm``; None: what the probe found to work.
    ``installation``  None: made or found now.
    ``trust``         run the Python files that the topology names as devices.
    ``verbose_console``  the guest kernel prints its whole log while it boots.
    ``warm``          restore each machine, booted once and saved, instead of booting it.
    ``disks``         False: nobody will look at disks; restored, they are left without a driver.
    ``again``         the command's next start of the same may begin ahead
                      (:mod:`testbed.machine.ahead`).
    ``router``        switches route what QEMU's own devices send (docs/switch-router.md).
    """

    name: str = ""
    unique: bool = True
    detach: bool = False
    accelerator: str | None = None
    installation: Installation | None = None
    kernel_args: tuple[str, ...] = ()
    verbose_console: bool = False
    warm: bool = False
    disks: bool = True
    again: bool = False
    router: bool = True
    trust: bool = False
    timeout_s: float = START_TIMEOUT_S


def start(
    topology: Topology,
    *,
    run_dir: Path | None = None,
    options: StartOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Rack:
    """Start every node of ``topology`` and return when all agents have said hello.

    :param run_dir: where logs and products go; made if missing.
    :param say: is told of each stage, one short line.
    :raises RackNameInUse: the name is taken. :raises InputError: it cannot be placed, or has
        devices of the user's own that are not trusted or cannot be made.
    :raises HostError: set-up, launch. :raises LostError: a machine died or never answered.
        In every case nothing is left running and no runtime file is left.
    """
    options = options or StartOptions()
    try:
        with contextlib.suppress(AnotherRack):  # started ahead, and not this one
            return _start(topology, run_dir, options, say)
        return _start(topology, run_dir, options, say)
    except SnapshotUnfit as error:
        if not error.is_sound:
            restore.store().discard(error.key)
        sys.stderr.write(f"testbed: not restored but booted: {error.message}\n")
        return _start(topology, run_dir, dataclasses.replace(options, warm=False), say)


def _start(
    topology: Topology,
    run_dir: Path | None,
    options: StartOptions,
    say: Callable[[str], None],
) -> Rack:
    began_s = time.monotonic()
    topology = own_devices.admit(topology, trust=options.trust)
    plan = placement.place(topology)
    begun = ahead.take(options.name or topology.rack) if options.again else None
    with begun or _reserve(topology, options) as reservation:
        if begun:
            run_dir = begun.run_dir
        run_dir = (run_dir or paths.new_run_dir(reservation.name)).resolve()
        run_products.begin(run_dir, plan)
        kernels = tuple(dict.fromkeys(node.kernel for node in topology.nodes.values()))
        installation = options.installation or _installation(kernels)
        accelerator = options.accelerator or accelerators.chosen(installation)
        say(
            f"starting {len(plan.nodes)} machine(s) with QEMU {installation.qemu.version}"
            f" under {accelerator}"
        )
        keys = _Later(_ways_in)
        contexts = _contexts(plan, installation, accelerator, options, reservation.folder)
        saved = _saved(plan, contexts, installation, options, run_dir, say)
        boot = functools.partial(_to_boot, plan, contexts, installation, keys)
        commands, processes, files = _commands(plan, reservation.folder, saved, boot)
        run_products.write_commands(run_dir, processes)
        versions = run_products.keep_versions(run_dir, topology, installation, accelerator)
        if not saved and QMP not in sys.modules:  # else it takes no time, or has time later
            keys.begin()
        keeper = _started(begun, reservation, processes, files, run_dir)

        def access() -> AccessKeys:
            return AccessKeys(keys.get().client_private, keys.get().host_public)

        restart = _Restart(plan, keeper, boot, reservation.folder, options, say)
        rack = Rack(keeper, plan, access, versions, owner=True, commands=commands, restart=restart)
        try:
            restore.resume(rack, saved, keys.get, options.timeout_s, disks=options.disks)
            access().write(reservation.folder / KEYS_FILE)
            reservation.write_record(record_of(rack, time.time(), reservation.folder / KEYS_FILE))
            on_all(rack, lambda node: _await_hello(node, reservation.folder, options.timeout_s))
            if options.router:
                _start_routers(_without_router(rack, saved), say)
            if options.detach:
                rack.detach()
            if options.again and saved.keys() == plan.nodes.keys():
                ahead.remember(keeper, spawn.plan_of(keeper.folder, processes, run_dir), files)
        except BaseException:
            rack.close()
            raise
    say(f"{rack.name}: all agents answered after {time.monotonic() - began_s:.1f} s")
    return rack


def _commands(
    plan: RackPlan,
    rack: Path,
    saved: Mapping[str, restore.Saved],
    boot: Callable[[str], NodeCommand],
) -> tuple[dict[str, NodeCommand], list[Command], dict[str, str | Path]]:
    """By node what starts it, all processes in their order, and files that they read in ``rack``:
    their texts, or the paths of what has been copied there.
    """
    commands: dict[str, NodeCommand] = {}
    processes: list[Command] = []
    files: dict[str, str | Path] = {}
    if bells := bells_command(plan):
        processes.append(bells)
    for name, node in plan.nodes.items():
        folder = rack / name
        folder.mkdir(mode=0o700, exist_ok=True)
        if name in saved:
            restore.provide_state(saved[name].snapshot, folder)
            files[f"{name}/{MACHINE_STATE}"] = saved[name].snapshot.folder / STATE
            commands[name] = saved[name].command
        else:
            commands[name] = boot(name)
        if models.has_models(node):
            files[f"{name}/{MODELS_SPEC}"] = json.dumps(models.models_spec(plan, node))
            processes.append(models.models_command(plan, node))
        processes.append(commands[name])
    return commands, processes, files


def _started(
    begun: ahead.Ahead | None,
    reservation: registry.Reservation,
    processes: list[Command],
    files: Mapping[str, str | Path],
    run_dir: Path,
) -> Keeper:
    """The keeper of a rack whose processes run. :raises AnotherRack: others were begun."""
    if begun:
        return begun.keeper_of(spawn.plan_of(reservation.folder, processes, run_dir), files)
    for place, content in files.items():
        if isinstance(content, str):
            run_products.write_text(reservation.folder / place, content)
    return spawn.start_keeper(reservation, processes, run_folder=run_dir)


def _reserve(topology: Topology, options: StartOptions) -> registry.Reservation:
    name = options.name or topology.rack
    return registry.reserve(paths.runtime_dir(), name, unique=options.unique)


class _Later(Generic[T]):
    """What a start needs only when its machines run: made while they begin, or when asked for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: Future[T] = Future()
        self._asked = threading.Lock()  # by the one who makes it

    def begin(self) -> None:
        """Make it in the background."""
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        if not self._asked.acquire(blocking=False):
            return
        try:
            self._made.set_result(self._make())
        except BaseException as error:  # raised where it is asked for
            self._made.set_exception(error)

    def get(self) -> T:
        """It, or the error that it ended in."""
        self._work()
        return self._made.result()


def _ways_in() -> RackKeys:
    """New keys; and with them what talks to QEMU is imported. Both are slow to import."""
    from testbed.host.keys import RackKeys  # noqa: PLC0415
    from testbed.machine import qmp  # noqa: F401, PLC0415

    return RackKeys.generate()


def _installation(kernels: tuple[str, ...]) -> Installation:
    from testbed.host import prepare  # noqa: PLC0415  slow; commands have one already

    return prepare.prepare(kernels)


def _contexts(
    plan: RackPlan,
    installation: Installation,
    accelerator: str,
    options: StartOptions,
    folder: Path,
) -> dict[str, LaunchContext]:
    """What each node's command line must know of this host."""
    return {
        name: LaunchContext(
            qemu=installation.qemu.words,
            environment=installation.qemu.environment,
            accelerator=accelerator,
            kernel=installation.kernel(plan.topology.nodes[name].kernel).image,
            initrd=folder / name / INITRD,
            quick_firmware=installation.qemu.quick_firmware,
            tsc_khz=tsc_khz(),
            kernel_args=options.kernel_args,
            console_verbose=options.verbose_console,
        )
        for name in plan.nodes
    }


def _saved(
    plan: RackPlan,
    contexts: Mapping[str, LaunchContext],
    installation: Installation,
    options: StartOptions,
    run_dir: Path,
    say: Callable[[str], None],
) -> dict[str, restore.Saved]:
    """The saved machines to be restored; none, with the reason, if they cannot be kept here."""
    if not options.warm:
        return {}
    wanted = {
        name: Wanted(
            plan.alone(name),
            node,
            plan.topology.nodes[name],
            installation,
            contexts[name],
            options.router,
        )
        for name, node in plan.nodes.items()
    }
    try:
        return restore.ready(wanted, run_dir, options.timeout_s, say=say)
    except (HostError, LostError, QmpError) as error:
        sys.stderr.write(f"testbed: booted without being saved: {error.message}\n")
        return {}


def _await_hello(node: RackNode, folder: Path, timeout_s: float) -> None:
    """The race of one machine's start: its end, a panic, the deadline, the agent's hello."""
    _ = node.monitor  # QEMU is up, or the error says why not
    if not node.watch.hello_seen:
        node.watch.wait_ready(timeout_s)
    _ = node.agent
    # The kernel has unpacked it long ago; it holds the machine's private host key.
    (folder / node.name / INITRD).unlink(missing_ok=True)


def _to_boot(
    plan: RackPlan,
    contexts: Mapping[str, LaunchContext],
    installation: Installation,
    keys: _Later[RackKeys],
    name: str,
) -> NodeCommand:
    """What boots a node from its initial RAM disk, which is made."""
    spec = plan.topology.nodes[name]
    build_initrd(
        contexts[name].initrd,
        installation.image,
        installation.kernel(spec.kernel),
        keys=keys.get(),
        node_name=name,
        agent=installation.agent,
    )
    return argv.command(plan.nodes[name], spec, contexts[name])


@dataclasses.dataclass(frozen=True)
class _Restart:
    """Boots a node of a running rack again; see :meth:`testbed.rack.Rack.restart`."""

    plan: RackPlan
    keeper: Keeper
    boot: Callable[[str], NodeCommand]
    folder: Path
    options: StartOptions
    say: Callable[[str], None]

    def __call__(self, node: RackNode) -> None:
        keeper = self.keeper
        machine = self.boot(node.name)
        if keeper.exit_of(node.name) is None:
            keeper.kill(node.name)
        keeper.wait_exit(node.name, STOP_TIMEOUT_S)
        if models.has_models(
            node.plan
        ):  # after QEMU, whose end they see; in good order if they can
            helper = models.models_command(self.plan, node.plan)
            if keeper.exit_of(helper.name) is None:
                keeper.stop(helper.name)
            if keeper.wait_exit(helper.name, STOP_TIMEOUT_S) is None:
                keeper.kill(helper.name)
                keeper.wait_exit(helper.name, STOP_TIMEOUT_S)
            keeper.start(helper)
        node.begin_again(machine)
        keeper.start(machine)
        _await_hello(node, self.folder, self.options.timeout_s)
        if self.options.router:
            _start_routers([node], self.say)


def _without_router(rack: Rack, saved: Mapping[str, restore.Saved]) -> list[RackNode]:
    """The nodes that were not restored with the module loaded."""
    has = {n for n, each in saved.items() if switch_router.MODULE in each.snapshot.modules}
    return [node for node in rack.nodes.values() if node.name not in has]


def _start_routers(nodes: Iterable[RackNode], say: Callable[[str], None]) -> None:
    for node in (node for node in nodes if switch_router.is_wanted(node.plan)):
        if why_not := switch_router.start(node):
            say(f"{node.name}: its switches do not route what QEMU's devices send: {why_not}")
