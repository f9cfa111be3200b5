# SPDX-License-Identifier: Apache-2.0
"""Hold a placement against the PCI tree that a guest kernel reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from testbed.topology.plan import NodePlan, Role


def compare(plan: NodePlan, devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs, one line each; empty if the guest sees exactly what was placed.

    ``devices`` is the agent's ``pci.tree``. Functions of the machine itself (host bridge, LPC,
    SATA) are not part of a placement and are passed over: they are on the root bus and unplaced.
    """
    seen = {device["bdf"]: device for device in devices}
    wrong: list[str] = []
    for function in plan.functions:
        device = seen.pop(function.bdf, None)
        if device is None:
            wrong.append(f"{function.name} was placed at {function.bdf}, where nothing is")
            continue
        if function.secondary_bus and device.get("secondary_bus") != function.secondary_bus:
            wrong.append(
                f"{function.name} at {function.bdf} leads to bus {device.get('secondary_bus')},"
                f" not {function.secondary_bus}"
            )
        if function.role is Role.VRAM:
            sizes = [bar["size_bytes"] for bar in device["bars"]]
            if function.vram_size_bytes not in sizes:
                wrong.append(
                    f"{function.name} has BARs of {sizes} bytes, none of {function.vram_size_bytes}"
                )
    wrong += [f"an unplaced function is at {bdf}" for bdf in seen if not bdf.startswith("0000:00:")]
    return wrong
