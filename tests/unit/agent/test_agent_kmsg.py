# SPDX-License-Identifier: Apache-2.0
"""Reading /dev/kmsg: one record a read, gaps, and looking back."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from guest_agent.observe import kmsg


class Device:
    """Stands for /dev/kmsg: hands out whole records, and fails like it when some were lost."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.reader.setblocking(False)
        self.log = kmsg.KernelLog()
        self.log._fd = os.dup(self.reader.fileno())

    def say(self, number: int, text: str) -> None:
        self._writer.send(f"6,{number},{number * 100},-;{text}\n SUBSYSTEM=pci\n".encode())

    def close(self) -> None:
        self.log.close()
        self.reader.close()
        self._writer.close()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


def test_a_record_has_its_parts() -> None:
    assert kmsg.parse(b"30,1234,5678901,-,caller=T1;systemd: a;b\n KEY=value\n") == {
        "sequence": 1234,
        "time_us": 5678901,
        "level": 6,
        "facility": 3,
        "text": "systemd: a;b",
    }


def test_since_a_mark_are_the_later_records(device: Device) -> None:
    device.say(7, "before")
    mark = device.log.mark()
    device.say(8, "after")
    records, lost = device.log.since(mark)
    assert (mark, [r["text"] for r in records], lost) == (8, ["after"], 0)
    assert [r["text"] for r in device.log.since(0)[0]] == ["before", "after"]


def test_overwritten_records_are_counted_as_lost(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.say(1, "seen")
    mark = device.log.mark()
    device.say(12, "after the gap")
    real_read, broken = os.read, [True]

    def read(fd: int, size: int) -> bytes:
        if broken:
            broken.pop()
            raise BrokenPipeError
        return real_read(fd, size)

    monkeypatch.setattr(kmsg.os, "read", read)  # type: ignore[attr-defined]
    records, lost = device.log.since(mark)
    assert ([r["text"] for r in records], lost) == (["after the gap"], 10)


def test_words_choose_records_but_do_not_count_as_lost(device: Device) -> None:
    for number, text in enumerate(["DMAR: a", "other", "AMD-Vi: b"]):
        device.say(number, text)
    records, lost = device.log.since(0, (b"DMAR:", b"AMD-Vi:"))
    assert ([r["text"] for r in records], lost) == (["DMAR: a", "AMD-Vi: b"], 0)


def test_the_oldest_go_when_too_many_are_kept(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmsg, "_KEPT_RECORDS", 2)
    for number in range(4):
        device.say(number, str(number))
    records, lost = device.log.since(0)
    assert ([r["text"] for r in records], lost) == (["2", "3"], 2)
