# SPDX-License-Identifier: Apache-2.0
"""Which kind of part a PCI function is, by its class and vendor, or by its name alone.

Class codes: PCI Code and ID Assignment Specification 1.16, 1.1; names: pciutils' ``pci.ids``.
"""

from __future__ import annotations

import re

from testbed.topology.importers.machine import Kind

NVIDIA, INTEL, AMD, HYGON = 0x10DE, 0x8086, 0x1022, 0x1D94
HOST_BRIDGE = 0x0600
PCI_BRIDGE = 0x0604
_DISPLAY = 0x03

# Class and subclass; where only the class counts, the table after it.
_BY_SUBCLASS = {0x0108: Kind.NVME, 0x0C06: Kind.NIC}
_BY_CLASS = {0x02: Kind.NIC, 0x03: Kind.GPU, 0x12: Kind.GPU}

# The screens of servers' management controllers and of virtual machines: ASPEED, Matrox, Nuvoton,
# XGI, Silicon Motion, Hisilicon, Cirrus, Bochs, Red Hat (QXL), virtio, VMware.
_SCREEN_VENDORS = frozenset(
    (0x1A03, 0x102B, 0x1050, 0x18CA, 0x126F, 0x19E5, 0x1013, 0x1234, 0x1B36, 0x1AF4, 0x15AD)
)
_SCREENS = frozenset(((0x1002, 0x515E), (0x1002, 0x5159)))  # ATI ES1000 and RV100
# A paravirtual card's memory accesses are the hypervisor's own.
_PARAVIRTUAL_VENDORS = frozenset((0x1AF4, 0x15AD))
# What stands for a GPU's memory and for a NIC in the testbed's own racks.
_IVSHMEM = (0x1AF4, 0x1110)
_OWN = {
    _IVSHMEM: Kind.GPU,
    (0x1234, 0x11E8): Kind.NIC,  # edu
    (0x1234, 0xA9E1): Kind.NIC,  # the NIC in Python
}

# Names of classes as lspci prints them without -n, as far as they matter.
CLASS_NAMES = {
    "host bridge": HOST_BRIDGE,
    "pci bridge": PCI_BRIDGE,
    "non-volatile memory controller": 0x0108,
    "ethernet controller": 0x0200,
    "infiniband controller": 0x0207,
    "fabric controller": 0x0208,
    "network controller": 0x0280,
    "infiniband": 0x0C06,
    "vga compatible controller": 0x0300,
    "3d controller": 0x0302,
    "display controller": 0x0380,
    "processing accelerators": 0x1200,
}
_VENDOR_NAMES = {
    "nvidia": NVIDIA,
    "intel": INTEL,
    "advanced micro devices": AMD,
    "chengdu haiguang": HYGON,
    "aspeed": 0x1A03,
    "matrox": 0x102B,
    "nuvoton": 0x1050,
    "silicon motion": 0x126F,
    "huawei": 0x19E5,
    "cirrus": 0x1013,
    "red hat": 0x1AF4,
    "vmware": 0x15AD,
}

# In order: the first of which a word is found in a name decides.
_NAME_WORDS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (
        Kind.OTHER,
        (
            *("audio", "usb", "ucsi", "nvswitch", "bridge", "root port", "pci.?express port"),
            *("aspeed", "virtio"),
        ),
    ),
    (Kind.NVME, ("nvme", r"\bssd\b", "non-volatile", "optane")),
    (
        Kind.NIC,
        (
            *("connectx", "bluefield", "ethernet", "infiniband", "network", "omni-path"),
            *("netxtreme", r"\bmt[0-9]{5}\b", r"\bbcm5[0-9]{4}\b", r"\be8[0-9]{2}\b"),
            *(r"\bx[57][0-9]{2}\b", r"\befa\b", "wi-?fi"),
        ),
    ),
    (
        Kind.GPU,
        (
            *("nvidia", "radeon", "instinct", r"\bvega", r"\bnavi", r"\bmi[1-9][0-9]{2}"),
            *(
                "inter-vm shared memory",
                "arcturus",
                "aldebaran",
                "graphics",
                "gpu",
                "habana",
                "gaudi",
                "ponte vecchio",
            ),
            *(r"\barc\b", r"\bdg[12]\b", "accelerator"),
        ),
    ),
)
_NAMES = tuple((kind, re.compile("|".join(words), re.IGNORECASE)) for kind, words in _NAME_WORDS)


def of_class(class_code: int, vendor: int, device: int) -> Kind:
    """The kind of an endpoint; ``class_code`` has 16 bits, class and subclass."""
    kind = _BY_SUBCLASS.get(class_code) or _BY_CLASS.get(class_code >> 8, Kind.OTHER)
    is_display = class_code >> 8 == _DISPLAY
    return _corrected(kind, vendor, device, is_display=is_display)


def of_name(name: str, vendor: int, device: int) -> Kind:
    """A guess from a device's name."""
    kind = next((kind for kind, pattern in _NAMES if pattern.search(name)), Kind.OTHER)
    return _corrected(kind, vendor, device, is_display=True)


def _corrected(kind: Kind, vendor: int, device: int, *, is_display: bool) -> Kind:
    """The testbed's own devices are what they stand for; screens and paravirtual cards are not."""
    own = _OWN.get((vendor, device))
    if own is not None:
        return own
    is_screen = is_display and (vendor in _SCREEN_VENDORS or (vendor, device) in _SCREENS)
    is_paravirtual = vendor in _PARAVIRTUAL_VENDORS
    if (kind is Kind.GPU and is_screen) or (kind is Kind.NIC and is_paravirtual):
        return Kind.OTHER
    return kind


def ids_of_name(name: str) -> tuple[int, int]:
    """Vendor and device of a name, each 0 unless it is one that matters here."""
    lower = name.strip().lower()
    if "inter-vm shared memory" in lower:
        return _IVSHMEM
    return next((v for word, v in _VENDOR_NAMES.items() if lower.startswith(word)), 0), 0
