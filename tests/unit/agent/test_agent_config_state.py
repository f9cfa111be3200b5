# SPDX-License-Identifier: Apache-2.0
"""A function's settings, kept before a reset, given back and compared after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guest_agent.hw import config_state
from guest_agent.hw.config_state import Kept

FUNCTION = "0000:02:00.0"
EXPRESS, ATS = 0x40, 0x100
DEVICE_CONTROL, ATS_CONTROL = EXPRESS + 8, ATS + 6


def in_use() -> bytearray:
    """A function with an express capability and ATS, as the kernel has set it up."""
    space = bytearray(4096)
    space[0:4] = b"\x36\x1b\x10\x00"
    space[4:6] = b"\x06\x04"
    space[6:8] = b"\x10\x00"  # has capabilities
    space[0x10:0x18] = b"\x0c\x00\x00\x40\x10\x00\x00\x00"
    space[0x34] = EXPRESS
    space[EXPRESS : EXPRESS + 2] = b"\x10\x00"
    space[DEVICE_CONTROL : DEVICE_CONTROL + 2] = b"\x2f\x51"
    space[ATS : ATS + 4] = b"\x0f\x00\x01\x00"
    space[ATS_CONTROL : ATS_CONTROL + 2] = b"\x00\x80"
    return space


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its file."""
    monkeypatch.setattr(config_state, "PCI", str(tmp_path))
    file = tmp_path / FUNCTION / "config"
    file.parent.mkdir()
    file.write_bytes(in_use())
    return file


def reset(config: Path) -> None:
    space = in_use()
    for begin, end in ((4, 6), (0x14, 0x18), (0x48, 0x4A), (0x106, 0x108)):
        space[begin:end] = bytes(end - begin)
    space[0x10:0x14] = b"\x0c\x00\x00\x00"
    config.write_bytes(space)


def test_what_a_reset_took_is_given_back(config: Path) -> None:
    kept = Kept(FUNCTION)
    reset(config)
    assert config.read_bytes() != in_use()
    assert kept.give_back() == ""
    assert config.read_bytes() == in_use()


def test_a_function_decodes_its_addresses_last(config: Path) -> None:
    assert Kept(FUNCTION).registers[-1] == (4, b"\x06\x04")


def test_another_function_in_its_place_is_seen(config: Path) -> None:
    kept = Kept(FUNCTION)
    reset(config)
    with config.open("r+b") as file:
        file.seek(2)
        file.write(b"\x11")
    said = "0000:02:00.0: its register 0x00 is 0x00111b36, and was 0x00101b36"
    assert kept.give_back() == said


def test_none_in_its_place_is_seen(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(FUNCTION)
    config.write_bytes(b"\xff" * 4096)
    monkeypatch.setattr(os, "pwrite", lambda *_: None)
    assert kept.give_back() == "0000:02:00.0 is not there"


def test_what_happened_meanwhile_is_no_difference(config: Path) -> None:
    kept = Kept(FUNCTION)
    with config.open("r+b") as file:
        file.seek(7)
        file.write(b"\x20")  # a master abort, in the status
    assert kept.give_back() == ""
