# SPDX-License-Identifier: Apache-2.0
"""Numbers and structures of include/uapi/linux/vfio.h, and the calls made of them."""

from __future__ import annotations

import errno
import fcntl
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_BASE = ord(";") << 8 | 100
GET_API_VERSION = _BASE + 0
CHECK_EXTENSION = _BASE + 1
SET_IOMMU = _BASE + 2
GROUP_GET_STATUS = _BASE + 3
GROUP_SET_CONTAINER = _BASE + 4
GROUP_GET_DEVICE_FD = _BASE + 6
DEVICE_GET_INFO = _BASE + 7
DEVICE_GET_REGION_INFO = _BASE + 8
DEVICE_GET_IRQ_INFO = _BASE + 9
DEVICE_SET_IRQS = _BASE + 10
DEVICE_RESET = _BASE + 11
DEVICE_FEATURE = _BASE + 17
IOMMU_GET_INFO = _BASE + 12
IOMMU_MAP_DMA = _BASE + 13
IOMMU_UNMAP_DMA = _BASE + 14

API_VERSION = 0
TYPE1V2_IOMMU = 3
GROUP_VIABLE = 1
DEVICE_FLAG_RESET = 1
REGION_FLAG_MMAP = 4
CONFIG_REGION = 7
MAP_READ = 1
MAP_WRITE = 2
IRQ_INDEX = {"intx": 0, "msi": 1, "msix": 2}
REQUEST_INDEX = 4  # VFIO_PCI_REQ_IRQ_INDEX: the kernel wants the device back
SET_DATA_NONE = 1
SET_DATA_EVENTFD = 4
SET_ACTION_UNMASK = 16
SET_ACTION_TRIGGER = 32
_INFO_PAGE_SIZES = 1
_INFO_CAPABILITIES = 2
_CAP_IOVA_RANGE = 1
_CAP_DMA_AVAIL = 3
_FEATURE_GET = 1 << 16
_FEATURE_DMA_BUF = 11
_O_RDWR_CLOEXEC = 0o2000002


def group_is_viable(group_fd: int) -> bool:
    """Whether VFIO (or nobody) owns every function of the group."""
    status = bytearray(struct.pack("II", 8, 0))
    fcntl.ioctl(group_fd, GROUP_GET_STATUS, status)
    return bool(struct.unpack("II", status)[1] & GROUP_VIABLE)


def device_info(device_fd: int) -> tuple[int, int, int]:
    """(flags, number of regions, number of interrupt kinds)."""
    info = bytearray(struct.pack("IIIIII", 24, 0, 0, 0, 0, 0))
    fcntl.ioctl(device_fd, DEVICE_GET_INFO, info)
    _, flags, regions, irqs, _, _ = struct.unpack("IIIIII", info)
    return flags, regions, irqs


def region_info(device_fd: int, index: int) -> dict[str, int]:
    """``{index, size_bytes, flags, offset}``."""
    info = bytearray(struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
    fcntl.ioctl(device_fd, DEVICE_GET_REGION_INFO, info)
    _, flags, _, _, size, offset = struct.unpack("IIIIQQ", info)
    return {"index": index, "size_bytes": size, "flags": flags, "offset": offset}


def irq_info(device_fd: int, index: int) -> dict[str, int]:
    """``{index, flags, count}``."""
    info = bytearray(struct.pack("IIII", 16, 0, index, 0))
    fcntl.ioctl(device_fd, DEVICE_GET_IRQ_INFO, info)
    _, flags, _, count = struct.unpack("IIII", info)
    return {"index": index, "flags": flags, "count": count}


def set_irqs(device_fd: int, index: int, action: int, start: int, eventfds: list[int]) -> None:
    """Connect vectors from ``start`` on to eventfds (-1: none); no list turns the kind off."""
    count = len(eventfds)
    kind = SET_DATA_EVENTFD if eventfds else SET_DATA_NONE
    data = struct.pack(
        f"IIIII{count}i", 20 + 4 * count, kind | action, index, start, count, *eventfds
    )
    fcntl.ioctl(device_fd, DEVICE_SET_IRQS, data)


def unmask(device_fd: int, index: int) -> None:
    """Let a level-triggered interrupt come again; VFIO masks it each time it fires."""
    data = struct.pack("IIIII", 20, SET_DATA_NONE | SET_ACTION_UNMASK, index, 0, 1)
    fcntl.ioctl(device_fd, DEVICE_SET_IRQS, data)


def map_dma(container_fd: int, flags: int, address: int, iova: int, size_bytes: int) -> None:
    """Make a piece of this process's memory reachable for devices at ``iova``."""
    fcntl.ioctl(
        container_fd, IOMMU_MAP_DMA, struct.pack("IIQQQ", 32, flags, address, iova, size_bytes)
    )


def unmap_dma(container_fd: int, iova: int, size_bytes: int) -> int:
    """Undo mappings that lie wholly in the range; returns how many bytes that were."""
    data = bytearray(struct.pack("IIQQ", 24, 0, iova, size_bytes))
    fcntl.ioctl(container_fd, IOMMU_UNMAP_DMA, data)
    return int(struct.unpack("IIQQ", data)[3])


def iommu_info(container_fd: int) -> dict[str, Any]:
    """``{iova_ranges: [[first, last]], page_sizes: bit mask, mappings_left}``.

    ``mappings_left``: how many more there may be, as the kernel counts them; None if it does not
    say.
    """
    size = 24
    while True:
        data = bytearray(size)
        struct.pack_into("I", data, 0, size)
        fcntl.ioctl(container_fd, IOMMU_GET_INFO, data)
        wanted, flags, page_sizes, first = struct.unpack_from("IIQI", data)
        if wanted <= size:
            break
        size = wanted
    ranges: list[list[int]] = []
    left = None
    if flags & _INFO_CAPABILITIES:
        for identifier, at in _capabilities(data, first):
            if identifier == _CAP_IOVA_RANGE:
                (count,) = struct.unpack_from("I", data, at)
                ends = struct.unpack_from(f"{2 * count}Q", data, at + 8)
                ranges = [list(ends[i : i + 2]) for i in range(0, 2 * count, 2)]
            elif identifier == _CAP_DMA_AVAIL:
                (left,) = struct.unpack_from("I", data, at)
    return {
        "iova_ranges": ranges,
        "page_sizes": page_sizes if flags & _INFO_PAGE_SIZES else 0,
        "mappings_left": left,
    }


def _capabilities(data: bytearray, at: int) -> Iterator[tuple[int, int]]:
    while at:
        if at + 8 > len(data):
            raise OSError(errno.EPROTO, "VFIO: a capability is outside its structure")
        identifier, _, following = struct.unpack_from("HHI", data, at)
        yield identifier, at + 8
        at = following


def export(device_fd: int, region: int, ranges: list[tuple[int, int]], flags: int) -> int:
    """A dma-buf of parts of a region: (offset, size) each. OSError: ENOTTY: it cannot."""
    body = struct.pack("IIII", region, _O_RDWR_CLOEXEC, flags, len(ranges))
    body += b"".join(struct.pack("QQ", *each) for each in ranges)
    head = struct.pack("II", 8 + len(body), _FEATURE_GET | _FEATURE_DMA_BUF)
    return int(fcntl.ioctl(device_fd, DEVICE_FEATURE, bytearray(head + body)))
