# SPDX-License-Identifier: Apache-2.0
"""What of a machine can be saved, and how QEMU saves and restores it.

QEMU writes the state of devices; memory that is shared and has a file behind it is left to us
(``x-ignore-shared``; QEMU migration/ram.c, ``ramblock_is_ignored``). A function whose state cannot
be saved is not in the saved machine: a placeholder is, for which the guest's bridges open a window,
and which the guest then lets go. ``pci-testdev`` has no state, so that the stream has none for that
address, and the restored QEMU has the real function there from its start, as after a reset.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import CapabilityMissing, LinkLost, QmpError
from testbed.machine.command import MACHINE_STATE, MemoryFd
from testbed.topology.model import Node
from testbed.topology.plan import Function, NodePlan, Role
from testbed.topology.windows import own_bars

if TYPE_CHECKING:
    from testbed.machine.qmp import Qmp

RAM = "ram"  # the memory's name in the keeper, after the node's
RAM_FD = 99  # below those of the devices
RESTORE_WORDS = (
    *("-global", "migration.x-ignore-shared=on"),
    *("-incoming", "defer"),
)
# While devices are found, QEMU makes and drops 100 MiB of memory maps; the allocator (where it is
# tcmalloc) would keep 60 of them.
RESTORE_ENVIRONMENT = {"TCMALLOC_AGGRESSIVE_DECOMMIT": "true"}
SAVE_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 20.0
PAUSE_S = 0.01

# Bridges, the control network and the IOMMU are saved. All else comes back as after a reset: models
# and NVMe cannot be saved at all, and of memory behind a BAR QEMU wants to find the BAR where it
# was (migration/ram.c, "Mismatched GPAs"), which in a fresh machine it is not.
_SAVED = (
    Role.ROOT_PORT,
    Role.SWITCH_UPSTREAM,
    Role.SWITCH_DOWNSTREAM,
    Role.NETWORK,
    Role.IOMMU,
)


def left_out(plan: NodePlan) -> tuple[Function, ...]:
    """The functions that come back by themselves after a restore."""
    return tuple(f for f in plan.functions if f.role not in _SAVED)


def window_bytes(function: Function) -> int:
    """The size of the 64-bit BARs that such a function will have, 0 if it has none.

    Exactly that: with more, Linux finds no room for what fits in a cold boot.
    """
    return own_bars(function)[0]


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


def save(qmp: Qmp, state: Path, *, timeout_s: float = SAVE_TIMEOUT_S) -> None:
    """Stop the machine and write its devices' state; its memory then stands still too.

    :raises QmpError: QEMU cannot. :raises LinkLost: it did not end in time, or QEMU did.
    """
    qmp.execute("stop")
    capability = {"capability": "x-ignore-shared", "state": True}
    qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})
    qmp.execute("migrate", {"uri": f"file:{state}"})
    _await(qmp, timeout_s)


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
