# SPDX-License-Identifier: Apache-2.0
"""What this host can do, and what keeps it from doing more."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from testbed.errors import HostError, TestbedError
from testbed.host import accelerator as accelerators
from testbed.host import apt, mirror, paths, prepare
from testbed.host.facts import available_memory
from testbed.host.packages import NotSetUp
from testbed.host.progress import megabytes
from testbed.host.toolroot import Qemu

# What topologies are made of, by QEMU's names. Without the others, some topologies cannot start.
NEEDED_DEVICES = (
    *("pcie-root-port", "x3130-upstream", "xio3130-downstream", "virtio-net-pci"),
    *("ivshmem-plain", "edu", "igb", "nvme", "intel-iommu"),
)
USEFUL_DEVICES = ("amd-iommu", "virtio-iommu-pci", "vfio-pci", "vfio-user-pci")

GIB = 1 << 30
MEMORY_NEEDED_BYTES, MEMORY_WANTED_BYTES = 1 * GIB, 4 * GIB
DISK_NEEDED_BYTES, DISK_WANTED_BYTES = 1 * GIB, 3 * GIB
_LIST_TIMEOUT_S = 20.0

Status = Literal["ok", "warn", "bad"]

accelerator = accelerators.chosen


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: ``bad`` keeps racks from running, ``warn`` makes them worse."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def qemu_devices(qemu: Qemu) -> frozenset[str]:
    """The device models that this QEMU knows.

    :raises HostError: it does not list them, or not in time.
    """
    try:
        done = subprocess.run(
            [*qemu.words, "-device", "help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIST_TIMEOUT_S,
            env={**os.environ, **qemu.environment},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"QEMU does not list its devices: {error}") from error
    found = frozenset(re.findall(r'^name "([^"]+)"', done.stdout, re.MULTILINE))
    if done.returncode != 0 or not found:
        raise HostError(f"QEMU does not list its devices: {done.stderr.strip()[-300:]}")
    return found


def doctor(*, qemu: str | None = None, fresh: bool = False) -> list[Finding]:
    """Everything that is worth knowing about this host; downloads nothing, and takes seconds.

    :param qemu: as for :func:`testbed.host.prepare.prepare`.
    :param fresh: probe the accelerator again instead of using what is remembered.
    """
    return [*_host(), *_setup(qemu, fresh)]


def _host() -> Iterator[Finding]:
    release = mirror.os_release()
    machine = platform.machine()
    yield Finding(
        "host",
        "ok" if machine == "x86_64" else "bad",
        f"{release.get('PRETTY_NAME', 'an unknown system')}, {machine}, Linux {platform.release()}",
    )
    yield Finding("python", "ok", f"{platform.python_version()} in {sys.prefix}")
    processors = len(os.sched_getaffinity(0))
    yield _measured("processors", processors, 1, 2, str)
    yield _measured("memory", available_memory(), MEMORY_NEEDED_BYTES, MEMORY_WANTED_BYTES)
    yield _checked("cache", _cache)
    yield _checked("runtime folder", lambda: Finding("", "ok", str(paths.runtime_dir())))
    yield _packages_tools()
    yield _checked("mirror", lambda: Finding("", "ok", mirror.host_mirror(None)))


def _measured(
    name: str,
    value: int,
    needed: int,
    wanted: int,
    shown: Callable[[int], str] = megabytes,
) -> Finding:
    if value >= wanted:
        return Finding(name, "ok", shown(value))
    status: Status = "warn" if value >= needed else "bad"
    return Finding(name, status, f"{shown(value)}, better {shown(wanted)}")


def _cache() -> Finding:
    folder = paths.cache_dir().absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        hint = "set TESTBED_CACHE_DIR to a folder of your own"
        return Finding("", "bad", f"{folder} cannot be written", hint)
    space = _measured("", shutil.disk_usage(existing).free, DISK_NEEDED_BYTES, DISK_WANTED_BYTES)
    return Finding("", space.status, f"{folder}, free: {space.detail}")


def _packages_tools() -> Finding:
    missing = [name for name in ("apt-get", "dpkg-deb", "setpriv") if not shutil.which(name)]
    if not any(keyring.exists() for keyring in apt.KEYRINGS):
        missing.append("debian-archive-keyring")
    if missing:
        text = f"missing: {', '.join(missing)}"
        return Finding("package tools", "bad", text, "./bootstrap installs what can be installed")
    return Finding("package tools", "ok", "apt-get, dpkg-deb, setpriv, Debian's keyring")


def _setup(qemu: str | None, fresh: bool) -> Iterator[Finding]:
    try:
        installation = prepare.prepare(qemu=qemu, setup=prepare.options(offline=True))
    except NotSetUp as error:
        yield Finding("set-up", "warn", f"not done yet: {error}", "testbed setup")
        return
    except TestbedError as error:
        yield Finding("set-up", "bad", str(error), error.hint)
        return
    program = installation.qemu
    package = f" (package {program.package})" if program.package else ""
    yield Finding("QEMU", "ok", f"{program.version}{package}")
    yield _checked("QEMU devices", lambda: _devices(program))
    kernel = installation.kernel()
    entry = "PVH entry" if kernel.pvh else "bzImage"
    detail = f"{kernel.release}, {entry}"
    if kernel.missing:
        yield Finding("kernel", "warn", f"{detail}, without {', '.join(kernel.missing)}")
    else:
        yield Finding("kernel", "ok", detail)
    size_bytes = installation.image.archive.stat().st_size
    yield Finding("guest image", "ok", f"{installation.image.key}, {megabytes(size_bytes)}")
    found = accelerators.probe(program, kernel, fresh=fresh)
    slow = "machines are emulated, which is slow" if found.name == "tcg" else ""
    yield Finding("accelerator", "warn" if slow else "ok", f"{found.name}: {found.why}", slow)


def _devices(qemu: Qemu) -> Finding:
    known = qemu_devices(qemu)
    if missing := [name for name in NEEDED_DEVICES if name not in known]:
        return Finding("", "bad", f"this QEMU lacks {', '.join(missing)}")
    if missing := [name for name in USEFUL_DEVICES if name not in known]:
        return Finding("", "warn", f"this QEMU lacks {', '.join(missing)}")
    return Finding("", "ok", f"all {len(NEEDED_DEVICES) + len(USEFUL_DEVICES)} that are used")


def _checked(name: str, look: Callable[[], Finding]) -> Finding:
    """``look`` under the given name; an error of the testbed's is a finding too."""
    try:
        found = look()
    except TestbedError as error:
        return Finding(name, "bad", str(error), error.hint)
    return Finding(name, found.status, found.detail, found.hint)
