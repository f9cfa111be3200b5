# SPDX-License-Identifier: Apache-2.0
"""A node of a topology with a test program in the kernel's place: no guest, no agent, no link.

The machine is rendered as for a rack; what the program says on the serial port is its result, and
QEMU ends when it has ended.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from testbed.deploy import StartOptions
from testbed.host import paths, prepare, probe
from testbed.machine import argv, models, own_devices, registry, spawn
from testbed.machine.client import Exit
from testbed.machine.command import CONSOLE_LOG, MODELS_SPEC, QEMU_LOG, LaunchContext
from testbed.machine.console import read_tail
from testbed.machine.processes import Command
from testbed.run_products import COMMANDS_JSON, PLAN_JSON, TOPOLOGY_JSON, plan_data
from testbed.topology import model, placement
from testbed.topology.model import Topology


@dataclass(frozen=True)
class ProgramEnd:
    """What it said, how QEMU ended (None: it was ended at the deadline), and QEMU's own words."""

    said: str
    exit: Exit | None
    qemu_said: str


def run_program(
    topology: Topology,
    program: Path,
    *,
    run_dir: Path,
    timeout_s: float,
    options: StartOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ProgramEnd:
    """Run ``program`` on the first node of ``topology``, to its end or the deadline.

    Nothing is left running. The stages' products and logs are in ``run_dir``, as a rack's.

    :raises InputError: it cannot be placed, or has devices of the user's own that are not trusted.
    :raises HostError: set-up, launch. :raises LostError: the rack's keeper died.
    """
    options = options or StartOptions()
    topology = own_devices.admit(topology, trust=options.trust)
    plan = placement.place(topology)
    name, node = next(iter(plan.nodes.items()))
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    installation = options.installation or prepare.prepare((topology.nodes[name].kernel,))
    accelerator = options.accelerator or probe.accelerator(installation)
    with registry.reserve(paths.runtime_dir(), topology.rack, unique=True) as reservation:
        context = LaunchContext(
            qemu=installation.qemu.words,
            environment=installation.qemu.environment,
            accelerator=accelerator,
            kernel=program.resolve(),
            initrd=Path(),
            program=True,
        )
        machine = argv.command(node, topology.nodes[name], context)
        processes: list[Command] = [machine]
        if models.has_models(node):
            folder = reservation.folder / name
            folder.mkdir(mode=0o700, exist_ok=True)
            _write(folder / MODELS_SPEC, models.models_spec(plan, node))
            processes.insert(0, models.models_command(plan, node))
        _write(run_dir / TOPOLOGY_JSON, model.to_data(topology))
        _write(run_dir / PLAN_JSON, plan_data(plan))
        _write(run_dir / COMMANDS_JSON, [dataclasses.asdict(command) for command in processes])
        say(f"{program.name} on {name}, with QEMU {installation.qemu.version} under {accelerator}")
        keeper = spawn.start_keeper(reservation, processes, run_folder=run_dir)
        try:
            ended = keeper.wait_exit(name, timeout_s)
        finally:
            keeper.close()
    console = run_dir / name / CONSOLE_LOG
    said = console.read_text(errors="replace") if console.is_file() else ""
    return ProgramEnd(said, ended, read_tail(run_dir / name / QEMU_LOG))


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")
