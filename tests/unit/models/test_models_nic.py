# SPDX-License-Identifier: Apache-2.0
"""The NIC model: regions and rights, loopback, another NIC, on-demand pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.models import registers as hw
from testbed.models.access import Cause
from testbed.models.registers import (
    Common,
    FaultCause,
    Nic,
    NicOpcode,
    RegionFlag,
    Replay,
)
from testbed.models.witness import Path as Way
from tests.unit.models.nic_bench import ALL, BASE, DATA, FAULTS, PAGE, TABLE, Bench, Two, request


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    two = Two(tmp_path)
    yield two
    two.a.qemu.close()
    two.b.qemu.close()


def test_who_it_is(two: Two) -> None:
    assert two.a.read(Common.IDENTITY) == hw.NIC_IDENTITY
    assert (two.a.read(Nic.ADDRESS), two.b.read(Nic.ADDRESS)) == (1, 2)
    assert two.a.read(Nic.REGIONS) == 64


def test_loopback(two: Two) -> None:
    source = two.a.region(0)
    target = two.a.region(1, iova=DATA + 8 * PAGE, base=0)
    two.a.at(DATA, 5)[:] = b"again"
    two.run(request(NicOpcode.WRITE, source, target, 2 * PAGE, peer=1, at=0))
    assert bytes(two.a.at(DATA + 8 * PAGE, 5)) == b"again"
    two.a.at(DATA + 8 * PAGE, 4)[:] = b"back"
    two.run(request(NicOpcode.READ, source, target, 4, peer=1, at=0))
    assert bytes(two.a.at(DATA, 5)) == b"backn"


@pytest.mark.parametrize("size", [1, PAGE + 3, 4 * PAGE])
def test_write_and_read_another_node_s_memory(two: Two, size: int) -> None:
    mine = two.a.region(0)
    theirs = two.b.region(3, iova=DATA + 4 * PAGE)
    data = bytes(n & 0xFF for n in range(size))
    two.a.at(DATA, size)[:] = data
    two.run(request(NicOpcode.WRITE, mine, theirs, size))
    assert bytes(two.b.at(DATA + 4 * PAGE, size)) == data
    two.a.at(DATA, size)[:] = bytes(size)
    two.run(request(NicOpcode.READ, mine, theirs, size))
    assert bytes(two.a.at(DATA, size)) == data
    assert two.a.nic.witness.bytes_by(Way.NETWORK, write=True) == size
    assert two.b.nic.witness.bytes_by(Way.IOMMU, write=True) == size


def test_more_than_one_frame(tmp_path: Path) -> None:
    two = Two(tmp_path)
    try:
        for bench in (two.a, two.b):
            bench.qemu.add_memory(1 << 40, 1 << 20)
        memories = [bench.nic.bus.table.mappings()[-1].memory for bench in (two.a, two.b)]
        data = bytes(range(256)) * 4096
        assert memories[0] is not None
        assert memories[1] is not None
        memories[0].view[:] = data
        for bench in (two.a, two.b):
            bench.write(Nic.REGION_IOVA_HIGH, 1 << 8)
        keys = [bench.region(0, iova=0, pages=256) for bench in (two.a, two.b)]
        two.run(request(NicOpcode.WRITE, keys[0], keys[1], 1 << 20))
        assert bytes(memories[1].view) == data
    finally:
        two.a.qemu.close()
        two.b.qemu.close()


@pytest.mark.parametrize(
    ("flags", "opcode"),
    [
        (RegionFlag.VALID | RegionFlag.REMOTE_READ, NicOpcode.WRITE),
        (RegionFlag.VALID | RegionFlag.REMOTE_WRITE | RegionFlag.LOCAL_WRITE, NicOpcode.READ),
    ],
)
def test_the_peer_s_rights(two: Two, flags: int, opcode: int) -> None:
    mine = two.a.region(0)
    theirs = two.b.region(0, flags=flags)
    two.b.at(DATA, 4)[:] = b"mine"
    assert two.fail(request(opcode, mine, theirs, 4)) == (Cause.LINK_REFUSED, BASE)
    assert bytes(two.b.at(DATA, 4)) == b"mine"
    assert bytes(two.a.at(DATA, 4)) == bytes(4)


def test_local_rights(two: Two) -> None:
    mine = two.a.region(0, flags=RegionFlag.VALID)
    theirs = two.b.region(0)
    two.run(request(NicOpcode.WRITE, mine, theirs, 4))
    assert two.fail(request(NicOpcode.READ, mine, theirs, 4))[0] == Cause.LINK_REFUSED


@pytest.mark.parametrize("wrong", [0, 1, 0xFFFFFFFF, "old"])
def test_a_key_that_is_none(two: Two, wrong: int | str) -> None:
    mine = two.a.region(0)
    old = two.b.region(0)
    assert two.b.region(0) != old
    key = old if wrong == "old" else int(wrong)
    assert two.fail(request(NicOpcode.WRITE, mine, key, 4)) == (Cause.LINK_REFUSED, BASE)


@pytest.mark.parametrize(("at", "size"), [(BASE - 1, 1), (BASE + 4 * PAGE - 1, 2)])
def test_outside_the_region(two: Two, at: int, size: int) -> None:
    mine = two.a.region(0)
    theirs = two.b.region(0)
    assert two.fail(request(NicOpcode.WRITE, mine, theirs, size, at=at))[0] == Cause.LINK_REFUSED


def test_the_peer_s_iommu_has_its_say(two: Two) -> None:
    mine = two.a.region(0)
    theirs = two.b.region(0, iova=0x9000_0000)
    assert two.fail(request(NicOpcode.WRITE, mine, theirs, 4)) == (Cause.REFUSED, BASE)
    assert two.b.qemu.faults == [(0x9000_0000, 4, True)]


@pytest.mark.parametrize(("peer", "cause"), [(3, Cause.LINK_DOWN), (9, Cause.BAD_COMMAND)])
def test_nobody_there(two: Two, peer: int, cause: int) -> None:
    mine = two.a.region(0)
    assert two.fail(request(NicOpcode.WRITE, mine, 1, 4, peer=peer))[0] == cause


def test_the_peer_s_machine_is_gone(two: Two) -> None:
    mine = two.a.region(0)
    theirs = two.b.region(0)
    two.run(request(NicOpcode.WRITE, mine, theirs, 4))
    two.b.qemu.unplug()
    assert two.fail(request(NicOpcode.WRITE, mine, theirs, 4))[0] == Cause.LINK_REFUSED


def test_the_peer_s_process_is_gone(two: Two) -> None:
    mine = two.a.region(0)
    theirs = two.b.region(0)
    two.run(request(NicOpcode.WRITE, mine, theirs, 4))
    two.b.qemu.close()
    assert two.fail(request(NicOpcode.WRITE, mine, theirs, 4))[0] == Cause.LINK_DOWN


class TestOnDemand:
    FLAGS = ALL | RegionFlag.ON_DEMAND

    def entry(self, bench: Bench, page: int, iova: int, bits: int = 3) -> None:
        bench.at(TABLE + 8 * page, 8)[:] = (iova | bits).to_bytes(8, "little")

    def record(self, bench: Bench, number: int = 0) -> hw.FaultRecord:
        return hw.FAULT_RECORD.decode(bench.at(FAULTS + 32 * number, 32))

    def test_pages_in_any_order(self, two: Two) -> None:
        mine = two.a.region(0)
        theirs = two.b.region(0, iova=TABLE, pages=2, flags=self.FLAGS)
        self.entry(two.b, 0, DATA + PAGE)
        self.entry(two.b, 1, DATA)
        two.a.at(DATA, 2 * PAGE)[:] = b"1" * PAGE + b"2" * PAGE
        two.run(request(NicOpcode.WRITE, mine, theirs, 2 * PAGE))
        assert bytes(two.b.at(DATA, 2 * PAGE)) == b"2" * PAGE + b"1" * PAGE

    def test_a_local_page_is_repaired(self, two: Two) -> None:
        mine = two.a.region(0, iova=TABLE, flags=self.FLAGS)
        theirs = two.b.region(0)
        value = two.a.post(request(NicOpcode.WRITE, mine, theirs, 8))
        two.wait(lambda: two.a.read(Common.FAULT_PUT) == 1)
        assert two.a.qemu.interrupts(2) == 1
        record = self.record(two.a)
        assert (record.address, record.command, record.write) == (BASE, mine, 0)
        assert record.cause == FaultCause.NOT_VALID
        two.a.at(DATA, 8)[:] = b"repaired"
        self.entry(two.a, 0, DATA)
        two.a.write(Common.FAULT_REPLAY, Replay.AGAIN)
        two.wait(lambda: two.a.fence == value)
        assert bytes(two.b.at(DATA, 8)) == b"repaired"

    def test_a_remote_page_is_repaired_while_the_requester_waits(self, two: Two) -> None:
        mine = two.a.region(0)
        theirs = two.b.region(0, iova=TABLE, flags=self.FLAGS)
        two.a.at(DATA, 4)[:] = b"wait"
        value = two.a.post(request(NicOpcode.WRITE, mine, theirs, 4))
        two.wait(lambda: two.b.read(Common.FAULT_PUT) == 1)
        assert two.a.fence != value
        assert self.record(two.b).write == 1
        self.entry(two.b, 0, DATA)
        two.b.write(Common.FAULT_REPLAY, Replay.AGAIN)
        two.wait(lambda: two.a.fence == value)
        assert bytes(two.b.at(DATA, 4)) == b"wait"

    def test_cancelled_there_it_fails_here(self, two: Two) -> None:
        mine = two.a.region(0)
        theirs = two.b.region(0, iova=TABLE, flags=self.FLAGS)
        two.a.post(request(NicOpcode.WRITE, mine, theirs, 4))
        two.wait(lambda: two.b.read(Common.FAULT_PUT) == 1)
        two.b.write(Common.FAULT_REPLAY, Replay.CANCEL)
        two.wait(lambda: two.a.halted)
        assert two.a.read(Common.ERROR_CAUSE) == Cause.PAGE_FAULT

    def test_invalidated_it_faults_again(self, two: Two) -> None:
        mine = two.a.region(0, iova=TABLE, flags=self.FLAGS)
        theirs = two.b.region(0)
        self.entry(two.a, 0, DATA)
        two.run(request(NicOpcode.WRITE, mine, theirs, 4))
        self.entry(two.a, 0, 0, bits=0)
        two.run(request(NicOpcode.WRITE, mine, theirs, 4))  # it still knows the page
        two.a.write(Nic.REGION_INVALIDATE, 0)
        two.a.post(request(NicOpcode.WRITE, mine, theirs, 4))
        two.wait(lambda: two.a.read(Common.FAULT_PUT) == 1)

    def test_a_late_answer_meets_no_other_request(self, two: Two) -> None:
        mine = two.a.region(0)
        slow = two.b.region(0, iova=TABLE, flags=self.FLAGS)
        quick = two.b.region(1, iova=DATA + PAGE)
        two.a.post(request(NicOpcode.READ, mine, slow, 4))
        two.wait(lambda: two.b.read(Common.FAULT_PUT) == 1)
        two.a.write(Common.RESET, 1)
        two.a.set_up()
        mine = two.a.region(0)
        two.b.at(DATA, 4)[:] = b"slow"
        two.b.at(DATA + PAGE, 4)[:] = b"fast"
        self.entry(two.b, 0, DATA)
        two.b.write(Common.FAULT_REPLAY, Replay.AGAIN)
        two.run(request(NicOpcode.READ, mine, quick, 4))
        assert bytes(two.a.at(DATA, 4)) == b"fast"

    def test_a_source_that_goes_while_its_target_is_repaired(self, two: Two) -> None:
        nic = two.a
        source = nic.region(0, iova=TABLE, flags=self.FLAGS)
        target = nic.region(1, iova=TABLE + 2 * PAGE, flags=self.FLAGS)
        self.entry(nic, 0, DATA)
        value = nic.post(request(NicOpcode.WRITE, source, target, 4, peer=1))
        two.wait(lambda: nic.read(Common.FAULT_PUT) == 1)
        self.entry(nic, 0, 0, bits=0)  # the source is evicted
        nic.write(Nic.REGION_INVALIDATE, 0)
        self.entry(nic, 2 * PAGE // 8, DATA + PAGE)
        nic.write(Common.FAULT_REPLAY, Replay.AGAIN)
        two.wait(lambda: nic.read(Common.FAULT_PUT) == 2)
        assert [self.record(nic, n).write for n in (0, 1)] == [1, 0]
        nic.at(DATA + 2 * PAGE, 4)[:] = b"back"
        self.entry(nic, 0, DATA + 2 * PAGE)
        nic.write(Common.FAULT_REPLAY, Replay.AGAIN)
        two.wait(lambda: nic.fence == value)
        assert bytes(nic.at(DATA + PAGE, 4)) == b"back"

    def test_read_only_page(self, two: Two) -> None:
        mine = two.a.region(0)
        theirs = two.b.region(0, iova=TABLE, flags=self.FLAGS)
        self.entry(two.b, 0, DATA, bits=1)
        two.run(request(NicOpcode.READ, mine, theirs, 4))
        two.a.post(request(NicOpcode.WRITE, mine, theirs, 4))
        two.wait(lambda: two.b.read(Common.FAULT_PUT) == 1)
        assert self.record(two.b).cause == FaultCause.NOT_WRITABLE

    def test_a_reset_there_fails_it_here(self, two: Two) -> None:
        mine = two.a.region(0)
        theirs = two.b.region(0, iova=TABLE, flags=self.FLAGS)
        two.a.post(request(NicOpcode.WRITE, mine, theirs, 4))
        two.wait(lambda: two.b.read(Common.FAULT_PUT) == 1)
        two.b.write(Common.RESET, 1)
        two.wait(lambda: two.a.halted)


@pytest.mark.parametrize(
    ("index", "flags", "pages", "base"),
    [
        (64, ALL, 1, 0),
        (0, 0, 1, 0),
        (0, ALL, 0, 0),
        (0, ALL, 2, (1 << 64) - PAGE),
        (0, ALL | RegionFlag.ON_DEMAND, 1, 1),
    ],
)
def test_regions_that_cannot_be(two: Two, index: int, flags: int, pages: int, base: int) -> None:
    assert two.a.region(index, flags=flags, pages=pages, base=base) == 0
