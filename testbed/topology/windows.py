# SPDX-License-Identifier: Apache-2.0
"""How much address space a node's BARs need: memory above 4 GiB, and I/O ports.

A bridge's window is as aligned as the largest BAR in it and a multiple of that alignment (SeaBIOS
``src/fw/pciinit.c``, ``pci_bios_check_devices``; Linux needs no more), so that the need is worked
out along the tree; a plain sum would be too small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from testbed.topology.plan import Function, Role
from testbed.topology.units import GIB, MIB, power_of_two_at_least, round_up

# QEMU's default (hw/pci-host/q35.c, Q35_PCI_HOST_HOLE64_SIZE_DEFAULT); never less.
LEAST_HOLE64_BYTES = 32 * GIB
# A passed-through device's BARs are not known before it is there; large GPUs have up to 128 GiB.
PASSTHROUGH_BYTES = 128 * GIB
BRIDGE_ALIGNMENT_BYTES = MIB

# I/O ports are given to bridges 4 KiB at a time, out of less than 60 KiB. SeaBIOS stops without a
# word on the console when that is not enough (``pci_bios_init_root_regions_io``; measured: 13
# bridges boot, 15 do not).
MOST_IO_BRIDGES = 14
_KINDS_WITH_IO = ("igb", "vfio")


def io_bridges(functions: Sequence[Function]) -> int:
    """How many ports lead straight to a device with I/O ports (or one that may have them)."""
    return len({f.parent for f in functions if f.parent and f.kind in _KINDS_WITH_IO})


def hole64_bytes(functions: Sequence[Function]) -> int:
    """The size of the 64-bit window: a power of two, at least QEMU's default."""
    children: dict[str, list[Function]] = defaultdict(list)
    for function in functions:
        children[function.parent].append(function)

    # Children stand after their parents, so that going backwards finds every child measured.
    needs: dict[str, tuple[int, int]] = {}
    for function in reversed(functions):
        below = [needs[child.qemu_id] for child in children[function.qemu_id]]
        needs[function.qemu_id] = _window(below) if below else _own_bars(function)
    size_bytes, alignment_bytes = _window([needs[child.qemu_id] for child in children[""]])
    # The window's own start need not be aligned: room for one alignment more.
    return max(LEAST_HOLE64_BYTES, power_of_two_at_least(size_bytes + alignment_bytes))


def _window(needs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    alignment_bytes = max((alignment for _, alignment in needs), default=BRIDGE_ALIGNMENT_BYTES)
    return round_up(sum(size for size, _ in needs), alignment_bytes), alignment_bytes


def _own_bars(function: Function) -> tuple[int, int]:
    """Size and alignment of a device's 64-bit prefetchable BARs."""
    if function.role is Role.VRAM:
        size_bytes = function.vram_size_bytes
    elif function.role is Role.PASSTHROUGH:
        size_bytes = PASSTHROUGH_BYTES
    else:
        size_bytes = int(
            function.options.get("cmb_bytes", 0) or function.options.get("bars_bytes", 0)
        )
    return size_bytes, max(size_bytes, BRIDGE_ALIGNMENT_BYTES)
