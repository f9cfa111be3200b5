# SPDX-License-Identifier: Apache-2.0
"""virtme-ng beside us: the same kernel, QEMU and accelerator, a command and out again.

It is installed into an environment of its own in the cache. What it calls on the host (busybox,
depmod, modprobe) is a package set of the manifest, as QEMU is: nothing has to be installed by hand.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import CapabilityMissing, HostError
from testbed.host import manifest, product
from testbed.host.digest import digest
from testbed.host.kernel import KernelImage, locate
from testbed.host.lock import Lock
from testbed.host.packages import PackageRoot, SetupOptions, ensure
from testbed.host.prepare import Installation, prepare_kernel
from testbed.host.toolchain import wrapper

NAME = "virtme-ng"
SET = "virtme"
BUILDER = 1
_INSTALL_TIMEOUT_S = 600
BOOT_TIMEOUT_S = 300
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


@dataclass(frozen=True)
class Boot:
    """Seconds from exec until its command had run in the guest, and until all had ended; and the
    processor time of it all.
    """

    ran_s: float
    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class Peer:
    """virtme-ng with a kernel of ours, ready to run. ``version`` is its own, ``release`` Linux's.

    ``words`` lack what it shall run.
    """

    version: str
    release: str
    words: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def of(
        cls, name: str, installation: Installation, accelerator: str, setup: SetupOptions
    ) -> Peer:
        """With the kernel of that name; what it takes is made on the way.

        :raises CapabilityMissing: the kernel cannot have the host's files as its root.
        :raises HostError: virtme-ng cannot be installed.
        :raises SetupError, MirrorError: what it calls cannot be downloaded or unpacked.
        """
        kernel = installation.kernels.get(name)
        if kernel is None:
            _, kernel = prepare_kernel(name, manifest.load(), setup)
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
        _write_script(qemu, installation)
        image = view(kernel, modules, setup)
        path = f"{program.parent}:{programs}:{os.environ.get('PATH', os.defpath)}:{_SBIN}"
        words = [str(program), "--run", str(image), "--qemu", str(qemu), "--force-9p"]
        words += [] if accelerator == "kvm" else ["--disable-kvm"]
        return cls(
            version_in(folder),
            kernel.release,
            tuple(words),
            {**os.environ, "PATH": path},
        )

    def run(self) -> Boot:
        """Boot, run a command, and out again.

        The command leaves a mark on the host, through the guest's root: that it ran, and when, is
        seen there. (On a host without udev virtme-ng finds no ports for its command's streams and
        ends with 255, whatever its command said.)

        :raises HostError: the command did not run.
        """
        with tempfile.TemporaryDirectory(prefix="testbed-virtme-") as name:
            mark = Path(name) / "ran"
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began, began_s = time.time(), time.monotonic()
            try:
                done = subprocess.run(
                    [*self.words, f"--rwdir={name}", "-e", f"echo ran > {mark}"],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    cwd=name,
                    env=self.environment,
                    timeout=BOOT_TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise HostError(f"{NAME} did not end within {BOOT_TIMEOUT_S} s") from None
            seconds = time.monotonic() - began_s
            if not mark.exists():
                said = (done.stderr or done.stdout).decode(errors="replace").strip()
                raise HostError(f"{NAME}: its command did not run: {said[-300:]}")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return Boot(mark.stat().st_mtime - began, seconds, cpu_s)


def version_in(folder: Path) -> str:
    """The version that is installed in an environment, "" if none is."""
    found = folder.glob("lib/python*/site-packages/virtme_ng-*.dist-info")
    return next((path.stem.rpartition("-")[2] for path in found), "")


def _write_script(qemu: Path, installation: Installation) -> None:
    lines = [f"export {k}={shlex.quote(v)}" for k, v in installation.qemu.environment.items()]
    qemu.write_text(
        "\n".join(["#!/bin/sh", *lines, f'exec {shlex.join(installation.qemu.words)} "$@"\n'])
    )
    qemu.chmod(0o755)


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
