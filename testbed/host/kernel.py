# SPDX-License-Identifier: Apache-2.0
"""Guest kernels, from the manifest's packages or from a path, made ready to boot.

``CACHE/kernels/KEY/`` holds the kernel as QEMU takes it, its configuration, the archive of its
modules and ``kernel.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import InputError, SetupError
from testbed.host import product
from testbed.host.digest import digest

if TYPE_CHECKING:
    from testbed.host.manifest import ModuleLists
    from testbed.host.packages import SetupOptions

BUILDER = 2
MODULES = ",modules="


@dataclass(frozen=True)
class KernelImage:
    """A kernel that is ready to boot.

    ``image``    an ELF vmlinux if ``pvh``, else a bzImage; QEMU's ``-kernel`` takes either.
    ``sha256``   of the file that it was made from.
    ``build_id`` the linker's name for it, "" if it has none that can be read.
    ``source``   that file.
    ``config``   the kernel's configuration, or None if it was not found.
    ``modules``  the archive of its modules.
    ``missing``  modules that are neither there nor known to be built in.
    ``build``    a folder in which modules for it can be built, if the user gave one.
    """

    name: str
    release: str
    image: Path
    pvh: bool
    sha256: str
    source: Path
    config: Path | None
    modules: Path
    missing: tuple[str, ...]
    build_id: str = ""
    build: Path | None = None

    @property
    def identity(self) -> str:
        """Another for every build of the kernel."""
        return self.build_id or self.sha256

    def option(self, name: str) -> str | None:
        """The value of ``CONFIG_name``: ``y``, ``m``, text; None if unset or unknown."""
        if self.config is None:
            return None
        prefix = f"CONFIG_{name}="
        for line in self.config.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip('"')
        return None


@dataclass(frozen=True)
class KernelSource:
    """Where the parts of a kernel are; all but ``image`` may be unknown.

    ``build``  a built tree, or a folder of headers: where ``make M=…`` works.
    """

    image: Path
    module_folder: Path | None = None
    config: Path | None = None
    build: Path | None = None


def split_word(word: str) -> tuple[str, Path | None]:
    """The user's word for a kernel, ``PATH`` or ``PATH,modules=FOLDER``, and the folder."""
    path, comma, folder = word.partition(MODULES)
    return path, Path(folder).expanduser() if comma else None


def locate(path: Path, module_folder: Path | None = None) -> KernelSource:
    """The parts of the kernel that ``path`` means.

    A file: a bzImage or vmlinux, with modules and configuration where a package, ``make install``
    or the build puts them relative to it. A folder: an unpacked package, a root with ``/boot`` or
    ``/usr/lib/modules``, ``/lib/modules/RELEASE`` itself, or a built kernel tree.

    :param module_folder: where the modules are instead: ``…/lib/modules/RELEASE``, a folder in
        which that is the only one (``make modules_install INSTALL_MOD_PATH=…``), or any other
        that has modules in it.
    :raises InputError: nothing there is a kernel, or it is not clear which one is meant.
    """
    if path.is_file():
        found = _beside(path.resolve())
    elif path.is_dir():
        found = _beside(_only_image(path))
    else:
        raise InputError(f"kernel {path}: no such file or folder")
    if module_folder is not None:
        given = _only_modules(module_folder)
        found = replace(
            found,
            module_folder=given,
            config=found.config or _existing(given / "config"),
            build=found.build or _build_folder(given),
        )
    return found


def _only_image(path: Path) -> Path:
    folder = path.resolve()
    found = list(dict.fromkeys(image.resolve() for image in _candidates(folder)))
    if not found and any((folder / name).is_file() for name in ("Kconfig", ".config")):
        raise InputError(
            f"kernel tree {path}: it was not built: there is no arch/x86/boot/bzImage",
            hint="make bzImage modules",
        )
    if not found:
        raise InputError(
            f"kernel {path}: no kernel in this folder",
            hint="a built kernel tree, an unpacked kernel package, or the bzImage itself",
        )
    if len(found) > 1:
        raise InputError(
            f"kernel {path}: several kernels: " + ", ".join(str(image) for image in found),
            hint="name one of them",
        )
    return found[0]


def _only_modules(path: Path) -> Path:
    """:raises InputError: no modules are there, or those of several kernels."""
    from testbed.host import modules  # noqa: PLC0415  with decompressors; a finished kernel needs none

    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"modules {path}: no such folder")
    below = [
        each.parent for lib in ("lib", "usr/lib") for each in folder.glob(f"{lib}/modules/*/kernel")
    ]
    found = list(dict.fromkeys(each.resolve() for each in below)) or [folder]
    if len(found) > 1:
        raise InputError(
            f"modules {path}: of several kernels: " + ", ".join(str(each) for each in found),
            hint="name one of them",
        )
    if not modules.find(found[0]).files:
        raise InputError(
            f"modules {path}: no kernel modules in this folder",
            hint="…/lib/modules/RELEASE, as `make modules_install` fills it",
        )
    return found[0]


def _candidates(folder: Path) -> Iterator[Path]:
    built = folder / "arch/x86/boot/bzImage"
    if built.is_file():
        yield built
        return
    patterns = ("vmlinuz", "usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz")
    in_modules = [image for pattern in patterns for image in sorted(folder.glob(pattern))]
    yield from in_modules or sorted(folder.glob("boot/vmlinuz-*"))


def _beside(image: Path) -> KernelSource:
    folder = image.parent
    if folder.parts[-3:] == ("arch", "x86", "boot"):
        tree = folder.parents[2]
        return KernelSource(image, tree, _existing(tree / ".config"), tree)
    if image.name == "vmlinux" and (folder / ".config").is_file():
        return KernelSource(image, folder, folder / ".config", folder)
    if (folder / "kernel").is_dir():
        return KernelSource(image, folder, _existing(folder / "config"), _build_folder(folder))
    _, _, release = image.name.partition("-")
    places = [folder.parent / lib / "modules" / release for lib in ("usr/lib", "lib")]
    module_folder = next((p for p in places if release and p.is_dir()), None)
    config = _existing(folder / f"config-{release}")
    return KernelSource(
        image, module_folder, config, _build_folder(module_folder) if module_folder else None
    )


def _build_folder(module_folder: Path) -> Path | None:
    """What `make modules_install` leaves beside the modules, if it leads anywhere."""
    build = module_folder / "build"
    return build.resolve() if (build / "Makefile").is_file() else None


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def prepare(
    name: str,
    path: Path,
    wanted: ModuleLists,
    options: SetupOptions,
    *,
    module_folder: Path | None = None,
    origin: str = "",
) -> KernelImage:
    """Make the kernel at ``path`` ready, or find it ready.

    :param origin: the identity of an unchanging ``path`` (a package set's key); otherwise the
        identity is taken from the files' sizes and times.
    :param module_folder: as for :func:`locate`.
    :raises InputError: it is no kernel, or the modules are another's.
    :raises SetupError: no space, broken modules.
    """
    folder = options.cache / "kernels"
    source = None if origin else locate(path, module_folder)
    key = digest(BUILDER, wanted, origin or str(path), _stamps(source) if source else None)
    if found := _read(name, folder / key):
        return found
    source = source or locate(path)
    options.progress.say(f"kernel {name}: preparing {source.image.name}")
    try:
        with product.exclusive(folder / f"{key}.lock", options.waiting(f"kernel {name}")):
            return _read(name, folder / key) or _make(name, source, wanted, folder / key)
    except OSError as error:
        raise product.disk_error(error, folder) from error


def _stamps(source: KernelSource) -> list[tuple[str, int, int, int]]:
    """Cheap identity of files that somebody else may rebuild at any time."""
    folder = source.module_folder
    lists = [folder / name for name in ("modules.order", "modules.builtin")] if folder else []
    symbols = [source.build / "Module.symvers"] if source.build else []
    stamps = []
    for path in [source.image, *([source.config] if source.config else []), *lists, *symbols]:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        stamps.append((str(path), found.st_size, found.st_mtime_ns, found.st_ino))
    return stamps


def _make(name: str, source: KernelSource, wanted: ModuleLists, final: Path) -> KernelImage:
    from testbed.host import kernel_file, modules  # noqa: PLC0415  likewise

    kernel = kernel_file.read(source.image)
    available = modules.find(source.module_folder)
    packed = modules.build(kernel.release, available, wanted)
    with product.building(final) as folder:
        image = "vmlinux" if kernel.pvh else "bzImage"
        (folder / image).write_bytes(kernel.data)
        (folder / "modules.cpio").write_bytes(packed.data)
        if source.config:
            (folder / "config").write_bytes(source.config.read_bytes())
        record = {
            "image": image,
            "release": kernel.release,
            "pvh": kernel.pvh,
            "sha256": hashlib.sha256(source.image.read_bytes()).hexdigest(),
            "build_id": kernel.build_id,
            "source": str(source.image),
            "missing": packed.missing,
            "build": str(source.build) if source.build else None,
        }
        product.write_json(folder / "kernel.json", record)
    made = _read(name, final)
    if made is None:
        raise SetupError(f"{final}: cannot be read back")
    return made


def _read(name: str, folder: Path) -> KernelImage | None:
    record: Any = product.read_json(folder / "kernel.json")
    if not isinstance(record, dict):
        return None
    return KernelImage(
        name=name,
        release=record["release"],
        image=folder / record["image"],
        pvh=record["pvh"],
        sha256=record["sha256"],
        build_id=record["build_id"],
        source=Path(record["source"]),
        config=_existing(folder / "config"),
        modules=folder / "modules.cpio",
        missing=tuple(record["missing"]),
        build=Path(record["build"]) if record["build"] else None,
    )
