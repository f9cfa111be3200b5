# SPDX-License-Identifier: Apache-2.0
"""The tool root: programs of another Debian than the host's, run through their own loader."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import HostError

if TYPE_CHECKING:
    from testbed.host.packages import PackageRoot

QEMU_VARIABLE = "TESTBED_QEMU"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_VERSION_TIMEOUT_S = 20
_QBOOT = "qboot.rom"


@dataclass(frozen=True)
class Qemu:
    """How QEMU is started here.

    ``words``        what the command line begins with.
    ``environment``  what has to be in its environment.
    ``version``      as it says itself: ``11.1.2``.
    ``package``      the Debian package's version, "" for a QEMU that the user named.
    ``identity``     changes when the program does.
    ``quick_firmware``  the name by which it finds qboot, "" if it may not have it.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    package: str = ""
    identity: str = ""
    quick_firmware: str = ""


def loader_words(root: Path) -> tuple[str, ...]:
    """The loader of ``root`` with its libraries; options of ld.so(8) and a program may follow."""
    return (
        str(root / "usr/lib64/ld-linux-x86-64.so.2"),
        *("--library-path", str(root / _LIBRARIES)),
    )


def through_loader(root: Path, program: str, *, preload: str = "") -> tuple[str, ...]:
    """The words that start ``root/program`` with the loader and the libraries of ``root``.

    The host's own C library may be older than what the program was linked with.

    :param preload: a library of ``root`` that comes before all others.
    """
    return (
        *loader_words(root),
        *(("--preload", str(root / preload)) if preload else ()),
        str(root / program),
    )


# QEMU builds the memory map of every bridge and IOMMU address space anew at each write to a bridge,
# and frees and allocates in small pieces there: this saves a large machine's boot 0.2 s.
_ALLOCATOR = f"{_LIBRARIES}/libtcmalloc_minimal.so.4"


def packaged_qemu(tools: PackageRoot) -> Qemu:
    """The tool root's QEMU.

    :raises HostError: it does not even say its version.
    """
    root = tools.root
    words = (
        *through_loader(root, "usr/bin/qemu-system-x86_64", preload=_ALLOCATOR),
        "-L",
        str(root / "usr/share/qemu"),
        "-L",
        str(root / "usr/share/seabios"),
    )
    environment = {"QEMU_MODULE_DIR": str(root / _LIBRARIES / "qemu")}
    package = tools.version("qemu-system-x86")
    # The product never changes, so the package's version is the program's: no need to start it.
    version = re.sub(r"^\d+:|[+~-].*$", "", package)
    return Qemu(words, environment, version, package, tools.key, _QBOOT)


def named_qemu(word: str) -> Qemu:
    """A QEMU of the user's: a path, or a name to look up in ``PATH``.

    :raises HostError: it is not there, or is not QEMU.
    """
    path = shutil.which(word)
    if path is None:
        raise HostError(f"QEMU {word}: no such program", hint=f"--qemu PATH or {QEMU_VARIABLE}")
    found = Path(path).resolve()
    status = found.stat()
    identity = f"{found}:{status.st_size}:{status.st_mtime_ns}"
    return Qemu((str(Path(path).absolute()),), {}, version_of((path,), {}), "", identity)


def version_of(words: tuple[str, ...], environment: Mapping[str, str]) -> str:
    """What ``--version`` says.

    :raises HostError: it does not say, or not in time.
    """
    try:
        done = subprocess.run(
            [*words, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            env={**os.environ, **environment},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"QEMU {words[-1]} does not start: {error}") from error
    found = re.search(r"QEMU emulator version (\S+)", done.stdout)
    if done.returncode != 0 or found is None:
        said = (done.stderr or done.stdout).strip()[-300:]
        raise HostError(f"QEMU {words[-1]} does not say its version: {said}")
    return found[1]
