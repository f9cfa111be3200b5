# SPDX-License-Identifier: Apache-2.0
"""Devices without VFIO: sysfs's resource files, for machines whose IOMMU is off or passes through.

Nothing stands between such a device and the machine's memory: bus addresses are physical ones.
"""

from __future__ import annotations

import mmap
import os

from guest_agent import sysfs
from guest_agent.hw.binding import Binding, check_free, check_names, restore
from guest_agent.hw.device import Device
from guest_agent.hw.region import Region
from guest_agent.observe.pci import bars
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

_COMMAND = 0x04


class RawDevice(Device):
    """One driverless function. Its command register is put back as it was by :meth:`close`."""

    def __init__(self, bdf: str) -> None:
        super().__init__(bdf)
        self._folder = f"{sysfs.ROOT}/bus/pci/devices/{bdf}"
        self._config_fd = os.open(f"{self._folder}/config", os.O_RDWR | os.O_CLOEXEC)
        self._bars = {bar["index"]: bar for bar in bars(sysfs.read(f"{self._folder}/resource"))}
        self._command = self.config_read(_COMMAND, 2)

    def describe(self) -> dict[str, Any]:
        """Regions in VFIO's form; no interrupts, which only VFIO delivers to user space."""
        regions = [
            {"index": index, "size_bytes": bar["size_bytes"], "flags": 0, "offset": 0}
            for index, bar in self._bars.items()
        ]
        return {"regions": regions, "irqs": []}

    def config_read(self, offset: int, size_bytes: int) -> int:
        """A word of the configuration space."""
        return int.from_bytes(os.pread(self._config_fd, size_bytes, offset), "little")

    def config_write(self, offset: int, size_bytes: int, value: int) -> None:
        """Store a word in the configuration space."""
        os.pwrite(self._config_fd, value.to_bytes(size_bytes, "little"), offset)

    def _map(self, index: int) -> Region:
        if index not in self._bars or self._bars[index]["kind"] != "mem":
            raise ParameterError(f"index: {self.bdf} has no memory region {index}")
        fd = os.open(f"{self._folder}/resource{index}", os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
        try:
            return Region(mmap.mmap(fd, self._bars[index]["size_bytes"]))
        finally:
            os.close(fd)

    def reset(self) -> bool:
        """Function-level reset through sysfs; the kernel restores the configuration space."""
        if not sysfs.read_or(f"{self._folder}/reset_method", ""):
            return False
        sysfs.write(f"{self._folder}/reset", "1")
        return True

    def close(self) -> None:
        """Unmap and put the command register back. Idempotent."""
        super().close()
        if self._config_fd >= 0:
            self.config_write(_COMMAND, 2, self._command)
            os.close(self._config_fd)
            self._config_fd = -1


class RawContainer:
    """Functions taken from their drivers, with no address space of their own.

    :param held: functions that are open already.
    :raises ParameterError: no functions named, or the same twice.
    :raises OSError: ENODEV: no such function; EBUSY: it is open already, or the machine needs it.
    """

    def __init__(self, bdfs: list[str], held: Collection[str]) -> None:
        check_names(bdfs)
        check_free(bdfs, held)
        self.devices: dict[str, Device] = {}
        self._bindings: list[Binding] = []
        try:
            for bdf in bdfs:
                self._bindings.append(Binding(bdf, ""))
                self.devices[bdf] = RawDevice(bdf)
                self.devices[bdf].enable()
        except BaseException:
            self.close()
            raise

    def info(self) -> dict[str, Any]:
        """In VFIO's form: nothing can be mapped."""
        return {"iova_ranges": [], "page_sizes": 0}

    def close(self) -> list[str]:
        """Give everything back; returns the functions whose driver was restored. Idempotent."""
        for device in self.devices.values():
            device.close()
        self.devices.clear()
        return restore(self._bindings)
