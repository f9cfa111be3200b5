# SPDX-License-Identifier: Apache-2.0
"""Slots and functions of one PCI bus: explicit addresses honoured, the rest filled in.

A bus has 32 slots of 8 functions (PCI Local Bus Specification 3.0, 3.2.2.3.4); a slot's function 0
must exist, or the others are not looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from testbed.topology.model import Entry, Gpu
from testbed.topology.problem import DataPath, Problem

SLOT_COUNT = 32


@dataclass(frozen=True)
class Bus:
    """What one bus allows.

    ``reserved``    slots that the testbed or the chipset holds, and by whom.
    ``first_free``  where the search for a free slot starts.
    ``for_ports``   each entry gets a port of its own here, so that it needs one function only.
    """

    label: str
    reserved: Mapping[int, str] = field(default_factory=dict)
    first_free: int = 0
    for_ports: bool = False


@dataclass(frozen=True)
class Seat:
    """One entry at its address; ``shared`` if its slot has further entries."""

    entry: Entry
    path: DataPath
    slot: int
    number: int
    shared: bool = False


@dataclass(frozen=True)
class Seating:
    """The entries of a bus in the order in which firmware finds them, and what went wrong."""

    seats: tuple[Seat, ...]
    problems: tuple[Problem, ...]


def assign(bus: Bus, entries: Sequence[Entry], path: DataPath) -> Seating:
    """Addresses for ``entries``, whose list stands at ``path`` in the topology's data."""
    problems: list[Problem] = []
    taken: dict[tuple[int, int], Seat] = {}
    for index, entry in enumerate(entries):
        address = entry.slot_and_function
        if address is None:
            continue
        seat = Seat(entry, (*path, index), *address)
        fault = _fault(bus, seat, taken)
        if fault:
            problems.append(Problem((*seat.path, "address"), f"{entry.address}: {fault}"))
        else:
            taken[address] = seat
    problems.extend(_without_function_0(taken))

    used = {slot for slot, _ in taken} | set(bus.reserved)
    free = (slot for slot in range(bus.first_free, SLOT_COUNT) if slot not in used)
    for index, entry in enumerate(entries):
        if entry.address is not None:
            continue
        slot = next(free, None)
        if slot is None:
            room = SLOT_COUNT - bus.first_free - sum(s >= bus.first_free for s in bus.reserved)
            problems.append(
                Problem(
                    (*path, index, entry.kind),
                    f"no slot is left on {bus.label} for '{entry.name}'",
                    expected=f"at most {room} entries",
                )
            )
            break
        taken[slot, 0] = Seat(entry, (*path, index), slot, 0)
    return Seating(_in_order(taken), tuple(problems))


def _fault(bus: Bus, seat: Seat, taken: Mapping[tuple[int, int], Seat]) -> str:
    """Why an explicit address cannot be, or ""."""
    holder = bus.reserved.get(seat.slot)
    if holder:
        return f"this slot of {bus.label} holds {holder}"
    other = taken.get((seat.slot, seat.number))
    if other:
        return f"'{other.entry.name}' stands at this address of {bus.label} already"
    whole = [s for s in (seat, *taken.values()) if s.slot == seat.slot and _needs_slot(bus, s)]
    if seat.number and seat in whole:
        return "a GPU takes all functions of its slot and starts at function 0"
    if whole and any(s.slot == seat.slot for s in taken.values()):
        return f"the GPU '{whole[0].entry.name}' takes all functions of this slot of {bus.label}"
    return ""


def _needs_slot(bus: Bus, seat: Seat) -> bool:
    return isinstance(seat.entry, Gpu) and not bus.for_ports


def _without_function_0(taken: Mapping[tuple[int, int], Seat]) -> list[Problem]:
    return [
        Problem(
            (*seat.path, "address"),
            f"{seat.entry.address}: the slot has no function 0, so no guest would find it",
        )
        for (slot, number), seat in taken.items()
        if number and (slot, 0) not in taken
    ]


def _in_order(taken: Mapping[tuple[int, int], Seat]) -> tuple[Seat, ...]:
    slots = [slot for slot, _ in taken]
    return tuple(
        Seat(seat.entry, seat.path, slot, number, shared=slots.count(slot) > 1)
        for (slot, number), seat in sorted(taken.items())
    )
