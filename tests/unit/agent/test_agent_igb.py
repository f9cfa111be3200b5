# SPDX-License-Identifier: Apache-2.0
"""The igb driver against a model of the device: exact bytes, batches, faults, recovery."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from guest_agent.hw import igb as igb_module
from guest_agent.hw.engine import Scratch
from guest_agent.hw.igb import Igb
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError
from tests.unit.agent.fake_devices import PAGE, Bus, FakeIgb

SOURCE, TARGET, SCRATCH, HOLE = 0x1_0000_0000, 0x2_0000_0000, 0x10000, 0x9_0000_0000
SIZE = 1 << 20


@dataclass
class Machine:
    """Source and target memory, scratch and the device."""

    scratch_bytes: int = 128 << 10
    bus: Bus = field(default_factory=Bus)

    def __post_init__(self) -> None:
        self.source = self.bus.memory(SOURCE, SIZE)
        self.target = self.bus.memory(TARGET, SIZE)
        self.source.write(0, pattern(1, 0, SIZE))
        self.scratch = self.bus.memory(SCRATCH, self.scratch_bytes)
        self.igb = FakeIgb(self.bus)
        memory = Scratch(self.scratch, 0, self.scratch_bytes, SCRATCH)
        self.engine = Igb(self.igb.device, memory)
        self.engine.open()

    def copy(self, source: int, target: int, size: int) -> dict[str, object]:
        return self.engine.copy(SOURCE + source, TARGET + target, size, 5.0)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("source", "target", "size"),
    [
        (0, 0, 1),
        (0, 0, 59),
        (5, 77, 60),
        (4095, 4095, 2),
        (0, 0, 4096),
        (1, 0, 8192),
        (0, 1, 8193),
        (4090, 3, 100_000),
        (0, 0, SIZE),
        (SIZE - 1, 0, 1),
        (123, 4567, 500_001),
    ],
)
@pytest.mark.parametrize("scratch_bytes", [8192, 128 << 10])
def test_moves_exactly_these_bytes(source: int, target: int, size: int, scratch_bytes: int) -> None:
    machine = Machine(scratch_bytes)
    machine.target.write(0, b"\xaa" * SIZE)
    answer = machine.copy(source, target, size)
    assert answer["completed"] is True
    assert answer["copied_bytes"] == size
    moved = b"\xaa" * target + pattern(1, source, size) + b"\xaa" * (SIZE - target - size)
    assert machine.target.read(0, SIZE) == moved
    assert machine.bus.faults == []


def test_bytes_that_look_like_a_broken_packet_are_moved_too(machine: Machine) -> None:
    packet = bytes(12) + b"\x08\x00" + bytes(50) + b"\x81\x00" * 100
    machine.source.write(0, packet)
    assert machine.copy(0, 0, len(packet))["completed"] is True
    assert machine.target.read(0, len(packet)) == packet


def test_one_interrupt_a_batch(machine: Machine) -> None:
    machine.copy(0, 0, SIZE)
    assert machine.igb.interrupts == 1


@pytest.mark.parametrize("where", [0, 3 * 8192 + 5])
def test_a_refused_read_is_noticed_and_the_device_usable_again(
    machine: Machine, where: int
) -> None:
    resets = machine.igb.device.resets
    began = time.monotonic()
    answer = machine.engine.copy(SOURCE + SIZE - where, TARGET, 65536, 5.0)
    assert time.monotonic() - began < 1.0
    assert answer["completed"] is False
    assert machine.igb.device.resets == resets + 1
    machine.target.write(0, bytes(SIZE))
    assert machine.copy(0, 0, SIZE)["completed"] is True
    assert machine.target.read(0, SIZE) == pattern(1, 0, SIZE)


def test_a_refused_write_is_not_noticed_by_the_device(machine: Machine) -> None:
    """PCIe writes are posted; what `completed` means is said in engine.py."""
    answer = machine.engine.copy(SOURCE, HOLE, 100, 5.0)
    assert answer["completed"] is True
    assert machine.bus.faults == [("write", HOLE)]


def test_a_device_that_does_nothing_is_reset_after_the_timeout(machine: Machine) -> None:
    machine.igb.stuck = True
    began = time.monotonic()
    answer = machine.engine.copy(SOURCE, TARGET, 4096, 0.1)
    assert 0.1 <= time.monotonic() - began < 1.0
    assert (answer["completed"], answer["copied_bytes"]) == (False, 0)
    machine.igb.stuck = False
    assert machine.copy(0, 0, 4096)["completed"] is True


def test_no_link_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igb_module, "_LINK_TIMEOUT_S", 0.05)
    machine = Machine()
    machine.igb.link = False
    with pytest.raises(TimeoutError, match="no link"):
        machine.engine.open()


def test_without_a_function_level_reset_the_register_does_it(machine: Machine) -> None:
    machine.igb.device.has_reset = False
    machine.igb.values[0x1524] = 0xFF
    machine.engine.open()
    assert machine.igb.values[0x1524] == 1
    assert machine.copy(0, 0, 4096)["completed"] is True


def test_rings_a_doorbell_with_four_bytes(machine: Machine) -> None:
    machine.bus.writes.clear()
    answer = machine.engine.write32(TARGET + 0x60, 0xCAFE1234, 1.0)
    assert answer["completed"] is True
    assert machine.target.read32(0x60) == 0xCAFE1234
    outside = [write for write in machine.bus.writes if write[0] >= TARGET]
    assert outside == [(TARGET + 0x60, 4)]


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_storm_touches_every_page_once(machine: Machine, access: str) -> None:
    answer = machine.engine.storm(HOLE, 3000, access, 30.0)
    assert answer["chunks"] == 3000
    assert machine.bus.faults == [(access, HOLE + page * PAGE) for page in range(3000)]
    assert machine.copy(0, 0, 4096)["completed"] is True


def test_close_makes_it_quiet(machine: Machine) -> None:
    machine.engine.close()
    for register in (0x0100, 0x0400, 0xC028, 0xE028):
        assert machine.igb.values[register] == 0


def test_addresses_and_sizes_that_it_cannot_do(machine: Machine) -> None:
    with pytest.raises(ParameterError, match="address 0"):
        machine.engine.copy(SOURCE, 0, 64, 1.0)
    with pytest.raises(ParameterError, match="multiple of 4"):
        machine.engine.write32(TARGET + 2, 1, 1.0)
    with pytest.raises(ParameterError, match="32 bits"):
        machine.engine.write32(TARGET, 1 << 32, 1.0)
    for size in (0, (1 << 32) + 1):
        with pytest.raises(ParameterError, match="size_bytes"):
            machine.copy(0, 0, size)


def test_scratch_memory_it_cannot_use(machine: Machine) -> None:
    with pytest.raises(ParameterError, match="8192"):
        Igb(machine.igb.device, None)
    with pytest.raises(ParameterError, match="8192"):
        Igb(machine.igb.device, Scratch(machine.scratch, 0, 4096, SCRATCH))
    with pytest.raises(ParameterError, match="4096"):
        Scratch(machine.scratch, 64, 8192, SCRATCH)
    with pytest.raises(ParameterError, match="beyond the end"):
        Scratch(machine.scratch, 4096, 128 << 10, SCRATCH)


def test_uses_only_the_scratch_it_was_given() -> None:
    machine = Machine()
    machine.scratch.write(0, b"\xee" * (128 << 10))
    engine = Igb(machine.igb.device, Scratch(machine.scratch, 8192, 16384, SCRATCH + 8192))
    engine.open()
    assert engine.copy(SOURCE, TARGET, SIZE, 5.0)["completed"] is True
    assert machine.scratch.read(0, 8192) == b"\xee" * 8192
    rest = (128 << 10) - 24576
    assert machine.scratch.read(24576, rest) == b"\xee" * rest


def test_knows_its_device(machine: Machine) -> None:
    Igb.probe(machine.igb.device)
    machine.igb.device._identity = (0x8086, 0x1234)
    with pytest.raises(ParameterError, match="8086:1234, no igb"):
        Igb.probe(machine.igb.device)
