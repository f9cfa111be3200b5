# SPDX-License-Identifier: Apache-2.0
"""What placement yields: every PCI function of a rack with its address, as frozen values.

Everything after this stage (QEMU command, agent, suites, drawings) reads these values and derives
nothing again. A function is named ``node/device.role``, for example ``host0/gpu0.vram``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from testbed.topology.model import Topology

# The kinds of functions that are served from outside QEMU: the GPU's engine, the NIC, and devices
# of the user's own.
MODEL_KINDS = ("model", "model-nic", "own")


class Role(StrEnum):
    """What one PCI function is there for."""

    ROOT_PORT = "root_port"
    SWITCH_UPSTREAM = "switch_upstream"
    SWITCH_DOWNSTREAM = "switch_downstream"
    VRAM = "vram"
    ENGINE = "engine"
    DOORBELL = "doorbell"
    NVME = "nvme"
    PASSTHROUGH = "passthrough"
    DEVICE = "device"  # of the user's own
    BELL = "bell"  # how nodes interrupt one another
    NETWORK = "network"  # the rack's own control network, not part of the topology
    IOMMU = "iommu"  # virtio-iommu is a PCI function too


@dataclass(frozen=True)
class Function:
    """One PCI function.

    ``name``      ``gpu0.vram``; for ports and single-function devices the device's own name.
    ``device``    the topology's entry that it stands for (``gpu0``; ``sw0`` for all of a switch).
    ``kind``      the QEMU-independent kind: ``ivshmem``, ``model``, ``igb``, ``nvme``, ``port`` …
    ``qemu_id``   unique within the node; made of letters, digits, ``-`` and ``_``.
    ``parent``    the ``qemu_id`` of the bridge it is plugged into, or "" for the root bus.
    ``bus``/``slot``/``number``  the address the guest kernel will see (segment 0).
    """

    name: str
    device: str
    role: Role
    kind: str
    qemu_id: str
    parent: str
    bus: int
    slot: int
    number: int
    multifunction: bool = False  # its slot has more than one function
    secondary_bus: int = 0  # bridges only
    subordinate_bus: int = 0  # bridges only
    acs: bool = False  # the QEMU function has an ACS capability
    chassis: int = 0  # ports with a slot only
    port: int = 0  # ports only: the port number in the link capabilities
    vram_size_bytes: int = 0  # vram only
    memory_fd: int = 0  # vram and nvme: the file descriptor that QEMU inherits
    options: Mapping[str, str | int | bool] = field(default_factory=dict)  # kind-specific

    @property
    def bdf(self) -> str:
        """The guest's address, ``0000:BB:SS.F``."""
        return f"0000:{self.bus:02x}:{self.slot:02x}.{self.number:x}"


@dataclass(frozen=True)
class NodePlan:
    """One node's PCI tree, parents before children, and its memory map's needs."""

    name: str
    functions: tuple[Function, ...]
    pci_hole64_bytes: int  # the window above 4 GiB that the host bridge needs
    last_bus: int  # buses 0 to this one exist

    def function(self, name: str) -> Function:
        """The function called ``gpu0.vram``; KeyError if there is none."""
        for function in self.functions:
            if function.name == name:
                return function
        raise KeyError(name)

    def of_device(self, device: str) -> tuple[Function, ...]:
        """All functions of one entry, in tree order; within a slot by function number."""
        return tuple(f for f in self.functions if f.device == device)

    def by_role(self, *roles: Role) -> tuple[Function, ...]:
        """All functions with one of these roles, in tree order."""
        return tuple(f for f in self.functions if f.role in roles)


@dataclass(frozen=True)
class RackPlan:
    """The rack: its topology as resolved, and where everything stands."""

    topology: Topology
    nodes: Mapping[str, NodePlan]

    def alone(self, name: str) -> RackPlan:
        """The rack that has nothing but this node, which stands as it does in this one."""
        nodes = {name: self.topology.nodes[name]}
        topology = replace(self.topology, nodes=nodes, links=())
        return RackPlan(topology, {name: self.nodes[name]})
