# SPDX-License-Identifier: Apache-2.0
"""Small devices for the tests of the server."""

from __future__ import annotations

import asyncio

from testbed.models.config import Bar, ConfigSpace, Identity, MsixLayout
from testbed.models.device import Device
from testbed.models.memory import SharedMemory

BAR_BYTES = 0x4000


class Card(Device):
    """Registers that keep what is written; a few that do something.

    0x100 (write): copy 0x20 bytes from the IOVA written to the IOVA kept in register 0.
    0x108 (write): raise that interrupt.    0x110: fails, as a bug in a model would.
    """

    identity = Identity(0x1234, 0x0001, 0x120000)
    msix = MsixLayout(vectors=8, bar=0, table_offset=0x2000, pending_offset=0x3000)

    def __init__(self, name: str = "card", memory: SharedMemory | None = None) -> None:
        self.bars = (Bar(0, BAR_BYTES),)
        if memory is not None:
            self.bars += (
                Bar(2, memory.size_bytes, is_64bit=True, prefetchable=True, memory=memory),
            )
        super().__init__(name)
        self.values: dict[int, int] = {}
        self.errors: list[str] = []
        self.copies = 0

    def make_config(self) -> ConfigSpace:
        config = super().make_config()
        config.add_vendor(b"test")
        config.add_error_reporting()
        return config

    def read(self, bar: int, offset: int, size: int) -> int:
        if offset == 0x110:
            raise ZeroDivisionError("a bug")
        return self.values.get(offset, 0)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset == 0x100:
            self.start(self.copy(value, self.values.get(0, 0)))
        elif offset == 0x108:
            self.raise_interrupt(value)
        elif offset == 0x110:
            raise ZeroDivisionError("a bug")
        else:
            self.values[offset] = value

    async def copy(self, source: int, target: int) -> None:
        data = await self.dma_read(source, 0x20)
        await self.dma_write(target, data)
        self.copies += 1

    async def sleep(self) -> None:
        await asyncio.sleep(3600)

    def reset(self) -> None:
        self.values.clear()
