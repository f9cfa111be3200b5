# SPDX-License-Identifier: Apache-2.0
"""Where every PCI function of a rack stands, worked out before anything boots.

Bus numbers are those that the guest will see: depth first, bridges of one bus in order of slot and
function. So does SeaBIOS number them (``src/fw/pciinit.c``, ``pci_bios_init_bus_rec``), whose
numbers Linux keeps, and so does Linux where it is told to do it itself (``drivers/pci/probe.c``,
``pci_scan_bridge_extend``; :mod:`testbed.machine.firmware`). Ports stay capable of hot-plug:
neither of the two reserves bus numbers for it unless told to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from testbed.errors import Diagnostic, InputError
from testbed.topology import virtual_functions
from testbed.topology.checks import problems
from testbed.topology.model import (
    IOMMU_NAME,
    NETWORK_NAME,
    Bell,
    Entry,
    Gpu,
    Nic,
    Node,
    Nvme,
    OwnDevice,
    Passthrough,
    RootPort,
    Switch,
    Topology,
)
from testbed.topology.plan import Function, NodePlan, RackPlan, Role
from testbed.topology.problem import DataPath, Problem
from testbed.topology.slots import Bus, Seat, assign
from testbed.topology.units import GIB, MIB, format_size
from testbed.topology.windows import MOST_IO_BRIDGES, hole64_bytes, io_bridges

BUS_COUNT = 256
FIRST_MEMORY_FD = 100

# The root bus of QEMU's q35 (hw/pci-host/q35.c, hw/isa/lpc_ich9.c), and the testbed's own cards.
IOMMU_SLOT = 0x01
FIRST_FREE_SLOT = 0x02
NETWORK_SLOT = 0x1E
ROOT_BUS_RESERVED = {
    0x00: "the host bridge",
    NETWORK_SLOT: f"the control network's card '{NETWORK_NAME}'",
    0x1F: "the chipset's ISA bridge",
}

# What all bells of a rack share beside their interrupts: QEMU wants some, a power of two.
BELL_MEMORY_BYTES = MIB

# Their own registers have a page that a peer rings.
ENGINES_WITH_DOORBELL = ("model", "edu")

# Under TCG a physical address has 40 bits (QEMU target/i386/cpu.h, TCG_PHYS_ADDR_BITS); half of
# that space is left to memory and to the alignment of the window itself.
MOST_HOLE64_BYTES = 512 * GIB


@dataclass(frozen=True)
class Placed:
    """What placement yields: a plan, or everything that stands against it."""

    plan: RackPlan | None
    problems: tuple[Problem, ...]


def place(topology: Topology) -> RackPlan:
    """The rack's plan; InputError with all faults, by name, if there can be none."""
    placed = attempt(topology)
    if placed.plan is None:
        raise refusal(topology, placed.problems)
    return placed.plan


def refusal(topology: Topology, faults: Sequence[Problem]) -> InputError:
    """Faults of a topology as an error, by name: for one whose file is not at hand any more."""
    return InputError(diagnostics=[_by_name(topology, fault) for fault in faults])


def attempt(topology: Topology) -> Placed:
    """The rack's plan, or all faults with their places in the topology's data."""
    found = list(problems(topology))
    plans: dict[str, NodePlan] = {}
    if not found:
        for name, node in topology.nodes.items():
            placer = _Placer(name, node)
            plans[name] = placer.run()
            found.extend(placer.problems)
    return Placed(None if found else RackPlan(topology, plans), tuple(found))


def _by_name(topology: Topology, fault: Problem) -> Diagnostic:
    """A fault of a topology that has no file, or none any more."""
    node = f", node {fault.path[1]}" if len(fault.path) > 1 and fault.path[0] == "nodes" else ""
    place = f"rack {topology.rack}{node}"
    return Diagnostic(place, 0, 0, fault.message, fault.expected, fault.nearest)


@dataclass(frozen=True)
class _Spot:
    """An address on a bus, and the bridge (``qemu_id``, or "") that the bus belongs to."""

    parent: str
    bus: int
    slot: int
    number: int
    shared: bool

    def function(
        self,
        name: str,
        role: Role,
        kind: str,
        *,
        device: str = "",
        buses: tuple[int, int] = (0, 0),
        acs: bool = False,
        chassis: int = 0,
        port: int = 0,
        vram_size_bytes: int = 0,
        memory_fd: int = 0,
        options: Mapping[str, str | int | bool] | None = None,
    ) -> Function:
        """The function that stands here; ``device`` if its name is not the entry's own."""
        return Function(
            name=name,
            device=device or name,
            role=role,
            kind=kind,
            qemu_id=_qemu_id(name),
            parent=self.parent,
            bus=self.bus,
            slot=self.slot,
            number=self.number,
            multifunction=self.shared,
            secondary_bus=buses[0],
            subordinate_bus=buses[1],
            acs=acs,
            chassis=chassis,
            port=port,
            vram_size_bytes=vram_size_bytes,
            memory_fd=memory_fd,
            options=options or {},
        )


class _Placer:
    """One node's placement; functions are appended parents first."""

    def __init__(self, name: str, node: Node) -> None:
        self.problems: list[Problem] = []
        self._name = name
        self._node = node
        self._path: DataPath = ("nodes", name, "pcie")
        self._functions: list[Function] = []
        self._last_bus = 0
        self._chassis = 0
        self._root_ports = 0
        self._memory_fd = FIRST_MEMORY_FD

    def run(self) -> NodePlan:
        """The plan; of use only if ``problems`` stays empty."""
        reserved = dict(ROOT_BUS_RESERVED)
        iommu = self._node.iommu
        # Nothing on the kernel's command line turns virtio's off: mode off leaves the device out.
        if iommu.kind == "amd" or (iommu.kind == "virtio" and iommu.mode != "off"):
            reserved[IOMMU_SLOT] = f"the IOMMU '{IOMMU_NAME}'"
            spot = _Spot("", 0, IOMMU_SLOT, 0, shared=False)
            kind = f"{iommu.kind}-iommu"
            self._functions.append(spot.function(IOMMU_NAME, Role.IOMMU, kind))
        spot = _Spot("", 0, NETWORK_SLOT, 0, shared=False)
        self._functions.append(spot.function(NETWORK_NAME, Role.NETWORK, "virtio-net"))

        bus = Bus("the root bus", reserved, FIRST_FREE_SLOT)
        for seat in self._seats(bus, self._node.pcie, self._path):
            self._place(seat, _Spot("", 0, seat.slot, seat.number, seat.shared))

        self._check_ids()
        self._check_buses()
        for conflict in virtual_functions.conflicts(self._functions):
            self._refuse_node(conflict, virtual_functions.ADVICE)
        hole_bytes = self._check_windows()
        return NodePlan(self._name, tuple(self._functions), hole_bytes, self._last_bus)

    def _seats(self, bus: Bus, entries: Sequence[Entry], path: DataPath) -> tuple[Seat, ...]:
        seating = assign(bus, entries, path)
        self.problems.extend(seating.problems)
        return seating.seats

    def _place(self, seat: Seat, spot: _Spot) -> None:
        entry = seat.entry
        match entry:
            case RootPort():
                self._place_root_port(entry, seat.path, spot)
            case Switch():
                self._place_switch(entry, seat.path, spot)
            case Gpu():
                self._place_gpu(entry, spot)
            case Nic():
                kind = "model-nic" if entry.engine == "model" else entry.engine
                self._functions.append(spot.function(entry.name, Role.ENGINE, kind))
            case Nvme():
                options = {"size_bytes": entry.size_bytes, "cmb_bytes": entry.cmb_bytes or 0}
                memory_fd = self._next_memory_fd()
                self._functions.append(
                    spot.function(
                        entry.name, Role.NVME, "nvme", memory_fd=memory_fd, options=options
                    )
                )
            case Passthrough():
                host = {"host": entry.host}
                self._functions.append(
                    spot.function(entry.name, Role.PASSTHROUGH, "vfio", options=host)
                )
            case OwnDevice():
                own: dict[str, str | int | bool] = {
                    "model": entry.model,
                    "bars_bytes": entry.bars_bytes or 0,
                }
                self._functions.append(spot.function(entry.name, Role.DEVICE, "own", options=own))
            case Bell():
                shared = {"bars_bytes": BELL_MEMORY_BYTES}
                self._functions.append(spot.function(entry.name, Role.BELL, "bell", options=shared))
            case _:
                assert_never(entry)

    def _place_root_port(self, entry: RootPort, path: DataPath, spot: _Spot) -> None:
        for index, child in enumerate(entry.below):
            if child.slot_and_function not in (None, (0, 0)):
                message = f"{child.address}: below a port there is one address only"
                place = (*path, "below", index, "address")
                self.problems.append(Problem(place, message, expected="00.0"))
        number = self._root_ports
        self._root_ports += 1
        position, chassis = len(self._functions), self._next_chassis()
        buses = self._place_below(
            entry.name, [(child, (*path, "below", i)) for i, child in enumerate(entry.below)]
        )
        port = spot.function(
            entry.name,
            Role.ROOT_PORT,
            "port",
            buses=buses,
            acs=entry.acs == "redirect",
            chassis=chassis,
            port=number,
        )
        self._functions.insert(position, port)

    def _place_switch(self, entry: Switch, path: DataPath, spot: _Spot) -> None:
        upstream_position = len(self._functions)
        bus = self._next_bus()
        rules = Bus(f"the switch '{entry.name}'", for_ports=True)
        for number, seat in enumerate(self._seats(rules, entry.below, (*path, "below"))):
            place = _Spot(_qemu_id(entry.name), bus, seat.slot, seat.number, seat.shared)
            name = f"{entry.name}.port{number}"
            position, chassis = len(self._functions), self._next_chassis()
            port = place.function(
                name,
                Role.SWITCH_DOWNSTREAM,
                "port",
                device=entry.name,
                buses=self._place_below(name, [(seat.entry, seat.path)]),
                acs=entry.acs == "redirect",
                chassis=chassis,
                port=number,
            )
            self._functions.insert(position, port)
        upstream = spot.function(
            entry.name, Role.SWITCH_UPSTREAM, "port", buses=(bus, self._last_bus)
        )
        self._functions.insert(upstream_position, upstream)

    def _place_below(
        self, port_name: str, entries: Sequence[tuple[Entry, DataPath]]
    ) -> tuple[int, int]:
        """What a port's link leads to, always at slot 0 of a bus of its own; the buses it took."""
        bus = self._next_bus()
        spot = _Spot(_qemu_id(port_name), bus, 0, 0, shared=False)
        for entry, path in entries:
            self._place(Seat(entry, path, 0, 0), spot)
        return bus, self._last_bus

    def _place_gpu(self, entry: Gpu, spot: _Spot) -> None:
        """Function 0 is the VRAM, 1 the engine, 2 the doorbell where the engine is not its own."""
        name = entry.name
        vram, engine, doorbell = (
            _Spot(spot.parent, spot.bus, spot.slot, number, shared=True) for number in range(3)
        )
        self._functions += [
            vram.function(
                f"{name}.vram",
                Role.VRAM,
                "ivshmem",
                device=name,
                vram_size_bytes=entry.vram_bytes,
                memory_fd=self._next_memory_fd(),
            ),
            engine.function(f"{name}.engine", Role.ENGINE, entry.engine, device=name),
        ]
        if entry.doorbell and entry.engine not in ENGINES_WITH_DOORBELL:
            self._functions.append(
                doorbell.function(f"{name}.doorbell", Role.DOORBELL, "edu", device=name)
            )

    def _next_bus(self) -> int:
        self._last_bus += 1
        return self._last_bus

    def _next_chassis(self) -> int:
        self._chassis += 1
        return self._chassis

    def _next_memory_fd(self) -> int:
        self._memory_fd += 1
        return self._memory_fd - 1

    def _check_windows(self) -> int:
        hole_bytes = hole64_bytes(self._functions)
        # With a passed-through device the host's own width counts, and QEMU checks it.
        is_emulated = all(f.role is not Role.PASSTHROUGH for f in self._functions)
        if is_emulated and hole_bytes > MOST_HOLE64_BYTES:
            message = f"the BARs need {format_size(hole_bytes)} of address space above 4 GiB"
            expected = f"at most {format_size(MOST_HOLE64_BYTES)}"
            self._refuse_node(message, expected)
        bridges = io_bridges(self._functions)
        if bridges > MOST_IO_BRIDGES:
            message = f"{bridges} ports lead to devices with I/O ports (engine igb)"
            self._refuse_node(message, f"at most {MOST_IO_BRIDGES}; other engines need none")
        return hole_bytes

    def _refuse_node(self, message: str, expected: str = "") -> None:
        self.problems.append(Problem(self._path, message, expected, at_key=True))

    def _check_ids(self) -> None:
        """``gpu0-vram`` as a name of its own would be the identifier of gpu0's VRAM."""
        seen: dict[str, Function] = {}
        for function in self._functions:
            other = seen.setdefault(function.qemu_id, function)
            if other is not function:
                self._refuse_node(
                    f"the names '{other.name}' and '{function.name}' are too much alike"
                )

    def _check_buses(self) -> None:
        if self._last_bus >= BUS_COUNT:
            self._refuse_node(
                f"node '{self._name}' needs {self._last_bus + 1} buses",
                f"at most {BUS_COUNT}: one for the root, one for each port and each switch",
            )


def _qemu_id(name: str) -> str:
    return name.replace(".", "-")
