# SPDX-License-Identifier: Apache-2.0
"""The edu driver against a model of the device, and what engines have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from guest_agent.hw.drivers import engine_class
from guest_agent.hw.edu import Edu
from guest_agent.hw.engine import Scratch, burst
from guest_agent.hw.igb import Igb
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError
from tests.unit.agent.fake_devices import Bus, FakeEdu, FakeIgb

SOURCE, TARGET, SCRATCH, HOLE = 0x1_0000_0000, 0x2_0000_0000, 0x10000, 0x9_0000_0000
SIZE = 1 << 16


@dataclass
class Machine:
    """Source and target memory, scratch and the device."""

    with_scratch: bool = True
    bus: Bus = field(default_factory=Bus)

    def __post_init__(self) -> None:
        self.source = self.bus.memory(SOURCE, SIZE)
        self.target = self.bus.memory(TARGET, SIZE)
        self.source.write(0, pattern(1, 0, SIZE))
        self.scratch = self.bus.memory(SCRATCH, 4096)
        self.edu = FakeEdu(self.bus)
        memory = Scratch(self.scratch, 0, 4096, SCRATCH) if self.with_scratch else None
        self.engine = Edu(self.edu.device, memory)
        self.engine.open()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("source", "target", "size"), [(0, 0, 1), (5, 9, 4096), (4095, 0, 4097), (3, 70, 10_000)]
)
@pytest.mark.parametrize("with_scratch", [False, True])
def test_moves_exactly_these_bytes(source: int, target: int, size: int, with_scratch: bool) -> None:
    machine = Machine(with_scratch)
    machine.target.write(0, b"\xaa" * SIZE)
    answer = machine.engine.copy(SOURCE + source, TARGET + target, size, 5.0)
    assert answer["completed"] is True
    assert (answer["copied_bytes"], answer["chunks"]) == (size, -(-size // 4096))
    moved = b"\xaa" * target + pattern(1, source, size) + b"\xaa" * (SIZE - target - size)
    assert machine.target.read(0, SIZE) == moved


def test_stale_bytes_do_not_pass_for_the_source(machine: Machine) -> None:
    """The device hands on what its buffer holds when the IOMMU refuses the read."""
    machine.engine.copy(SOURCE, TARGET, 4096, 5.0)
    machine.target.write(0, bytes(4096))
    machine.engine.copy(HOLE, TARGET, 4096, 5.0)
    assert ("read", HOLE) in machine.bus.faults
    old = pattern(1, 0, 4096)
    new = machine.target.read(0, 4096)
    assert not any(new[at : at + 16] == old[at : at + 16] for at in range(0, 4096, 16))


def test_rings_a_doorbell_with_four_bytes(machine: Machine) -> None:
    machine.bus.writes.clear()
    assert machine.engine.write32(TARGET + 0x60, 0x55, 5.0)["completed"] is True
    assert machine.bus.writes == [(TARGET + 0x60, 4)]
    assert machine.target.read32(0x60) == 0x55


def test_ringing_needs_scratch() -> None:
    with pytest.raises(ParameterError, match="scratch"):
        Machine(with_scratch=False).engine.write32(TARGET, 1, 5.0)


def test_a_dma_that_does_not_end_is_incomplete(machine: Machine) -> None:
    machine.edu.stuck = True
    answer = machine.engine.copy(SOURCE, TARGET, 100, 0.05)
    assert (answer["completed"], answer["copied_bytes"]) == (False, 0)
    with pytest.raises(TimeoutError, match="does not end"):
        machine.engine.open()
    machine.edu.stuck = False
    machine.engine.open()
    assert machine.engine.copy(SOURCE, TARGET, 100, 5.0)["completed"] is True


def test_interrupts_are_asked_for_only_if_armed(machine: Machine) -> None:
    machine.engine.copy(SOURCE, TARGET, 100, 5.0)
    assert not any(command & 4 for command in machine.edu.started)
    machine.edu.started.clear()
    machine.edu.device.armed = True
    machine.engine.copy(SOURCE, TARGET, 100, 5.0)
    assert all(command & 4 for command in machine.edu.started)


def test_being_rung_is_not_acknowledged_by_a_copy(machine: Machine) -> None:
    machine.edu.device.armed = True
    machine.edu.values[0x24] = 0x55
    machine.engine.copy(SOURCE, TARGET, 100, 5.0)
    assert machine.edu.values[0x24] == 0x55


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_storm_touches_every_page_once(machine: Machine, access: str) -> None:
    assert machine.engine.storm(HOLE, 5, access, 5.0)["chunks"] == 5
    assert machine.bus.faults == [(access, HOLE + page * 4096) for page in range(5)]


def test_a_burst_has_all_under_way_at_once() -> None:
    bus = Bus()
    machines = [Machine(with_scratch=False, bus=bus) for _ in range(3)]
    bus.events.clear()
    answer = burst([machine.engine for machine in machines], HOLE, "write", 5.0)
    assert answer["completed"] is True
    assert bus.events == ["start"] * 3 + ["look"] * 3
    assert bus.faults == [("write", HOLE)] * 3


def test_an_engine_that_cannot_burst_says_so() -> None:
    bus = Bus()
    scratch = Scratch(bus.memory(SCRATCH, 8192), 0, 8192, SCRATCH)
    with pytest.raises(ParameterError, match="igb"):
        burst([Igb(FakeIgb(bus).device, scratch)], HOLE, "read", 1.0)


def test_kinds_have_their_drivers() -> None:
    assert engine_class("edu") is Edu
    assert engine_class("igb") is Igb
    with pytest.raises(ParameterError, match="'nvme' is none of"):
        engine_class("nvme")
