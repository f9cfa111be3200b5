# SPDX-License-Identifier: Apache-2.0
"""The accelerator's probe against programs that act like QEMU on good and on bad hosts."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from testbed.errors import HostError
from testbed.host import accelerator, probe
from testbed.host.kernel import KernelImage
from testbed.host.toolroot import Qemu

SPEAKS = "echo 'Linux version 7.2.0'; exec sleep 60"
SILENT = "exec sleep 60"
STUBBORN = "trap '' TERM; echo BIOS; while :; do sleep 1; done"
REFUSES = "echo 'failed to initialize kvm' >&2; exit 1"


@dataclasses.dataclass
class Host:
    """A host with a KVM device, a kernel and a program in the place of QEMU."""

    folder: Path
    kernel: KernelImage
    kvm: accelerator.Kvm

    def qemu(self, behaviour: str) -> Qemu:
        program = self.folder / "qemu"
        program.write_text(f'#!/bin/sh\necho $$ >>"{self.folder}/starts"\n{behaviour}\n')
        program.chmod(0o755)
        return Qemu((str(program),), {}, "0", "", behaviour)

    def pids(self) -> list[int]:
        file = self.folder / "starts"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def ask(self, qemu: Qemu, deadline_s: float = 0.5) -> accelerator.Accelerator:
        memory = self.folder / "memory.json"
        return accelerator.probe(
            qemu, self.kernel, kvm=self.kvm, memory=memory, deadline_s=deadline_s
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "kvm").write_text("")
    (tmp_path / "boot_id").write_text("first boot")
    kernel = KernelImage(
        name="k",
        release="7.2",
        image=tmp_path / "vmlinux",
        pvh=True,
        sha256="ab",
        source=tmp_path / "vmlinuz",
        config=None,
        modules=tmp_path / "modules.cpio",
        missing=(),
    )
    return Host(tmp_path, kernel, accelerator.Kvm(tmp_path / "kvm", tmp_path / "boot_id"))


def test_a_guest_that_speaks(host: Host) -> None:
    found = host.ask(host.qemu(SPEAKS), deadline_s=20)
    assert found.name == "kvm"


@pytest.mark.parametrize("behaviour", [SILENT, STUBBORN])
def test_a_guest_that_never_runs(host: Host, behaviour: str) -> None:
    began_s = time.monotonic()
    found = host.ask(host.qemu(behaviour), deadline_s=1)
    assert found.name == "tcg"
    assert "no guest kernel said a word" in found.why
    assert time.monotonic() - began_s < 15
    assert not any(Path(f"/proc/{pid}").exists() for pid in host.pids()), "it was reaped"


def test_a_qemu_that_refuses(host: Host) -> None:
    found = host.ask(host.qemu(REFUSES), deadline_s=20)
    assert found.name == "tcg"
    assert "failed to initialize kvm" in found.why


def test_no_device(host: Host) -> None:
    host.kvm.device.unlink()
    assert host.ask(host.qemu(SPEAKS)).why == f"there is no {host.kvm.device}"
    assert host.pids() == []


def test_no_qemu(host: Host) -> None:
    found = host.ask(Qemu(("/nowhere/qemu",)))
    assert found.name == "tcg"


def test_the_answer_is_remembered_until_something_changes(host: Host) -> None:
    qemu = host.qemu(REFUSES)
    first = host.ask(qemu, 20)
    assert host.ask(qemu, 20) == first
    assert len(host.pids()) == 1
    host.kvm.boot_id.write_text("second boot")
    host.ask(qemu, 20)
    assert len(host.pids()) == 2
    host.ask(dataclasses.replace(qemu, identity="another"), 20)
    assert len(host.pids()) == 3
    host.kernel = dataclasses.replace(host.kernel, sha256="cd")
    host.ask(qemu, 20)
    assert len(host.pids()) == 4


def test_a_broken_memory_is_no_obstacle(host: Host) -> None:
    (host.folder / "memory.json").write_text("{")
    assert host.ask(host.qemu(REFUSES), 20).name == "tcg"


def test_the_devices_that_qemu_knows(host: Host) -> None:
    qemu = host.qemu('printf \'Network devices:\\nname "igb", bus PCI\\nname "edu", bus PCI\\n\'')
    assert probe.qemu_devices(qemu) == {"igb", "edu"}
    with pytest.raises(HostError, match="does not list"):
        probe.qemu_devices(host.qemu("exit 1"))
