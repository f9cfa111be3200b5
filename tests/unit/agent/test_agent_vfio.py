# SPDX-License-Identifier: Apache-2.0
"""VFIO's structures as bytes, and the mapping loop, against an ioctl that answers."""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable
from typing import Any

import pytest

from guest_agent.hw import vfio_abi as abi
from guest_agent.hw.region import Region
from guest_agent.hw.vfio import VfioContainer
from guest_agent.rpc import ParameterError

Ioctl = Callable[[int, int, Any], int]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Ioctl], None]:
    """Let a function answer every ioctl."""

    def use(function: Ioctl) -> None:
        monkeypatch.setattr(abi.fcntl, "ioctl", function)  # type: ignore[attr-defined]

    return use


def test_numbers_are_those_of_the_kernel() -> None:
    """As printed by a C program that includes linux/vfio.h."""
    assert abi.GET_API_VERSION == 0x3B64
    assert abi.DEVICE_RESET == 0x3B6F
    assert abi.IOMMU_UNMAP_DMA == 0x3B72


def test_every_structure_says_its_own_size(answer: Callable[[Ioctl], None]) -> None:
    seen: list[int] = []

    def ioctl(_fd: int, _request: int, data: Any) -> int:
        assert struct.unpack_from("I", data)[0] == len(data)
        seen.append(len(data))
        return 0

    answer(ioctl)
    abi.group_is_viable(1)
    abi.device_info(1)
    abi.region_info(1, 2)
    abi.irq_info(1, 2)
    abi.set_irqs(1, 2, abi.SET_ACTION_TRIGGER, 0, [5, -1, 6])
    abi.unmask(1, 0)
    abi.map_dma(1, 3, 0x7000, 0x1000, 4096)
    abi.unmap_dma(1, 0x1000, 4096)
    abi.iommu_info(1)
    assert seen == [8, 24, 32, 16, 32, 20, 32, 24, 24]


def test_iova_ranges_come_from_a_capability(answer: Callable[[Ioctl], None]) -> None:
    other = struct.pack("HHII", 3, 1, 48, 65000) + bytes(12)
    ranges = struct.pack("HHIII4Q", 1, 1, 0, 2, 0, 0, 0xFEDFFFFF, 0xFEF00000, (1 << 48) - 1)
    whole = struct.pack("IIQII", 24 + len(other) + len(ranges), 3, 0x40201000, 24, 0)
    whole += other + ranges

    def ioctl(_fd: int, _request: int, data: bytearray) -> int:
        data[:] = whole[: len(data)]
        return 0

    answer(ioctl)
    assert abi.iommu_info(1) == {
        "iova_ranges": [[0, 0xFEDFFFFF], [0xFEF00000, (1 << 48) - 1]],
        "page_sizes": 0x40201000,
        "mappings_left": 65000,
    }


class FakeIommu:
    """Keeps mappings like type1v2: no overlap, and one fault on purpose."""

    def __init__(self) -> None:
        self.mapped: dict[int, tuple[int, int, int]] = {}
        self.refuse_at = -1

    def ioctl(self, _fd: int, request: int, data: Any) -> int:
        if request == abi.IOMMU_MAP_DMA:
            _, flags, address, iova, size = struct.unpack("IIQQQ", data)
            if iova == self.refuse_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.mapped[iova] = (address, size, flags)
        else:
            _, _, iova, size = struct.unpack("IIQQ", data)
            gone = [each for each in self.mapped if iova <= each < iova + size]
            total = sum(self.mapped.pop(each)[1] for each in gone)
            struct.pack_into("Q", data, 16, total)
        return 0


@pytest.fixture
def iommu(answer: Callable[[Ioctl], None]) -> FakeIommu:
    iommu = FakeIommu()
    answer(iommu.ioctl)
    return iommu


def _map(region: Region, offset: int, size: int, **how: Any) -> None:
    container = VfioContainer.__new__(VfioContainer)
    container._fd = 5
    how = {"read": True, "write": True, "page_bytes": 0, **how}
    container.map(region, offset, 0x10000, size, **how)


def test_maps_in_one_piece_or_page_by_page(iommu: FakeIommu) -> None:
    region = Region(mmap.mmap(-1, 1 << 16))
    start = region.virtual_address()
    _map(region, 4096, 12288)
    assert iommu.mapped == {0x10000: (start + 4096, 12288, 3)}
    iommu.mapped.clear()
    _map(region, 0, 20480, page_bytes=8192)
    assert iommu.mapped == {
        0x10000: (start, 8192, 3),
        0x12000: (start + 8192, 8192, 3),
        0x14000: (start + 16384, 4096, 3),
    }


@pytest.mark.parametrize(("read", "write", "flags"), [(True, False, 1), (False, True, 2)])
def test_maps_with_the_access_asked_for(
    iommu: FakeIommu, read: bool, write: bool, flags: int
) -> None:
    _map(Region(mmap.mmap(-1, 4096)), 0, 4096, read=read, write=write)
    assert iommu.mapped[0x10000][2] == flags


def test_a_failed_map_leaves_nothing_mapped(iommu: FakeIommu) -> None:
    iommu.refuse_at = 0x12000
    with pytest.raises(OSError, match="cannot map 0x4000 bytes at 0x10000: No space") as caught:
        _map(Region(mmap.mmap(-1, 1 << 16)), 0, 16384, page_bytes=4096)
    assert caught.value.errno == errno.ENOSPC
    assert iommu.mapped == {}


def test_nothing_beyond_the_region_is_mapped(iommu: FakeIommu) -> None:
    with pytest.raises(ParameterError, match="beyond the end"):
        _map(Region(mmap.mmap(-1, 8192)), 4096, 8192)
    assert iommu.mapped == {}
