# SPDX-License-Identifier: Apache-2.0
"""A GPU model on a bench: a fake machine, a ring in its memory, and page tables made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from testbed.models import registers as hw
from testbed.models.gpu import GpuModel
from testbed.models.link import LinkEnd
from testbed.models.memory import SharedMemory
from testbed.models.registers import Aperture, Command, CommandFlag, Common, Entry, Gpu
from testbed.models.testing import FakeQemu

MIB = 1 << 20
RAM = 0x4000_0000  # the IOVA of the machine's memory; the ring is its first page
RING_ENTRIES = 32
FENCE = RAM + 4096 - 8
FREE = RAM + 4096  # what tests may use of it
ROOT = 8 * MIB  # where page tables begin in video memory
FAULTS = 7 * MIB  # where the fault buffer stands
RAM_BYTES = 8 * MIB


class Bench:
    """One GPU, plugged in and enabled."""

    def __init__(
        self, name: str = "gpu0", *, vram_bytes: int = 16 * MIB, links: Sequence[LinkEnd] = ()
    ) -> None:
        self.vram = SharedMemory.create(vram_bytes, name=f"{name}.vram")
        self.gpu = GpuModel(name, self.vram, links)
        self.qemu = FakeQemu(self.gpu)
        for vector in range(hw.MSIX_VECTORS):
            self.qemu.arm(vector)
        self.ram = self.qemu.add_memory(RAM, RAM_BYTES)
        self._tables = ROOT + 4096
        self.set_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.qemu.close()

    def set_up(self) -> None:
        """Ring, fault buffer, interrupts; also after a reset."""
        self.tail = 0
        self.sequence = 0
        self.qemu.enable_dma()
        self.write_pair(Common.RING_BASE_LOW, RAM)
        self.write(Common.RING_APERTURE, Aperture.SYSTEM)
        self.write(Common.RING_ENTRIES, RING_ENTRIES)
        self.write_pair(Common.FAULT_BUFFER_LOW, FAULTS)
        self.write(Common.FAULT_ENTRIES, 8)
        self.write(Common.INTERRUPT_ENABLE, 0x1F)
        self.write(Common.CONTROL, 1)

    def read(self, register: int) -> int:
        return self.qemu.read(0, register)

    def write(self, register: int, value: int) -> None:
        self.qemu.write(0, register, value)

    def read_pair(self, register: int) -> int:
        return self.read(register) | self.read(register + 4) << 32

    def write_pair(self, register: int, value: int) -> None:
        self.write(register, value & 0xFFFFFFFF)
        self.write(register + 4, value >> 32)

    def put(self, command: Command) -> int:
        """Put a command into the ring, with a fence; answers the value of the fence."""
        self.sequence += 1
        command = command._replace(
            flags=command.flags | CommandFlag.FENCE,
            fence_aperture=Aperture.SYSTEM,
            fence_address=FENCE,
            fence_value=self.sequence,
        )
        self.put_raw(hw.COMMAND.encode(command))
        return self.sequence

    def put_raw(self, data: bytes) -> None:
        place = self.tail * hw.COMMAND.size_bytes
        self.ram.view[place : place + len(data)] = data
        self.tail = (self.tail + 1) % RING_ENTRIES

    def ring(self) -> None:
        self.write(Common.DOORBELL_TAIL, self.tail)

    @property
    def fence(self) -> int:
        return int.from_bytes(self.ram.view[FENCE - RAM : FENCE - RAM + 8], "little")

    def run(self, *commands: Command) -> None:
        """Run commands to their end; AssertionError if the engine halts instead."""
        values = [self.put(command) for command in commands]
        self.ring()
        self.qemu.wait(lambda: self.fence == values[-1] or self.halted)
        assert not self.halted, self.gpu.ring.error

    def fail(self, *commands: Command) -> tuple[int, int]:
        """Run commands until the engine halts: cause and address."""
        for command in commands:
            self.put(command)
        self.ring()
        self.qemu.wait(lambda: self.halted)
        return self.read(Common.ERROR_CAUSE), self.read_pair(Common.ERROR_ADDRESS_LOW)

    @property
    def halted(self) -> bool:
        return bool(self.read(Common.STATUS) & hw.Status.HALTED)

    @property
    def faulted(self) -> bool:
        return bool(self.read(Common.STATUS) & hw.Status.FAULTED)

    # --- page tables

    def use_mmu(self, control: int = hw.MmuControl.ENABLE) -> None:
        self.write_pair(Gpu.MMU_ROOT_LOW, ROOT)
        self.write(Gpu.MMU_CONTROL, control)

    def enter(
        self, virtual: int, address: int, aperture: int, *, large: bool = False, bits: int = 3
    ) -> None:
        """Make a page table entry, and the tables above it."""
        table = ROOT
        for shift in (39, 30, 21) if not large else (39, 30):
            place = table + (virtual >> shift & 0x1FF) * 8
            entry = int.from_bytes(self.vram.view[place : place + 8], "little")
            if not entry & Entry.VALID:
                entry = self._tables | Entry.VALID
                self.poke(place, entry)
                self._tables += 4096
            table = entry & hw.ENTRY_ADDRESS_MASK
        shift = 21 if large else 12
        size = Entry.LARGE if large else 0
        self.poke(table + (virtual >> shift & 0x1FF) * 8, address | aperture << 4 | size | bits)

    def poke(self, place: int, value: int) -> None:
        self.vram.view[place : place + 8] = value.to_bytes(8, "little")


def copy(source: int, target: int, size: int, *, of: int = 0, to: int = 0) -> Command:
    return Command(
        hw.Opcode.COPY,
        source=source,
        target=target,
        size_bytes=size,
        source_aperture=of,
        target_aperture=to,
    )
