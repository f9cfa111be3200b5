# SPDX-License-Identifier: Apache-2.0
"""From a device's access, over its supervisor and QEMU's word, to its peer: real processes, and a
QEMU that is none.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

import pytest

from testbed.models import registers as hw
from testbed.models import wire
from testbed.models.access import Cause
from testbed.models.registers import Aperture, Common, Opcode
from testbed.models.wire import Command
from tests.contract.fake_monitor import MIB, FakeMachine
from tests.contract.model_process import (
    Process,
    Vfio,
    memory,
    specification,
    wait_for,
)

PEER_MEMORY = 4 * 64 * MIB
PEER_DOORBELL = PEER_MEMORY + MIB + Common.DOORBELL_NOTIFY
SOURCE = 0x8000  # in the requester's own memory, whose first page is the ring
RING_ENTRIES = 32


@contextmanager
def beside(machine: FakeMachine) -> Iterator[None]:
    """The machine answers in a thread of its own."""
    began = threading.Event()
    end: list[Callable[[], object]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        end.append(lambda: loop.call_soon_threadsafe(stop.set))
        async with machine:
            began.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert began.wait(20)
    try:
        yield
    finally:
        end[0]()
        thread.join(20)


class Requester:
    """gpu0, whose ring is in its own memory."""

    def __init__(self, process: Process, client: Vfio, vram: mmap, peer: mmap) -> None:
        self.process = process
        self.client = client
        self.vram = vram
        self.peer = peer
        self.tail = 0
        config = wire.REGION_ACCESS.encode(wire.RegionAccess(4, wire.Region.CONFIG, 2))
        client.call(Command.REGION_WRITE, config + b"\x06\0")
        self.start()

    def start(self) -> None:
        self.tail = 0
        for register, value in (
            (Common.RESET, 1),
            (Common.RING_APERTURE, Aperture.VRAM),
            (Common.RING_ENTRIES, RING_ENTRIES),
            (Common.CONTROL, 1),
        ):
            self.client.write(register, value)

    def copy(self, address: int, data: bytes) -> int:
        """Copy ``data`` to a bus address; the error's cause, or 0."""
        self.begin(address, data)
        wait_for(lambda: not self.client.read(Common.STATUS) & hw.Status.BUSY)
        cause = self.client.read(Common.ERROR_CAUSE)
        if cause:
            self.start()
        return cause

    def begin(self, address: int, data: bytes) -> None:
        """Only begin: upstream, this test's machine answers no message."""
        self.vram[SOURCE : SOURCE + len(data)] = data
        command = hw.Command(
            **dict.fromkeys(hw.Command._fields, 0)
            | {
                "opcode": Opcode.COPY,
                "source_aperture": Aperture.VRAM,
                "source": SOURCE,
                "target_aperture": Aperture.SYSTEM,
                "target": address,
                "size_bytes": len(data),
            }
        )
        record = hw.COMMAND.encode(command)
        at = self.tail * len(record)
        self.vram[at : at + len(record)] = record
        self.tail = (self.tail + 1) % RING_ENTRIES
        self.client.write(Common.DOORBELL_TAIL, self.tail)

    def events(self) -> dict[str, int]:
        events: dict[str, int] = self.process.call("counters", device="gpu0")["events"]
        return events


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FakeMachine]:
    log = tmp_path / "qemu.log"
    log.touch()
    machine = FakeMachine(tmp_path / "qmp.sock", log)
    with beside(machine):
        yield machine


@pytest.fixture
def gpu(tmp_path: Path, machine: FakeMachine) -> Iterator[Requester]:
    fds = [memory("one"), memory("two")]
    spec = specification(tmp_path, fds)
    spec["machine"] = {"monitor": str(machine.path), "log": str(machine.log)}
    for n in range(2):
        spec["memories"][n] |= {"function": f"gpu{n}-vram", "bar": 2}
        spec["devices"][n]["function"] = f"gpu{n}-engine"
    process = Process(tmp_path, spec, fds=fds)
    try:
        with (
            mmap(fds[0], MIB) as vram,
            mmap(fds[1], MIB) as peer,
            process.connect("gpu0.vfu") as one,
            process.connect("gpu1.vfu") as two,
        ):
            Vfio(two)
            yield Requester(process, Vfio(one), vram, peer)
    finally:
        for fd in fds:
            os.close(fd)
        process.popen.kill()
        process.popen.communicate()


def test_a_peers_memory(gpu: Requester, machine: FakeMachine) -> None:
    assert not machine.asked
    assert gpu.copy(PEER_MEMORY + 4096, b"hello, peer") == 0
    assert gpu.peer[4096 : 4096 + 11] == b"hello, peer"
    assert gpu.process.call("counters", device="gpu0")["peer"]["written_bytes"] == 11
    assert gpu.events()["routes_read"] == 1


def test_a_peers_register(gpu: Requester) -> None:
    assert gpu.copy(PEER_DOORBELL, struct.pack("<I", 7)) == 0
    assert gpu.process.call("counters", device="gpu1")["events"]["doorbells"] == 1


def test_a_peer_that_died_refuses(gpu: Requester) -> None:
    os.kill(gpu.process.pids["gpu1"], signal.SIGKILL)
    assert gpu.copy(PEER_DOORBELL, bytes(4)) == Cause.REFUSED


def test_a_hole_in_the_switchs_window_is_refused(gpu: Requester) -> None:
    assert gpu.copy(PEER_MEMORY + 32 * MIB, bytes(4)) == Cause.REFUSED
    (entry,) = [e for e in gpu.process.call("trace", device="gpu0") if e["outcome"] == "refused"]
    assert entry["path"] == "peer"


def test_a_change_holds_for_the_next_command(gpu: Requester, machine: FakeMachine) -> None:
    for number, control in enumerate((0x19, 0x1D, 0x19)):
        machine.acs = {(2, 0): control}
        machine.write_config()
        word = struct.pack("<I", number + 1)
        if control & 0x04:
            entry = next(
                e
                for e in gpu.process.call("routes", device="gpu0")
                if e.get("memory") == "gpu1.vram"
            )
            assert entry["why"] == "redirected by sw-port0"
        else:
            assert gpu.copy(PEER_MEMORY, word) == 0
            assert gpu.peer[:4] == word
    assert gpu.events()["routes_unknown"] == 0


def test_a_qemu_that_does_not_answer_is_counted_and_waited_for_no_longer_than_that(
    gpu: Requester, machine: FakeMachine
) -> None:
    machine.fail = {"query-pci": "refuse"}
    gpu.begin(PEER_MEMORY, b"lost")
    wait_for(lambda: gpu.events()["routes_unknown"] >= 2)
    assert gpu.peer[:4] == bytes(4)
