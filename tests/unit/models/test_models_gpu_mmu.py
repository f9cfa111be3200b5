# SPDX-License-Identifier: Apache-2.0
"""The GPU model's page tables and faults, through its registers as a driver sees them."""

from __future__ import annotations

import pytest

from testbed.models import registers as hw
from testbed.models.access import Cause
from testbed.models.registers import (
    Aperture,
    Command,
    Common,
    FaultCause,
    Gpu,
    MmuControl,
    Opcode,
    Replay,
)
from testbed.models.witness import Event
from tests.unit.models.gpu_bench import (
    FAULTS,
    FREE,
    MIB,
    RAM,
    Bench,
    copy,
)

REPLAYABLE = MmuControl.ENABLE | MmuControl.REPLAYABLE
VIRTUAL = 0x7F00_0020_0000


def test_small_and_large_pages_of_every_kind(bench: Bench) -> None:
    bench.use_mmu()
    bench.enter(VIRTUAL, 3 * 4096, Aperture.VRAM)
    bench.enter(VIRTUAL + 4096, FREE, Aperture.SYSTEM)
    bench.enter(VIRTUAL + 2 * MIB, 4 * MIB, Aperture.VRAM, large=True)
    bench.vram.view[3 * 4096 : 5 * 4096] = b"v" * 8192
    bench.run(copy(VIRTUAL + 4000, 4 * MIB + 77, 96, of=Aperture.VIRTUAL))
    assert bytes(bench.vram.view[4 * MIB + 77 : 4 * MIB + 77 + 96]) == b"v" * 96
    bench.ram.view[FREE - RAM : FREE - RAM + 4] = b"bus!"
    bench.run(copy(VIRTUAL + 4096, VIRTUAL + 3 * MIB, 4, of=3, to=3))
    assert bytes(bench.vram.view[5 * MIB : 5 * MIB + 4]) == b"bus!"


def test_pages_that_continue_each_other_are_one_access(bench: Bench) -> None:
    bench.use_mmu()
    for page in range(64):
        bench.enter(VIRTUAL + page * 4096, 5 * MIB + page * 4096, Aperture.VRAM)
    bench.gpu.witness.reset()
    bench.run(copy(VIRTUAL, 0, 64 * 4096, of=Aperture.VIRTUAL))
    assert bench.gpu.witness.counters()["local"]["reads"] == 1


def test_pages_that_do_not_continue_each_other(bench: Bench) -> None:
    bench.use_mmu()
    bench.enter(VIRTUAL, 9 * 4096, Aperture.VRAM)
    bench.enter(VIRTUAL + 4096, 3 * 4096, Aperture.VRAM)
    bench.enter(VIRTUAL + 8192, FREE, Aperture.SYSTEM)
    bench.enter(VIRTUAL + 12288, FREE + 8192, Aperture.SYSTEM)
    bench.vram.view[: 4 * 4096] = b"".join(bytes([n]) * 4096 for n in (1, 2, 3, 4))
    data = bytes(bench.vram.view[: 4 * 4096])
    bench.run(copy(0, VIRTUAL, 3 * 4096, to=3), copy(4096, VIRTUAL + 12288, 4096, to=3))
    assert bytes(bench.vram.view[9 * 4096 : 10 * 4096]) == data[:4096]
    assert bytes(bench.vram.view[3 * 4096 : 4 * 4096]) == data[4096:8192]
    at = FREE - RAM
    assert bytes(bench.ram.view[at : at + 4096]) == data[8192:12288]
    assert bytes(bench.ram.view[at + 4096 : at + 8192]) == bytes(4096)


def test_read_only_page(bench: Bench) -> None:
    bench.use_mmu()
    bench.enter(VIRTUAL, 0, Aperture.VRAM, bits=1)
    bench.run(copy(VIRTUAL, 100, 4, of=Aperture.VIRTUAL))
    assert bench.fail(copy(0, VIRTUAL, 4, to=Aperture.VIRTUAL)) == (Cause.PAGE_FAULT, VIRTUAL)
    assert records(bench) == [(VIRTUAL, 1, 1, FaultCause.NOT_WRITABLE)]


@pytest.mark.parametrize(
    ("address", "aperture", "large", "cause"),
    [
        (0, Aperture.VIRTUAL, False, FaultCause.BAD_ENTRY),
        (4096, Aperture.VRAM, True, FaultCause.BAD_ENTRY),  # not at a multiple of 2 MiB
        (0, Aperture.LINK, False, FaultCause.BAD_ENTRY),  # has no links
    ],
)
def test_entries_that_make_no_sense(
    bench: Bench, address: int, aperture: int, large: bool, cause: int
) -> None:
    bench.use_mmu()
    bench.enter(VIRTUAL, address, aperture, large=large)
    assert bench.fail(copy(VIRTUAL, 0, 4, of=Aperture.VIRTUAL))[0] == Cause.PAGE_FAULT
    assert records(bench) == [(VIRTUAL, 0, 0, cause)]


def test_tables_outside_video_memory(bench: Bench) -> None:
    bench.use_mmu()
    bench.write_pair(Gpu.MMU_ROOT_LOW, 16 * MIB)
    bench.fail(copy(VIRTUAL, 0, 4, of=Aperture.VIRTUAL))
    assert records(bench) == [(VIRTUAL, 0, 0, FaultCause.BAD_ENTRY)]


def test_a_stale_translation_stays_until_it_is_invalidated(bench: Bench) -> None:
    bench.use_mmu()
    bench.enter(VIRTUAL, 0, Aperture.VRAM)
    write = Command(Opcode.SIGNAL, target=VIRTUAL, target_aperture=3, value=1)
    bench.run(write)
    bench.enter(VIRTUAL, 4096, Aperture.VRAM)
    bench.run(write._replace(value=2))
    assert (bench.vram.view[0], bench.vram.view[4096]) == (2, 0)
    bench.write_pair(Gpu.INVALIDATE_LOW, VIRTUAL + 8)
    bench.write(Gpu.INVALIDATE, 1)
    bench.run(write._replace(value=3))
    assert (bench.vram.view[0], bench.vram.view[4096]) == (2, 3)
    bench.enter(VIRTUAL, 0, Aperture.VRAM)
    bench.run(Command(Opcode.INVALIDATE), write._replace(value=4))
    assert (bench.vram.view[0], bench.vram.view[4096]) == (4, 3)
    assert bench.gpu.witness.count(Event.INVALIDATION) == 2


def records(bench: Bench) -> list[tuple[int, int, int, int]]:
    found = []
    for number in range(bench.read(Common.FAULT_PUT)):
        at = FAULTS + number * hw.FAULT_RECORD.size_bytes
        record = hw.FAULT_RECORD.decode(bench.vram.view[at : at + hw.FAULT_RECORD.size_bytes])
        assert record.time_ns > 0
        found.append((record.address, record.command, record.write, record.cause))
    return found


def test_a_fault_is_repaired_and_replayed(bench: Bench) -> None:
    bench.use_mmu(REPLAYABLE)
    bench.enter(VIRTUAL, 0, Aperture.VRAM)
    bench.vram.view[:4096] = b"1" * 4096
    bench.vram.view[4096:8192] = b"2" * 4096
    done = bench.put(copy(VIRTUAL + 4000, MIB, 192, of=Aperture.VIRTUAL))
    bench.ring()
    bench.qemu.wait(lambda: bench.faulted)
    assert bench.qemu.interrupts(2) == 1
    assert records(bench) == [(VIRTUAL + 4096, 0, 0, FaultCause.NOT_VALID)]
    assert bytes(bench.vram.view[MIB : MIB + 192]) == b"1" * 96 + bytes(96)
    bench.write(Common.FAULT_REPLAY, Replay.AGAIN)  # nothing is repaired: it faults again
    bench.qemu.wait(lambda: bench.read(Common.FAULT_PUT) == 2)
    bench.enter(VIRTUAL + 4096, 4096, Aperture.VRAM)
    bench.write(Common.FAULT_REPLAY, Replay.AGAIN)
    bench.qemu.wait(lambda: bench.fence == done)
    assert bytes(bench.vram.view[MIB : MIB + 192]) == b"1" * 96 + b"2" * 96
    assert bench.read(Common.PAGE_FAULTS) == 2


def test_a_fault_is_cancelled(bench: Bench) -> None:
    bench.use_mmu(REPLAYABLE)
    bench.put(copy(VIRTUAL, 0, 4, of=Aperture.VIRTUAL))
    bench.ring()
    bench.qemu.wait(lambda: bench.faulted)
    bench.write(Common.FAULT_REPLAY, Replay.CANCEL)
    bench.qemu.wait(lambda: bench.halted)
    assert bench.read(Common.ERROR_CAUSE) == Cause.PAGE_FAULT
    assert not bench.faulted


def test_a_write_fault_is_repaired_without_an_invalidation(bench: Bench) -> None:
    bench.use_mmu(REPLAYABLE)
    bench.enter(VIRTUAL, 0, Aperture.VRAM, bits=1)
    bench.run(copy(VIRTUAL, 100, 4, of=Aperture.VIRTUAL))  # now it is cached, read-only
    done = bench.put(Command(Opcode.SIGNAL, target=VIRTUAL, target_aperture=3, value=7))
    bench.ring()
    bench.qemu.wait(lambda: bench.faulted)
    bench.enter(VIRTUAL, 0, Aperture.VRAM)
    bench.write(Common.FAULT_REPLAY, Replay.AGAIN)
    bench.qemu.wait(lambda: bench.fence == done)
    assert bench.vram.view[0] == 7


def test_a_full_fault_buffer_loses_and_counts(bench: Bench) -> None:
    bench.use_mmu(REPLAYABLE)
    bench.put(copy(VIRTUAL, 0, 4, of=Aperture.VIRTUAL))
    bench.ring()
    for faults in range(1, 11):
        bench.qemu.wait(lambda seen=faults: bench.read(Common.PAGE_FAULTS) == seen)  # type: ignore[misc]
        bench.write(Common.FAULT_REPLAY, Replay.AGAIN)
    bench.qemu.wait(lambda: bench.read(Common.PAGE_FAULTS) == 11)
    assert bench.read(Common.FAULT_PUT) == 7  # of 8, one stays free
    assert bench.read(Common.FAULT_LOST) == 4
    bench.write(Common.FAULT_GET, 7)
    bench.write(Common.FAULT_REPLAY, Replay.AGAIN)
    bench.qemu.wait(lambda: bench.read(Common.FAULT_PUT) == 0)  # room again, round the end


def test_a_reset_frees_who_waits(bench: Bench) -> None:
    bench.use_mmu(REPLAYABLE)
    bench.put(copy(VIRTUAL, 0, 4, of=Aperture.VIRTUAL))
    bench.ring()
    bench.qemu.wait(lambda: bench.faulted)
    bench.write(Common.RESET, 1)
    bench.qemu.wait(lambda: not bench.faulted)
    bench.set_up()
    bench.run(Command(Opcode.NOP))
