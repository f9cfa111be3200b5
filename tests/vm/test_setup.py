# SPDX-License-Identifier: Apache-2.0
"""What the set-up makes really boots, and holds what it is said to hold."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.guest.link import GuestLink
from testbed.host import child, kernel, manifest, prepare
from testbed.host.kernel import KernelImage
from testbed.host.keys import RackKeys
from testbed.host.overlay import build_initrd
from testbed.host.packages import SetupOptions
from testbed.host.prepare import Installation

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

BOOT_TIMEOUT_S = 90.0
READY = "testbed: ready"


@dataclasses.dataclass
class Machine:
    """A guest with nothing but the set-up's own products, and QEMU's simplest command line."""

    folder: Path
    process: subprocess.Popen[bytes]
    keys: RackKeys
    installation: Installation

    def console(self) -> str:
        file = self.folder / "console.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while text not in self.console():
            assert self.process.poll() is None, self.console()
            assert time.monotonic() < deadline, self.console()
            time.sleep(0.05)

    def monitor(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()


def started(
    installation: Installation, guest_kernel: KernelImage, accelerator: str
) -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="tb-"))  # short: a socket is in it
    keys = RackKeys.generate()
    build_initrd(
        folder / "initrd",
        installation.image,
        guest_kernel,
        keys=keys,
        node_name="node7",
        agent=installation.agent,
    )
    network = f"user,id=n,restrict=on,ipv6=off,hostfwd=unix:{folder}/ssh.sock-:22"
    process = subprocess.Popen(
        [
            *child.DIE_WITH_US,
            *installation.qemu.words,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-M", "q35", "-accel", accelerator, "-cpu", "max", "-m", "512M"),
            *("-kernel", str(guest_kernel.image), "-initrd", str(folder / "initrd")),
            *("-append", "console=ttyS0 panic=-1 quiet"),
            *("-serial", f"file:{folder}/console.log", "-monitor", "stdio"),
            *("-netdev", network, "-device", "virtio-net-pci,netdev=n,romfile="),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **installation.qemu.environment},
    )
    try:
        yield Machine(folder, process, keys, installation)
    finally:
        child.end(process)
        if process.stdin:
            process.stdin.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def machine(installation: Installation, accelerator: str) -> Iterator[Machine]:
    for one in started(installation, installation.kernel(), accelerator):
        one.wait_for(READY)
        yield one


@pytest.fixture(scope="module")
def link(machine: Machine) -> Iterator[GuestLink]:
    keys = machine.keys
    socket = machine.folder / "ssh.sock"
    connected = GuestLink("node7", socket, keys.client_private, keys.host_public, timeout_s=60)
    yield connected
    connected.close()


def said(link: GuestLink, command: str) -> str:
    done = link.run(command)
    assert done.exit_status == 0, done.stderr.decode()
    return done.stdout.decode()


def test_a_cold_boot_says_nothing_but_ready(machine: Machine) -> None:
    lines = [line for line in machine.console().splitlines() if "testbed:" in line]
    assert lines == [READY]
    assert "not found" not in machine.console()


def test_it_is_the_node_that_was_asked_for(link: GuestLink) -> None:
    assert said(link, "hostname").strip() == "node7"
    assert said(link, "id -un").strip() == "root"


def test_every_python_module_of_the_manifest_is_there(link: GuestLink) -> None:
    names = ",".join(manifest.load().image.python_modules)
    more = "json,struct,mmap,ctypes,fcntl,select,socket,zlib,array,errno,math,binascii,termios"
    said(link, f"python3 -I -S -c 'import {names},{more}'")


def test_hashes_need_no_openssl(link: GuestLink) -> None:
    code = 'import hashlib as h; print(h.sha256(b"").hexdigest()[:8], h.blake2b(b"").name)'
    assert said(link, f"python3 -I -S -c '{code}'") == "e3b0c442 blake2b\n"


def test_the_agent_is_there_and_compiled(link: GuestLink, installation: Installation) -> None:
    agent = installation.agent
    assert said(link, "ls /opt/testbed/agent").split() == [agent.hash]
    code = "import guest_agent.agent as a, os; print(os.path.exists(a.__cached__))"
    assert said(link, f"PYTHONPATH={agent.folder} python3 -S -B -c '{code}'") == "True\n"


def test_every_lazy_module_can_be_loaded(link: GuestLink) -> None:
    loop = (
        "cd /usr/lib/modules/$(uname -r) && while read -r name order; do"
        " for m in $order; do [ -d /sys/module/$m ] || insmod $m.ko || exit 1; done;"
        " done <closure && cat closure"
    )
    listed = [line.split()[0] for line in said(link, loop).splitlines()]
    modules = manifest.load().modules
    assert listed == [*modules.boot, *modules.lazy]
    assert said(link, "[ -c /dev/vfio/vfio ] && echo yes") == "yes\n"


def test_orphans_are_reaped(link: GuestLink) -> None:
    said(link, "(sleep 0.1 &) ; sleep 1")
    assert "Z" not in said(link, "ps -o stat | tail -n +2").split()


def test_the_power_button_ends_it(machine: Machine, link: GuestLink) -> None:
    # The listener is started late; see images/init.
    deadline = time.monotonic() + 30
    while "acpid" not in said(link, "ps -o comm"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(1)
    machine.monitor("system_powerdown")
    assert machine.process.wait(20) == 0


def test_a_kernel_without_modules_says_what_is_missing(
    installation: Installation, accelerator: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bzImage"
    shutil.copy(installation.kernel().source, bare)
    options = SetupOptions(cache=tmp_path / "cache")
    made = kernel.prepare("bare", bare, manifest.load().modules, options)
    assert "virtio_net" in made.missing
    for machine in started(installation, made, accelerator):
        machine.wait_for(READY)
        console = machine.console()
        assert "there is no network card with a driver (virtio_net)" in console


def test_a_finished_setup_takes_no_time(installation: Installation) -> None:
    options = prepare.options(offline=True)
    prepare.prepare(setup=options)
    began_s = time.process_time()
    prepare.prepare(setup=options)
    # 0.03 s; processor time, as the host also runs guests.
    assert time.process_time() - began_s < 0.3
