# SPDX-License-Identifier: Apache-2.0
"""A small /sys made of real files and links, for the agent's observers."""

from __future__ import annotations

import struct
from pathlib import Path


def config_space(
    *,
    vendor: int = 0x1234,
    device: int = 0x11E8,
    bridge: tuple[int, int, int] | None = None,
    capabilities: tuple[tuple[int, bytes], ...] = (),
    extended: tuple[tuple[int, bytes], ...] = (),
    size: int = 4096,
) -> bytes:
    """Configuration space with these capabilities (identifier, what follows the header)."""
    config = bytearray(size)
    struct.pack_into("<HHHH", config, 0, vendor, device, 6, 0x10 if capabilities else 0)
    config[8:12] = b"\x10\x00\xff\x00"  # revision 0x10, class 0x00ff00
    if bridge:
        config[0x0E] = 1
        config[0x18:0x1B] = bytes(bridge)
    pointer, at = 0x34, 0x40
    for identifier, body in capabilities:
        config[pointer] = at
        config[at] = identifier
        config[at + 2 : at + 2 + len(body)] = body
        pointer, at = at + 1, (at + 2 + len(body) + 3) & ~3
    at = 0x100
    for number, (identifier, body) in enumerate(extended):
        end = (at + 4 + len(body) + 3) & ~3
        following = end if number + 1 < len(extended) else 0
        struct.pack_into("<I", config, at, identifier | 1 << 16 | following << 20)
        config[at + 4 : at + 4 + len(body)] = body
        at = end
    return bytes(config)


class FakeSysfs:
    """Files below ``root`` as the kernel lays them out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.devices = root / "bus/pci/devices"
        self.groups = root / "kernel/iommu_groups"
        self.devices.mkdir(parents=True)
        (root / "bus/pci/drivers").mkdir()

    def function(
        self, path: str, config: bytes, *, resource: str = "", group: int | None = None
    ) -> Path:
        """A function at ``0000:00:04.0/0000:01:00.0`` below the root bus."""
        bdf = path.rpartition("/")[2]
        folder = self.root / "devices/pci0000:00" / path
        folder.mkdir(parents=True)
        (folder / "config").write_bytes(config)
        (folder / "resource").write_text(resource)
        (folder / "driver_override").write_text("(null)\n")
        (self.devices / bdf).symlink_to(f"../../../devices/pci0000:00/{path}")
        if group is not None:
            members = self.groups / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (self.groups / str(group) / "type").write_text("DMA\n")
            (members / bdf).symlink_to(folder)
            (folder / "iommu_group").symlink_to(self.groups / str(group))
        return folder

    def driver(self, name: str) -> Path:
        """A loaded driver."""
        folder = self.root / "bus/pci/drivers" / name
        folder.mkdir(exist_ok=True)
        (folder / "bind").touch()
        return folder

    def bind(self, bdf: str, driver: str) -> None:
        """Let ``driver`` own the function, as if it always had."""
        (self.devices / bdf / "driver").symlink_to(self.driver(driver))
