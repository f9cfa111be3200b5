# SPDX-License-Identifier: Apache-2.0
"""The connection itself: its version, its messages, its end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from testbed.models import wire
from testbed.models.memory import MemoryCache
from testbed.models.server import Session
from testbed.models.testing import FakeQemu
from testbed.models.wire import Command, Irq, IrqSetFlag, Region
from tests.contract.vfio_user_client import PAGE, open_descriptors, refusal
from tests.unit.models.model_devices import Card


class TestConnection:
    def test_the_first_message_is_version(self) -> None:
        reasons = asyncio.run(first_words(wire.encode_header(1, Command.DEVICE_RESET, 0)))
        assert reasons == ["protocol error: the first message is not VERSION"]

    def test_another_major_version(self) -> None:
        body = wire.encode_version(1, 0, wire.OURS)
        head = wire.encode_header(1, Command.VERSION, len(body))
        assert asyncio.run(first_words(head + body)) == ["protocol error: major version 1"]

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (bytes(16), "a message of 0 bytes"),
            (b"\xff" * 16, f"a message of {0xFFFFFFFF} bytes"),
            (wire.encode_header(1, 4, wire.MAX_MESSAGE_BYTES), "a message of"),
        ],
    )
    def test_what_is_no_message(self, qemu: FakeQemu, data: bytes, reason: str) -> None:
        qemu.send_raw(data)
        with pytest.raises(ConnectionResetError):
            qemu.read(0, 0)
        assert qemu.device.bus.machine is None

    def test_too_many_descriptors(self, qemu: FakeQemu) -> None:
        before = open_descriptors()
        fds = tuple(os.dup(0) for _ in range(wire.MAX_MESSAGE_FDS + 1))
        head = wire.encode_header(1, Command.DEVICE_RESET, 0)
        qemu.send_raw(head, fds)
        for fd in fds:
            os.close(fd)
        with pytest.raises(ConnectionResetError):
            qemu.read(0, 0)
        assert open_descriptors() <= before

    def test_descriptors_nobody_wants_are_closed(self, qemu: FakeQemu) -> None:
        before = open_descriptors()
        for _ in range(20):
            qemu.call(Command.DEVICE_RESET, b"", (0, 1, 2))
            assert refusal(qemu, Command.DEVICE_RESET, b"x", (0, 1, 2)) == errno.EINVAL
        assert open_descriptors() == before

    def test_when_the_machine_goes_its_memory_is_out_of_reach(self) -> None:
        device = Card()
        with FakeQemu(device) as qemu:
            qemu.add_memory(0x10000, PAGE)
            qemu.write(0, 0x20, 5)
        assert len(device.bus.table) == 0
        assert device.bus.machine is None
        assert device.values == {}

    def test_its_interrupts_are_let_go_of(self) -> None:
        device = Card()
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        before = open_descriptors()
        with FakeQemu(device) as qemu:
            flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
            request = wire.IRQ_SET.encode(wire.IrqSet(20, flags, Irq.MSIX, 0, 1))
            qemu.call(Command.DEVICE_SET_IRQS, request, (fd,))
        assert open_descriptors() == before
        device.raise_interrupt(0)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)

    def test_closed_with_requests_unread_it_does_not_reset_the_connection(self) -> None:
        """QEMU does not survive a reset: the end has to be an end of file."""
        assert asyncio.run(close_unread()) == b""

    def test_another_machine_may_come(self) -> None:
        device = Card()
        for _ in range(3):
            with FakeQemu(device) as qemu:
                memory = qemu.add_memory(0x10000, PAGE)
                memory.view[:4] = b"next"
                qemu.write(0, 0, 0x10800, 8)
                copies = device.copies
                qemu.write(0, 0x100, 0x10000, 8)
                qemu.wait(lambda seen=copies: device.copies > seen)  # type: ignore[misc]
                assert bytes(memory.view[0x800:0x804]) == b"next"

    def test_who_does_not_read_is_not_read_from(self, qemu: FakeQemu) -> None:
        """Requests without end, no reply ever read: what is kept for them stays bounded."""
        session = qemu._session
        theirs = session._channel
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(0, Region.CONFIG, 4096))
        one = wire.encode_header(9, Command.REGION_READ, 16) + access
        qemu._channel._pause()
        for _ in range(40):
            qemu.send_raw(one * 1000)
        assert theirs._unsent_bytes < 2 * (4 << 20)


async def close_unread() -> bytes:
    """What the client reads last when the server closes with requests in its socket."""
    ours, theirs = socket.socketpair()
    session = Session(theirs, Card(), MemoryCache(), lambda _session, _reason: None)
    for _ in range(100):
        ours.sendall(wire.encode_header(1, Command.DEVICE_RESET, 0))
    session.close("enough")
    ours.settimeout(2)
    with ours:
        return ours.recv(1)


async def first_words(data: bytes) -> list[str]:
    """What a session says of the connection that begins so."""
    ours, theirs = socket.socketpair()
    reasons: list[str] = []
    Session(theirs, Card(), MemoryCache(), lambda _session, reason: reasons.append(reason))
    ours.sendall(data)
    async with asyncio.timeout(2):
        while not reasons:
            await asyncio.sleep(0)
    ours.close()
    return reasons
