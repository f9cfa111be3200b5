# SPDX-License-Identifier: Apache-2.0
"""What of a machine can be saved, and how QEMU saves and restores it.

QEMU writes the state of its devices by the command that Xen's tools use (QEMU migration/savevm.c,
``qmp_xen_save_devices_state``): unlike a migration it leaves the memory to us, and asks no device
whether it may. What has no state to be written (models, NVMe) is in the saved machine as in any
other, used by no driver; restored, it is as after a reset, and the guest gives it back its settings
(``guest_agent/resume.py``).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import CapabilityMissing, LinkLost, QmpError
from testbed.machine.command import MACHINE_STATE, MemoryFd
from testbed.machine.state_stream import without
from testbed.topology.model import Node
from testbed.topology.plan import Function, NodePlan, Role

if TYPE_CHECKING:
    from testbed.machine.qmp import Qmp

RAM = "ram"  # the memory's name in the keeper, after the node's
RAM_FD = 99  # below those of the devices
# What Xen's tools want has neither a head that names the machine nor a description at its end.
RESTORE_WORDS = (
    *("-machine", "suppress-vmdesc=on"),
    *("-global", "migration.send-configuration=off"),
    *("-incoming", "defer"),
)
# While devices are found, QEMU makes and drops 100 MiB of memory maps; the allocator (where it is
# tcmalloc) would keep 60 of them.
RESTORE_ENVIRONMENT = {"TCMALLOC_AGGRESSIVE_DECOMMIT": "true"}
# Only the first at the bells' server may load what each of them writes (QEMU hw/misc/ivshmem-pci.c,
# ``ivshmem_pre_load``).
REFUSED = "/ivshmem-doorbell"
LOAD_TIMEOUT_S = 20.0
PAUSE_S = 0.01

# The guest goes on using these; of all others it is made sure that nobody uses them.
_IN_USE = (
    Role.ROOT_PORT,
    Role.SWITCH_UPSTREAM,
    Role.SWITCH_DOWNSTREAM,
    Role.NETWORK,
    Role.IOMMU,
)


def reset(plan: NodePlan) -> tuple[Function, ...]:
    """The functions that a restore resets."""
    return tuple(f for f in plan.functions if f.role not in _IN_USE)


def ram(node: Node) -> MemoryFd:
    """The guest's memory, as the keeper makes it."""
    return MemoryFd(RAM_FD, RAM, node.machine.memory_bytes)


def why_not(plan: NodePlan, node: Node) -> str:
    """Why this machine cannot be saved; "" if it can."""
    if node.iommu.kind == "amd":
        return "QEMU cannot save AMD's IOMMU"
    passed = [f.name for f in plan.functions if f.kind == "vfio"]
    return f"{', '.join(passed)}: a real device cannot be saved" if passed else ""


def check(plan: NodePlan, node: Node) -> None:
    """:raises CapabilityMissing: it cannot be saved, and why."""
    if why := why_not(plan, node):
        raise CapabilityMissing(f"a warm start of '{plan.name}': {why}", hint="leave out --warm")


def save(qmp: Qmp, state: Path) -> None:
    """Stop the machine and write its devices' state; its memory then stands still too.

    :raises QmpError: QEMU cannot. :raises LinkLost: QEMU ended.
    """
    qmp.execute("stop")
    qmp.execute("xen-save-devices-state", {"filename": str(state), "live": False})
    try:
        state.write_bytes(without(state.read_bytes(), REFUSED))
    except ValueError as error:
        raise QmpError(
            f"{qmp.node}: the machine's state: {error}",
            error_class="GenericError",
            description=str(error),
        ) from error


def load(qmp: Qmp, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
    """Give a restored machine's devices their state; it stands still then.

    Its memory must be there: virtio devices read their rings, interrupts the IOMMU's tables.

    :raises QmpError: QEMU refused the state. :raises LinkLost: not in time, or QEMU ended.
    """
    qmp.execute("migrate-incoming", {"uri": f"file:{MACHINE_STATE}"})
    _await(qmp, timeout_s)


def _await(qmp: Qmp, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = qmp.execute("query-migrate")
        status = found.get("status", "none")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            why = found.get("error-desc", status)
            raise QmpError(
                f"{qmp.node}: the machine's state: {why}",
                error_class="GenericError",
                description=why,
            )
        if time.monotonic() > deadline_s:
            with contextlib.suppress(QmpError):
                qmp.execute("migrate_cancel")
            raise LinkLost(f"{qmp.node}: its state took longer than {timeout_s:g} s", node=qmp.node)
        time.sleep(PAUSE_S)
