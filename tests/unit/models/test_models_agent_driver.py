# SPDX-License-Identifier: Apache-2.0
"""The agent's drivers against the models themselves: both sides of the registers in one test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest_agent.hw import model_registers as registers
from guest_agent.hw.engine import Engine, Scratch, burst
from guest_agent.hw.model import Model, ModelNic
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError
from testbed.models.device import Device
from testbed.models.gpu import GpuModel
from testbed.models.memory import SharedMemory
from testbed.models.nic import NicModel
from testbed.models.testing import FakeQemu
from tests.unit.models.agent_side import Function, seen

SOURCE, TARGET, SCRATCH, HOLE = 0x1_0000_0000, 0x2_0000_0000, 0x10000, 0x9_0000_0000
SIZE = 1 << 16
SCRATCH_BYTES = 8192


class Machine:
    """Source and target memory, scratch, the model and its driver."""

    def __init__(self, kind: str) -> None:
        vram = SharedMemory.create(1 << 20, name="vram")
        device: Device = GpuModel("gpu0", vram) if kind == "model" else NicModel("nic0", address=4)
        self.qemu = FakeQemu(device)
        self.qemu.arm(0)
        self.source = seen(self.qemu.add_memory(SOURCE, SIZE))
        self.target = seen(self.qemu.add_memory(TARGET, SIZE))
        self.source.write(0, pattern(1, 0, SIZE))
        self.target.write(0, b"\xaa" * SIZE)
        scratch = seen(self.qemu.add_memory(SCRATCH, SCRATCH_BYTES))
        self.function = Function(self.qemu)
        driver: type[Engine] = Model if kind == "model" else ModelNic
        driver.probe(self.function)
        self.engine = driver(self.function, Scratch(scratch, 0, SCRATCH_BYTES, SCRATCH))
        self.engine.open()
        self.qemu.interrupts(0)


@pytest.fixture(params=["model", "model-nic"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(request.param)
    yield machine
    machine.qemu.close()


@pytest.mark.parametrize(
    ("source", "target", "size"), [(0, 0, 1), (5, 9, 4096), (4095, 0, 4097), (3, 70, 60_000)]
)
def test_moves_exactly_these_bytes(machine: Machine, source: int, target: int, size: int) -> None:
    answer = machine.engine.copy(SOURCE + source, TARGET + target, size, 5.0)
    assert answer["completed"] is True
    assert (answer["copied_bytes"], answer["chunks"], answer["status"]) == (size, 1, {})
    moved = b"\xaa" * target + pattern(1, source, size) + b"\xaa" * (SIZE - target - size)
    assert machine.target.read(0, SIZE) == moved
    assert machine.qemu.interrupts(0) == 1


def test_many_copies_go_around_the_ring(machine: Machine) -> None:
    for number in range(150):
        place = number * 64
        assert machine.engine.copy(SOURCE + place, TARGET + place, 64, 5.0)["completed"]
    assert machine.target.read(0, 150 * 64) == pattern(1, 0, 150 * 64)


@pytest.mark.parametrize(("source", "target"), [(HOLE, TARGET), (SOURCE, HOLE)])
def test_refused(machine: Machine, source: int, target: int) -> None:
    answer = machine.engine.copy(source, target, 64, 5.0)
    assert answer["completed"] is False
    assert answer["copied_bytes"] == 0
    assert answer["status"] == {"cause": "refused", "address": HOLE}
    assert machine.target.read(0, SIZE) == b"\xaa" * SIZE
    assert machine.engine.copy(SOURCE, TARGET, 64, 5.0)["completed"]  # usable again
    assert machine.function.resets == 1  # and without a reset of the function, which takes long


def test_a_function_that_was_just_reset_is_not_reset_again(machine: Machine) -> None:
    """VFIO does that for who opens it; but not for who opens an engine a second time."""
    resets = machine.function.resets
    machine.function.was_reset = True
    engine = type(machine.engine)(machine.function, machine.engine.scratch)
    engine.open()
    assert machine.function.resets == resets
    assert engine.copy(SOURCE, TARGET, 64, 5.0)["completed"]
    again = type(machine.engine)(machine.function, machine.engine.scratch)
    again.open()
    assert machine.function.resets == resets + 1
    assert again.copy(SOURCE, TARGET, 64, 5.0)["completed"]


def test_no_answer_in_time(machine: Machine) -> None:
    model = machine.qemu.device
    assert isinstance(model, GpuModel | NicModel)
    model.ring.stick(on=True)
    answer = machine.engine.copy(SOURCE, TARGET, 64, 0.05)
    assert answer["completed"] is False
    assert answer["status"] == {"cause": "no answer in time"}
    model.ring.stick(on=False)
    assert machine.engine.copy(SOURCE, TARGET, 64, 5.0)["completed"]
    assert machine.target.read(0, 64) == pattern(1, 0, 64)


def test_a_doorbell_is_a_write_of_four_bytes(machine: Machine) -> None:
    answer = machine.engine.write32(TARGET + 8, 0x12345678, 5.0)
    assert answer["completed"] is True
    assert machine.target.read(4, 12).hex() == "aaaaaaaa78563412aaaaaaaa"
    with pytest.raises(ParameterError, match="multiple of 4"):
        machine.engine.write32(TARGET + 2, 1, 5.0)


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_storm_faults_once_a_page(machine: Machine, access: str) -> None:
    answer = machine.engine.storm(HOLE, 300, access, 10.0)
    assert (answer["completed"], answer["copied_bytes"], answer["chunks"]) == (False, 0, 300)
    assert answer["status"] == {"failed": 300}
    assert [(fault.address, fault.write) for fault in machine.qemu.faults] == [
        (HOLE + page * 4096, access == "write") for page in range(300)
    ]
    assert machine.engine.copy(SOURCE, TARGET, 64, 5.0)["completed"]


def test_burst(machine: Machine) -> None:
    answer = burst([machine.engine], HOLE, "read", 5.0)
    assert answer["completed"] is True
    assert machine.qemu.faults[0].address == HOLE


def test_a_lost_device_is_named(machine: Machine) -> None:
    machine.function.registers.gone = True
    with pytest.raises(OSError, match=r"0000:05:00\.1: the device is lost"):
        machine.engine.copy(SOURCE, TARGET, 64, 5.0)
    with pytest.raises(OSError, match="does not answer"):
        machine.engine.open()


def test_closed_it_does_nothing(machine: Machine) -> None:
    machine.engine.close()
    machine.qemu.write(0, registers.DOORBELL_TAIL, 1)
    machine.qemu.turn()
    assert machine.qemu.read(0, registers.STATUS) == 0


@pytest.mark.parametrize("size", [0, 1 << 41])
def test_sizes_that_cannot_be(machine: Machine, size: int) -> None:
    with pytest.raises(ParameterError, match="size_bytes"):
        machine.engine.copy(SOURCE, TARGET, size, 5.0)


def test_it_needs_scratch_memory(machine: Machine) -> None:
    with pytest.raises(ParameterError, match="scratch"):
        Model(machine.function, None)


def test_another_device_is_refused(machine: Machine) -> None:
    other = ModelNic if isinstance(machine.engine, Model) else Model
    with pytest.raises(ParameterError, match="1234:a9e"):
        other.probe(machine.function)
