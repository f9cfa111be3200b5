# SPDX-License-Identifier: Apache-2.0
"""The configuration space as a guest kernel reads, sizes and writes it."""

from __future__ import annotations

from struct import pack, unpack_from

import pytest

from testbed.models.config import (
    BAR0,
    COMMAND,
    STATUS,
    Bar,
    Capability,
    ConfigSpace,
    Extended,
    Identity,
    MsixLayout,
)
from testbed.models.memory import SharedMemory

IDENTITY = Identity(0x1234, 0x5678, 0x030200, 7, 0x1111, 0x2222)


def space(*bars: Bar) -> ConfigSpace:
    config = ConfigSpace(IDENTITY, bars)
    config.add_power_management()
    config.add_msi(4)
    config.add_msix(MsixLayout(8, 2, 0x1000, 0x2000))
    config.add_pcie()
    config.add_vendor(b"data")
    config.add_error_reporting()
    config.add_extended(Extended.VENDOR, b"more", version=2)
    return config.seal()


def test_identity() -> None:
    config = space()
    assert unpack_from("<HH", config.bytes) == (0x1234, 0x5678)
    assert unpack_from("<I", config.bytes, 8) == (0x03020007,)
    assert unpack_from("<HH", config.bytes, 0x2C) == (0x1111, 0x2222)


def walk(config: ConfigSpace) -> dict[int, int]:
    """Capability numbers and offsets, as drivers/pci/pci.c finds them."""
    assert config.bytes[STATUS] & 0x10
    found = {}
    at = config.bytes[0x34]
    while at:
        assert at % 4 == 0
        found[config.bytes[at]] = at
        at = config.bytes[at + 1]
    return found


def test_capabilities_are_linked() -> None:
    assert list(walk(space())) == [
        Capability.PM,
        Capability.MSI,
        Capability.MSIX,
        Capability.PCIE,
        Capability.VENDOR,
    ]


def test_extended_capabilities_are_linked() -> None:
    config = space()
    (first,) = unpack_from("<I", config.bytes, 0x100)
    assert first & 0xFFFF == Extended.AER
    assert first >> 16 & 0xF == 2
    at = first >> 20
    (second,) = unpack_from("<I", config.bytes, at)
    assert (second & 0xFFFF, second >> 16 & 0xF, second >> 20) == (Extended.VENDOR, 2, 0)
    assert config.bytes[at + 4 : at + 8] == b"more"


def test_the_capabilities_say_what_they_should() -> None:
    config = space()
    at = walk(config)
    assert unpack_from("<HII", config.bytes, at[Capability.MSIX] + 2) == (7, 0x1002, 0x2002)
    assert unpack_from("<H", config.bytes, at[Capability.MSI] + 2) == (0x80 | 2 << 1,)
    express = at[Capability.PCIE]
    flags, device = unpack_from("<HI", config.bytes, express + 2)
    assert (flags & 0xF, flags >> 4 & 0xF) == (2, 0)  # version 2, endpoint
    assert device & 1 << 28  # function level reset
    (status,) = unpack_from("<H", config.bytes, express + 0x12)
    assert (status & 0xF, status >> 4 & 0x3F) == (4, 16)
    assert config.bytes[at[Capability.VENDOR] + 2] == 7  # its length
    assert config.bytes[at[Capability.VENDOR] + 3 : at[Capability.VENDOR] + 7] == b"data"


@pytest.mark.parametrize(
    ("bar", "words"),
    [
        (Bar(0, 0x1000), (0xFFFFF000,)),
        (Bar(1, 1 << 20, prefetchable=True), (0xFFF00008,)),
        (Bar(2, 1 << 26, is_64bit=True, prefetchable=True), (0xFC00000C, 0xFFFFFFFF)),
        (Bar(4, 1 << 33, is_64bit=True), (0x00000004, 0xFFFFFFFE)),
    ],
)
def test_bars_are_sized(bar: Bar, words: tuple[int, ...]) -> None:
    config = space(bar)
    at = BAR0 + 4 * bar.index
    config.write(at, b"\xff" * 4 * len(words))
    assert unpack_from(f"<{len(words)}I", config.bytes, at) == words


@pytest.mark.parametrize(
    ("index", "size", "wide"), [(6, 16, False), (5, 16, True), (0, 8, False), (0, 48, False)]
)
def test_bars_that_cannot_be(index: int, size: int, wide: bool) -> None:
    with pytest.raises(ValueError, match="BAR"):
        Bar(index, size, is_64bit=wide)


@pytest.mark.parametrize(
    "areas", [((1, 4096),), ((0, 0),), ((4096, 4096), (0, 4096)), ((0, 1 << 21),)]
)
def test_areas_that_cannot_be(areas: tuple[tuple[int, int], ...]) -> None:
    memory = SharedMemory.create(1 << 20, name="m")
    with pytest.raises(ValueError, match="BAR 0"):
        Bar(0, 1 << 20, memory=memory, areas=areas)


def test_part_of_a_bar_is_direct() -> None:
    memory = SharedMemory.create(1 << 20, name="m")
    bar = Bar(0, 1 << 20, memory=memory, areas=((4096, 8192),))
    assert bar.direct(4096, 8192) is not None
    assert bar.direct(0, 4) is None
    assert bar.direct(12284, 8) is None
    assert Bar(0, 1 << 20, memory=memory).direct(0, 4) is not None
    assert Bar(0, 1 << 20).direct(0, 4) is None


def test_read_only_words_stay() -> None:
    config = space()
    before = bytes(config.bytes)
    for at in range(0, 4096, 4):
        if at not in range(0x04, 0x08) and config.write(at, before[at : at + 4]):
            raise AssertionError(f"a reset at {at:#x}")
    config.write(0, b"\xff" * 4)
    config.write(0x34, b"\xff")
    assert bytes(config.bytes[:4]) == before[:4]
    assert config.bytes[0x34] == before[0x34]


def test_command_and_bus_mastering() -> None:
    config = space()
    assert not config.bus_master
    config.write(COMMAND, pack("<H", 0xFFFF))
    assert config.bus_master
    assert unpack_from("<H", config.bytes, COMMAND) == (0x0546,)
    config.reset()
    assert not config.bus_master


def test_status_bits_are_cleared_by_ones() -> None:
    config = space()
    config.bytes[STATUS + 1] = 0x20
    config.write(STATUS, b"\0\0")
    assert config.bytes[STATUS + 1] == 0x20
    config.write(STATUS, b"\0\x20")
    assert config.bytes[STATUS + 1] == 0
    assert config.bytes[STATUS] & 0x10


def test_a_function_level_reset_is_seen_once() -> None:
    config = space()
    control = walk(config)[Capability.PCIE] + 8
    assert config.write(control, pack("<H", 0x2810 | 0x8000))
    assert unpack_from("<H", config.bytes, control) == (0x2810,)
    assert not config.write(control, pack("<H", 0x2810))
    assert unpack_from("<H", config.bytes, control) == (0x2810,)


def test_there_is_an_end_to_it() -> None:
    config = ConfigSpace(IDENTITY, ())
    for _ in range((0x100 - 0x40) // 24):
        config.add_vendor(bytes(20))
    with pytest.raises(ValueError, match="no room"):
        config.add_vendor(bytes(20))
    for _ in range((0x1000 - 0x100) // 204):
        config.add_extended(Extended.VENDOR, bytes(200))
    with pytest.raises(ValueError, match="no room"):
        config.add_extended(Extended.VENDOR, bytes(200))
