# SPDX-License-Identifier: Apache-2.0
"""Programs that take the kernel's place, as the user's checkout of kvm-unit-tests built them.

Nothing of them is run on this host. Source: kvm-unit-tests' ``x86/Makefile.common`` (``*.flat``)
and the Multiboot specification 0.6.96, 3.1 (the header stands in the first 8 KiB).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import Diagnostic, InputError
from testbed.payload.collection import EMULATED_FACTOR
from testbed.topology.problem import nearest

DEFAULT_PROGRAM = "intel-iommu"
FOLDER = "x86"
SUFFIX = ".flat"
TIMEOUT_S = 90  # kvm-unit-tests' own (scripts/runtime.bash)

_MAGIC = 0x1BADB002
_HEADER_BYTES = 8192


@dataclass(frozen=True)
class MachineProgram:
    """One program, by its name in the checkout."""

    name: str
    file: Path


@dataclass(frozen=True)
class MachinePrograms:
    """What of a checkout a run shall do. ``timeout_s``: for each; None for the usual one."""

    programs: tuple[MachineProgram, ...]
    timeout_s: float | None = None

    @property
    def deadline_s(self) -> float:
        """What each program may take here."""
        return self.timeout_s or TIMEOUT_S * EMULATED_FACTOR


def find_programs(
    tree: Path, names: Sequence[str] = (), timeout_s: float | None = None
) -> MachinePrograms:
    """The programs called ``names`` of a checkout; ``intel-iommu`` if none is named.

    :raises InputError: it is no checkout, or one was not built; all that is wrong at once.
    """
    folder = tree.expanduser().absolute() / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"--tree {tree}: no checkout of kvm-unit-tests: it has no folder {FOLDER}",
            hint="git clone https://gitlab.com/kvm-unit-tests/kvm-unit-tests.git",
        )
    built = sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}"))
    if not built:
        raise InputError(
            f"{folder}: no program was built", hint="./configure --arch=x86_64 && make, there"
        )
    found, wrong = [], []
    for name in dict.fromkeys(names or (DEFAULT_PROGRAM,)):
        file = folder / f"{name}{SUFFIX}"
        if name not in built:
            expected = "a program that was built: " + ", ".join(built[:20])
            near = nearest(name, built)
            wrong.append(
                Diagnostic(
                    "--program", 0, 0, f"there is no {FOLDER}/{name}{SUFFIX}", expected, near
                )
            )
        elif why := _unfit(file):
            wrong.append(Diagnostic(str(file), 0, 0, why, "a multiboot program", ""))
        else:
            found.append(MachineProgram(name, file))
    if wrong:
        raise InputError(diagnostics=wrong)
    return MachinePrograms(tuple(found), timeout_s)


def _unfit(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEADER_BYTES)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    for at in range(0, len(head) - 11, 4):
        magic, flags, check = struct.unpack_from("<III", head, at)
        if magic == _MAGIC and (magic + flags + check) & 0xFFFFFFFF == 0:
            return ""
    return "it has no multiboot header"
