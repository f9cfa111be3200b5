# SPDX-License-Identifier: Apache-2.0
"""A device of one's own: it adds up 32-bit integers in the guest's memory, by DMA.

In a topology: `model: docs/examples/adder.py:Adder`. BAR0:

| at   | what                                                           |
|------|----------------------------------------------------------------|
| 0x00 | where the integers are (64-bit bus address)                    |
| 0x08 | how many; writing it starts the work                           |
| 0x10 | the sum (64 bits)                                              |
| 0x18 | 0 idle, 1 busy, 2 done, 3 the IOMMU refused; vector 0 at an end |
"""

from __future__ import annotations

from testbed.models.access import AccessError
from testbed.models.config import Bar, Identity, MsixLayout
from testbed.models.device import Device

ADDRESS, COUNT, SUM, STATE = 0x00, 0x08, 0x10, 0x18
IDLE, BUSY, DONE, REFUSED = range(4)


class Adder(Device):
    """See the module's text."""

    identity = Identity(vendor=0x1234, device=0xADD0, class_code=0x120000)
    bars = (Bar(index=0, size_bytes=0x4000),)
    msix = MsixLayout(vectors=1, bar=0, table_offset=0x2000, pending_offset=0x3000)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.registers = {ADDRESS: 0, COUNT: 0, SUM: 0, STATE: IDLE}

    def reset(self) -> None:
        """As after power-on."""
        self.registers = dict.fromkeys(self.registers, 0)

    def read(self, bar: int, offset: int, size: int) -> int:  # noqa: ARG002 - one BAR
        """The guest reads a register."""
        return self.registers.get(offset, 0)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """The guest writes a register. The work begins here, and goes on after the answer."""
        if offset in (ADDRESS, COUNT) and self.registers[STATE] != BUSY:
            self.registers[offset] = value
            if offset == COUNT:
                self.registers[STATE] = BUSY
                self.start(self.add_up())

    async def add_up(self) -> None:
        """Read, add, interrupt."""
        try:
            data = await self.dma_read(self.registers[ADDRESS], 4 * self.registers[COUNT])
            self.registers[SUM] = sum(memoryview(data).cast("I"))
            self.registers[STATE] = DONE
        except AccessError:
            self.registers[STATE] = REFUSED
        self.raise_interrupt(0)
