# SPDX-License-Identifier: Apache-2.0
"""The GPU model's engine and witness, through its registers as a driver sees them."""

from __future__ import annotations

import pytest

from testbed.models import registers as hw
from testbed.models import wire
from testbed.models.access import Cause
from testbed.models.config import Capability
from testbed.models.gpu import GpuModel
from testbed.models.memory import SharedMemory
from testbed.models.registers import (
    Aperture,
    Command,
    CommandFlag,
    Common,
    Gpu,
    InterruptCause,
    Opcode,
)
from testbed.models.tables import Access
from testbed.models.testing import FakeQemu
from testbed.models.wire import Irq
from testbed.models.witness import Path
from tests.unit.models.gpu_bench import (
    FREE,
    MIB,
    RAM,
    RAM_BYTES,
    RING_ENTRIES,
    Bench,
    copy,
)


class TestRegisters:
    def test_who_it_is(self, bench: Bench) -> None:
        assert bench.read(Common.IDENTITY) == hw.GPU_IDENTITY
        assert bench.read(Common.VERSION) >> 16 == 1
        assert bench.read_pair(Gpu.VRAM_SIZE_LOW) == 16 * MIB
        assert bench.read(Gpu.LINKS) == 0
        assert not bench.read(Gpu.FEATURES) & hw.Feature.LINK

    def test_sizes_are_made_of_words(self, bench: Bench) -> None:
        bench.qemu.write(0, Gpu.MMU_ROOT_LOW, 0x1122_3344_5566_7000, 8)
        assert bench.qemu.read(0, Gpu.MMU_ROOT_LOW, 8) == 0x1122_3344_5566_7000
        assert bench.qemu.read(0, Gpu.MMU_ROOT_LOW + 2, 2) == 0x5566
        bench.qemu.write(0, Gpu.MMU_ROOT_LOW, 0, 1)  # no effect
        assert bench.read(Gpu.MMU_ROOT_LOW) == 0x5566_7000

    def test_read_only_registers_stay(self, bench: Bench) -> None:
        for register in (*Common, *Gpu):
            if register.access is Access.RO:
                before = bench.read(register)
                bench.write(register, 0xFFFFFFFF)
                assert bench.read(register) == before, register.name

    def test_every_register_that_can_be_written_keeps_or_does_something(self, bench: Bench) -> None:
        for register in (*Common, *Gpu):
            assert (register.access is Access.RO) == (register not in bench.gpu.writers)

    def test_after_a_reset_all_is_as_after_power_on(self, bench: Bench) -> None:
        bench.qemu.reset()
        with Bench() as other:
            other.qemu.reset()
            fresh = {register: other.read(register) for register in (*Common, *Gpu)}
        assert {register: bench.read(register) for register in (*Common, *Gpu)} == fresh

    def test_with_msi_instead_of_msix(self) -> None:
        vram = SharedMemory.create(MIB, name="vram")
        with FakeQemu(GpuModel("gpu0", vram, msi=True)) as qemu:
            numbers = capabilities(qemu)
            assert Capability.MSI in numbers
            assert Capability.MSIX not in numbers
            qemu.arm(0, kind=Irq.MSI)
            qemu.write(0, Common.INTERRUPT_ENABLE, InterruptCause.NOTIFY)
            qemu.write(0, Common.DOORBELL_NOTIFY, 1)
            assert qemu.interrupts(0) == 1


def capabilities(qemu: FakeQemu) -> list[int]:
    numbers = []
    at = qemu.config_read(0x34, 1)
    while at:
        numbers.append(qemu.config_read(at, 1))
        at = qemu.config_read(at + 1, 1)
    return numbers


class TestCommands:
    @pytest.mark.parametrize("size", [1, 7, 4096, 4097, 3 * MIB])
    def test_copy_from_vram_to_the_bus_and_back(self, bench: Bench, size: int) -> None:
        data = bytes(n * 7 & 0xFF for n in range(256)) * (size // 256 + 1)
        bench.vram.view[100 : 100 + size] = data[:size]
        bench.run(
            copy(100, FREE + 3, size, to=Aperture.SYSTEM),
            copy(FREE + 3, 4 * MIB, size, of=Aperture.PEER),
        )
        assert bytes(bench.vram.view[4 * MIB : 4 * MIB + size]) == data[:size]
        at = FREE + 3 - RAM
        assert bytes(bench.ram.view[at : at + size]) == data[:size]
        assert bench.ram.view[at - 1] == bench.ram.view[at + size] == 0

    def test_overlapping_copy(self, bench: Bench) -> None:
        bench.vram.view[:16] = bytes(range(16))
        bench.run(copy(0, 4, 12))
        assert bytes(bench.vram.view[:16]) == bytes([0, 1, 2, 3, *range(12)])

    def test_copy_2d(self, bench: Bench) -> None:
        for row in range(4):
            bench.vram.view[row * 64 : row * 64 + 8] = bytes([row + 1]) * 8
        command = Command(
            Opcode.COPY_2D,
            source=0,
            target=FREE,
            target_aperture=Aperture.SYSTEM,
            size_bytes=8,
            rows=4,
            source_pitch=64,
            target_pitch=16,
        )
        bench.run(command)
        at = FREE - RAM
        rows = [bytes(bench.ram.view[at + 16 * row : at + 16 * row + 16]) for row in range(4)]
        assert rows == [bytes([row + 1]) * 8 + bytes(8) for row in range(4)]

    @pytest.mark.parametrize("size", [1, 8, 12, 2 * MIB + 5])
    def test_fill(self, bench: Bench, size: int) -> None:
        command = Command(Opcode.FILL, target=64, size_bytes=size, value=0x8877665544332211)
        bench.run(command)
        pattern = bytes.fromhex("1122334455667788") * (size // 8 + 1)
        assert bytes(bench.vram.view[64 : 64 + size + 1]) == pattern[:size] + b"\0"

    @pytest.mark.parametrize(("size", "total"), [(4, 1), (8, 0x1_0000_0001)])
    def test_atomic_add(self, bench: Bench, size: int, total: int) -> None:
        bench.vram.view[8:16] = (0xFFFF_FFFF).to_bytes(8, "little")
        bench.run(Command(Opcode.ATOMIC_ADD, target=8, size_bytes=size, value=2))
        assert int.from_bytes(bench.vram.view[8 : 8 + size], "little") == total

    def test_signal_and_wait(self, bench: Bench) -> None:
        wait = Command(Opcode.WAIT, source=FREE, source_aperture=Aperture.SYSTEM, value=5)
        done = bench.put(wait)
        bench.ring()
        for value in (1, 4):
            bench.ram.view[FREE - RAM] = value
            with pytest.raises(TimeoutError):
                bench.qemu.wait(lambda: bench.fence == done, timeout_s=0.03)
        bench.ram.view[FREE - RAM] = 6
        bench.qemu.wait(lambda: bench.fence == done)
        bench.run(Command(Opcode.SIGNAL, target=0, value=0x0102030405060708))
        assert bench.vram.view[0] == 8

    def test_commands_run_in_order_around_the_ring(self, bench: Bench) -> None:
        for number in range(3 * RING_ENTRIES):
            bench.run(Command(Opcode.SIGNAL, target=0, value=number))
        assert bench.read(Common.COMMANDS_DONE) == 3 * RING_ENTRIES
        assert bench.read(Common.RING_HEAD) == bench.read(Common.RING_TAIL)

    def test_a_full_ring_at_once(self, bench: Bench) -> None:
        bench.run(*[Command(Opcode.ATOMIC_ADD, target=0, size_bytes=8, value=1)] * 31)
        assert bench.vram.view[0] == 31

    def test_a_ring_in_video_memory(self, bench: Bench) -> None:
        bench.write(Common.CONTROL, 0)
        bench.write_pair(Common.RING_BASE_LOW, 2 * MIB)
        bench.write(Common.RING_APERTURE, Aperture.VRAM)
        bench.write(Common.RING_ENTRIES, 2)
        command = Command(Opcode.SIGNAL, target=0, value=9)
        bench.vram.view[2 * MIB : 2 * MIB + 64] = hw.COMMAND.encode(command)
        bench.write(Common.DOORBELL_TAIL, 1)
        assert bench.read(Common.RING_HEAD) == 0  # not enabled
        bench.write(Common.CONTROL, 1)
        bench.qemu.wait(lambda: bench.read(Common.RING_HEAD) == 1)
        assert bench.vram.view[0] == 9

    def test_interrupt_after_the_fence(self, bench: Bench) -> None:
        bench.run(Command(Opcode.NOP), Command(Opcode.NOP, flags=CommandFlag.INTERRUPT))
        bench.qemu.wait(lambda: bench.qemu.interrupts(0) == 1)
        assert bench.read(Common.INTERRUPT_CAUSE) == InterruptCause.COMMAND
        bench.write(Common.INTERRUPT_CAUSE, InterruptCause.COMMAND)
        assert bench.read(Common.INTERRUPT_CAUSE) == 0

    def test_a_disabled_cause_fires_when_it_is_enabled(self, bench: Bench) -> None:
        bench.write(Common.INTERRUPT_ENABLE, 0)
        bench.run(Command(Opcode.INTERRUPT))
        assert bench.qemu.interrupts(0) == 0
        bench.write(Common.INTERRUPT_ENABLE, 0x1F)
        assert bench.qemu.interrupts(0) == 1

    def test_a_peer_rings(self, bench: Bench) -> None:
        bench.write(Common.DOORBELL_NOTIFY, 77)
        assert bench.read(Common.NOTIFIED) == 77
        assert bench.qemu.interrupts(0) == 1
        assert bench.read(Common.INTERRUPT_CAUSE) == InterruptCause.NOTIFY


class TestErrors:
    @pytest.mark.parametrize(
        ("command", "cause", "address"),
        [
            (copy(0x9_0000_0000, 0, 16, of=1), Cause.REFUSED, 0x9_0000_0000),
            (copy(0, 0x9_0000_0000, 16, to=1), Cause.REFUSED, 0x9_0000_0000),
            (copy(0, 16 * MIB - 8, 16), Cause.OUT_OF_RANGE, 16 * MIB),
            (copy(1 << 63, 0, 16), Cause.OUT_OF_RANGE, 1 << 63),
            (copy(RAM + RAM_BYTES - 8, 0, 16, of=1), Cause.REFUSED, RAM + RAM_BYTES),
            (copy(0, 0, 16, of=Aperture.LINK), Cause.BAD_COMMAND, 0),
            (copy(0, 5, 16, to=9), Cause.BAD_COMMAND, 5),
            (copy(0x1000, 0, 16, of=Aperture.VIRTUAL), Cause.PAGE_FAULT, 0x1000),
            (Command(Opcode.ATOMIC_ADD, target=8, size_bytes=3), Cause.BAD_COMMAND, 8),
            (Command(Opcode.ATOMIC_ADD, target=4, size_bytes=8), Cause.BAD_COMMAND, 4),
            (Command(99), Cause.BAD_COMMAND, RAM),
            (Command(Opcode.NOP, flags=0x80), Cause.BAD_COMMAND, RAM),
        ],
    )
    def test_causes(self, bench: Bench, command: Command, cause: int, address: int) -> None:
        assert bench.fail(command) == (cause, address)
        assert bench.qemu.interrupts(1) == 1
        assert bench.fence == 0

    def test_the_engine_stays_halted_until_reset(self, bench: Bench) -> None:
        bench.run(Command(Opcode.NOP))
        bench.fail(Command(Opcode.NOP), Command(99), Command(Opcode.SIGNAL, target=0, value=1))
        assert bench.read(Common.ERROR_COMMAND) == 2
        bench.ring()
        assert bench.vram.view[0] == 0
        bench.write(Common.RESET, 1)
        assert not bench.halted
        bench.set_up()
        bench.run(Command(Opcode.SIGNAL, target=0, value=1))
        assert bench.vram.view[0] == 1

    def test_a_command_may_fail_and_let_the_others_go_on(self, bench: Bench) -> None:
        bad = copy(0x9_0000_0000, 0, 16, of=1)._replace(flags=CommandFlag.KEEP_GOING)
        bench.run(bad, bad, Command(Opcode.SIGNAL, target=0, value=1))
        assert bench.vram.view[0] == 1
        assert bench.read(Common.COMMANDS_FAILED) == 2
        assert len(bench.qemu.faults) == 2

    def test_what_came_before_the_fault_is_done(self, bench: Bench) -> None:
        bench.vram.view[: 2 * 4096] = b"\x5a" * 8192
        end = RAM + RAM_BYTES
        bench.fail(copy(0, end - 4096, 8192, to=Aperture.SYSTEM))
        assert bytes(bench.ram.view[-4096:]) == b"\x5a" * 4096

    def test_bus_mastering_off(self, bench: Bench) -> None:
        bench.qemu.enable_dma(on=False)
        bench.put(Command(Opcode.NOP))
        bench.ring()
        bench.qemu.wait(lambda: bench.halted)
        assert bench.read(Common.ERROR_CAUSE) == Cause.NO_BUS_MASTER

    @pytest.mark.parametrize("entries", [0, 1, 3, 1 << 17, 0xFFFFFFFF])
    def test_a_ring_that_cannot_be(self, bench: Bench, entries: int) -> None:
        bench.write(Common.RING_ENTRIES, entries)
        bench.write(Common.DOORBELL_TAIL, 1)
        assert bench.read(Common.STATUS) == 0
        assert bench.read(Common.RING_TAIL) == 0

    def test_unplugged_in_the_middle(self) -> None:
        with Bench() as bench:
            bench.put(Command(Opcode.WAIT, source=0, value=1))
            bench.ring()
            assert bench.read(Common.STATUS) == hw.Status.BUSY
        assert bench.gpu.failure is None
        assert not bench.gpu.ring.busy

    def test_reset_in_the_moment_of_an_answer(self, bench: Bench) -> None:
        """The reset counts, although what the engine waited for has arrived as well."""
        bench.qemu.add_message_memory(1 << 40, 4096)
        bench.qemu.hold_answers = True
        bench.put(copy(1 << 40, 0, 16, of=Aperture.SYSTEM))
        bench.ring()
        bench.qemu.wait(lambda: bench.qemu.held_answers == 1)
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(Common.RESET, 0, 4)) + b"\1\0\0\0"
        head = wire.encode_header(1, wire.Command.REGION_WRITE, len(access), wire.NO_REPLY)
        bench.qemu.send_raw(bench.qemu.release_answers() + head + access)
        assert bench.gpu.failure is None
        assert bench.read(Common.STATUS) == 0
        bench.qemu.hold_answers = False
        bench.set_up()
        bench.run(Command(Opcode.NOP))


class TestWitness:
    def test_paths_are_told_apart(self, bench: Bench) -> None:
        bench.qemu.add_message_memory(1 << 40, 4096)
        bench.gpu.witness.reset()
        bench.run(
            copy(0, MIB, 100),
            copy(0, FREE, 200, to=Aperture.SYSTEM),
            copy(0, 1 << 40, 300, to=Aperture.SYSTEM),
        )
        witness = bench.gpu.witness
        fences = 3 * 8
        written = {path: witness.bytes_by(path, write=True) for path in Path}
        assert written == {
            Path.LOCAL: 100,
            Path.IOMMU: 200 + fences,
            Path.MESSAGE: 300,
            Path.PEER: 0,
            Path.LINK: 0,
            Path.NETWORK: 0,
        }

    def test_the_trace_names_address_size_and_target(self, bench: Bench) -> None:
        bench.gpu.witness.reset()
        bench.run(copy(0x40, FREE + 8, 16, to=Aperture.SYSTEM))
        entries = [
            (e["what"], e["path"], e["address"], e["size_bytes"], e["target"])
            for e in bench.gpu.witness.trace()
            if e["what"] in ("read", "write")
        ]
        assert entries == [
            ("read", "iommu", RAM, 64, "ram"),
            ("read", "local", 0x40, 16, "gpu0.vram"),
            ("write", "iommu", FREE + 8, 16, "ram"),
            ("write", "iommu", RAM + 4088, 8, "ram"),
        ]
