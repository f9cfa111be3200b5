# SPDX-License-Identifier: Apache-2.0
"""virtme-ng beside us: the same kernel, QEMU and accelerator, a command and out again.

It is installed into an environment of its own in the cache. What it calls on the host (busybox,
depmod, modprobe) is a package set of the manifest, as QEMU is: nothing has to be installed by hand.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from testbed.errors import CapabilityMissing, HostError
from testbed.host import manifest, product
from testbed.host.kernel import KernelImage, locate
from testbed.host.lock import Lock
from testbed.host.manifest import digest
from testbed.host.packages import PackageRoot, SetupOptions, ensure
from testbed.host.prepare import Installation
from testbed.host.toolchain import wrapper

NAME = "virtme-ng"
SET = "virtme"
BUILDER = 1
_INSTALL_TIMEOUT_S = 600
_SBIN = "/usr/sbin:/sbin"
_KMOD = ("depmod", "modprobe")
_BUSYBOX = ("busybox", "strings")  # it looks for a kernel's release with the latter


def prepare(setup: SetupOptions) -> dict[str, Lock]:
    """Make or find what virtme-ng calls; which packages it consists of, by set.

    :raises SetupError, MirrorError: it cannot be downloaded or unpacked.
    """
    unpacked = ensure(SET, manifest.load().virtme, setup)
    tools(unpacked, setup)
    return {SET: unpacked.packages}


def command(installation: Installation, accelerator: str, setup: SetupOptions) -> str:
    """What runs ``true`` in the installation's first kernel; what that takes is made on the way.

    :raises CapabilityMissing: the kernel cannot have the host's files as its root.
    :raises HostError: virtme-ng cannot be installed.
    :raises SetupError, MirrorError: what it calls cannot be downloaded or unpacked.
    """
    kernel = next(iter(installation.kernels.values()))
    modules = locate(kernel.source).module_folder
    if modules is None or not list(modules.rglob("9p.ko*")):
        raise CapabilityMissing(
            f"virtme-ng's root is 9p, which kernel {kernel.release} does not have",
            hint="--kernel generic",
        )
    programs = tools(ensure(SET, manifest.load().virtme, setup), setup)
    bench = setup.cache / "bench"
    folder = bench / NAME
    program = folder / "bin" / "vng"
    if not program.exists():
        with product.exclusive(bench / "lock", setup.waiting(NAME)):
            if not program.exists():
                setup.progress.say(f"{NAME}: installing")
                _install(folder)
    qemu = folder / "qemu"
    lines = [f"export {k}={shlex.quote(v)}" for k, v in installation.qemu.environment.items()]
    qemu.write_text(
        "\n".join(["#!/bin/sh", *lines, f'exec {shlex.join(installation.qemu.words)} "$@"\n'])
    )
    qemu.chmod(0o755)
    image = view(kernel, modules, setup)
    path = f"{program.parent}:{programs}:{os.environ.get('PATH', os.defpath)}:{_SBIN}"
    words = ["env", f"PATH={path}", str(program), "--run", str(image)]
    words += ["--qemu", str(qemu), "--force-9p", "-e", "true"]
    words += [] if accelerator == "kvm" else ["--disable-kvm"]
    return shlex.join(words)


def tools(unpacked: PackageRoot, setup: SetupOptions) -> Path:
    """A folder with the programs that virtme-ng calls, made or found.

    They run with their own C library (busybox has none), as the host's may be older.
    """
    key = digest(BUILDER, unpacked.key, str(setup.cache))

    def make(folder: Path) -> None:
        for name in _KMOD:
            script = folder / name
            script.write_text(wrapper(unpacked.root, unpacked.root / "usr/bin/kmod"))
            script.chmod(0o755)
        for name in _BUSYBOX:
            (folder / name).symlink_to(unpacked.root / "usr/bin/busybox")

    return _made(setup, f"tools-{key}", make)


def view(kernel: KernelImage, modules: Path, setup: SetupOptions) -> Path:
    """The kernel's image in a tree of its own, with its modules beside it.

    depmod writes there, where the kernel's packages stay as they were unpacked.
    """

    def make(folder: Path) -> None:
        (folder / "boot").mkdir()
        (folder / "boot" / f"vmlinuz-{kernel.release}").symlink_to(kernel.source)
        copied = folder / "lib/modules" / kernel.release
        copied.mkdir(parents=True)
        for path in modules.iterdir():
            if path != kernel.source:
                (copied / path.name).symlink_to(path)

    made = _made(setup, f"kernel-{digest(BUILDER, kernel.sha256, str(modules))}", make)
    return made / "boot" / f"vmlinuz-{kernel.release}"


def _made(setup: SetupOptions, name: str, make: Callable[[Path], None]) -> Path:
    bench = setup.cache / "bench"
    final = bench / name
    if not final.is_dir():
        with product.exclusive(bench / "lock", setup.waiting(NAME)):
            if not final.is_dir():
                with product.building(final) as folder:
                    make(folder)
    return final


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for words in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", NAME],
    ):
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise HostError(f"virtme-ng cannot be installed: {done.stderr.strip()[-300:]}")
