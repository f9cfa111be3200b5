# SPDX-License-Identifier: Apache-2.0
"""The structure of a rack without its names, for comparing two of them."""

from __future__ import annotations

from typing import Any

from testbed.errors import InputError
from testbed.topology.importers.convert import Imported, Options, convert_bytes
from testbed.topology.model import Entry, Topology
from testbed.topology.placement import place
from testbed.topology.plan import NodePlan, Role

Shape = tuple[Any, ...]


def imported(form: str, text: str | bytes, options: Options | None = None) -> Imported:
    """The import of a file's content."""
    content = text.encode() if isinstance(text, str) else text
    return convert_bytes(form, "a-file.txt", content, options or Options())


def refusal(form: str, text: str | bytes, options: Options | None = None) -> str:
    """The message that refuses a file's content."""
    try:
        imported(form, text, options)
    except InputError as error:
        return str(error)
    raise AssertionError("it was taken")


def only_plan(topology: Topology) -> NodePlan:
    """The plan of a rack with one node."""
    (plan,) = place(topology).nodes.values()
    return plan


def shape_of(topology: Topology, *, acs: bool = True) -> Shape:
    """What stands below what in a rack of one node, in order of address; no empty bridges."""
    (node,) = topology.nodes.values()
    plan = only_plan(topology)
    order = {f.device: n for n, f in enumerate(sorted(plan.functions, key=_address))}
    shapes = (_shape(entry, acs) for entry in sorted(node.pcie, key=lambda e: order[e.name]))
    return tuple(shape for shape in shapes if shape is not None)


def _address(function: Any) -> tuple[int, int, int]:
    return (function.bus, function.slot, function.number)


def _shape(entry: Entry, acs: bool) -> Shape | None:
    if entry.kind not in ("root_port", "switch"):
        return (entry.kind,)
    children = entry.children
    if entry.kind == "switch":
        # Explicit addresses of downstream ports order them; the rest fills the gaps.
        children = tuple(sorted(children, key=lambda c: _seat(entry, c)))
    below = tuple(s for s in (_shape(child, acs) for child in children) if s is not None)
    if not below:
        return None
    return (entry.kind, getattr(entry, "acs") if acs else "", *below)  # noqa: B009


def _seat(switch: Entry, child: Entry) -> tuple[int, int]:
    from testbed.topology.slots import Bus, assign  # noqa: PLC0415

    seats = assign(Bus("", for_ports=True), switch.children, ()).seats
    return next((s.slot, s.number) for s in seats if s.entry is child)


def names_of(topology: Topology) -> set[str]:
    """All devices' names."""
    (node,) = topology.nodes.values()
    return {e.name for e in node.entries() if e.kind not in ("root_port", "switch")}


def vrams(topology: Topology) -> set[int]:
    """The sizes of all GPUs' memories in bytes."""
    plan = only_plan(topology)
    return {f.vram_size_bytes for f in plan.functions if f.role is Role.VRAM}
