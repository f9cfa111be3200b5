# SPDX-License-Identifier: Apache-2.0
"""NIC models on a bench: one, and two on one wire, driven as a driver would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from testbed.models import registers as hw
from testbed.models.nic import NicModel
from testbed.models.registers import (
    Aperture,
    CommandFlag,
    Common,
    Nic,
    RegionFlag,
    WorkRequest,
)
from testbed.models.testing import FakeQemu
from tests.unit.models.turns import turn_until

RAM = 0x4000_0000
PAGE = 4096
FENCE = RAM + PAGE - 8
TABLE = RAM + PAGE  # an on-demand region's table
FAULTS = RAM + 2 * PAGE
DATA = RAM + 16 * PAGE
BASE = 0x10_0000_0000  # a region's own addresses
ALL = RegionFlag.VALID | RegionFlag.LOCAL_WRITE | RegionFlag.REMOTE_READ | RegionFlag.REMOTE_WRITE


class Bench:
    """One NIC on a bench."""

    def __init__(self, nic: NicModel) -> None:
        self.nic = nic
        self.qemu = FakeQemu(nic)
        for vector in range(hw.MSIX_VECTORS):
            self.qemu.arm(vector)
        self.ram = self.qemu.add_memory(RAM, 64 * PAGE)
        self.set_up()

    def set_up(self) -> None:
        self.tail = self.sequence = 0
        for register, value in {
            Common.RING_BASE_LOW: RAM,
            Common.RING_APERTURE: Aperture.SYSTEM,
            Common.RING_ENTRIES: 32,
            Common.FAULT_BUFFER_LOW: FAULTS,
            Common.FAULT_ENTRIES: 8,
            Common.INTERRUPT_ENABLE: 0x1F,
            Common.CONTROL: 1,
        }.items():
            self.write(register, value)

    def read(self, register: int) -> int:
        return self.qemu.read(0, register)

    def write(self, register: int, value: int) -> None:
        self.qemu.write(0, register, value)

    def region(
        self, index: int, *, iova: int = DATA, pages: int = 4, flags: int = ALL, base: int = BASE
    ) -> int:
        for register, value in {
            Nic.REGION_INDEX: index,
            Nic.REGION_FLAGS: flags,
            Nic.REGION_BASE_LOW: base & 0xFFFFFFFF,
            Nic.REGION_BASE_HIGH: base >> 32,
            Nic.REGION_SIZE_LOW: pages * PAGE,
            Nic.REGION_IOVA_LOW: iova,
            Nic.REGION_COMMIT: 1,
        }.items():
            self.write(register, value)
        return self.read(Nic.REGION_KEY)

    def post(self, request: WorkRequest) -> int:
        self.sequence += 1
        request = request._replace(
            flags=CommandFlag.FENCE,
            fence_aperture=Aperture.SYSTEM,
            fence_address=FENCE,
            fence_value=self.sequence,
        )
        place = self.tail * 64
        self.ram.view[place : place + 64] = hw.WORK_REQUEST.encode(request)
        self.tail = (self.tail + 1) % 32
        self.write(Common.DOORBELL_TAIL, self.tail)
        return self.sequence

    @property
    def fence(self) -> int:
        return int.from_bytes(self.ram.view[PAGE - 8 : PAGE], "little")

    @property
    def halted(self) -> bool:
        return bool(self.read(Common.STATUS) & hw.Status.HALTED)

    def at(self, iova: int, size: int) -> memoryview:
        return self.ram.view[iova - RAM : iova - RAM + size]


class Two:
    """Two NICs of a network, and how to let both work."""

    def __init__(self, folder: Path) -> None:
        sockets = {1: folder / "nic1", 2: folder / "nic2", 3: folder / "nobody"}
        self.a = Bench(NicModel("nic0", address=1, socket=sockets[1], peers=sockets))
        self.b = Bench(NicModel("nic1", address=2, socket=sockets[2], peers=sockets))

    def wait(self, condition: Callable[[], bool]) -> None:
        turn_until(condition, self.a, self.b)

    def run(self, request: WorkRequest) -> None:
        value = self.a.post(request)
        self.wait(lambda: self.a.fence == value or self.a.halted)
        assert not self.a.halted, self.a.nic.ring.error

    def fail(self, request: WorkRequest) -> tuple[int, int]:
        self.a.post(request)
        self.wait(lambda: self.a.halted)
        low, high = Common.ERROR_ADDRESS_LOW, Common.ERROR_ADDRESS_HIGH
        return self.a.read(Common.ERROR_CAUSE), self.a.read(low) | self.a.read(high) << 32


def request(
    opcode: int, local_key: int, remote_key: int, size: int, *, peer: int = 2, at: int = BASE
) -> WorkRequest:
    return WorkRequest(
        opcode,
        peer=peer,
        local_key=local_key,
        local_address=BASE,
        remote_key=remote_key,
        remote_address=at,
        size_bytes=size,
    )
