# SPDX-License-Identifier: Apache-2.0
"""What lspci would print of a planned rack, in several of its forms."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from testbed.topology.plan import Function, NodePlan, Role
from tests.unit.agent.fake_sysfs import config_space

ROOT_PORT, UPSTREAM, DOWNSTREAM = 4, 5, 6

# class, vendor, device, and words, by the kind of function
_ENDPOINTS = {
    "ivshmem": (0x0500, 0x1AF4, 0x1110, "RAM memory"),
    "igb": (0x0200, 0x8086, 0x10C9, "Ethernet controller"),
    "edu": (0x00FF, 0x1234, 0x11E8, "Unclassified device"),
    "nvme": (0x0108, 0x1B36, 0x0010, "Non-Volatile memory controller"),
    "virtio-net": (0x0200, 0x1AF4, 0x1041, "Ethernet controller"),
    "virtio-iommu": (0x0880, 0x1AF4, 0x1057, "System peripheral"),
    "amd-iommu": (0x0806, 0x1022, 0x1419, "IOMMU"),
    "model": (0x1200, 0x1234, 0xA9E0, "Processing accelerators"),
    "model-nic": (0x0200, 0x1234, 0xA9E1, "Ethernet controller"),
}
_HOST_BRIDGE = "00:00.0 Host bridge [0600]: Intel Corporation Device [8086:29c0]"
_PORT_WORDS = {
    ROOT_PORT: "Root Port (Slot+)",
    UPSTREAM: "Upstream Port",
    DOWNSTREAM: "Downstream Port",
}
_ACS_FLAGS = "SrcValid+ {} ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans+"
_ACS_LINES = (
    "\tCapabilities: [148 v1] Access Control Services",
    f"\t\tACSCap:\t{_ACS_FLAGS.format('TransBlk+')}",
    f"\t\tACSCtl:\t{_ACS_FLAGS.format('TransBlk-')}",
)


def ids(function: Function) -> tuple[int, int, int, str]:
    """Class, vendor, device and the class's name."""
    if function.secondary_bus:
        # The ports with ACS are QEMU's root ports, also below a switch.
        port = (0x104C, 0x8233) if function.role is Role.SWITCH_DOWNSTREAM else (0x8086, 0x3420)
        if function.role is Role.SWITCH_UPSTREAM:
            port = (0x104C, 0x8232)
        return 0x0604, *((0x1B36, 0x000C) if function.acs else port), "PCI bridge"
    return _ENDPOINTS[function.kind]


def port_type(function: Function) -> int:
    """The type in a port's PCI Express capability."""
    if function.role is Role.SWITCH_UPSTREAM:
        return UPSTREAM
    return ROOT_PORT if function.acs or function.role is Role.ROOT_PORT else DOWNSTREAM


def verbose(plan: NodePlan, *, is_root: bool = True) -> str:
    """``lspci -nnvvv``, by root or by anybody."""
    blocks = [_HOST_BRIDGE + "\n"]
    for function in in_order(plan):
        code, vendor, device, name = ids(function)
        lines = [f"{_short(function)} {name} [{code:04x}]: Some Maker [{vendor:04x}:{device:04x}]"]
        if function.secondary_bus:
            lines.append(
                f"\tBus: primary={function.bus:02x}, secondary={function.secondary_bus:02x}, "
                f"subordinate={function.subordinate_bus:02x}, sec-latency=0"
            )
            words = _PORT_WORDS[port_type(function)]
            lines.append(f"\tCapabilities: [54] Express (v2) {words}, MSI 00")
            lines.append("\tCapabilities: [100 v2] Advanced Error Reporting")
        if function.acs:
            lines += _ACS_LINES
        if function.vram_size_bytes:
            size = function.vram_size_bytes >> 20
            lines.append(f"\tRegion 2: Memory at 1000000 (64-bit, prefetchable) [size={size}M]")
        if not is_root:
            lines = [line for line in lines if "Capabilities" not in line and "ACS" not in line]
            lines.append("\tCapabilities: <access denied>")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def hex_dump(plan: NodePlan, size: int = 4096) -> str:
    """``lspci -n -xxxx`` (``size`` 256: ``-xxx``)."""
    blocks = []
    for function in in_order(plan):
        code, vendor, device, _ = ids(function)
        lines = [f"{_short(function)} {code:04x}: {vendor:04x}:{device:04x}"]
        config = config_of(function)[:size]
        lines += [
            f"{offset:02x}: {' '.join(f'{byte:02x}' for byte in config[offset : offset + 16])}"
            for offset in range(0, size, 16)
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def config_of(function: Function) -> bytes:
    """A function's configuration space, as far as an importer may look."""
    code, vendor, device, _ = ids(function)
    express = ((0x10, struct.pack("<H", 2 | port_type(function) << 4)),)
    extended: tuple[tuple[int, bytes], ...] = ((0x01, bytes(8)),)
    if function.acs:
        extended += ((0x0D, struct.pack("<HH", 0x5F, 0x1D)),)
    is_bridge = bool(function.secondary_bus)
    config = bytearray(
        config_space(
            vendor=vendor,
            device=device,
            bridge=(function.bus, function.secondary_bus, function.subordinate_bus)
            if is_bridge
            else None,
            capabilities=express if is_bridge else (),
            extended=extended,
        )
    )
    config[10:12] = code.to_bytes(2, "little")
    return bytes(config)


def tree(plan: NodePlan) -> str:
    """``lspci -tvnn``."""
    root = [f for f in in_order(plan) if not f.parent]
    lines = list(_branches(plan, root))
    return "\n".join([f"-[0000:00]-{lines[0]}", *(" " * 11 + line for line in lines[1:])]) + "\n"


def _branches(plan: NodePlan, functions: Sequence[Function]) -> Iterator[str]:
    """The lines of one bus, the first with ``+-`` where the others have their branch."""
    for number, function in enumerate(functions):
        is_last = number == len(functions) - 1
        mark = "--" if len(functions) == 1 else "+-" if number == 0 or not is_last else "\\-"
        start = f"{mark}{function.slot:02x}.{function.number}"
        rest = " " if is_last else "|"
        if not function.secondary_bus:
            _, vendor, device, name = ids(function)
            yield f"{start}  Some Maker NVMe-less {name} [{vendor:04x}:{device:04x}]".replace(
                "NVMe-less ", "NVMe " if function.kind == "nvme" else ""
            )
            continue
        buses = f"{function.secondary_bus:02x}"
        if function.subordinate_bus != function.secondary_bus:
            buses += f"-{function.subordinate_bus:02x}"
        below = [f for f in in_order(plan) if f.parent == function.qemu_id]
        inner = list(_branches(plan, below))
        head = f"{start}-[{buses}]--"
        if not inner:
            yield head
            continue
        yield f"{head}{'--' if len(below) == 1 else ''}{inner[0]}"
        indent = rest + " " * (len(head) - 1 + (2 if len(below) == 1 else 0))
        yield from (indent + line for line in inner[1:])


def in_order(plan: NodePlan) -> list[Function]:
    """All functions in order of address, as lspci prints them."""
    return sorted(plan.functions, key=lambda f: (f.bus, f.slot, f.number))


def _short(function: Function) -> str:
    return function.bdf.removeprefix("0000:")
