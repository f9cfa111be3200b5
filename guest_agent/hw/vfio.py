# SPDX-License-Identifier: Apache-2.0
"""Devices and IOMMU mappings through VFIO's type1v2 containers.

Source: Documentation/driver-api/vfio.rst of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select

from guest_agent import modules, sysfs
from guest_agent.hw import vfio_abi as abi
from guest_agent.hw.binding import (
    VFIO_DRIVER,
    Binding,
    check_free,
    check_names,
    endpoints,
    restore,
)
from guest_agent.hw.device import Device
from guest_agent.hw.region import Region
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

_UNSAFE_INTERRUPTS = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"


class VfioDevice(Device):
    """One function, by its VFIO device descriptor, which this object owns."""

    def __init__(self, bdf: str, fd: int) -> None:
        super().__init__(bdf)
        self._fd = fd
        self._flags, regions, irqs = abi.device_info(fd)
        self._info = [abi.region_info(fd, index) for index in range(min(regions, 8))]
        self._irqs = [abi.irq_info(fd, index) for index in range(min(irqs, 3))]
        self._kind = ""
        self._eventfds: dict[int, int] = {}
        self._request_fd = -1
        # drivers/vfio/pci/vfio_pci_core.c, vfio_pci_core_enable(): who opens it gets it so.
        self.was_reset = bool(self._flags & abi.DEVICE_FLAG_RESET)

    def describe(self) -> dict[str, Any]:
        """Regions and interrupts as VFIO numbers them; unused ones are left out."""
        return {
            "regions": [info for info in self._info if info["size_bytes"]],
            "irqs": [info for info in self._irqs if info["count"]],
        }

    def config_read(self, offset: int, size_bytes: int) -> int:
        """A word of the configuration space as VFIO shows it (some bits are virtual)."""
        at = self._info[abi.CONFIG_REGION]["offset"] + offset
        return int.from_bytes(os.pread(self._fd, size_bytes, at), "little")

    def config_write(self, offset: int, size_bytes: int, value: int) -> None:
        """Store a word in the configuration space as far as VFIO allows it."""
        at = self._info[abi.CONFIG_REGION]["offset"] + offset
        os.pwrite(self._fd, value.to_bytes(size_bytes, "little"), at)

    def _map(self, index: int) -> Region:
        if index >= min(len(self._info), 6) or not self._info[index]["size_bytes"]:
            raise ParameterError(f"index: {self.bdf} has no region {index}")
        info = self._info[index]
        if not info["flags"] & abi.REGION_FLAG_MMAP:
            raise ParameterError(f"index: region {index} of {self.bdf} cannot be mapped")
        return Region(mmap.mmap(self._fd, info["size_bytes"], offset=info["offset"]))

    def reset(self) -> bool:
        """Function-level reset, or what the kernel has instead; interrupts are armed again."""
        if not self._flags & abi.DEVICE_FLAG_RESET:
            return False
        fcntl.ioctl(self._fd, abi.DEVICE_RESET)
        if self._eventfds:
            kind = abi.IRQ_INDEX[self._kind]
            abi.set_irqs(self._fd, kind, abi.SET_ACTION_TRIGGER, 0, [])
            self._connect()
        return True

    def export(self, region: int, ranges: list[tuple[int, int]], flags: int) -> int:
        """The descriptor of a dma-buf of parts of a region; OSError: the kernel refuses."""
        return abi.export(self._fd, region, ranges, flags)

    def arm(self, kind: str, vector: int) -> None:
        """Count interrupts of one vector. A function uses one kind at a time.

        :raises ParameterError: unknown kind, no such vector, or another kind is in use.
        """
        if kind not in abi.IRQ_INDEX:
            raise ParameterError(f"kind: {kind!r} is none of {', '.join(abi.IRQ_INDEX)}")
        count = self._irqs[abi.IRQ_INDEX[kind]]["count"]
        if vector >= count:
            raise ParameterError(f"vector: {self.bdf} has {count} {kind} vectors, not {vector + 1}")
        if self._kind not in ("", kind):
            raise ParameterError(f"kind: {self.bdf} uses {self._kind} already")
        if vector in self._eventfds:
            return
        if self._eventfds:  # the kernel cannot add vectors to those in use on every machine
            abi.set_irqs(self._fd, abi.IRQ_INDEX[kind], abi.SET_ACTION_TRIGGER, 0, [])
        self._kind = kind
        self._eventfds[vector] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._connect()
        except OSError:
            os.close(self._eventfds.pop(vector))
            self._kind = kind if self._eventfds else ""
            raise

    def _connect(self) -> None:
        fds = [self._eventfds.get(each, -1) for each in range(max(self._eventfds) + 1)]
        abi.set_irqs(self._fd, abi.IRQ_INDEX[self._kind], abi.SET_ACTION_TRIGGER, 0, fds)

    def wait(self, vector: int, timeout_s: float) -> int:
        """How often the vector fired since it was last asked for; 0 after ``timeout_s``.

        A level-triggered interrupt (``intx``) is unmasked again after it was counted.
        """
        return self._fired((vector,), timeout_s).get(vector, 0)

    def wait_any(self, vectors: tuple[int, ...], timeout_s: float) -> list[int]:
        """See :meth:`Device.wait_any`."""
        return list(self._fired(vectors, timeout_s))

    def _fired(self, vectors: tuple[int, ...], timeout_s: float) -> dict[int, int]:
        poll = select.poll()
        by_fd = {}
        for vector in vectors:
            fd = self._eventfds.get(vector)
            if fd is None:
                raise ParameterError(f"vector: {vector} of {self.bdf} is not armed")
            poll.register(fd, select.POLLIN)
            by_fd[fd] = vector
        counts = {by_fd[fd]: os.eventfd_read(fd) for fd, _ in poll.poll(timeout_s * 1000)}
        if counts and self._kind == "intx":
            abi.unmask(self._fd, abi.IRQ_INDEX["intx"])
        return counts

    def watch_request(self) -> None:
        """Have the kernel say when it wants the function back, as when it is pulled out."""
        if self._request_fd < 0:
            self._request_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            fds = [self._request_fd]
            abi.set_irqs(self._fd, abi.REQUEST_INDEX, abi.SET_ACTION_TRIGGER, 0, fds)

    def requested(self, timeout_s: float) -> bool:
        """Whether the kernel wants it back by now, or within ``timeout_s``.

        :raises ParameterError: nobody has asked to be told.
        """
        if self._request_fd < 0:
            raise ParameterError(f"device: {self.bdf} is not watched for requests")
        poll = select.poll()
        poll.register(self._request_fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def is_armed(self) -> bool:
        """Whether any interrupt is armed."""
        return bool(self._eventfds)

    def close(self) -> None:
        """Unmap, disconnect the interrupts, close. Idempotent."""
        super().close()
        for fd in self._eventfds.values():
            os.close(fd)
        self._eventfds.clear()
        if self._request_fd >= 0:
            os.close(self._request_fd)
            self._request_fd = -1
        if self._fd >= 0:
            os.close(self._fd)  # the kernel turns interrupts and bus mastering off
            self._fd = -1


class VfioContainer:
    """One IOMMU address space and the functions that live in it.

    Every endpoint of the IOMMU groups of ``bdfs`` is bound to vfio-pci and opened; bridges stay
    with the kernel. :meth:`close` gives all of them back, and so does a failure here.

    :param held: functions that are open already.

    :raises ParameterError: no functions named, or the same twice.
    :raises OSError: ENODEV: no such function, or it has no IOMMU group (no IOMMU: use the raw
        way); EBUSY: the group holds something that is open already, or that the machine needs;
        others from VFIO.
    """

    def __init__(self, bdfs: list[str], held: Collection[str]) -> None:
        check_names(bdfs)
        self.devices: dict[str, Device] = {}
        self._bindings: list[Binding] = []
        self._group_fds: list[int] = []
        self._fd = -1
        try:
            self._open(bdfs, held)
        except BaseException:
            self.close()
            raise

    def _open(self, bdfs: list[str], held: Collection[str]) -> None:
        groups: list[str] = []
        for bdf in bdfs:
            group = sysfs.link_name(f"{sysfs.ROOT}/bus/pci/devices/{bdf}/iommu_group")
            if not group:
                raise OSError(errno.ENODEV, f"{bdf} is in no IOMMU group")
            if group not in groups:
                groups.append(group)
        for module in ("vfio_pci", "vfio_iommu_type1"):
            modules.load(module)
        self._fd = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        if fcntl.ioctl(self._fd, abi.GET_API_VERSION) != abi.API_VERSION:
            raise OSError(errno.EPROTO, "VFIO speaks another version")
        for group in groups:
            members = endpoints(group)
            check_free(members, held)
            for bdf in members:
                self._bindings.append(Binding(bdf, VFIO_DRIVER))
            group_fd = os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC)
            self._group_fds.append(group_fd)
            if not abi.group_is_viable(group_fd):
                raise OSError(errno.EBUSY, f"IOMMU group {group} is not wholly VFIO's")
            fcntl.ioctl(group_fd, abi.GROUP_SET_CONTAINER, self._fd.to_bytes(4, "little"))
            if len(self._group_fds) == 1:
                self._set_iommu()
            for bdf in members:
                name = bytearray(bdf.encode() + b"\0")  # mutable: ioctl then returns the number
                fd = fcntl.ioctl(group_fd, abi.GROUP_GET_DEVICE_FD, name)
                self.devices[bdf] = VfioDevice(bdf, fd)
                self.devices[bdf].enable()

    def _set_iommu(self) -> None:
        try:
            fcntl.ioctl(self._fd, abi.SET_IOMMU, abi.TYPE1V2_IOMMU)
        except PermissionError:
            # virtio-iommu does not remap interrupts. What this allows, a device that sends any
            # message-signalled interrupt, is a danger to a host, not to a machine made for it.
            sysfs.write(_UNSAFE_INTERRUPTS, "Y")
            fcntl.ioctl(self._fd, abi.SET_IOMMU, abi.TYPE1V2_IOMMU)

    def info(self) -> dict[str, Any]:
        """``{iova_ranges, page_sizes, mappings_left}`` of the address space, all its groups
        considered."""
        return abi.iommu_info(self._fd)

    def map(
        self,
        region: Region,
        offset: int,
        iova: int,
        size_bytes: int,
        *,
        read: bool,
        write: bool,
        page_bytes: int,
    ) -> None:
        """Let the devices reach ``region[offset:offset + size_bytes]`` at ``iova``.

        :param page_bytes: 0 for one mapping; otherwise many of that size (the last may be less),
            as a driver does that walks a list of pages.
        :raises OSError: EINVAL: not page-aligned or outside the IOVA ranges; EEXIST: occupied.
            Nothing of the range stays mapped then.
        """
        region.check(offset, size_bytes)
        flags = abi.MAP_READ * read | abi.MAP_WRITE * write
        start = region.virtual_address() + offset
        step = page_bytes or size_bytes
        done = 0
        try:
            while done < size_bytes:
                size = min(step, size_bytes - done)
                abi.map_dma(self._fd, flags, start + done, iova + done, size)
                done += size
        except OSError as error:
            if done:
                abi.unmap_dma(self._fd, iova, done)
            raise OSError(
                error.errno, f"cannot map {size_bytes:#x} bytes at {iova:#x}: {error.strerror}"
            ) from error

    def unmap(self, iova: int, size_bytes: int) -> int:
        """Undo the mappings in the range; returns the bytes that were mapped.

        :raises OSError: EINVAL: the range cuts a mapping in two.
        """
        try:
            return abi.unmap_dma(self._fd, iova, size_bytes)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot unmap {size_bytes:#x} bytes at {iova:#x}: {error.strerror}"
            ) from error

    def close(self) -> list[str]:
        """Give everything back; returns the functions whose driver was restored. Idempotent.

        :raises OSError: a function could not be given back; the others were.
        """
        for device in self.devices.values():
            device.close()
        self.devices.clear()
        for fd in (*self._group_fds, self._fd):
            if fd >= 0:
                os.close(fd)  # with the last of them the kernel tears the address space down
        self._group_fds.clear()
        self._fd = -1
        return restore(self._bindings)
