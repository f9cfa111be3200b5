# SPDX-License-Identifier: Apache-2.0
"""Which firmware a machine starts with: QEMU's SeaBIOS, or qboot, which leaves the BARs to Linux.

SeaBIOS gives every BAR an address and lets every device decode it. From then on, each write of the
kernel to a bridge or a BAR makes QEMU build the memory maps of all bridges and IOMMU address spaces
again, with every BAR in them: half of an emulated boot with 26 bridges. qboot only numbers the
buses, the kernel places the BARs, and they are decoded when a driver wants them.

qboot numbers the bridges of one bus from the last to the first (``pci.c``, ``do_setup_pci_bus``).
The kernel must therefore number them anew, which it does in the order that placement predicts.
"""

from __future__ import annotations

from testbed.machine.command import LaunchContext
from testbed.topology.model import Node

RENUMBER_BUSES = "assign-busses"  # of the kernel's pci= word


def quick_firmware(node: Node, context: LaunchContext) -> str:
    """The firmware's file for ``-bios``, or "" if this machine starts with QEMU's default.

    AMD's table of IOMMUs is made while the firmware's bus numbers hold (QEMU hw/i386/acpi-build.c,
    ``build_amd_iommu``). qboot sets no memory types (MTRR), which matters to a real processor. A
    program in the kernel's place expects every BAR to have an address.
    """
    if context.program or context.accelerator != "tcg" or node.iommu.kind == "amd":
        return ""
    return context.quick_firmware
