# SPDX-License-Identifier: Apache-2.0
"""One machine that is to be restored: what boots it, what restores it, and what it is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import testbed
from testbed.guest import switch_router
from testbed.host import kmod_sources
from testbed.host.digest import digest
from testbed.host.installation import Installation
from testbed.machine import argv, models, saving
from testbed.machine.bells import bells_command
from testbed.machine.command import LaunchContext, NodeCommand, Start
from testbed.machine.processes import HelperCommand
from testbed.topology.model import Node
from testbed.topology.plan import NodePlan, RackPlan
from testbed.warm.store import FORMAT

INITRD = Path("initrd.img")  # in QEMU's working directory


@dataclass(frozen=True)
class Wanted:
    """One machine that is to be restored.

    ``rack``     the plan of a rack of it alone.
    ``context``  as for a cold start; its ``start`` and ``initrd`` are not looked at.
    ``router``   its switches shall route what QEMU's devices send, if that can be had.
    """

    rack: RackPlan
    plan: NodePlan
    spec: Node
    installation: Installation
    context: LaunchContext
    router: bool

    def command(self) -> NodeCommand:
        """What boots it to be saved."""
        return argv.command(self.plan, self.spec, self._context(Start.SAVE))

    def restoring(self) -> NodeCommand:
        """What restores it."""
        return argv.command(self.plan, self.spec, self._context(Start.RESTORE))

    def _context(self, start: Start) -> LaunchContext:
        values = {**vars(self.context), "start": start, "initrd": INITRD}
        return LaunchContext(**values)

    def helpers(self) -> list[HelperCommand]:
        """What QEMU needs beside it, while it boots to be saved."""
        helpers = [bells_command(self.rack)]
        if models.has_models(self.plan):
            helpers.append(models.models_command(self.rack, self.plan))
        return [helper for helper in helpers if helper]

    def models_spec(self) -> str:
        """What serves its devices then: nothing goes wrong on purpose."""
        spec = models.models_spec(self.rack, self.plan)
        for device in spec["devices"]:
            device.pop("faults", None)
            device.pop("bus_timing", None)
        return json.dumps(spec)

    @property
    def reset(self) -> tuple[str, ...]:
        """Addresses of the functions that a restore resets."""
        return tuple(function.bdf for function in saving.reset(self.plan))

    @property
    def key(self) -> str:
        """A hash of all that the saved machine is made from."""
        kernel = self.installation.kernel(self.spec.kernel)
        modules = kernel.modules.stat()
        command = self.command()
        return digest(
            FORMAT,
            testbed.__version__,
            command.argv,
            dict(command.environment),
            self.installation.qemu.identity,
            self.context.accelerator,
            _processor() if self.context.accelerator != "tcg" else "",
            kernel.sha256,
            (str(kernel.modules), modules.st_size, modules.st_mtime_ns),
            self.installation.image.key,
            self.installation.agent.hash,
            self.reset,
            [helper.argv[-1] for helper in self.helpers()],
            self.models_spec() if models.has_models(self.plan) else "",
            _code() if models.has_models(self.plan) else "",
            kmod_sources.source_hash(switch_router.MODULE) if self.has_router else "",
        )

    @property
    def has_router(self) -> bool:
        """Whether it is of any use."""
        return self.router and switch_router.is_wanted(self.plan)


def _code() -> str:
    """Of the device models, which the saved machine has found."""
    files = sorted((Path(testbed.__file__).parent / "models").glob("*.py"))
    return digest(*(part for file in files for part in (file.name, file.read_bytes())))


def _processor() -> str:
    """What a machine under KVM sees of the host's."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(wanted))
