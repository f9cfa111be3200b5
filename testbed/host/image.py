# SPDX-License-Identifier: Apache-2.0
"""The user space of every guest: one uncompressed cpio archive, the same for all machines.

Unpacking it is a part of every boot, so it holds what the manifest names and nothing else. Python's
standard library is in it as byte code only: compiling takes the emulated CPU seconds.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import SetupError
from testbed.host import cpio, paths, product
from testbed.host.digest import digest
from testbed.host.toolroot import loader_words, through_loader

if TYPE_CHECKING:
    from testbed.host.manifest import GuestFiles
    from testbed.host.packages import PackageRoot, SetupOptions

BUILDER = 1
_BUSYBOX = "usr/bin/busybox"
_LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
_TIMEOUT_S = 120
_STATICALLY_LINKED = 1  # the answer of the loader's --verify (ld.so(8))

# Runs in the guest's own Python, as byte code belongs to one version of it. Never checked against
# the source's time (PEP 552), which an archive does not keep.
_COMPILE = """\
import json, py_compile, sys
for source, shown, target in json.load(sys.stdin):
    py_compile.compile(source, cfile=target, dfile=shown, doraise=True, optimize=int(sys.argv[1]),
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


@dataclass(frozen=True)
class GuestPython:
    """The guest's Python, usable on the host. ``tag`` is its cache tag, such as cpython-313."""

    root: Path
    program: Path
    tag: str

    def compile(self, files: Sequence[tuple[Path, str, Path]], *, optimize: int) -> None:
        """Byte-compile ``(source, path shown in tracebacks, target)`` files.

        :raises SetupError: a file is no Python, or the interpreter does not run.
        """
        for _, _, target in files:
            target.parent.mkdir(parents=True, exist_ok=True)
        words = [*through_loader(self.root, str(self.program)), "-S", "-s", "-c", _COMPILE]
        work = json.dumps([[str(source), shown, str(target)] for source, shown, target in files])
        environment = {"PYTHONHOME": str(self.root / "usr"), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [*words, str(optimize)],
                input=work,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", **environment},
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SetupError(f"the guest's Python does not run here: {error}") from error
        if done.returncode != 0:
            raise SetupError(f"the guest's Python refused a file: {done.stderr.strip()[-500:]}")


@dataclass(frozen=True)
class GuestImage:
    """The finished image: its archive, its name in the cache, and its Python."""

    archive: Path
    key: str
    python: GuestPython


def prepare(packages: PackageRoot, files: GuestFiles, options: SetupOptions) -> GuestImage:
    """The image, from the cache or made from its packages.

    :raises SetupError: something that the manifest names is not in the packages; no space.
    """
    python = find_python(packages.root)
    overlay = list(_overlay(paths.data_dir("images")))
    key = digest(BUILDER, packages.key, files, [(e.path, e.mode, e.data) for e in overlay])
    folder = options.cache / "images"
    final = folder / key
    if not (final / "base.cpio").is_file():
        options.progress.say("guest: making the image")
        try:
            with product.exclusive(folder / "guest.lock", options.waiting("guest")):
                if not (final / "base.cpio").is_file():
                    with product.building(final) as partial:
                        entries = [*overlay, *_skeleton(files), *_programs(packages.root, files)]
                        entries += _applets(packages.root)
                        entries += _standard_library(python, files, partial / "compiled")
                        product.remove_tree(partial / "compiled")
                        (partial / "base.cpio").write_bytes(cpio.archive(entries))
        except OSError as error:
            raise product.disk_error(error, folder) from error
    return GuestImage(final / "base.cpio", key, python)


def find_python(root: Path) -> GuestPython:
    """The interpreter in a root.

    :raises SetupError: there is none, or several.
    """
    found = [p for p in sorted(root.glob("usr/bin/python3.*")) if not p.is_symlink()]
    if len(found) != 1:
        raise SetupError(f"{root}: {len(found)} Python interpreters instead of one")
    version = found[0].name.removeprefix("python").replace(".", "")
    return GuestPython(root, found[0].relative_to(root), f"cpython-{version}")


def _overlay(images: Path) -> Iterator[cpio.Entry]:
    """Our own files: ``images/init`` and all below ``images/overlay``."""
    yield cpio.from_file("/init", images / "init", 0o755)
    tree = images / "overlay"
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            permissions = 0o600 if path.name == "shadow" else None
            yield cpio.from_file(f"/{path.relative_to(tree)}", path, permissions)


def _skeleton(files: GuestFiles) -> Iterator[cpio.Entry]:
    for name in ("proc", "sys", "dev", "run", "etc/dropbear"):
        yield cpio.directory(f"/{name}")
    yield cpio.directory("/tmp", 0o1777)  # noqa: S108 (the guest's)
    yield cpio.directory("/root", 0o700)
    yield cpio.character_device("/dev/console", 5, 1)
    for name in ("bin", "lib", "lib64", "sbin"):
        yield cpio.symlink(f"/{name}", f"usr/{name}")
    for name, target in files.links.items():
        yield cpio.symlink(f"/{name}", target)


def _applets(root: Path) -> Iterator[cpio.Entry]:
    """``sh``, ``mount`` and so on: links to busybox, which is one static program."""
    listed = _run([str(root / _BUSYBOX), "--list"])
    if listed.returncode != 0:
        raise SetupError(f"the guest's busybox does not run here: {listed.stderr.strip()[-300:]}")
    for name in listed.stdout.split():
        if name != "busybox":
            yield cpio.symlink(f"/usr/bin/{name}", "busybox")


def _programs(root: Path, files: GuestFiles) -> Iterator[cpio.Entry]:
    """The programs, and the libraries that they are linked with."""
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    wanted = [loader, loader.resolve()]
    for pattern in files.programs:
        found = [path for path in sorted(root.glob(pattern)) if path.is_file()]
        if not found:
            raise SetupError(f"the guest's packages hold no {pattern}")
        for program in found:
            wanted += [program, *_libraries(root, program)]
    for path in dict.fromkeys(wanted):
        yield cpio.from_file(f"/{path.relative_to(root)}", path)


def _libraries(root: Path, program: Path) -> Iterator[Path]:
    """Each shared library as the loader asks for it, and the file behind it."""
    if _loader(root, "--verify", program).returncode == _STATICALLY_LINKED:
        return
    listed = _loader(root, "--list", program)
    if listed.returncode != 0:
        raise SetupError(f"{program.name}: {listed.stderr.strip()[-300:]}")
    for line in listed.stdout.splitlines():
        name, arrow, _ = line.strip().partition(" => ")
        if not arrow or name.startswith("/"):  # the kernel's vDSO; the loader itself
            continue
        library = root / _LIBRARIES / name
        if library.exists():
            yield library
            yield library.resolve()
        else:
            raise SetupError(f"{program.name} needs {name}, which the guest's packages lack")


def _loader(root: Path, verb: str, program: Path) -> subprocess.CompletedProcess[str]:
    return _run([*loader_words(root), verb, str(program)])


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def _standard_library(
    python: GuestPython, files: GuestFiles, scratch: Path
) -> Iterator[cpio.Entry]:
    """The named modules as byte code beside where their sources would be, without docstrings."""
    folder = Path("usr/lib") / python.program.name
    sources: list[Path] = []
    for name in files.python_modules:
        package, module = python.root / folder / name, python.root / folder / f"{name}.py"
        if package.is_dir():
            sources += sorted(package.rglob("*.py"))
        elif module.is_file():
            sources.append(module)
    work = []
    for source in sources:
        below = source.relative_to(python.root / folder)
        excluded = any(
            fnmatch.fnmatch(str(place), pattern)
            for place in (below, *below.parents)
            for pattern in files.python_excluded
        )
        if not excluded:
            work.append((source, f"/{folder / below}", scratch / f"{below}c"))
    python.compile(work, optimize=2)
    for _, shown, target in work:
        yield cpio.from_file(f"{shown}c", target)
