# SPDX-License-Identifier: Apache-2.0
"""The NIC model's whole driver: memory regions, pinned and on demand, and requests between them.

Region 0 is the one through which :meth:`ModelNic.copy` reaches everything; others are the caller's.
Registers and formats: docs/nic-model.md.
"""

from __future__ import annotations

import struct

from guest_agent import rpc
from guest_agent.hw import model_registers as hw
from guest_agent.hw.engine import PAGE_BYTES
from guest_agent.hw.fault_buffer import BUFFER_BYTES, FaultBuffer
from guest_agent.hw.gpu_commands import fits
from guest_agent.hw.model import ModelNic
from guest_agent.hw.model_batch import Batches, check_way
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from guest_agent.hw.device import Device
    from guest_agent.hw.engine import Scratch
    from guest_agent.hw.region import Region

RIGHTS = {
    "local_write": hw.REGION_FLAG_LOCAL_WRITE,
    "remote_read": hw.REGION_FLAG_REMOTE_READ,
    "remote_write": hw.REGION_FLAG_REMOTE_WRITE,
}
ENTRY_BYTES = 8
_OPCODES = {"nop": hw.NIC_OPCODE_NOP, "write": hw.NIC_OPCODE_WRITE, "read": hw.NIC_OPCODE_READ}
_PARTS = {
    "peer": "int",
    "local_key": "int",
    "local_address": "int",
    "remote_key": "int",
    "remote_address": "int",
    "size_bytes": "int",
}
_BITS = {"peer": 16, "local_key": 32, "remote_key": 32}


class NicRegion:
    """A memory region, as it was committed; ``table`` and ``offset`` if it is on demand."""

    def __init__(
        self, base: int, size_bytes: int, iova: int, flags: int, table: Region | None, offset: int
    ) -> None:
        self.base = base
        self.size_bytes = size_bytes
        self.iova = iova
        self.flags = flags
        self.table = table
        self.offset = offset
        self.key = 0

    def set_pages(self, page: int, count: int, iova: int, *, writable: bool) -> None:
        """Fill in table entries: consecutive pages from ``iova`` on. The device is not told.

        :raises ParameterError: not on demand, no such pages, or ``iova`` is not aligned.
        """
        if iova % PAGE_BYTES:
            raise ParameterError(f"iova: {iova:#x} is no multiple of 4096")
        bits = hw.REGION_ENTRY_VALID | hw.REGION_ENTRY_WRITABLE * writable
        for number in range(count):
            self._set(page + number, iova + number * PAGE_BYTES | bits)

    def clear_pages(self, page: int, count: int) -> None:
        """Make table entries invalid. The device may still know them."""
        for number in range(count):
            self._set(page + number, 0)

    def _set(self, page: int, entry: int) -> None:
        if self.table is None:
            raise ParameterError("index: this region is pinned, it has no pages")
        if page * PAGE_BYTES >= self.size_bytes:
            raise ParameterError(f"page: the region has no page {page}")
        self.table.write64(self.offset + page * ENTRY_BYTES, entry)


class Nic(Batches, ModelNic):
    """See the module. The fault buffer is the last page of the scratch memory."""

    kept_bytes = BUFFER_BYTES

    def __init__(self, device: Device, scratch: Scratch | None) -> None:
        super().__init__(device, scratch)
        self._regions: dict[int, NicRegion] = {}
        assert self.scratch is not None  # noqa: S101  the ring's constructor has seen to it
        last = self.scratch.size_bytes - BUFFER_BYTES
        self._buffer_iova = self.scratch.iova + last
        self.faults = FaultBuffer(self.scratch.region, self.scratch.offset + last)
        self.slots = 0
        self.address = 0

    def open(self) -> None:
        """See :meth:`Engine.open`."""
        super().open()
        self.slots = self._read(hw.NIC_REGIONS)
        self.address = self._own

    def _set_up(self) -> None:
        """Also the fault buffer and the regions, which have new keys then."""
        super()._set_up()
        self._set_up_faults(self._buffer_iova)
        for index, region in self._regions.items():
            self._commit(index, region)

    def keys(self) -> dict[str, int]:
        """Key of each region, by its index. A failed request resets the NIC: new keys."""
        return {str(index): region.key for index, region in self._regions.items()}

    def region(self, index: int) -> NicRegion:
        """:raises ParameterError: the caller has made none there."""
        if index not in self._regions:
            raise ParameterError(f"index: there is no region {index}")
        return self._regions[index]

    def add_region(self, index: int, region: NicRegion) -> int:
        """Commit a region; returns its key.

        :raises ParameterError: no such slot, it is taken, or the NIC refuses the region.
        """
        if not 1 <= index < self.slots:
            raise ParameterError(f"index: 1 to {self.slots - 1}, not {index}")
        if index in self._regions:
            raise ParameterError(f"index: there is a region {index}")
        self._commit(index, region)
        if not region.key:
            raise ParameterError("size_bytes, base or iova: the NIC refuses such a region")
        self._regions[index] = region
        return region.key

    def remove_region(self, index: int) -> None:
        """Take it away; its key is worth nothing from now on."""
        self.region(index)
        self._write(hw.NIC_REGION_INDEX, index)
        self._write(hw.NIC_REGION_FLAGS, 0)
        self._write(hw.NIC_REGION_COMMIT, 1)
        del self._regions[index]

    def invalidate(self, index: int) -> None:
        """Have the device forget the table entries of an on-demand region."""
        self.region(index)
        self._write(hw.NIC_REGION_INVALIDATE, index)

    def encode(self, name: str, request: Mapping[str, Any]) -> bytes:
        """A request as a caller writes it: ``{"op": "write", "peer", "local_key", "local_address",
        "remote_key", "remote_address", "size_bytes"}``. :raises ParameterError: by name and part.
        """
        operation = request.get("op")
        if not isinstance(operation, str) or operation not in _OPCODES:
            raise ParameterError(f"{name}.op: {operation!r} is none of {', '.join(_OPCODES)}")
        parts = {} if operation == "nop" else _PARTS
        rpc.check_parts(name, request, {"op": "str", **parts}, {"keep_going": "bool"})
        values = [fits(f"{name}.{p}", request.get(p, 0), _BITS.get(p, 64)) for p in _PARTS]
        flags = hw.COMMAND_FLAG_KEEP_GOING if request.get("keep_going") else 0
        return self._request(_OPCODES[operation], flags, *values)

    @staticmethod
    def _request(
        opcode: int,
        flags: int,
        peer: int,
        local_key: int,
        local_address: int,
        remote_key: int,
        remote_address: int,
        size_bytes: int,
    ) -> bytes:
        return struct.pack(
            hw.WORK_REQUEST_FORM,
            opcode, flags, peer, local_key,
            local_address, remote_address, size_bytes,
            remote_key, 0, hw.APERTURE_SYSTEM, 0, 0,
        )  # fmt: skip

    def first_touches(
        self, *, index: int, count: int, iova: int, backing_bytes: int, by: str, timeout_s: float
    ) -> dict[str, list[int]]:
        """Write 8 bytes into each of the first ``count`` pages of an on-demand region, none of
        which is there, and answer each fault; see :meth:`Gpu.first_touches`. Loopback.
        """
        check_way(by)
        region = self.region(index)
        region.clear_pages(0, count)
        self.invalidate(index)

        def service(fault: int) -> None:
            page = (fault - region.base) // PAGE_BYTES
            region.set_pages(page, 1, iova + page * PAGE_BYTES % backing_bytes, writable=True)

        requests = (
            self._request(
                hw.NIC_OPCODE_WRITE, 0, self.address,
                self._key, self.dump_iova, region.key, region.base + page * PAGE_BYTES, 8,
            )
            for page in range(count)
        )  # fmt: skip
        try:
            return self.touch_all(requests, service, timeout_s, by)
        finally:
            region.clear_pages(0, count)
            self.invalidate(index)

    def _commit(self, index: int, region: NicRegion) -> None:
        self._write(hw.NIC_REGION_INDEX, index)
        self._write(hw.NIC_REGION_FLAGS, region.flags)
        self._write_pair(hw.NIC_REGION_BASE_LOW, region.base)
        self._write_pair(hw.NIC_REGION_SIZE_LOW, region.size_bytes)
        self._write_pair(hw.NIC_REGION_IOVA_LOW, region.iova)
        self._write(hw.NIC_REGION_COMMIT, 1)
        region.key = self._read(hw.NIC_REGION_KEY)
