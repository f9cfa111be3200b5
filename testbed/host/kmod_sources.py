# SPDX-License-Identifier: Apache-2.0
"""The sources of our kernel modules: ``guest_agent/kmod/NAME``, and ``common`` for all of them."""

from __future__ import annotations

from pathlib import Path

from testbed.errors import SetupError
from testbed.host import paths
from testbed.host.digest import digest

FOLDER = "kmod"
COMMON = "common"


def names() -> tuple[str, ...]:
    """All modules of this project."""
    found = folder().glob("*/module.yaml")
    return tuple(sorted(file.parent.name for file in found))


def folder() -> Path:
    """Where they all are."""
    return paths.data_dir("guest_agent") / FOLDER


def sources(name: str) -> list[Path]:
    """The module's own files, and all that modules share: its ``Kbuild`` names what it wants.

    :raises SetupError: there is no such module.
    """
    if name not in names():
        raise SetupError(f"there is no kernel module '{name}'", hint=", ".join(names()))
    folders = (folder() / name, folder() / COMMON)
    return [path for each in folders for path in sorted(each.glob("*")) if path.is_file()]


def source_hash(name: str) -> str:
    """A hash of the module's sources. :raises SetupError: there is no such module."""
    return digest(name, [(path.name, path.read_bytes()) for path in sources(name)])
