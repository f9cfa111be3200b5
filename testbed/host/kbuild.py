# SPDX-License-Identifier: Apache-2.0
"""What the modules of a kernel are built against: Debian's headers, or a tree of the user's.

A :class:`KernelTree` is a folder in which ``make M=…`` works (Documentation/kbuild/modules.rst).
For a kernel of Debian's it is a folder of links to the unpacked headers, in which a wrapper stands
for each of the build system's own programs (see :mod:`testbed.host.toolchain`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from testbed.errors import CapabilityMissing, InputError, SetupError
from testbed.host import product, toolchain
from testbed.host.apt import NotOffered
from testbed.host.digest import digest
from testbed.host.manifest import Headers, PackageSet
from testbed.host.packages import PackageRoot, SetupOptions, ensure
from testbed.host.toolchain import Toolchain

BUILDER = 2

# What a tree has when it was built, and what makes it.
_BUILT = {
    ".config": "make defconfig",
    "Makefile": "a kernel's sources",
    "include/config/auto.conf": "make modules_prepare",
    "include/generated/utsrelease.h": "make modules_prepare",
    "scripts/mod/modpost": "make modules_prepare",
    "Module.symvers": "make",
}


@dataclass(frozen=True)
class KernelTree:
    """Where and how modules of one kernel are built.

    ``folder``    make runs here.
    ``release``   of the kernel that the modules will fit.
    ``identity``  changes when the tree does.
    ``words``     what make is told beside that.
    """

    folder: Path
    release: str
    identity: str
    words: tuple[str, ...]

    @property
    def config(self) -> Mapping[str, str]:
        """The kernel's options that are set: ``PCI_P2PDMA`` → ``y``."""
        return _options(self.folder / ".config", self.identity)

    @property
    def symbols(self) -> frozenset[str]:
        """What kernel and modules export."""
        return _exported(self.folder / "Module.symvers", self.identity)


def read_config(file: Path) -> dict[str, str]:
    """The options that a ``.config`` sets, without ``CONFIG_`` and quotes."""
    text = file.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip('"') for name, value in found}


# Files of ten and thirty thousand lines: each rack of a run asks what they say.
@lru_cache(maxsize=4)
def _options(file: Path, _identity: str) -> Mapping[str, str]:
    return MappingProxyType(read_config(file))


@lru_cache(maxsize=4)
def _exported(file: Path, _identity: str) -> frozenset[str]:
    text = file.read_text(encoding="utf-8", errors="replace")
    return frozenset(re.findall(r"^[^\t\n]*\t([^\t\n]*)", text, re.MULTILINE))


def packaged(
    name: str,
    release: str,
    kernel: PackageSet,
    installed: PackageRoot,
    headers: Headers,
    tools: Toolchain,
    options: SetupOptions,
) -> tuple[KernelTree, PackageRoot]:
    """The tree for a kernel of the manifest, and the packages that it is from.

    :param name: the kernel's, in the manifest.
    :param installed: the unpacked kernel.
    :raises CapabilityMissing: the mirror has no headers for this release: older kernels often
        stay there longer than their headers.
    :raises SetupError: anything else that keeps them from being made.
    """
    present = [f"{p.name}={p.version}" for p in installed.packages]
    wanted = headers.of(kernel, release, present)
    lacking = CapabilityMissing(
        f"headers of kernel {release} ({wanted.packages[0]}), which the mirror does not offer",
        hint="take another kernel, or your own build with --kernel-tree",
    )
    # Remembered, so that a suite asks no mirror, and needs none, for each of its modules.
    absent = options.cache / "current" / f"absent-{digest(wanted, options.mirror)}.json"
    if absent.is_file() and not options.refresh:
        raise lacking
    try:
        unpacked = ensure(f"headers:{name}", wanted, options)
    except NotOffered as error:
        product.write_json(absent, {"packages": wanted.packages})
        raise lacking from error
    key = digest(BUILDER, unpacked.key, tools.key)
    final = options.cache / "kbuild" / key
    if not (final / "Makefile").is_file():
        lock = options.cache / "locks" / f"kbuild-{key}.lock"
        with product.exclusive(lock, options.waiting(f"headers:{name}")):
            if not final.is_dir():
                with product.building(final) as folder:
                    _link(unpacked.root, release, folder, final, tools)
    words = ("CROSS_COMPILE=" + toolchain.PREFIX, f"CC={toolchain.PREFIX}gcc")
    return KernelTree(final, release, key, words), unpacked


def _link(root: Path, release: str, folder: Path, final: Path, tools: Toolchain) -> None:
    """Make the output folder of a build whose sources and results stay where they are."""
    flavour = root / f"usr/src/linux-headers-{release}"
    include = re.search(r"^include\s+/?(\S+/Makefile)$", _text(flavour / "Makefile"), re.MULTILINE)
    if include is None:
        raise SetupError(f"{flavour / 'Makefile'}: names no sources")
    for path in flavour.iterdir():
        if path.name in ("scripts", "tools"):
            shutil.copytree(path, folder / path.name, symlinks=True)
        elif path.is_dir():
            (folder / path.name).symlink_to(path)
        elif path.name not in ("Makefile", "vmlinux"):  # vmlinux: for type information only
            shutil.copyfile(path, folder / path.name)
    for part in ("scripts", "tools"):
        for program in list(toolchain.wrapped_programs(folder / part)):
            moved = program.with_name(f".{program.name}.program")
            program.rename(moved)
            where = final / moved.relative_to(folder)
            program.write_text(toolchain.wrapper(tools.root, where), encoding="utf-8")
            program.chmod(0o755)
    (folder / "Makefile").write_text(f"KBUILD_OUTPUT={final}\ninclude {root / include[1]}\n")


def built(folder: Path, release: str) -> KernelTree:
    """The user's own tree, or the ``build`` folder beside installed modules.

    Its build system's programs are the ones that were built with it. Its modules are compiled by
    the toolchain's gcc, or by the host's clang if that compiled the kernel.

    :param release: of the kernel that the modules are for.
    :raises InputError: it was not built, or is another kernel's.
    :raises CapabilityMissing: it was built by a clang, and the host has none.
    """
    check_built(folder)
    found = tree_release(folder)
    if release and found != release:
        raise InputError(
            f"kernel tree {folder}: it is of {found}, but the kernel is {release}",
            hint="build the tree again, or name the kernel that belongs to it",
        )
    stamps = []
    for name in (*_BUILT, "include/generated/autoconf.h"):
        status = (folder / name).stat()
        stamps.append((name, status.st_size, status.st_mtime_ns))
    words: tuple[str, ...] = ("CROSS_COMPILE=" + toolchain.PREFIX, f"CC={toolchain.PREFIX}gcc")
    if read_config(folder / ".config").get("CC_IS_CLANG") == "y":
        clang = shutil.which("clang")
        if clang is None:
            raise CapabilityMissing(f"clang, which compiled the kernel in {folder}")
        words = (f"LLVM={Path(clang).resolve().parent}{os.sep}",)
    return KernelTree(folder, found, digest(BUILDER, str(folder), stamps, words), words)


def check_built(folder: Path) -> None:
    """Refuse a kernel tree in which modules cannot be built.

    :raises InputError: with each thing that is missing and what makes it.
    """
    missing = {name: how for name, how in _BUILT.items() if not (folder / name).exists()}
    if missing:
        raise InputError(
            f"kernel tree {folder}: it was not built: there is no {', '.join(missing)}",
            hint="; ".join(dict.fromkeys(missing.values())),
        )


def tree_release(folder: Path) -> str:
    """What ``uname -r`` will say of the kernel in a built tree, "" if it does not tell."""
    try:
        text = _text(folder / "include/generated/utsrelease.h")
    except OSError:
        return ""
    found = re.search(r'#define\s+UTS_RELEASE\s+"([^"]+)"', text)
    return found[1] if found else ""


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
