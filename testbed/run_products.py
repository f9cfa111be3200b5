# SPDX-License-Identifier: Apache-2.0
"""What a start leaves in its run folder, stage by stage: for people, records and replays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.errors import HostError
from testbed.host.installation import Installation
from testbed.machine import own_devices
from testbed.machine.processes import Command
from testbed.topology import model
from testbed.topology.model import Topology
from testbed.topology.plan import RackPlan

TOPOLOGY_JSON = "topology.json"
PLAN_JSON = "plan.json"
COMMANDS_JSON = "commands.json"
VERSIONS_JSON = "versions.json"
KERNEL_CONFIG = "config-"  # and the beginning of the kernel's identity
KEPT_IDENTITY = 16


def begin(run_dir: Path, plan: RackPlan) -> None:
    """Make it, with what is known before anything is looked at on this host."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make the run folder {run_dir}: {error.strerror}") from error
    write(run_dir / TOPOLOGY_JSON, model.to_data(plan.topology))
    write(run_dir / PLAN_JSON, plan_data(plan))


def write_commands(run_dir: Path, commands: Sequence[Command]) -> None:
    """The processes that are started. :raises HostError: it cannot be written."""
    write(run_dir / COMMANDS_JSON, [dataclasses.asdict(command) for command in commands])


def keep_versions(
    run_dir: Path, topology: Topology, installation: Installation, accelerator: str
) -> dict[str, Any]:
    """What the rack runs on, in its folder, with the kernels' configurations if they are known."""
    versions = versions_of(installation, accelerator) | _own_versions(topology)
    write(run_dir / VERSIONS_JSON, versions)
    for kernel in installation.kernels.values():
        if kernel.config is not None:
            file = run_dir / f"{KERNEL_CONFIG}{kernel.identity[:KEPT_IDENTITY]}"
            try:
                file.write_bytes(kernel.config.read_bytes())
            except OSError as error:
                raise HostError(f"cannot write {file}: {error.strerror}") from error
    return versions


def _own_versions(topology: Topology) -> dict[str, Any]:
    own = own_devices.summary(topology)
    return {"own_devices": own} if own else {}


def versions_of(installation: Installation, accelerator: str) -> dict[str, Any]:
    """What the rack runs on, down to package hashes; goes into every record."""
    return {
        "qemu": installation.qemu.version,
        "qemu_package": installation.qemu.package,
        "qemu_identity": installation.qemu.identity,
        "accelerator": accelerator,
        "agent": installation.agent.hash,
        "kernels": {
            name: {
                "release": kernel.release,
                "build_id": kernel.build_id,
                "sha256": kernel.sha256,
                "pvh": kernel.pvh,
            }
            for name, kernel in installation.kernels.items()
        },
        "packages": {
            name: [dataclasses.asdict(package) for package in locked]
            for name, locked in installation.packages.items()
        },
    }


def plan_data(plan: RackPlan) -> dict[str, Any]:
    """A placement as plain values, for JSON."""
    return {
        name: {
            "pci_hole64_bytes": node.pci_hole64_bytes,
            "last_bus": node.last_bus,
            "functions": [
                {
                    **{k: _plain(v) for k, v in vars(function).items()},
                    "bdf": function.bdf,
                }
                for function in node.functions
            ],
        }
        for name, node in plan.nodes.items()
    }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def write(path: Path, data: Any) -> None:
    """As JSON. :raises HostError: it cannot be written."""
    write_text(path, json.dumps(data, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """:raises HostError: it cannot be written."""
    try:
        path.write_text(text)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error
