# SPDX-License-Identifier: Apache-2.0
"""A plan as a tree of text, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from testbed.topology.model import Link, Node
from testbed.topology.plan import Function, NodePlan, RackPlan, Role
from testbed.topology.units import format_duration, format_rate, format_size

_LABELS = {
    Role.ROOT_PORT: "root port",
    Role.SWITCH_UPSTREAM: "switch",
    Role.SWITCH_DOWNSTREAM: "port",
    Role.NETWORK: "control network",
    Role.IOMMU: "IOMMU",
    Role.BELL: "doorbell for other nodes",
}


def tree(plan: RackPlan) -> str:
    """The rack's nodes, their PCI functions as a tree, and the private links; no newline at end."""
    topology = plan.topology
    lines = [
        f"rack {topology.rack}" + (f": {topology.description}" if topology.description else "")
    ]
    for name, node_plan in plan.nodes.items():
        lines += ["", _node_title(name, topology.nodes[name])]
        lines += _branches(node_plan, "", "")
    if topology.links:
        lines += ["", "links"]
        lines += [
            f"  {link.kind} x{link.width}  {' ── '.join(link.between)}{_pace(link)}"
            for link in topology.links
        ]
    return "\n".join(lines)


def _pace(link: Link) -> str:
    rate, delay = link.bandwidth_bytes_per_s, link.latency_ns
    words = [*([format_rate(rate)] if rate else []), *([format_duration(delay)] if delay else [])]
    return f"  {', '.join(words)}" if words else ""


def _node_title(name: str, node: Node) -> str:
    machine, iommu = node.machine, node.iommu
    words = [
        f"cpu {machine.cpu}",
        f"{machine.vcpus} vCPU" + ("s" if machine.vcpus > 1 else ""),
        f"{format_size(machine.memory_bytes)} memory",
        f"kernel {node.kernel}",
        "no IOMMU" if iommu.kind == "none" else f"{iommu.kind} IOMMU, {iommu.mode}",
    ]
    return f"{name} ({', '.join(words)})"


def _branches(plan: NodePlan, parent: str, indent: str) -> Iterator[str]:
    """The lines of everything plugged into one bridge, in order of address."""
    slots: dict[int, list[Function]] = {}
    for function in plan.functions:
        if function.parent == parent:
            slots.setdefault(function.slot, []).append(function)
    rows = [row for slot in sorted(slots) for row in _rows(slots[slot])]
    for position, row in enumerate(rows):
        is_last = position == len(rows) - 1
        yield f"{indent}{'└─ ' if is_last else '├─ '}{_row_text(row)}"
        if row[0].secondary_bus:
            yield from _branches(plan, row[0].qemu_id, indent + ("   " if is_last else "│  "))


def _rows(functions: Sequence[Function]) -> Iterator[list[Function]]:
    """The functions of one slot by device: a GPU's share a line, ports have one each."""
    devices = dict.fromkeys(f.name if f.secondary_bus else f.device for f in functions)
    for device in devices:
        yield [f for f in functions if (f.name if f.secondary_bus else f.device) == device]


def _row_text(functions: Sequence[Function]) -> str:
    first = functions[0]
    address = first.bdf.removeprefix("0000:")
    if len(functions) == 1:
        return f"{address} {first.name}  {_what(first)}"
    parts = [f".{f.number} {f.name.removeprefix(f.device + '.')} {_what(f)}" for f in functions]
    return f"{address[:-2]} {first.device}  {', '.join(part.rstrip() for part in parts)}"


def _what(function: Function) -> str:
    if function.secondary_bus:
        buses = f"{function.secondary_bus:02x}"
        if function.subordinate_bus != function.secondary_bus:
            buses += f"-{function.subordinate_bus:02x}"
        acs = " ACS" if function.acs else ""
        return f"{_LABELS[function.role]}, bus {buses}{acs}"
    return endpoint(function)


def endpoint(function: Function) -> str:
    """What a function that is no bridge is, in a few words."""
    match function.role:
        case Role.VRAM:
            return format_size(function.vram_size_bytes)
        case Role.NVME:
            cmb_bytes = int(function.options["cmb_bytes"])
            cmb = f", CMB {format_size(cmb_bytes)}" if cmb_bytes else ""
            return f"nvme {format_size(int(function.options['size_bytes']))}{cmb}"
        case Role.PASSTHROUGH:
            return f"host device {function.options['host']}"
        case Role.DEVICE:
            return f"your own {PurePath(str(function.options['model'])).name}"
        case Role.DOORBELL:
            return ""
    return _LABELS.get(function.role, function.kind)
