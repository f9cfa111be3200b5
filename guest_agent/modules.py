# SPDX-License-Identifier: Apache-2.0
"""Kernel modules that the guest loads only when something needs them.

``/usr/lib/modules/RELEASE/closure`` has a line for each: its name, then what is to be loaded for
it, in order. A module that is built in has nothing after its name; a kernel without the file has
whatever it has.
"""

from __future__ import annotations

import errno
import os

FOLDER = "/usr/lib/modules"
LOADED = "/sys/module"


def load(name: str) -> None:
    """Load module ``name`` and what it depends on, unless they are there already.

    Raises OSError(ENOENT) if this kernel has no such module, OSError(EIO) if the kernel refused it.
    """
    if os.path.isdir(f"{LOADED}/{name}"):
        return
    folder = f"{FOLDER}/{os.uname().release}"
    for module in _closure(folder, name):
        if not os.path.isdir(f"{LOADED}/{module}"):
            _insert(f"{folder}/{module}.ko")


def _closure(folder: str, name: str) -> list[str]:
    try:
        with open(f"{folder}/closure") as lines:
            for line in lines:
                wanted, *order = line.split()
                if wanted == name:
                    return order
    except FileNotFoundError:
        return []
    raise OSError(errno.ENOENT, f"this kernel has no module {name}")


def _insert(path: str) -> None:
    # The standard library has no finit_module(2); one process costs less than importing ctypes.
    pid = os.posix_spawnp("insmod", ["insmod", path], os.environ)
    _, status = os.waitpid(pid, 0)
    if status:
        raise OSError(errno.EIO, f"the kernel refused the module {path}")
