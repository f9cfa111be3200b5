# SPDX-License-Identifier: Apache-2.0
"""The file of devices' states: its sections are told apart, or it is not used."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.machine.saving import save
from testbed.machine.state_stream import HEAD, sections, without

END = b"\0"


def section(number: int, name: str, body: bytes) -> bytes:
    mark = struct.pack(">I", number)
    versions = struct.pack(">II", 0, 1)
    return b"\x04" + mark + bytes([len(name)]) + name.encode() + versions + body + b"\x7e" + mark


# A body that holds its own end mark, and one that is empty.
APIC = section(7, "apic", b"ab" + b"\x7e\0\0\0\x07" + b"cd")
BELL = section(9, "0000:00:03.0/ivshmem-doorbell", b"")
CPU = section(300, "cpu", b"\x04" * 40)
STATE = HEAD + APIC + BELL + CPU + END


def test_sections_are_found_in_order() -> None:
    found = sections(STATE)
    assert [STATE[each.begin : each.end] for each in found] == [APIC, BELL, CPU]
    assert [each.name for each in found] == ["apic", "0000:00:03.0/ivshmem-doorbell", "cpu"]


def test_a_device_is_left_out_and_nothing_else() -> None:
    assert without(STATE, "/ivshmem-doorbell") == HEAD + APIC + CPU + END
    assert without(STATE, "/edu") == STATE


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (b"", "first bytes"),
        (b"QEVM\0\0\0\4" + APIC + END, "first bytes"),
        (HEAD + b"\x07" + END, "no section begins at byte 8"),
        (HEAD + APIC, "section 7 has no end"),
        (STATE[:-1], "section 300 has no end"),
        (STATE + END, "section 300 has no end"),
        (HEAD + APIC + CPU[:-3] + END, "section 300 has no end"),
    ],
)
def test_what_is_not_understood_is_refused(state: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        sections(state)


@given(st.binary(max_size=200), st.integers(min_value=0, max_value=len(STATE)))
def test_nothing_but_a_refusal_comes_of_damage(noise: bytes, at: int) -> None:
    for damaged in (STATE[:at] + noise, STATE[:at] + noise + STATE[at:], HEAD + noise):
        try:
            found = sections(damaged)
        except ValueError:
            continue
        parts = b"".join(damaged[each.begin : each.end] for each in found)
        assert HEAD + parts + END == damaged


def test_what_is_saved_has_no_bells(tmp_path: Path) -> None:
    said: list[str] = []

    def execute(command: str, arguments: Any = None) -> None:
        said.append(command)
        if arguments:
            Path(arguments["filename"]).write_bytes(STATE)

    qemu: Any = SimpleNamespace(node="host0", execute=execute)
    save(qemu, tmp_path / "state")
    assert said == ["stop", "xen-save-devices-state"]
    assert (tmp_path / "state").read_bytes() == HEAD + APIC + CPU + END
