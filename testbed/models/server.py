# SPDX-License-Identifier: Apache-2.0
"""The vfio-user server: one machine's connection to one device.

Commands are answered in the order in which they come, at once: none of them waits for anything.
That is what keeps QEMU and the models from waiting for each other: QEMU holds its big lock while it
waits for the answer to a register access, and serves our DMA_READ and DMA_WRITE only without it.

Nothing that the other side sends can do more than end its own connection: every size, index, offset
and descriptor is checked here or in the tables that this module calls.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from testbed.models import wire
from testbed.models.access import AccessError, Cause
from testbed.models.channel import Channel
from testbed.models.device import Device
from testbed.models.dma import MappingRefused
from testbed.models.interrupts import IrqRefused
from testbed.models.memory import MemoryCache, NotMappable, SharedMemory
from testbed.models.progress import Progress
from testbed.models.wire import Command, HeaderFlag, Malformed
from testbed.models.witness import Event

DMA_TIMEOUT_S: Final = 30.0  # QEMU answers within microseconds, unless someone has stopped it
MAX_PENDING: Final = 64  # DMA messages of one device under way at once
# QEMU 11.1 never sends again on a socket that was full when it answered a DMA_READ (its I/O thread
# is not woken), and then waits in vain for our answers, 30 s each. So what is asked for fits into
# a socket's buffer (/proc/sys/net/core/wmem_default, 208 KiB with its overhead).
MAX_MESSAGE_BYTES: Final = 32 << 10
MAX_READS: Final = 4
NUM_REGIONS: Final = 9
NUM_IRQS: Final = 5

Reply = tuple[bytes, tuple[int, ...]]
NOTHING: Final[Reply] = (b"", ())


class Refused(Exception):
    """A command that gets an error reply; the connection goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Session:
    """One machine's connection to one device, from its VERSION to its end."""

    def __init__(
        self,
        connection: socket.socket,
        device: Device,
        memories: MemoryCache,
        on_end: Callable[[Session, str], None],
        *,
        removed: bool = False,
        progress: Progress | None = None,
        received: bytes = b"",
    ) -> None:
        """``removed``: it begins after VERSION, with a device that is gone already. ``received``:
        what was received before and not answered.
        """
        self._device = device
        self._memories = memories
        self._on_end = on_end
        self.max_transfer_bytes = wire.MAX_TRANSFER_BYTES
        self._negotiated = removed
        self._removed = removed
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._slots = asyncio.Semaphore(MAX_PENDING)
        self._reads = asyncio.Semaphore(MAX_READS)
        self._next_id = 0
        self._handlers: dict[int, Callable[[memoryview, list[int]], Reply]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
            Command.DEVICE_RESET: self._reset,
            Command.DEVICE_FEATURE: self._feature,
        }
        if not removed:
            device.plug(self)
        self._channel = Channel(connection, self, progress, received)

    def remove(self) -> None:
        """Be as a card that was pulled out: reads are all ones, all else goes nowhere.

        The connection stays: QEMU would log every access to one that is closed, and may not
        survive its end (see :meth:`Channel._drain`).
        """
        if not self._removed:
            self._removed = True
            self._forget_pending("the device was removed")
            self._device.unplug()

    def close(self, reason: str) -> None:
        """End the connection."""
        self._channel.close(reason)

    # --- what the channel calls

    def message(self, header: wire.Header, payload: memoryview, fds: list[int]) -> None:
        """See :class:`testbed.models.channel.Receiver`."""
        if header.flags & wire.TYPE_MASK == wire.REPLY:
            self._take_reply(header, payload)
            return
        if not self._negotiated:
            if header.command != Command.VERSION:
                raise Malformed("the first message is not VERSION")
            self._version(header, payload)
            return
        silent = header.flags & wire.NO_REPLY
        try:
            handler = self._handlers.get(header.command)
            if handler is None:
                raise Refused(errno.ENOSYS)
            body, passed = handler(payload, fds)
        except Refused as error:
            if not silent:
                head = wire.encode_header(
                    header.message_id, header.command, 0, wire.ERROR_REPLY, error.number
                )
                self._channel.send(head)
            return
        if not silent:
            head = wire.encode_header(header.message_id, header.command, len(body), wire.REPLY)
            self._channel.send(head, body, passed)

    def closed(self, reason: str) -> None:
        """See :class:`testbed.models.channel.Receiver`."""
        self._forget_pending(reason)
        if not self._removed:
            self._device.unplug()
        self._on_end(self, reason)

    def _forget_pending(self, reason: str) -> None:
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(ConnectionResetError(reason))

    # --- what the device calls

    async def dma_read(self, address: int, size_bytes: int) -> bytes:
        """See :class:`testbed.models.device.Machine`."""
        request = wire.DMA_ACCESS.encode(wire.DmaAccess(address, size_bytes))
        async with self._reads:
            reply = await self._request(Command.DMA_READ, request, address, write=False)
        data = reply[wire.DMA_ACCESS.size_bytes :]
        if len(data) != size_bytes:
            raise AccessError(Cause.REFUSED, address, write=False)
        return data

    async def dma_write(self, address: int, data: bytes) -> None:
        """See :class:`testbed.models.device.Machine`."""
        request = wire.DMA_ACCESS.encode(wire.DmaAccess(address, len(data))) + data
        await self._request(Command.DMA_WRITE, request, address, write=True)

    async def _request(
        self, command: Command, payload: bytes, address: int, *, write: bool
    ) -> bytes:
        async with self._slots:
            while self._next_id in self._pending:
                self._next_id = (self._next_id + 1) & 0xFFFF
            number = self._next_id
            self._next_id = (number + 1) & 0xFFFF
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._pending[number] = future
            try:
                self._channel.send(wire.encode_header(number, command, len(payload)), payload)
                if not self._channel.is_open:
                    raise AccessError(Cause.DEVICE_GONE, address, write=write)
                # Not `wait_for`: before Python 3.12 it drops a cancellation that meets the answer.
                async with asyncio.timeout(DMA_TIMEOUT_S):
                    return await future
            except TimeoutError:
                raise AccessError(Cause.TIMEOUT, address, write=write) from None
            except ConnectionResetError:
                raise AccessError(Cause.DEVICE_GONE, address, write=write) from None
            except Refused:
                raise AccessError(Cause.REFUSED, address, write=write) from None
            finally:
                self._pending.pop(number, None)

    def _take_reply(self, header: wire.Header, payload: memoryview) -> None:
        future = self._pending.get(header.message_id)
        if future is None or future.done():
            return  # to a request that was cancelled meanwhile
        if header.flags & HeaderFlag.ERROR:
            future.set_exception(Refused(header.error or errno.EIO))
        else:
            future.set_result(bytes(payload))

    # --- commands

    def _version(self, header: wire.Header, payload: memoryview) -> None:
        major, _, capabilities = wire.decode_version(payload)
        if major != 0:
            raise Malformed(f"major version {major}")
        self.max_transfer_bytes = min(capabilities.max_transfer_bytes, MAX_MESSAGE_BYTES)
        self._negotiated = True
        # QEMU refuses every minor version above its own, which is 0.
        body = wire.encode_version(0, 0, wire.OURS)
        head = wire.encode_header(header.message_id, Command.VERSION, len(body), wire.REPLY)
        self._channel.send(head, body)

    def _dma_map(self, payload: memoryview, fds: list[int]) -> Reply:
        request = wire.DMA_MAP.decode(payload)
        if self._removed:
            return NOTHING
        memory: SharedMemory | None = None
        if len(fds) > 1 or request.flags & ~wire.DMA_FLAGS:
            raise Refused(errno.EINVAL)
        if fds:
            try:
                memory = self._memories.get(fds[0])
            except NotMappable:
                memory = None  # reachable by message all the same
            except OSError as error:
                raise Refused(error.errno or errno.EINVAL) from error
        try:
            self._device.bus.table.map(
                request.address,
                request.size,
                memory,
                request.offset if memory else 0,
                readable=bool(request.flags & wire.DMA_READABLE),
                writable=bool(request.flags & wire.DMA_WRITABLE),
            )
        except MappingRefused as error:
            raise Refused(error.number) from error
        self._device.witness.event(Event.MAP, address=request.address, detail=f"{request.size:#x}")
        return NOTHING

    def _dma_unmap(self, payload: memoryview, _fds: list[int]) -> Reply:
        request = wire.DMA_UNMAP.decode(payload)
        table = self._device.bus.table
        if request.flags & ~wire.UNMAP_ALL:
            raise Refused(errno.EINVAL)
        if request.flags & wire.UNMAP_ALL:
            if request.address or request.size:
                raise Refused(errno.EINVAL)
            table.clear()
        else:
            # QEMU also unmaps ranges in which nothing, or only a part, was ever mapped.
            table.unmap(request.address, request.size)
        self._device.witness.event(
            Event.UNMAP, address=request.address, detail=f"{request.size:#x}"
        )
        return bytes(payload), ()

    def _device_info(self, payload: memoryview, _fds: list[int]) -> Reply:
        wire.DEVICE_INFO.decode(payload)
        flags = wire.DeviceFlag.RESET | wire.DeviceFlag.PCI
        size = wire.DEVICE_INFO.size_bytes
        return wire.DEVICE_INFO.encode(wire.DeviceInfo(size, flags, NUM_REGIONS, NUM_IRQS)), ()

    def _region_info(self, payload: memoryview, _fds: list[int]) -> Reply:
        request = wire.REGION_INFO.decode(payload)
        size = wire.REGION_INFO.size_bytes
        if request.region >= NUM_REGIONS or request.argsz < size:
            raise Refused(errno.EINVAL)
        if request.region == wire.Region.CONFIG:
            return self._plain_region(request.region, len(self._device.config.bytes))
        try:
            bar = self._device.bar(request.region)
        except ValueError:
            return self._plain_region(request.region, 0)
        if bar.memory is None:
            return self._plain_region(request.region, bar.size_bytes)
        flags = wire.RegionFlag.READ | wire.RegionFlag.WRITE | wire.RegionFlag.MMAP
        areas = wire.encode_sparse_areas(bar.areas) if bar.areas else b""
        fits = request.argsz >= size + len(areas)  # otherwise QEMU asks again, with more room
        info = wire.RegionInfo(
            size + len(areas),
            flags | (wire.RegionFlag.CAPS if areas else 0),
            request.region,
            size if areas else 0,
            bar.size_bytes,
            0,
        )
        return wire.REGION_INFO.encode(info) + (areas if fits else b""), (bar.memory.fd,)

    @staticmethod
    def _plain_region(region: int, length: int) -> Reply:
        flags = wire.RegionFlag.READ | wire.RegionFlag.WRITE if length else 0
        size = wire.REGION_INFO.size_bytes
        return wire.REGION_INFO.encode(wire.RegionInfo(size, flags, region, 0, length, 0)), ()

    def _irq_info(self, payload: memoryview, _fds: list[int]) -> Reply:
        request = wire.IRQ_INFO.decode(payload)
        try:
            flags, count = self._device.interrupts.info(request.irq)
        except IrqRefused as error:
            raise Refused(error.number) from error
        size = wire.IRQ_INFO.size_bytes
        return wire.IRQ_INFO.encode(wire.IrqInfo(size, flags, request.irq, count)), ()

    def _set_irqs(self, payload: memoryview, fds: list[int]) -> Reply:
        request = wire.IRQ_SET.decode(payload, exact=False)
        if self._removed:
            return NOTHING
        try:
            self._device.interrupts.set(request, payload[wire.IRQ_SET.size_bytes :], fds)
        except IrqRefused as error:
            raise Refused(error.number) from error
        return NOTHING

    def _region_read(self, payload: memoryview, _fds: list[int]) -> Reply:
        access = wire.REGION_ACCESS.decode(payload)
        if access.size_bytes > wire.MAX_TRANSFER_BYTES:
            raise Refused(errno.EINVAL)
        if self._removed:
            return bytes(payload) + b"\xff" * access.size_bytes, ()
        try:
            data = self._device.region_read(access.region, access.offset, access.size_bytes)
        except ValueError as error:
            raise Refused(errno.EINVAL) from error
        return bytes(payload) + data, ()

    def _write(self, access: wire.RegionAccess, data: bytes | memoryview) -> None:
        if self._removed:
            return
        try:
            self._device.region_write(access.region, access.offset, data)
        except ValueError as error:
            raise Refused(errno.EINVAL) from error

    def _region_write(self, payload: memoryview, _fds: list[int]) -> Reply:
        access = wire.REGION_ACCESS.decode(payload, exact=False)
        data = payload[wire.REGION_ACCESS.size_bytes :]
        if len(data) != access.size_bytes:
            raise Refused(errno.EINVAL)
        self._write(access, data)
        return wire.REGION_ACCESS.encode(access), ()

    def _region_write_multi(self, payload: memoryview, _fds: list[int]) -> Reply:
        writes = wire.decode_write_multi(payload)
        for access, data in writes:
            self._write(access, data)
        return wire.encode_multi_count(len(writes)), ()

    def _reset(self, payload: memoryview, _fds: list[int]) -> Reply:
        if len(payload):
            raise Refused(errno.EINVAL)
        if not self._removed:
            self._device.function_reset()
        return NOTHING

    def _feature(self, payload: memoryview, _fds: list[int]) -> Reply:
        wire.FEATURE.decode(payload, exact=False)
        raise Refused(errno.ENOTTY)  # no migration, no dma-buf
