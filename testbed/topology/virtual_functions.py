# SPDX-License-Identifier: Apache-2.0
"""Where igb's virtual functions lie, although nobody asked for them.

QEMU (hw/net/igb.c, hw/pci/pcie_sriov.c) makes all eight with the device, at its own routing
identifier plus 0x80, 0x82, … 0x8e on its own bus, and does not start if one of them stands on
another function, or beyond the bus. Below a port nothing else is on the bus.
"""

from __future__ import annotations

from collections.abc import Sequence

from testbed.topology.plan import Function

FIRST_OFFSET = 0x80
STRIDE = 2
COUNT = 8
BUS_FUNCTIONS = 0x100
ADVICE = "igb below root ports, or two slots apart on the root bus, in slots up to 0e"


def conflicts(functions: Sequence[Function]) -> list[str]:
    """Every igb that QEMU could not start, in words; nothing if there is none."""
    found = []
    owners = {_place(f): f.device for f in functions}
    for function in functions:
        if function.kind != "igb":
            continue
        bus, number = _place(function)
        for virtual in range(number + FIRST_OFFSET, number + FIRST_OFFSET + STRIDE * COUNT, STRIDE):
            other = owners.setdefault((bus, virtual), function.device)
            at = f"at {function.slot:02x}.{function.number}"
            if virtual >= BUS_FUNCTIONS:
                found.append(
                    f"'{function.device}' (engine igb) {at} needs functions beyond its bus"
                )
                break
            if other != function.device:
                found.append(
                    f"virtual functions of '{function.device}' (engine igb) {at} would stand where"
                    f" those of '{other}' do"
                )
                break
    return found


def _place(function: Function) -> tuple[int, int]:
    return function.bus, function.slot << 3 | function.number
