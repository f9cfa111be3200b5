# SPDX-License-Identifier: Apache-2.0
"""Switches that route what QEMU's own devices send: the module ``p2p_router``, on by default.

Model devices route by themselves (:mod:`testbed.models.fabric`). QEMU sends all that its disks and
passed-through devices do to the IOMMU, as no switch does; see docs/switch-router.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# ruff: noqa: PLC0415  what builds modules is slow to import, and few racks build any
from testbed.errors import CapabilityMissing, SetupError
from testbed.host.progress import shown
from testbed.topology.plan import NodePlan, Role

if TYPE_CHECKING:
    from testbed.rack_node import RackNode

MODULE = "p2p_router"

# Who does DMA for a driver of the guest's kernel; VFIO's users route for themselves.
_INITIATORS = (Role.NVME, Role.PASSTHROUGH)


def is_wanted(plan: NodePlan) -> bool:
    """Whether a device of QEMU's that the guest's kernel drives is below a switch."""
    ports = {f.qemu_id for f in plan.by_role(Role.SWITCH_DOWNSTREAM)}
    return any(function.parent in ports for function in plan.by_role(*_INITIATORS))


def built(kernel: str) -> Path | None:
    """The module's file for a kernel, to be had from the start; None if :func:`start` says why."""
    from testbed.host import built_modules

    try:
        with shown() as progress:
            return built_modules.module_file(kernel, MODULE, progress)
    except (CapabilityMissing, SetupError):
        return None


def start(node: RackNode) -> str:
    """Load the module, to stay; answers why not, or "" if the switches route now.

    The first time it is built, and a compiler downloaded, with progress on stderr.
    """
    from testbed.guest import modules

    try:
        with shown() as progress:
            modules.ensure(node, MODULE, keep=True, progress=progress)
    except (CapabilityMissing, SetupError) as error:
        return error.message
    return ""
