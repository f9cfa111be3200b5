# SPDX-License-Identifier: Apache-2.0
"""Thousands of messages that are almost right, from QEMU's side and from the guest's.

Whatever comes: no exception of ours, no descriptor lost, nothing kept without bound, and not one
byte touched of memory that was not given.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
from pathlib import Path

import pytest

from testbed.models import registers as hw
from testbed.models import wire
from testbed.models.device import Device
from testbed.models.gpu import GpuModel
from testbed.models.memory import MemoryCache, SharedMemory
from testbed.models.nic import NicModel
from testbed.models.server import Session
from testbed.models.wire import Command, HeaderFlag
from tests.unit.models.model_devices import Card

PAGE = 4096
GIVEN = range(4 * PAGE, 12 * PAGE)  # the part of each memory file that is ever mapped
CANARY = 0xA5
SEEDS = range(6)
MESSAGES = 300
EDGES = (0, 1, 3, 4, 7, 8, 16, PAGE - 1, PAGE, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)
WIDE_EDGES = (*EDGES, 1 << 47, (1 << 48) - 1, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1)


class Fuzzer:
    """One connection's worth of messages, from a seed."""

    def __init__(self, seed: int, memory: SharedMemory) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - the same every time
        self.memory = memory
        self.number = 0

    def pick(self, *edges: int) -> int:
        return self.rng.choice(edges) + self.rng.choice((0, 0, 0, 1, 4, PAGE))

    def message(self) -> tuple[bytes, int]:
        """Bytes, and how many descriptors of the memory go with them."""
        command, payload, fds = self.rng.choice(
            (self.map, self.map, self.map, self.unmap,
             self.access, self.access, self.access, self.access, self.work, self.work,
             self.multi, self.irqs, self.info, self.other, self.reply)
        )()  # fmt: skip
        flags = self.rng.choice((0, 0, 0, HeaderFlag.NO_REPLY))
        if command in (Command.DMA_READ, Command.DMA_WRITE):
            flags = HeaderFlag.REPLY | self.rng.choice((0, HeaderFlag.ERROR))
        data = bytearray(wire.encode_header(self.rng.randrange(70), command, len(payload), flags))
        data += payload
        if self.rng.random() < 0.1:
            for _ in range(self.rng.randint(1, 3)):
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
            if self.rng.random() < 0.9:  # mostly keep the frame, so that the session lives on
                data[4:8] = len(data).to_bytes(4, "little")
        return bytes(data), fds

    def map(self) -> tuple[int, bytes, int]:
        page = self.rng.randrange(GIVEN.start // PAGE, GIVEN.stop // PAGE)
        pages = self.rng.randint(1, GIVEN.stop // PAGE - page)
        address = self.rng.randrange(64) * PAGE
        request = wire.DmaMap(
            32, self.rng.choice((1, 2, 3, 3, 3)), page * PAGE, address, pages * PAGE
        )
        if self.rng.random() < 0.2:  # outside what the file has, or no pages at all
            at = self.pick(1 << 63, 64 * PAGE, (1 << 64) - PAGE)
            request = request._replace(offset=at % (1 << 64), size=self.pick(*EDGES))
        return Command.DMA_MAP, wire.DMA_MAP.encode(request), self.rng.choice((0, 1, 1, 1, 2, 17))

    def unmap(self) -> tuple[int, bytes, int]:
        size = self.pick(PAGE, PAGE, 4 * PAGE, 1 << 40)
        request = wire.DmaUnmap(
            24, self.rng.choice((0, 0, 0, 0, 2, 1)), self.rng.randrange(64) * PAGE, size
        )
        return Command.DMA_UNMAP, wire.DMA_UNMAP.encode(request), 0

    def access(self) -> tuple[int, bytes, int]:
        command = self.rng.choice((Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE))
        region = self.rng.choice((0, 0, 0, 0, 7, 2, 9, 0xFFFFFFFF))
        offset = self.rng.choice((self.register, self.anywhere))()
        size = self.rng.choice((4, 4, 4, 1, 2, 8, 3, PAGE))
        payload = wire.REGION_ACCESS.encode(wire.RegionAccess(offset, region, size))
        if command == Command.REGION_WRITE:
            value = self.rng.choice((self.rng.randrange(64) * PAGE, *EDGES)) % (1 << 32)
            payload += value.to_bytes(max(size, 4), "little")[:size]
        return command, payload, 0

    def register(self) -> int:
        table = self.rng.choice((hw.Common, hw.Gpu, hw.Nic))
        return int(self.rng.choice(list(table)))

    def anywhere(self) -> int:
        return self.rng.choice((4, 0x44, 0x800 + 4 * self.rng.randrange(64), *WIDE_EDGES))

    def multi(self) -> tuple[int, bytes, int]:
        writes = [
            (wire.RegionAccess(self.register(), 0, 4), self.rng.randbytes(4))
            for _ in range(self.rng.randrange(20))
        ]
        return Command.REGION_WRITE_MULTI, wire.encode_write_multi(writes), 0

    def work(self) -> tuple[int, bytes, int]:
        """A ring that is really there, if its page is mapped, and its doorbell."""
        values = {
            hw.Common.RING_BASE_LOW: self.rng.randrange(64) * PAGE,
            hw.Common.RING_APERTURE: self.rng.choice((1, 1, 1, 0, 3, 7)),
            hw.Common.RING_ENTRIES: 32,
            hw.Gpu.MMU_CONTROL: self.rng.choice((0, 1, 3)),
            hw.Common.CONTROL: 1,
            hw.Common.DOORBELL_TAIL: self.rng.randrange(32),
            hw.Common.FAULT_REPLAY: self.rng.randrange(3),
        }
        if self.rng.random() < 0.2:
            values = {hw.Common.RESET: 1} | values
        master = (wire.RegionAccess(4, 7, 2), b"\6\0")
        writes = [
            (wire.RegionAccess(register, 0, 4), value.to_bytes(4, "little"))
            for register, value in values.items()
        ]
        return Command.REGION_WRITE_MULTI, wire.encode_write_multi([master, *writes]), 0

    def irqs(self) -> tuple[int, bytes, int]:
        amount = self.rng.choice((0, 1, 2, 8, 0xFFFFFFFF))
        flags = self.rng.choice((1, 2, 4)) | self.rng.choice((8, 16, 32, 32))
        request = wire.IrqSet(20, flags, self.rng.randrange(6), self.rng.randrange(4), amount)
        payload = wire.IRQ_SET.encode(request) + self.rng.randbytes(self.rng.choice((0, 0, 1, 2)))
        return Command.DEVICE_SET_IRQS, payload, self.rng.choice((0, 1, 2))

    def info(self) -> tuple[int, bytes, int]:
        command, size = self.rng.choice(
            (
                (Command.DEVICE_GET_INFO, 16),
                (Command.DEVICE_GET_REGION_INFO, 32),
                (Command.DEVICE_GET_IRQ_INFO, 16),
                (Command.DEVICE_GET_REGION_IO_FDS, 16),
            )
        )
        words = (self.rng.choice((0, 1, 7, 16, 32, 0xFFFFFFFF)) for _ in range(size // 4))
        return command, b"".join(word.to_bytes(4, "little") for word in words), 0

    def other(self) -> tuple[int, bytes, int]:
        command = self.rng.choice((Command.DEVICE_RESET, Command.VERSION, 16, 17, 18, 99, 0xFFFF))
        return command, self.rng.randbytes(self.rng.choice((0, 0, 8, 100))), self.rng.choice((0, 3))

    def reply(self) -> tuple[int, bytes, int]:
        """An answer to one of the device's own requests, right or wrong."""
        payload = self.rng.randbytes(self.rng.choice((0, 16, 16 + 8, 16 + 64, 16 + PAGE)))
        return self.rng.choice((Command.DMA_READ, Command.DMA_WRITE)), payload, 0

    def place(self) -> int:
        page = self.rng.randrange(64) * PAGE
        return self.rng.choice((page, page, page, page + 8, *WIDE_EDGES[-3:], PAGE - 1))

    def scribble(self) -> None:
        """The guest writes commands, page tables and region tables, right and wrong."""
        for place in range(GIVEN.start, GIVEN.stop, 64):
            if self.rng.random() < 0.8:
                command = hw.Command(
                    self.rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 12)),
                    self.rng.choice((0, 0, 1, 2, 3, 4)),
                    self.rng.choice((0, 0, 1, 1, 1, 2, 3, 4, 0xFF)),
                    self.rng.choice((0, 0, 1, 1, 1, 2, 3, 4, 0xFF)),
                    self.rng.choice((0, 1, 3)),
                    source=self.place(),
                    target=self.place(),
                    size_bytes=self.rng.choice((4, 8, 64, 64, 64, PAGE, 3 * PAGE, *WIDE_EDGES)),
                    rows=self.rng.choice((0, 1, 5)),
                    source_pitch=self.rng.choice(EDGES) % (1 << 32),
                    target_pitch=self.rng.choice(EDGES) % (1 << 32),
                    value=self.rng.choice((0, 1, 1 << 40)),
                    fence_address=self.rng.randrange(64) * PAGE,
                )
                self.memory.view[place : place + 64] = hw.COMMAND.encode(command)


def make_device(kind: str) -> Device:
    if kind == "gpu":
        return GpuModel("gpu", SharedMemory.create(1 << 20, name="vram"))
    if kind == "nic":
        return NicModel("nic", address=1)
    return Card()


def send(connection: socket.socket, data: bytes, fds: list[int]) -> bool:
    try:
        socket.send_fds(connection, [data], fds)
        connection.recv(1 << 20)  # what it answers is not looked at, but read
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


async def fuzz(kind: str, seed: int) -> list[str]:
    """Why sessions ended, and what went wrong in the loop."""
    trouble: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: trouble.append(str(context))
    )
    memory = SharedMemory.create(16 * PAGE, name="ram")
    memory.view[:] = bytes([CANARY]) * memory.size_bytes
    before, behind = bytes(memory.view[: GIVEN.start]), bytes(memory.view[GIVEN.stop :])
    fuzzer = Fuzzer(seed, memory)
    device = make_device(kind)
    cache = MemoryCache()
    ours: socket.socket | None = None
    for number in range(MESSAGES):
        if ours is None:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            Session(theirs, device, cache, lambda _session, reason: trouble.append(reason))
            version = wire.encode_version(0, 0, wire.OURS)
            send(ours, wire.encode_header(0, Command.VERSION, len(version)) + version, [])
            master = wire.REGION_ACCESS.encode(wire.RegionAccess(4, 7, 2)) + b"\6\0"
            send(ours, wire.encode_header(0, Command.REGION_WRITE, len(master)) + master, [])
        if not number % 20:
            fuzzer.scribble()
        data, count = fuzzer.message()
        if not send(ours, data, [memory.fd] * count):
            ours.close()
            ours = None
        await asyncio.sleep(0)
        assert bytes(memory.view[: GIVEN.start]) == before
        assert bytes(memory.view[GIVEN.stop :]) == behind
    if ours is not None:
        ours.close()
    async with asyncio.timeout(5):
        while device.bus.machine is not None or len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
    if device.failure is not None:
        trouble.append(f"failure: {device.failure}")
    return trouble


@pytest.mark.parametrize("kind", ["card", "gpu", "nic"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_message_does_harm(kind: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(fuzz(kind, -1))  # what is made once is made now
    before = open_descriptors()
    reasons = asyncio.run(fuzz(kind, seed))
    assert open_descriptors() == before
    expected = ("protocol error", "the other side is gone", "send failed", "receive failed")
    assert [reason for reason in reasons if not reason.startswith(expected)] == []
    assert "Traceback" not in capsys.readouterr().err


def test_the_fuzzer_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would prove little."""
    devices: list[Device] = []
    make = make_device

    def remember(kind: str) -> Device:
        devices.append(make(kind))
        return devices[-1]

    monkeypatch.setitem(globals(), "make_device", remember)
    for seed in SEEDS:
        asyncio.run(fuzz("gpu", seed))
    seen = {entry["what"] for device in devices for entry in device.witness.trace()}
    assert {"commands", "doorbells", "dma_maps", "resets", "read", "write"} <= seen
    paths = {entry["path"] for device in devices for entry in device.witness.trace()}
    assert {"iommu", "message", "local"} <= paths


def open_descriptors() -> int:
    gc.collect()
    return len([name for name in Path("/proc/self/fd").iterdir() if os.path.lexists(name)])
