# SPDX-License-Identifier: Apache-2.0
"""A machine without a machine: drive a device model from a test, over the real protocol, no QEMU.

::

    with FakeQemu(Card("card0")) as qemu:
        memory = qemu.add_memory(0x10000, 4096)  # the guest maps a page at IOVA 0x10000
        qemu.write(0, 0x08, 0x10000)
        qemu.wait(lambda: qemu.read(0, 0x0C) == 1)
        assert memory.view[:4] == b"done"

Device and machine share one event loop, which runs only inside the methods below: what a test sees
does not depend on threads or luck. An access that nothing maps is refused and kept in ``faults``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from testbed.models import config, wire
from testbed.models.channel import Channel
from testbed.models.device import Device
from testbed.models.memory import MemoryCache, SharedMemory
from testbed.models.server import Session
from testbed.models.wire import Command, HeaderFlag, Irq, IrqSetFlag

TIMEOUT_S: Final = 5.0
Answer = TypeVar("Answer")


class Fault(NamedTuple):
    """A DMA that the machine refused, as its IOMMU would."""

    address: int
    size_bytes: int
    write: bool


class CommandFailed(Exception):
    """The device answered a command with an error."""

    def __init__(self, command: int, number: int) -> None:
        super().__init__(f"command {command}: {errno.errorcode.get(number, number)}")
        self.number = number


class FakeQemu:
    """The client side of vfio-user, with one device plugged in; a context manager."""

    def __init__(self, device: Device, capabilities: wire.Capabilities = wire.OURS) -> None:
        self.device = device
        self.faults: list[Fault] = []
        self.closed_because = ""
        self.memories = MemoryCache()
        self.hold_answers = False  # keep the answers to the device's DMA messages
        self._loop = asyncio.new_event_loop()
        self._replies: dict[int, asyncio.Future[tuple[bytes, list[int]]]] = {}
        self._held_answers: list[bytes] = []
        self._by_message: list[tuple[int, SharedMemory]] = []
        self._eventfds: dict[int, int] = {}
        self._next_id = 0
        self.run(self._connect(capabilities))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._loop.is_closed()

    def unplug(self) -> None:
        """End the connection, as a machine that dies; the device goes on."""
        self._channel.close()
        self.turn()

    def turn(self) -> None:
        """Let the device do what there is to do."""
        self._loop.run_until_complete(asyncio.sleep(0.0005))

    def close(self) -> None:
        """Unplug, and end the device's work; harmless when done twice."""
        if self.closed:
            return
        self._loop.run_until_complete(self._disconnect())
        for fd in self._eventfds.values():
            os.close(fd)
        self._eventfds.clear()
        self._loop.close()

    def run(self, work: Coroutine[None, None, Answer]) -> Answer:
        """Run a coroutine in the device's loop; TimeoutError after :data:`TIMEOUT_S`."""
        return self._loop.run_until_complete(asyncio.wait_for(work, TIMEOUT_S))

    def wait(self, condition: Callable[[], bool], *, timeout_s: float = TIMEOUT_S) -> None:
        """Let the device work until ``condition`` holds; TimeoutError if it does not in time."""
        deadline = self._loop.time() + timeout_s
        while not condition():
            if self._loop.time() > deadline:
                raise TimeoutError("the condition never held")
            self.turn()

    # --- registers

    def read(self, bar: int, offset: int, size: int = 4) -> int:
        """Read a register. CommandFailed if the device refuses."""
        request = wire.REGION_ACCESS.encode(wire.RegionAccess(offset, bar, size))
        reply, _ = self.call(Command.REGION_READ, request)
        return int.from_bytes(reply[wire.REGION_ACCESS.size_bytes :], "little")

    def write(self, bar: int, offset: int, value: int, size: int = 4) -> None:
        """Write a register, and wait until the device has answered."""
        request = wire.REGION_ACCESS.encode(wire.RegionAccess(offset, bar, size))
        self.call(Command.REGION_WRITE, request + value.to_bytes(size, "little"))

    def config_read(self, offset: int, size: int = 4) -> int:
        """Read configuration space."""
        return self.read(wire.Region.CONFIG, offset, size)

    def config_write(self, offset: int, value: int, size: int = 4) -> None:
        """Write configuration space."""
        self.write(wire.Region.CONFIG, offset, value, size)

    def reset(self) -> None:
        """Reset the device; bus mastering is off afterwards, as on a real one."""
        self.call(Command.DEVICE_RESET, b"")

    def enable_dma(self, *, on: bool = True) -> None:
        """Switch memory decoding and bus mastering on (which plugging in has done) or off."""
        bits = config.COMMAND_MEMORY | config.COMMAND_MASTER if on else 0
        self.config_write(config.COMMAND, bits, 2)

    # --- memory

    def add_memory(self, address: int, size_bytes: int, *, name: str = "ram") -> SharedMemory:
        """New memory, mapped for the device at ``address``."""
        memory = self.memories.add(SharedMemory.create(size_bytes, name=name))
        self.map(address, memory)
        return memory

    def add_message_memory(self, address: int, size_bytes: int) -> SharedMemory:
        """New memory that the device reaches by DMA_READ and DMA_WRITE only."""
        memory = SharedMemory.create(size_bytes, name="message")
        request = wire.DmaMap(wire.DMA_MAP.size_bytes, 3, 0, address, size_bytes)
        self.call(Command.DMA_MAP, wire.DMA_MAP.encode(request))
        self._by_message.append((address, memory))
        return memory

    def map(
        self,
        address: int,
        memory: SharedMemory,
        *,
        offset: int = 0,
        size_bytes: int | None = None,
        read: bool = True,
        write: bool = True,
    ) -> None:
        """Map (a part of) a memory. CommandFailed if the device refuses."""
        size = memory.size_bytes - offset if size_bytes is None else size_bytes
        flags = (wire.DmaFlag.READ if read else 0) | (wire.DmaFlag.WRITE if write else 0)
        request = wire.DmaMap(wire.DMA_MAP.size_bytes, flags, offset, address, size)
        self.call(Command.DMA_MAP, wire.DMA_MAP.encode(request), (memory.fd,))

    def unmap(self, address: int, size_bytes: int) -> None:
        """Unmap a range."""
        request = wire.DmaUnmap(wire.DMA_UNMAP.size_bytes, 0, address, size_bytes)
        self.call(Command.DMA_UNMAP, wire.DMA_UNMAP.encode(request))

    @property
    def held_answers(self) -> int:
        """How many of the device's DMA messages wait for :meth:`release_answers`."""
        return len(self._held_answers)

    def release_answers(self) -> bytes:
        """The answers that were held back; send them with :meth:`send_raw`."""
        held, self._held_answers = b"".join(self._held_answers), []
        return held

    # --- interrupts

    def arm(self, vector: int = 0, *, kind: Irq = Irq.MSIX) -> None:
        """Enable one interrupt vector."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
        request = wire.IrqSet(wire.IRQ_SET.size_bytes, flags, kind, vector, 1)
        self._eventfds[vector] = fd
        self.call(Command.DEVICE_SET_IRQS, wire.IRQ_SET.encode(request), (fd,))

    def interrupts(self, vector: int = 0) -> int:
        """How often that vector fired since the last question."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self._eventfds[vector])
        return 0

    # --- the protocol

    def call(
        self, command: int, payload: bytes, fds: tuple[int, ...] = ()
    ) -> tuple[bytes, list[int]]:
        """Send any command and wait for its reply (payload, descriptors that are the caller's).

        CommandFailed for an error reply, ConnectionResetError if the device hung up.
        """
        return self.run(self._call(command, payload, fds))

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes that need not be a message, and let the device have a look at them."""
        self._channel.send(data, fds=fds)
        self._loop.run_until_complete(asyncio.sleep(0.001))

    def _message(self, header: wire.Header, payload: memoryview, fds: list[int]) -> None:
        if not header.is_reply:
            self._serve(header, payload)
            return
        future = self._replies.pop(header.message_id, None)
        if future is None or future.done():
            return
        if header.flags & HeaderFlag.ERROR:
            future.set_exception(CommandFailed(header.command, header.error))
        else:
            taken, fds[:] = list(fds), []
            future.set_result((bytes(payload), taken))

    def _hung_up(self, reason: str) -> None:
        self.closed_because = reason
        for future in self._replies.values():
            if not future.done():
                future.set_exception(ConnectionResetError(reason))
        self._replies.clear()

    async def _connect(self, capabilities: wire.Capabilities) -> None:
        await self.device.open()
        ours, theirs = socket.socketpair()
        self._session = Session(theirs, self.device, self.memories, lambda _session, _reason: None)
        self._client = _Client(self)
        self._channel = Channel(ours, self._client)
        await self._call(Command.VERSION, wire.encode_version(0, 0, capabilities))
        enabled = config.COMMAND_MEMORY | config.COMMAND_MASTER
        request = wire.RegionAccess(config.COMMAND, wire.Region.CONFIG, 2)
        data = wire.REGION_ACCESS.encode(request) + enabled.to_bytes(2, "little")
        await self._call(Command.REGION_WRITE, data)

    async def _disconnect(self) -> None:
        self._channel.close()
        self._session.close("unplugged")
        self.device.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _call(
        self, command: int, payload: bytes, fds: tuple[int, ...] = ()
    ) -> tuple[bytes, list[int]]:
        if not self._channel.is_open:
            raise ConnectionResetError(self.closed_because)
        self._next_id = (self._next_id + 1) & 0xFFFF
        future: asyncio.Future[tuple[bytes, list[int]]] = self._loop.create_future()
        self._replies[self._next_id] = future
        self._channel.send(wire.encode_header(self._next_id, command, len(payload)), payload, fds)
        return await future

    def _serve(self, header: wire.Header, payload: memoryview) -> None:
        write = header.command == Command.DMA_WRITE
        access = wire.DMA_ACCESS.decode(payload, exact=not write)
        view = self._message_view(access)
        if view is None:
            self.faults.append(Fault(access.address, access.size_bytes, write))
            flags = HeaderFlag.REPLY | HeaderFlag.ERROR
            head = wire.encode_header(header.message_id, header.command, 0, flags, errno.EFAULT)
            self._answer(head)
            return
        body = b""
        if write:
            view[:] = payload[wire.DMA_ACCESS.size_bytes :]
        else:
            body = wire.DMA_ACCESS.encode(access) + bytes(view)
        head = wire.encode_header(header.message_id, header.command, len(body), HeaderFlag.REPLY)
        self._answer(head + body)

    def _answer(self, data: bytes) -> None:
        if self.hold_answers:
            self._held_answers.append(data)
        else:
            self._channel.send(data)

    def _message_view(self, access: wire.DmaAccess) -> memoryview | None:
        for start, memory in self._by_message:
            within = access.address - start
            if within >= 0 and within + access.size_bytes <= memory.size_bytes:
                return memory.view[within : within + access.size_bytes]
        return None


class _Client:
    """What the channel calls."""

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu

    def message(self, header: wire.Header, payload: memoryview, fds: list[int]) -> None:
        self._qemu._message(header, payload, fds)

    def closed(self, reason: str) -> None:
        self._qemu._hung_up(reason)
