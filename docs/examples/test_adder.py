# SPDX-License-Identifier: Apache-2.0
"""The adder's driver and its tests: in a machine, and (the last one) without.

pytest docs/examples/test_adder.py --testbed-topology docs/examples/adder.yaml --testbed-trust
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import pytest
from adder import ADDRESS, COUNT, DONE, REFUSED, STATE, SUM, Adder

from testbed.driver import Driver
from testbed.models.testing import FakeQemu


class AdderDriver(Driver):
    """What the card can do, with names."""

    def add_up(self, address: int, count: int) -> int:
        """Start at a bus address, wait for the interrupt; the state it ended in."""
        self.write64(ADDRESS, address)
        self.write32(COUNT, count)
        assert self.wait_interrupt(0) == 1, "no interrupt"
        return self.read32(STATE)

    def sum_of(self, numbers: Sequence[int]) -> int:
        """Put the numbers where the card finds them, and have them added."""
        buffer = self.buffer(4 * len(numbers))
        buffer.write(struct.pack(f"<{len(numbers)}I", *numbers))
        assert self.add_up(buffer.iova, len(numbers)) == DONE
        return self.read64(SUM)


@pytest.fixture
def adder(rack) -> Iterator[AdderDriver]:
    with AdderDriver(rack.nodes["host0"], "adder0") as driver:
        driver.arm(0)
        yield driver
        driver.check()  # an exception in the model is a failure here


@pytest.mark.requirement("ADD-01")
def test_it_adds(adder) -> None:
    assert adder.sum_of([1, 2, 0xFFFFFFFF]) == 0x1_0000_0002


@pytest.mark.requirement("ADD-02")
def test_what_is_not_mapped_faults(adder) -> None:
    with adder.watch_faults() as watch:
        assert adder.add_up(0xDEAD0000, 4) == REFUSED
    assert {(f.requester, f.address) for f in watch.window.records} == {(adder.bdf, 0xDEAD0000)}


def test_it_adds_without_a_machine() -> None:
    with FakeQemu(Adder("adder0")) as qemu:
        qemu.arm(0)
        qemu.add_memory(0x10000, 4096).view[:8] = struct.pack("<2I", 1, 2)
        qemu.write(0, ADDRESS, 0x10000, 8)
        qemu.write(0, COUNT, 2)
        qemu.wait(lambda: qemu.interrupts(0) == 1)
        assert qemu.read(0, SUM, 8) == 3
