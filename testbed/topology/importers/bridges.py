# SPDX-License-Identifier: Apache-2.0
"""PCI functions and the bridges they stand behind to a tree of parts.

A PCI Express link has one device at its end (PCI Express Base Specification 6.0, 7.3.1), so that
everything on the bus below a port is that device's functions: a GPU's audio function, a network
card's second port, virtual functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from testbed.topology.importers.machine import (
    DEVICES,
    MOST_BRIDGES_IN_A_ROW,
    Acs,
    Address,
    Kind,
    Notes,
    Part,
    counted,
)
from testbed.topology.importers.source import fault_at


class PortType(StrEnum):
    """What a bridge says it is."""

    EXPRESS = "express"  # a root port or a downstream port: a link, and one device at its end
    UPSTREAM = "upstream"
    CONVENTIONAL = "conventional"  # the bridge to a shared, parallel bus
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Function:
    """One PCI function as found: a bridge if ``port`` is set, otherwise of kind ``kind``."""

    address: Address
    line: int
    kind: Kind = Kind.OTHER
    port: PortType | None = None
    what: str = ""
    vendor: int = 0
    acs: Acs = Acs.UNKNOWN
    memory_bytes: int = 0
    below: tuple[Function, ...] = ()


@dataclass
class TreeMaker:
    """Functions to parts; what is merged on the way is counted for the notes."""

    name: str
    notes: Notes
    _merged: int = field(default=0, init=False)
    _conventional: list[str] = field(default_factory=list, init=False)
    _lost_ports: int = field(default=0, init=False)

    def root_bus(self, functions: Sequence[Function], *, is_lost: bool = False) -> tuple[Part, ...]:
        """The parts on a root bus; ``is_lost`` if the bus is none, and its port not in the file."""
        parts = self._bus(functions, Kind.ROOT_PORT, is_link=False, depth=0)
        if not is_lost:
            return parts
        return tuple(p if p.kind is Kind.ROOT_PORT else self._port_above(p) for p in parts)

    def say(self) -> None:
        """Add what was merged to the notes."""
        if self._merged:
            self.notes.folded.append(
                f"{counted(self._merged, 'function')} of devices that have several: each device "
                "is one here"
            )
        if self._lost_ports:
            self.notes.unknown.append(
                f"{counted(self._lost_ports, 'root port')} above what the file has: made up"
            )
        for origin in self._conventional:
            self.notes.changed.append(
                f"{origin} leads to a conventional PCI bus: a switch without ACS stands for it"
            )

    def _bus(
        self, functions: Sequence[Function], bridge_kind: Kind, *, is_link: bool | None, depth: int
    ) -> tuple[Part, ...]:
        """Bridges as ``bridge_kind``, and the devices of one bus; ``is_link`` None: perhaps one."""
        parts = [
            self._bridge(function, bridge_kind, depth)
            for function in functions
            if function.port is not None
        ]
        endpoints = [function for function in functions if function.port is None]
        parts += [self._device(group) for group in _devices(endpoints, is_link=is_link)]
        return tuple(sorted(parts, key=lambda part: part.rank))

    def _port_above(self, part: Part) -> Part:
        self._lost_ports += 1
        return Part(Kind.ROOT_PORT, f"above {part.origin}", part.rank, below=(part,))

    def _bridge(self, bridge: Function, kind: Kind, depth: int) -> Part:
        if kind is Kind.ROOT_PORT and bridge.port is PortType.UPSTREAM:
            return self._port_above(self._bridge(bridge, Kind.SWITCH, depth))
        if depth > MOST_BRIDGES_IN_A_ROW:
            message = f"more than {MOST_BRIDGES_IN_A_ROW} bridges in a row, up to {bridge.address}"
            raise fault_at(self.name, bridge.line, 1, message)
        if bridge.port is PortType.CONVENTIONAL and bridge.below:
            self._conventional.append(str(bridge.address))
        below_kind = Kind.PORT if kind is Kind.SWITCH else Kind.SWITCH
        is_link = None if bridge.port is PortType.UNKNOWN else bridge.port is PortType.EXPRESS
        if kind is Kind.SWITCH:
            is_link = False
        below = self._bus(bridge.below, below_kind, is_link=is_link, depth=depth + 1)
        return Part(
            kind=kind,
            origin=str(bridge.address),
            rank=_rank(bridge),
            what=bridge.what,
            acs=Acs.NONE if bridge.port is PortType.CONVENTIONAL else bridge.acs,
            below=below,
        )

    def _device(self, functions: Sequence[Function]) -> Part:
        """One device from its functions: the most telling one gives its kind and name."""
        first = min(functions, key=lambda f: (DEVICES.index(f.kind), f.address))
        self._merged += len(functions) - 1
        return Part(
            kind=first.kind,
            origin=str(first.address),
            rank=_rank(first),
            what=first.what,
            memory_bytes=max(f.memory_bytes for f in functions if f.kind is first.kind),
            functions=len(functions),
        )


def _rank(function: Function) -> tuple[int, ...]:
    address = function.address
    return (address.domain, address.bus, address.slot, address.number)


def _devices(endpoints: Sequence[Function], *, is_link: bool | None) -> list[list[Function]]:
    """The endpoints of one bus, by device."""
    if is_link is None:
        # Cards of one maker from slot 0 on are one card and its virtual functions.
        vendors = {function.vendor for function in endpoints}
        is_link = len(vendors) == 1 and any(f.address.slot == 0 for f in endpoints)
    if is_link:
        return [list(endpoints)] if endpoints else []
    slots: dict[int, list[Function]] = {}
    for function in endpoints:
        slots.setdefault(function.address.slot, []).append(function)
    return list(slots.values())


def assemble(
    functions: Mapping[Address, Function], secondary: Mapping[Address, int], name: str
) -> dict[tuple[int, int], tuple[Function, ...]]:
    """The functions on each root bus, by (domain, bus), with those behind bridges below them.

    ``secondary`` has the bus behind each bridge whose bus is known. InputError if two bridges lead
    to one bus, or one leads to a bus that is not behind it.
    """
    buses: dict[tuple[int, int], list[Function]] = {}
    for address in sorted(functions):
        buses.setdefault((address.domain, address.bus), []).append(functions[address])
    behind: dict[tuple[int, int], Address] = {}
    for address, bus in sorted(secondary.items()):
        line = functions[address].line
        if bus <= address.bus:
            message = f"{address} leads to bus {bus:02x}, which cannot be behind it"
            raise fault_at(name, line, 1, message, f"a bus number above {address.bus:02x}")
        other = behind.setdefault((address.domain, bus), address)
        if other != address:
            message = f"{address} leads to bus {bus:02x}, and so does {other}"
            raise fault_at(name, line, 1, message, "a bus for each bridge")
    # Bus numbers grow downwards: from the highest on, each bus is complete when it is hung up.
    for (domain, bus), bridge in sorted(behind.items(), reverse=True):
        on_bus = buses.pop((domain, bus), [])
        siblings = buses[domain, bridge.bus]
        index = next(i for i, f in enumerate(siblings) if f.address == bridge)
        siblings[index] = replace(siblings[index], below=tuple(on_bus))
    return {key: tuple(on_bus) for key, on_bus in buses.items()}
