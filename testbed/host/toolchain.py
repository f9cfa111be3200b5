# SPDX-License-Identifier: Apache-2.0
"""A compiler of our own for kernel modules: the same on every host, used by nothing else.

The packages are unpacked, not installed, and their C library may be newer than the host's. A small
script stands for each program and runs it with the loader and the libraries of its own root, so
that a compiler may start its assembler and make itself as usual, while the host's shell, sed and
awk keep the host's libraries. (Rewriting the programs' interpreter instead would need one more
package, and room in each of them for the path.)
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import SetupError
from testbed.host import product
from testbed.host.digest import digest
from testbed.host.lock import Lock
from testbed.host.manifest import PackageSet
from testbed.host.packages import SetupOptions, ensure
from testbed.host.toolroot import loader_words

NAME = "toolchain"
BUILDER = 1
PREFIX = "x86_64-linux-gnu-"
_BINUTILS = ("ar", "as", "ld", "nm", "objcopy", "objdump", "readelf", "strip")
_ELF_MAGIC = b"\x7fELF"
# Words that make(1) would split or expand, whatever one does.
_UNUSABLE = re.compile(r"[\s:%#$]")


@dataclass(frozen=True)
class Toolchain:
    """What builds modules.

    ``key``       changes when any of its programs does.
    ``root``      the unpacked packages; programs of other packages can use its libraries.
    ``bin``       make, and the compiler and binutils with the prefix ``x86_64-linux-gnu-``.
    ``compiler``  as the package says: ``gcc-14 14.2.0-19``.
    ``packages``  what it consists of.
    """

    key: str
    root: Path
    bin: Path
    compiler: str
    packages: Lock

    @property
    def environment(self) -> dict[str, str]:
        """All that a build's environment may hold; nothing of the user's gets in."""
        return {
            "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "LC_ALL": "C",
            "HOME": "/nonexistent",
        }


def prepare(packages: PackageSet, options: SetupOptions) -> Toolchain:
    """The toolchain, made or found.

    :raises SetupError: it cannot be downloaded or unpacked, or the cache's path is one that
        make(1) cannot work with.
    """
    check_path(options.cache)
    unpacked = ensure(NAME, packages, options)
    key = digest(BUILDER, unpacked.key, str(options.cache))
    final = options.cache / "toolchains" / key
    if not (final / "bin/make").is_file():
        lock = options.cache / "locks" / f"{NAME}-{key}.lock"
        with product.exclusive(lock, options.waiting(NAME)):
            if not final.is_dir():
                with product.building(final) as folder:
                    _make(unpacked.root, folder, final)
    gcc = next(p for p in unpacked.packages if re.fullmatch(r"gcc-[\d.]+-x86-64.*", p.name))
    compiler = f"{re.sub(r'-x86-64.*', '', gcc.name)} {gcc.version}"
    return Toolchain(key, unpacked.root, final / "bin", compiler, unpacked.packages)


def check_path(folder: Path) -> None:
    """:raises SetupError: make(1) cannot work below this folder."""
    found = _UNUSABLE.search(str(folder))
    if found:
        raise SetupError(
            f"kernel modules cannot be built below {folder}: make knows no {found[0]!r} in a path",
            hint="set TESTBED_CACHE_DIR to a folder with a plain name",
        )


def _make(root: Path, folder: Path, final: Path) -> None:
    compilers = sorted((root / "usr/bin").glob(f"{PREFIX}gcc-[0-9]*"))
    internal = sorted((root / "usr/libexec/gcc/x86_64-linux-gnu").glob("*/cc1"))
    if not compilers or not internal:
        raise SetupError(f"{root}: no compiler among the packages of '{NAME}'")
    bin_folder, passes = folder / "bin", folder / "passes"
    bin_folder.mkdir()
    passes.mkdir()
    # The compiler looks for its passes, the assembler and the linker in this folder first.
    more = ("-B", f"{final / 'passes'}/")
    _write(bin_folder / f"{PREFIX}gcc", wrapper(root, compilers[-1], *more))
    for name in ("cc1", "collect2"):
        _write(passes / name, wrapper(root, internal[-1].with_name(name)))
    for name in _BINUTILS:
        program = (root / f"usr/bin/{PREFIX}{name}").resolve()
        _write(bin_folder / f"{PREFIX}{name}", wrapper(root, program))
        if name in ("as", "ld", "nm"):
            _write(passes / name, wrapper(root, program))
    _write(bin_folder / "make", wrapper(root, root / "usr/bin/make"))


def wrapper(root: Path, program: Path, *words: str) -> str:
    """A script that runs ``program`` with the libraries of ``root``, and ``words`` before its own.

    The program sees the script's path as its name, by which it finds what stands beside it.
    """
    start = shlex.join([*loader_words(root), "--argv0"])
    return f'#!/bin/sh\nexec {start} "$0" {shlex.join([str(program), *words])} "$@"\n'


def wrapped_programs(folder: Path) -> Iterator[Path]:
    """Every program below ``folder`` that needs a wrapper: executable ELF files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and os.access(path, os.X_OK):
            with path.open("rb") as stream:
                if stream.read(4) == _ELF_MAGIC:
                    yield path


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
