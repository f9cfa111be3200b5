# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's command line.

Source: Linux Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

from testbed.machine.command import LaunchContext
from testbed.machine.firmware import RENUMBER_BUSES, quick_firmware
from testbed.topology.machine import Iommu
from testbed.topology.model import Node

# A dead guest must end QEMU (which runs with -no-reboot) instead of standing still.
PANIC_WORDS = ("panic=-1", "oops=panic")

# An emulated processor has no speculation to guard against, its clocks need no calibration, and its
# every instruction costs: without the self-tests of ciphers and the clearing of each page twice, a
# cold boot takes a fifth less; statistics of pressure and of memory's use are work without end.
# None of it is under test, and none of it taints the kernel.
TCG_WORDS = (
    "mitigations=off",
    "tsc=reliable",
    "no_timer_check",
    "cryptomgr.notests",
    "init_on_alloc=0",
    "noreplace-smp",
    "psi=0",
    "damon_stat.enabled=0",
)

# Linux would set I/O ports aside below every port that can hot-plug. There are too few, and it then
# takes those away that the firmware had given to devices.
NO_HOTPLUG_IO = "hpiosize=0"

_STRICTNESS = {"passthrough": "iommu=pt", "lazy": "iommu.strict=0", "strict": "iommu.strict=1"}


def kernel_words(node: Node, context: LaunchContext) -> tuple[str, ...]:
    """All words, the user's last, so that they win."""
    return (
        "console=ttyS0",
        *PANIC_WORDS,
        *(() if context.console_verbose else ("quiet",)),
        pci_word(node, context),
        *iommu_words(node.iommu),
        *(tcg_words(context) if context.accelerator == "tcg" else ()),
        *context.kernel_args,
        *node.kernel_args,
    )


def tcg_words(context: LaunchContext) -> tuple[str, ...]:
    """What an emulated machine is spared, and how fast its clock runs: it is the host's."""
    if not context.tsc_khz:
        return TCG_WORDS
    return (*TCG_WORDS, f"tsc_early_khz={context.tsc_khz}")


def pci_word(node: Node, context: LaunchContext) -> str:
    """What the kernel is told of the PCI bus: by all racks, and by those with quick firmware."""
    renumbered = (RENUMBER_BUSES,) if quick_firmware(node, context) else ()
    return "pci=" + ",".join((NO_HOTPLUG_IO, *renumbered))


def iommu_words(iommu: Iommu) -> tuple[str, ...]:
    """What makes the kernel use the IOMMU as the topology says.

    Distributions differ in their defaults, so that each choice is spelt out. virtio-iommu has no
    word of its own: it is in use if it is there.
    """
    if iommu.kind == "none":
        return ()
    if iommu.mode == "off":
        return {"intel": ("intel_iommu=off",), "amd": ("amd_iommu=off",), "virtio": ()}[iommu.kind]
    words: tuple[str, ...] = ()
    if iommu.kind == "intel":
        words = (f"intel_iommu=on,{'sm_on' if iommu.scalable else 'sm_off'}",)
    if iommu.mode != "passthrough":
        words += ("iommu.passthrough=0",)
    return (*words, _STRICTNESS[iommu.mode])
