# SPDX-License-Identifier: Apache-2.0
"""Choosing kernel modules, in the order in which they can be loaded."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from testbed.errors import SetupError
from testbed.host import modules
from testbed.host.manifest import ModuleLists

from .test_cpio import read


def module(*depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=x\0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """virtio-net → net_failover → failover; vfio-pci → vfio-pci-core → vfio, irqbypass."""
    kernel = tmp_path / "kernel"
    kernel.mkdir()
    for name, data in {
        "virtio-net.ko.xz": lzma.compress(module("net_failover")),
        "net_failover.ko.zst": zstandard.compress(module("failover")),
        "failover.ko.gz": gzip.compress(module()),
        "vfio-pci.ko": module("vfio-pci-core", "vfio"),
        "vfio-pci-core.ko": module("vfio", "irqbypass"),
        "vfio.ko": module(),
        "broken.ko.xz": b"broken",
        "orphan.ko": module("nowhere"),
    }.items():
        (kernel / name).write_bytes(data)
    (tmp_path / "modules.builtin").write_text("kernel/virt/lib/irqbypass.ko\nkernel/nvme.ko\n")
    return tmp_path


def built(folder: Path | None, boot: list[str], lazy: list[str]) -> tuple[dict[str, bytes], object]:
    wanted = ModuleLists(boot=tuple(boot), lazy=tuple(lazy))
    packed = modules.build("1.0", modules.find(folder), wanted)
    prefix = "usr/lib/modules/1.0/"
    files = {
        name.removeprefix(prefix): content
        for name, _, content, *_ in read(packed.data)
        if name.startswith(prefix)
    }
    return files, packed.missing


def test_dependencies_come_first_and_everything_is_uncompressed(folder: Path) -> None:
    files, missing = built(folder, ["virtio_net"], ["vfio_pci", "nvme"])
    assert missing == ()
    assert files["boot"].decode().split() == ["failover", "net_failover", "virtio_net"]
    assert files["closure"].decode().splitlines() == [
        "virtio_net failover net_failover virtio_net",
        "vfio_pci vfio vfio_pci_core vfio_pci",
        "nvme",
    ]
    assert files["virtio_net.ko"] == module("net_failover")
    assert files["net_failover.ko"] == module("failover")
    assert files["failover.ko"] == module()
    assert {name for name in files if name.endswith(".ko")} == {
        *("virtio_net.ko", "net_failover.ko", "failover.ko"),
        *("vfio_pci.ko", "vfio_pci_core.ko", "vfio.ko"),
    }


def test_what_is_not_there_is_named(folder: Path) -> None:
    files, missing = built(folder, ["virtio_net"], ["igb", "orphan"])
    assert missing == ("igb", "orphan")
    assert files["closure"].decode().split()[0] == "virtio_net"
    assert "orphan.ko" not in files, "a module that cannot be loaded is no use"


def test_a_kernel_without_modules(tmp_path: Path) -> None:
    files, missing = built(None, ["virtio_net"], ["nvme"])
    assert missing == ("virtio_net", "nvme")
    assert files == {"boot": b"", "closure": b""}


def test_a_broken_module_is_told(folder: Path) -> None:
    with pytest.raises(SetupError, match=r"broken\.ko\.xz"):
        built(folder, ["broken"], [])
