# SPDX-License-Identifier: Apache-2.0
"""Kernel modules for a guest: chosen, closed over their dependencies, uncompressed, in a cpio.

In the guest, ``/usr/lib/modules/RELEASE/`` holds the ``NAME.ko`` files and two lists::

    boot     one module a line, in the order in which init loads them
    closure  one line for each wanted module: its name, then all that is to be loaded for it, in
             order, itself last; a module that is built in has nothing after its name

The dependencies come from the modules themselves (``depends=`` in ``.modinfo``), so that no depmod
and no modprobe is needed on either side.
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from testbed.errors import InputError, SetupError
from testbed.host import cpio
from testbed.host.manifest import ModuleLists

_SUFFIX = re.compile(r"\.ko(\.xz|\.zst|\.gz)?$")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_VERMAGIC = re.compile(rb"\0vermagic=(\S+) ")


@dataclass(frozen=True)
class ModuleFiles:
    """The modules of one kernel.

    ``files``     by name, with ``_`` for ``-``.
    ``built_in``  names of those that are part of the kernel image; None if that is not known.
    """

    files: dict[str, Path]
    built_in: frozenset[str] | None


@dataclass(frozen=True)
class ModuleArchive:
    """What :func:`build` yields. ``missing`` modules are neither there nor known to be built in."""

    data: bytes
    missing: tuple[str, ...]


def canonical(name: str) -> str:
    """The kernel's own spelling of a module's name."""
    return name.replace("-", "_")


def find(folder: Path | None) -> ModuleFiles:
    """The modules below ``folder`` (``…/lib/modules/RELEASE``, or a built kernel tree)."""
    if folder is None:
        return ModuleFiles({}, None)
    files = {
        canonical(_SUFFIX.sub("", path.name)): path
        for path in sorted(folder.rglob("*.ko*"))
        if _SUFFIX.search(path.name)
    }
    try:
        listed = (folder / "modules.builtin").read_text(encoding="utf-8").split()
    except OSError:
        return ModuleFiles(files, None)
    return ModuleFiles(
        files, frozenset(canonical(_SUFFIX.sub("", Path(line).name)) for line in listed)
    )


def build(release: str, available: ModuleFiles, wanted: ModuleLists) -> ModuleArchive:
    """The archive of the wanted modules; those that cannot be found are named, not refused.

    :param release: the kernel's, "" if that is not known.
    :raises InputError: a module is for another release.
    :raises SetupError: a module file is broken.
    """
    contents: dict[str, bytes] = {}
    orders: dict[str, tuple[str, ...]] = {}
    missing = []
    for name in [*wanted.boot, *wanted.lazy]:
        order = _closure(name, available, contents)
        orders[name] = order or ()
        if order is None:
            missing.append(name)
    for name, data in contents.items():
        made_for = release_of(data)
        if release and made_for and made_for != release:
            raise InputError(
                f"kernel module {available.files[name]}: it is for {made_for},"
                f" but the kernel is {release}",
                hint="give the modules that were built with the kernel (make modules)",
            )
    folder = f"/usr/lib/modules/{release or 'unknown'}"
    boot = _distinct(module for name in wanted.boot for module in orders[name])
    entries = [cpio.regular(f"{folder}/{name}.ko", data) for name, data in contents.items()]
    entries.append(cpio.regular(f"{folder}/boot", _lines(boot)))
    closure = [" ".join((name, *order)) for name, order in orders.items() if name not in missing]
    entries.append(cpio.regular(f"{folder}/closure", _lines(closure)))
    return ModuleArchive(cpio.archive(entries), tuple(missing))


def _closure(
    name: str, available: ModuleFiles, contents: dict[str, bytes]
) -> tuple[str, ...] | None:
    """What to load for ``name``, in order; None if it or one of its dependencies is not there."""
    if name in (available.built_in or ()):
        return ()
    if name not in available.files:
        return None
    data = contents.get(name) or uncompressed(available.files[name])
    order: list[str] = []
    for needed in dependencies(data):
        below = _closure(needed, available, contents)
        if below is None:
            return None
        order += below
    contents[name] = data
    return tuple(_distinct([*order, name]))


def dependencies(module: bytes) -> tuple[str, ...]:
    """The names in ``depends=``."""
    found = _DEPENDS.search(module)
    return tuple(canonical(word) for word in found[1].decode().split(",") if word) if found else ()


def release_of(module: bytes) -> str:
    """The kernel release in ``vermagic=``, "" if there is none."""
    found = _VERMAGIC.search(module)
    return found[1].decode(errors="replace") if found else ""


def uncompressed(path: Path) -> bytes:
    """The content of a ``.ko``, ``.ko.xz``, ``.ko.zst`` or ``.ko.gz``.

    :raises SetupError: it is broken.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".zst":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        if path.suffix == ".gz":
            return gzip.decompress(data)
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise SetupError(f"kernel module {path}: {error}") from error
    return data


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _lines(words: Sequence[str]) -> bytes:
    return "".join(word + "\n" for word in words).encode()
