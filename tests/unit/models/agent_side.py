# SPDX-License-Identifier: Apache-2.0
"""The agent's view of a model that is plugged into a fake machine: registers, function, memory."""

from __future__ import annotations

import mmap

from guest_agent.hw import model_registers as registers
from guest_agent.hw.device import Device as AgentDevice
from guest_agent.hw.region import Region
from testbed.models.memory import SharedMemory
from testbed.models.testing import FakeQemu
from testbed.models.wire import Region as Place


class Registers(Region):
    """BAR0, seen through the fake machine."""

    def __init__(self, qemu: FakeQemu) -> None:
        super().__init__(mmap.mmap(-1, 4096))
        self.qemu = qemu
        self.gone = False

    def read32(self, offset: int) -> int:
        return 0xFFFFFFFF if self.gone else self.qemu.read(0, offset)

    def write32(self, offset: int, value: int) -> None:
        if not self.gone:
            self.qemu.write(0, offset, value)


class Function(AgentDevice):
    """The PCI function, likewise."""

    def __init__(self, qemu: FakeQemu) -> None:
        super().__init__("0000:05:00.1")
        self.qemu = qemu
        self.registers = Registers(qemu)
        self.resets = 0
        self.armed: set[int] = set()

    def config_read(self, offset: int, size_bytes: int) -> int:
        return self.qemu.read(Place.CONFIG, offset, size_bytes)

    def config_write(self, offset: int, size_bytes: int, value: int) -> None:
        self.qemu.write(Place.CONFIG, offset, value, size_bytes)

    def reset(self) -> bool:
        self.resets += 1
        self.qemu.reset()
        return True

    def arm(self, kind: str, vector: int) -> None:
        assert kind == "msix"
        self.qemu.arm(vector)
        self.armed.add(vector)

    def wait_any(self, vectors: tuple[int, ...], timeout_s: float) -> list[int]:
        assert set(vectors) <= self.armed
        self.qemu.turn()
        return [vector for vector in vectors if self.qemu.interrupts(vector)]

    def _map(self, index: int) -> Region:
        assert index == registers.REGISTER_BAR
        return self.registers


def seen(memory: SharedMemory) -> Region:
    """The guest's view of a memory."""
    return Region(mmap.mmap(memory.fd, memory.size_bytes))
