# SPDX-License-Identifier: Apache-2.0
"""The example device of the documentation: the test that a user would write for it."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import pytest

from testbed.models.serve import make_device
from testbed.models.spec import DeviceSpec
from testbed.models.testing import FakeQemu
from testbed.models.witness import Path

EXAMPLE = FilePath(__file__).parents[3] / "docs" / "examples" / "adder.py"
ADDRESS, COUNT, SUM, STATE = 0x00, 0x08, 0x10, 0x18


@pytest.fixture
def adder() -> Any:
    spec = DeviceSpec("adder0", f"{EXAMPLE}:Adder", FilePath("adder0.vfu"))
    return make_device(spec, {}, trusted=True)


def test_it_adds(adder: Any) -> None:
    with FakeQemu(adder) as qemu:
        qemu.arm(0)
        memory = qemu.add_memory(0x10000, 4096)
        memory.view[:12] = b"\1\0\0\0\2\0\0\0\xff\xff\xff\xff"
        qemu.write(0, ADDRESS, 0x10000, 8)
        qemu.write(0, COUNT, 3)
        qemu.wait(lambda: qemu.interrupts(0) == 1)
        assert (qemu.read(0, STATE), qemu.read(0, SUM, 8)) == (2, 0x1_0000_0002)


def test_it_says_when_it_is_refused(adder: Any) -> None:
    with FakeQemu(adder) as qemu:
        qemu.arm(0)
        qemu.write(0, ADDRESS, 0x10000, 8)
        qemu.write(0, COUNT, 3)
        qemu.wait(lambda: qemu.interrupts(0) == 1)
        assert qemu.read(0, STATE) == 3
        assert [fault.address for fault in qemu.faults] == [0x10000]


def test_a_guest_cannot_make_it_grow(adder: Any) -> None:
    with FakeQemu(adder) as qemu:
        qemu.arm(0)
        qemu.add_memory(0, 1 << 30)
        qemu.write(0, COUNT, 0xFFFFFFFF)
        qemu.wait(lambda: qemu.interrupts(0) == 1)
        assert qemu.read(0, STATE) == 3
        assert adder.witness.bytes_by(Path.IOMMU, write=False) == 0


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
