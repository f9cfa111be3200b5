# SPDX-License-Identifier: Apache-2.0
"""Disks and peer-to-peer memory as sysfs shows them, with files for the kernel."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from guest_agent.hw import acs, storage
from guest_agent.hw.memory import Buffers
from guest_agent.hw.region import Region
from guest_agent.rpc import ParameterError
from tests.unit.agent.fake_sysfs import FakeSysfs, config_space

BDF = "0000:05:00.0"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "DEVICES", str(tmp_path / "devices"))
    monkeypatch.setattr("guest_agent.sysfs.ROOT", str(tmp_path))
    folder = tmp_path / "devices" / BDF
    folder.mkdir(parents=True)
    return folder


def test_a_controller_s_namespace_is_found_by_its_address(device: Path, tmp_path: Path) -> None:
    (device / "nvme" / "nvme3").mkdir(parents=True)
    assert storage.namespaces() == {}
    block = tmp_path / "block" / "nvme3n1"
    block.mkdir(parents=True)
    (block / "size").write_text("2048\n")
    assert storage.namespaces() == {BDF: {"disk": "/dev/nvme3n1", "size_bytes": 1 << 20}}


@pytest.mark.parametrize("word", ["without_disks", "disks"])
def test_who_said_that_he_looks_at_none_is_told_so(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setattr(storage, "DISKS_FILE", str(tmp_path / "disks"))
    monkeypatch.setattr("guest_agent.modules.is_loaded", lambda _: True)
    (tmp_path / "disks").write_text(word)
    region = Region(mmap.mmap(-1, mmap.PAGESIZE))
    asks = (
        storage.start,
        storage.namespaces,
        lambda: storage.transfer(BDF, region, 0, 512, 0, write=False),
    )
    for ask in asks[: 2 if word == "disks" else 3]:
        if word == "disks":
            assert not ask()
        else:
            with pytest.raises(OSError, match="in a test that is `without_disks`"):
                ask()


def test_a_driver_that_is_a_module_is_loaded_and_its_disks_are_waited_for(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (device / "class").write_text("0x010802\n")
    loaded: list[str] = []

    def probe(_: float) -> None:
        (device / "nvme" / "nvme0").mkdir(parents=True)
        (tmp_path / "block/nvme0n1").mkdir(parents=True)
        (tmp_path / "block/nvme0n1/size").write_text("8\n")

    monkeypatch.setattr("guest_agent.modules.is_loaded", lambda name: name in loaded)
    monkeypatch.setattr("guest_agent.modules.load", loaded.append)
    monkeypatch.setattr("time.sleep", probe)
    storage.start()
    assert loaded == ["nvme"]
    assert BDF in storage.namespaces()
    storage.start()
    assert loaded == ["nvme"]


def test_providers_and_their_memory(device: Path) -> None:
    assert storage.providers() == {}
    with pytest.raises(OSError, match="has no peer-to-peer memory"):
        storage.allocate(BDF, 4096)
    folder = device / "p2pmem"
    folder.mkdir()
    for name, value in {"size": "65536", "available": "61440", "published": "1"}.items():
        (folder / name).write_text(value + "\n")
    (folder / "allocate").write_bytes(bytes(65536))
    assert storage.providers() == {
        BDF: {"size_bytes": 65536, "available_bytes": 61440, "published": True}
    }
    buffers = Buffers()
    buffers.adopt("peer", storage.allocate(BDF, 8192))
    assert buffers.get("peer").size_bytes == 8192
    with pytest.raises(ParameterError, match="taken"):
        buffers.adopt("peer", storage.allocate(BDF, 4096))
    with pytest.raises(ParameterError, match="multiple of 4096"):
        storage.allocate(BDF, 100)
    buffers.close()


def test_a_transfer_is_what_the_kernel_says_of_it(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * 8192)
    monkeypatch.setattr(
        storage, "namespaces", lambda: {BDF: {"disk": str(disk), "size_bytes": 8192}}
    )
    monkeypatch.setattr(os, "O_DIRECT", 0)  # this file's file system may have none
    region = Region(mmap.mmap(-1, 8192))
    read = storage.transfer(BDF, region, 4096, 4096, 0, write=False)
    assert read == {"bytes": 4096, "error": ""}
    assert region.read(4096, 2) == b"dd"
    assert region.read(0, 2) == bytes(2)
    assert storage.transfer(BDF, region, 0, 4096, 4096, write=True)["bytes"] == 4096
    assert disk.read_bytes()[4096:] == bytes(4096)
    with pytest.raises(ParameterError, match="no NVMe controller"):
        storage.transfer("0000:06:00.0", region, 0, 4096, 0, write=False)
    with pytest.raises(ParameterError, match="beyond the end"):
        storage.transfer(BDF, region, 4096, 8192, 0, write=False)

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    answer = storage.transfer(BDF, region, 0, 4096, 0, write=False)
    assert answer == {"bytes": 0, "error": "EINVAL"}
    region.close()


def test_acs_is_changed_only_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSysfs(tmp_path)
    monkeypatch.setattr("guest_agent.sysfs.ROOT", str(tmp_path))
    without = fake.function("0000:00:03.0", config_space())
    port = fake.function("0000:00:04.0", config_space(extended=((0x0D, b"\x5f\0\x1d\0"),)))
    before = (port / "config").read_bytes()
    assert acs.set_control("0000:00:04.0", 0x11) == 0x1D
    after = (port / "config").read_bytes()
    assert [i for i in range(4096) if before[i] != after[i]] == [0x106]
    assert after[0x106] == 0x11
    with pytest.raises(ParameterError, match=r"0000:00:03\.0 has no ACS capability"):
        acs.set_control("0000:00:03.0", 0)
    with pytest.raises(ParameterError, match="seven bits"):
        acs.set_control("0000:00:04.0", 0x80)
    assert (without / "config").read_bytes() == config_space()
