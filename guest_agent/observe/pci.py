# SPDX-License-Identifier: Apache-2.0
"""The PCI tree as the guest kernel sees it, from sysfs and the configuration space.

Offsets and identifiers: PCI Express Base Specification 6.0, chapter 7, and
include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

import os

from guest_agent import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Self, TypeAlias

    Config: TypeAlias = "bytes | ConfigSpace"

HEADER_TYPE = 0x0E
CAPABILITY_LIST = 0x34
PRIMARY_BUS = 0x18
EXTENDED_START = 0x100

_STATUS = 0x06
_STATUS_CAPABILITIES = 0x10
_ID_EXPRESS = 0x10
_ID_ACS = 0x0D

CAPABILITY_NAMES = {
    0x01: "pm",
    0x03: "vpd",
    0x04: "slot_id",
    0x05: "msi",
    0x07: "pcix",
    0x09: "vendor",
    0x0C: "hotplug",
    0x0D: "subsystem",
    0x10: "express",
    0x11: "msix",
    0x12: "sata",
    0x13: "af",
    0x14: "ea",
}
EXTENDED_NAMES = {
    0x01: "aer",
    0x02: "vc",
    0x03: "serial",
    0x0B: "vendor",
    0x0D: "acs",
    0x0E: "ari",
    0x0F: "ats",
    0x10: "sriov",
    0x13: "pri",
    0x15: "rebar",
    0x17: "tph",
    0x18: "ltr",
    0x19: "pcie2",
    0x1B: "pasid",
    0x1D: "dpc",
    0x1F: "ptm",
    0x23: "dvsec",
    0x25: "dlf",
    0x26: "16gt",
    0x2E: "doe",
}
_PCIE_TYPES = {
    0: "endpoint",
    1: "endpoint",  # legacy endpoint
    4: "root_port",
    5: "upstream",
    6: "downstream",
    9: "rc_endpoint",
}
ACS_REDIRECT = 0x04 | 0x08 | 0x20  # request redirect, completion redirect, egress control

# include/linux/ioport.h
_RESOURCE_IO = 0x100
_RESOURCE_MEM = 0x200
_RESOURCE_PREFETCH = 0x2000
_RESOURCE_MEM_64 = 0x100000


_PIECE_BYTES = 16


class ConfigSpace:
    """A function's configuration space, of which only what is looked at is read; like ``bytes``.

    Each word that is read is an access to the device, which an emulated machine hands to its
    device model: the 4 KiB of each of 45 functions take it two seconds, what is looked at 0.1.

    :raises OSError: there is no such function.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size_bytes = os.fstat(self._fd).st_size
        self._pieces: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        return self._size_bytes

    def bytes_at(self, offset: int, size_bytes: int) -> bytes:
        """Some bytes; fewer at the end."""
        number, begin = divmod(offset, _PIECE_BYTES)
        if begin + size_bytes > _PIECE_BYTES:  # no field does that, what a broken pointer finds may
            return os.pread(self._fd, size_bytes, offset)
        piece = self._pieces.get(number)
        if piece is None:
            piece = os.pread(self._fd, _PIECE_BYTES, number * _PIECE_BYTES)
            self._pieces[number] = piece
        return piece[begin : begin + size_bytes]


def _u8(config: Config, offset: int) -> int:
    return _word(config, offset, 1)


def _u16(config: Config, offset: int) -> int:
    return _word(config, offset, 2)


def _u32(config: Config, offset: int) -> int:
    return _word(config, offset, 4)


def _word(config: Config, offset: int, size_bytes: int) -> int:
    if isinstance(config, ConfigSpace):
        found = config.bytes_at(offset, size_bytes)
    else:
        found = config[offset : offset + size_bytes]
    return int.from_bytes(found, "little")


def capabilities(config: Config) -> Iterator[tuple[int, int]]:
    """(identifier, offset) of each capability; ends at a loop or a pointer out of bounds."""
    if not _u16(config, _STATUS) & _STATUS_CAPABILITIES:
        return
    seen = set()
    offset = _u8(config, CAPABILITY_LIST) & 0xFC
    while 0x40 <= offset < min(len(config), 0x100) and offset not in seen:
        seen.add(offset)
        yield _u8(config, offset), offset
        offset = _u8(config, offset + 1) & 0xFC


def extended_capabilities(config: Config) -> Iterator[tuple[int, int]]:
    """(identifier, offset) of each extended capability; none if only 256 bytes are there."""
    seen = set()
    offset = EXTENDED_START
    while EXTENDED_START <= offset <= len(config) - 8 and offset not in seen:
        seen.add(offset)
        header = _u32(config, offset)
        if header in (0, 0xFFFFFFFF):
            return
        yield header & 0xFFFF, offset
        offset = header >> 20


def acs(config: Config) -> dict[str, Any] | None:
    """The ACS extended capability and its control register, or None if there is none to be seen."""
    for identifier, offset in extended_capabilities(config):
        if identifier == _ID_ACS:
            control = _u16(config, offset + 6)
            return {
                "offset": offset,
                "capability": _u16(config, offset + 4),
                "control": control,
                "redirect": bool(control & ACS_REDIRECT),
            }
    return None


def pcie_type(config: Config) -> str:
    """The kind of port or endpoint that the PCI Express capability names, or ""."""
    for identifier, offset in capabilities(config):
        if identifier == _ID_EXPRESS:
            return _PCIE_TYPES.get(_u16(config, offset + 2) >> 4 & 0xF, "")
    return ""


def bars(resource: str) -> list[dict[str, Any]]:
    """The base address registers out of a device's ``resource`` file; unused ones are left out."""
    found = []
    for index, line in enumerate(resource.splitlines()[:6]):
        start, end, flags = (int(word, 16) for word in line.split())
        if flags & (_RESOURCE_IO | _RESOURCE_MEM):
            found.append(
                {
                    "index": index,
                    "address": start,
                    "size_bytes": end - start + 1,
                    "kind": "io" if flags & _RESOURCE_IO else "mem",
                    "is_64bit": bool(flags & _RESOURCE_MEM_64),
                    "prefetchable": bool(flags & _RESOURCE_PREFETCH),
                }
            )
    return found


def _named(identifiers: Iterator[tuple[int, int]], names: dict[int, str]) -> list[str]:
    return [names.get(identifier, f"0x{identifier:02x}") for identifier, _ in identifiers]


def device(bdf: str, root: str = sysfs.ROOT) -> dict[str, Any]:
    """One function, as the protocol's ``pci.tree`` describes it. :raises OSError: there is none."""
    folder = f"{root}/bus/pci/devices/{bdf}"
    with ConfigSpace(f"{folder}/config") as config:
        return _described(bdf, folder, config)


def _described(bdf: str, folder: str, config: ConfigSpace) -> dict[str, Any]:
    header_type = _u8(config, HEADER_TYPE)
    is_bridge = header_type & 0x7F == 1
    path = sysfs.link(folder).split("/")
    parent = path[-2] if len(path) > 1 and path[-2].count(":") == 2 else ""
    group = sysfs.link_name(f"{folder}/iommu_group")
    return {
        "bdf": bdf,
        "vendor": _u16(config, 0),
        "device": _u16(config, 2),
        "class": _u32(config, 8) >> 8,
        "revision": _u8(config, 8),
        "subsystem_vendor": int(sysfs.read_or(f"{folder}/subsystem_vendor", "0"), 16),
        "subsystem_device": int(sysfs.read_or(f"{folder}/subsystem_device", "0"), 16),
        "header": "bridge" if is_bridge else "endpoint",
        "multifunction": bool(header_type & 0x80),
        "pcie_type": pcie_type(config),
        "parent": parent,
        "secondary_bus": _u8(config, PRIMARY_BUS + 1) if is_bridge else 0,
        "subordinate_bus": _u8(config, PRIMARY_BUS + 2) if is_bridge else 0,
        "bars": bars(sysfs.read(f"{folder}/resource")),
        "capabilities": _named(capabilities(config), CAPABILITY_NAMES),
        "extended": _named(extended_capabilities(config), EXTENDED_NAMES),
        "acs": acs(config),
        "iommu_group": int(group) if group else None,
        "driver": sysfs.link_name(f"{folder}/driver"),
    }


def tree(root: str = sysfs.ROOT, only: list[str] | None = None) -> list[dict[str, Any]]:
    """Every function of the machine, or those of ``only`` that it has, in order of address."""
    found = sysfs.names(f"{root}/bus/pci/devices")
    return [device(bdf, root) for bdf in found if only is None or bdf in only]


def places(root: str = sysfs.ROOT) -> list[dict[str, Any]]:
    """``{bdf, bars}`` of every function that has any, as the kernel keeps them."""
    folder = f"{root}/bus/pci/devices"
    return [
        {"bdf": bdf, "bars": found}
        for bdf in sysfs.names(folder)
        if (found := bars(sysfs.read(f"{folder}/{bdf}/resource")))
    ]
