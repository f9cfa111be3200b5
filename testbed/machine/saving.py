# SPDX-License-Identifier: Apache-2.0
"""What of a machine can be saved, and how QEMU saves and restores it.

QEMU writes the state of its devices by the command that Xen's tools use (QEMU migration/savevm.c,
``qmp_xen_save_devices_state``): unlike a migration it leaves the memory to us, and asks no device
whether it may. What has no state to be written (models, NVMe) is in the saved machine as in any
other, used by no driver; restored, it is as after a reset, and the guest gives it back its settings
(``guest_agent/resume.py``).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import CapabilityMissing, HostError, QmpError
from testbed.machine.command import MACHINE_STATE, QMP_USER_SOCKET, MemoryFd
from testbed.machine.sockets import connect_unix
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
    *("-incoming", f"file:{MACHINE_STATE}"),
)
# While devices are found, QEMU makes and drops 100 MiB of memory maps; the allocator (where it is
# tcmalloc) would keep 60 of them.
RESTORE_ENVIRONMENT = {"TCMALLOC_AGGRESSIVE_DECOMMIT": "true"}
# Only the first at the bells' server may load what each of them writes (QEMU hw/misc/ivshmem-pci.c,
# ``ivshmem_pre_load``).
REFUSED = "/ivshmem-doorbell"
LOAD_TIMEOUT_S = 20.0
PAUSE_S = 0.005

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


def await_running(folder: Path, node: str, check: Callable[[], None]) -> None:
    """Return when a restored machine has its state and goes on: it waits for its agent's message.

    Its memory is there from the start: virtio devices read their rings, interrupts the IOMMU's
    tables. A state that QEMU refuses ends it.

    :param check: raises if it has ended. :raises HostError: not in time; that is a slow host's.
    """
    deadline_s = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            with connect_unix(folder / QMP_USER_SOCKET, LOAD_TIMEOUT_S) as wire:
                if _is_running(wire, deadline_s):
                    return
        except (OSError, ValueError):
            pass  # it still starts, or has ended
        check()
        time.sleep(PAUSE_S)
    raise HostError(f"{node}: its state took longer than {LOAD_TIMEOUT_S:g} s")


def _is_running(wire: socket.socket, deadline_s: float) -> bool:
    """Ask until it is; for a question or two asyncio would be slow to import.

    :raises OSError, ValueError: no answer.
    """

    def ask(command: str) -> Any:
        wire.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while True:
            message = json.loads(answers.readline())
            if "error" in message:
                raise ValueError(message["error"])
            if "event" not in message:
                return message["return"]

    with wire.makefile("rb") as answers:
        json.loads(answers.readline())  # its greeting
        ask("qmp_capabilities")
        while time.monotonic() < deadline_s:
            if ask("query-status")["running"]:
                return True
            time.sleep(PAUSE_S)
    return False
