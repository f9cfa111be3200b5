# SPDX-License-Identifier: Apache-2.0
"""Disks and peer-to-peer memory, as the guest's own kernel drives them: no VFIO, no module.

A provider's memory is mapped from ``/sys/bus/pci/devices/BDF/p2pmem/allocate`` and handed to
``O_DIRECT`` I/O on a disk: the kernel then maps it for the disk's controller with ``pci_p2pdma``
(drivers/pci/p2pdma.c, block/blk-map.c). What it answers is an observation; where the bytes went is
for the host to find out.
"""

from __future__ import annotations

import errno
import mmap
import os
import time

from guest_agent import modules, sysfs
from guest_agent.hw.region import Region
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEVICES = f"{sysfs.ROOT}/bus/pci/devices"
SECTOR_BYTES = 512
DRIVER = "nvme"
DISKS_FILE = "/etc/testbed/disks"  # guest_agent/resume.py writes the host's word there
WITHOUT_DISKS = "without_disks"

_CLASS = "0x010802"  # NVM Express
_READY_S = 15.0
_POLL_S = 0.02


def start() -> None:
    """Load the kernel's driver, if it is a module, and wait until it has looked at all disks.

    It does that on threads of its own (drivers/nvme/host/pci.c, PROBE_PREFER_ASYNCHRONOUS). A disk
    that never answers is waited for no longer than :data:`_READY_S`.

    :raises OSError: ENODEV, as :func:`namespaces`.
    """
    _check_wanted()
    if modules.is_loaded(DRIVER):
        return
    try:
        modules.load(DRIVER)
    except FileNotFoundError:
        return  # this kernel has none, and so no disks
    deadline_s = time.monotonic() + _READY_S
    while _unready() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _unready() -> bool:
    disks = namespaces()
    return any(
        sysfs.read_or(f"{DEVICES}/{bdf}/class", "") == _CLASS
        and bdf not in disks
        and sysfs.link_name(f"{DEVICES}/{bdf}/driver") in ("", DRIVER)
        for bdf in sysfs.names(DEVICES)
    )


def namespaces() -> dict[str, dict[str, Any]]:
    """Each NVMe controller's first namespace: ``{bdf: {disk, size_bytes}}``.

    :raises OSError: ENODEV: this machine was restored for a test that looks at no disk.
    """
    _check_wanted()
    found = {}
    for bdf in sysfs.names(DEVICES):
        for controller in sysfs.names(f"{DEVICES}/{bdf}/nvme"):
            # With multipath the namespace is nvme0c0n1 here, and the disk is nvme0n1.
            disk = f"{controller}n1"
            sectors = sysfs.read_or(f"{sysfs.ROOT}/block/{disk}/size", "")
            if sectors:
                size_bytes = int(sectors) * SECTOR_BYTES
                found[bdf] = {"disk": f"/dev/{disk}", "size_bytes": size_bytes}
    return found


def _check_wanted() -> None:
    if sysfs.read_or(DISKS_FILE, "") == WITHOUT_DISKS:
        raise OSError(errno.ENODEV, "disks have no driver in a test that is `without_disks`")


def providers() -> dict[str, dict[str, Any]]:
    """Who has peer-to-peer memory: ``{bdf: {size_bytes, available_bytes, published}}``."""
    found = {}
    for bdf in sysfs.names(DEVICES):
        folder = f"{DEVICES}/{bdf}/p2pmem"
        size = sysfs.read_or(f"{folder}/size", "")
        if size:
            found[bdf] = {
                "size_bytes": int(size),
                "available_bytes": int(sysfs.read(f"{folder}/available")),
                "published": sysfs.read(f"{folder}/published") == "1",
            }
    return found


def allocate(provider: str, size_bytes: int) -> Region:
    """Memory of a provider, mapped.

    :raises OSError: ENOENT: it provides none; ENOMEM or EINVAL from the kernel.
    """
    if not size_bytes or size_bytes % mmap.PAGESIZE:
        raise ParameterError(f"size_bytes: {size_bytes} is no multiple of {mmap.PAGESIZE}")
    path = f"{DEVICES}/{provider}/p2pmem/allocate"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"{provider} has no peer-to-peer memory") from None
    try:
        return Region(mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED))
    finally:
        os.close(fd)


def transfer(
    device: str, region: Region, offset: int, size_bytes: int, disk_offset: int, write: bool
) -> dict[str, Any]:
    """Direct I/O between a disk and mapped memory: ``{bytes, error}``.

    ``bytes`` is the kernel's own word of how much it moved; ``error`` the name of its errno, or "".
    """
    region.check(offset, size_bytes)
    namespace = namespaces().get(device)
    if namespace is None:
        raise ParameterError(f"device: {device} is no NVMe controller with a namespace")
    fd = os.open(namespace["disk"], os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        view = region.view(offset, size_bytes)
        try:
            move = os.pwritev if write else os.preadv
            return {"bytes": move(fd, [view], disk_offset), "error": ""}
        except OSError as error:
            return {"bytes": 0, "error": errno.errorcode.get(error.errno or 0, str(error.errno))}
        finally:
            view.release()
    finally:
        os.close(fd)
