# SPDX-License-Identifier: Apache-2.0
"""A package set of the manifest as an unpacked folder in the cache.

``CACHE/packages/KEY/root`` holds the files, ``CACHE/packages/KEY/lock.json`` says which packages
they are from. KEY is a hash of the manifest's entry and the lock. ``CACHE/current/NAME-ENTRY.json``
points to the KEY that the entry led to last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from testbed.errors import Interrupted, SetupError
from testbed.host import apt, lock, mirror, product
from testbed.host.digest import digest
from testbed.host.lock import Lock
from testbed.host.manifest import PackageSet
from testbed.host.progress import Progress, Silent, megabytes

BUILDER = 1  # raised when the same packages shall be unpacked differently
UNPACKERS = 2

# What no program here reads; a third of the bytes.
_PRUNED = (
    *(f"usr/share/{name}" for name in ("doc", "man", "locale", "info", "lintian", "zoneinfo")),
    *(f"usr/share/{name}" for name in ("bash-completion", "zsh", "icons", "perl5", "bug")),
    "var",
)


class NotSetUp(SetupError):
    """A part is missing, and the caller did not want it to be made."""


@dataclass(frozen=True)
class SetupOptions:
    """How a set-up is done.

    ``mirror``   the URL that the user named, or None.
    ``locked``   use exactly what ``reviewed`` says, or fail.
    ``refresh``  ask the mirror even if a finished product is there.
    ``offline``  make nothing that has to be downloaded: say that it is missing.
    ``reviewed`` the sets of ``images/lock.json``.
    ``cancelled`` set from another thread, it ends downloads and waits.
    """

    cache: Path
    mirror: str | None = None
    locked: bool = False
    refresh: bool = False
    offline: bool = False
    reviewed: Mapping[str, Lock] = field(default_factory=dict)
    progress: Progress = field(default_factory=Silent)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def waiting(self, what: str) -> Callable[[], None]:
        """To call while another process builds ``what``: says so once, ends when cancelled."""
        said = False

        def wait() -> None:
            nonlocal said
            if not said:
                self.progress.say(f"{what}: another set-up is at it; waiting")
                said = True
            if self.cancelled.is_set():
                raise Interrupted("the set-up was ended")

        return wait


@dataclass(frozen=True)
class PackageRoot:
    """An unpacked set: its folder and exactly what is in it. ``key`` names it in the cache."""

    name: str
    key: str
    root: Path
    packages: Lock

    def version(self, package: str) -> str:
        """The version of one of its packages, "" if it is not among them."""
        return next((p.version for p in self.packages if p.name == package), "")


def ensure(name: str, entry: PackageSet, options: SetupOptions) -> PackageRoot:
    """The set, from the cache or else from the mirror.

    :param name: ``toolroot``, ``guest`` or ``kernel:NAME``; names the set in locks and messages.
    :raises NotSetUp: it would have to be downloaded, and ``options.offline``.
    :raises MirrorError: the mirror does not answer; the cache is as it was.
    :raises SetupError: drift that ``options.locked`` forbids, changed content, no space.
    """
    if not options.refresh:
        found = cached(name, entry, options)
        if found:
            return found
    if options.offline:
        raise NotSetUp(f"{name} is not set up", hint="testbed setup")
    lock_file = options.cache / "locks" / f"{_file_name(name)}.lock"
    try:
        with product.exclusive(lock_file, options.waiting(name)):
            # The other one may have made it in the meantime.
            found = None if options.refresh else cached(name, entry, options)
            return found or _make(name, entry, options)
    except OSError as error:
        raise product.disk_error(error, options.cache) from error


def cached(name: str, entry: PackageSet, options: SetupOptions) -> PackageRoot | None:
    """The finished product for this entry, if it may be used; asks no mirror."""
    pointer = product.read_json(_pointer(name, entry, options.cache))
    if not isinstance(pointer, dict) or not isinstance(pointer.get("key"), str):
        return None
    found = _read(name, pointer["key"], options.cache)
    if found is None:
        return None
    reviewed = options.reviewed.get(name)
    if options.locked and (reviewed is None or _differs(reviewed, found.packages)):
        return None
    return found


def _differs(reviewed: Lock, packages: Lock) -> bool:
    drift = lock.compare(reviewed, packages)
    return bool(drift.conflicts or drift.changes)


def _read(name: str, key: str, cache: Path) -> PackageRoot | None:
    folder = cache / "packages" / key
    stored = product.read_json(folder / "lock.json")
    if not isinstance(stored, list) or not (folder / "root").is_dir():
        return None
    return PackageRoot(name, key, folder / "root", lock.from_json(stored))


def _make(name: str, entry: PackageSet, options: SetupOptions) -> PackageRoot:
    source = mirror.host_mirror(options.mirror)
    state = options.cache / "apt" / _file_name(name)
    manager = apt.Apt(state, entry, source, options.cancelled)
    options.progress.say(f"{name}: reading the index of {', '.join(entry.suites)} from {source}")
    manager.update()
    archives = manager.resolve()
    if not archives:
        raise SetupError(f"{name}: the mirror {source} offers nothing of what is wanted")
    packages = apt.to_lock(archives)
    drift = lock.check(name, options.reviewed.get(name), packages, locked=options.locked)
    if drift.changes:
        options.progress.say(f"{name}: newer than reviewed, and used: " + _shortened(drift.changes))
    key = digest(BUILDER, entry, [list(_identity(package)) for package in packages])
    found = _read(name, key, options.cache)
    if found is None:
        missing = manager.missing(archives)
        if missing:
            size_bytes = sum(archive.package.size_bytes for archive in missing)
            here = len(archives) - len(missing)
            options.progress.say(
                f"{name}: downloading {len(missing)} packages, {megabytes(size_bytes)}"
                + (f" ({here} more are here already)" if here else "")
            )
            manager.download(name, size_bytes, options.progress)
        _unpack(name, key, manager, archives, options)
        found = PackageRoot(name, key, options.cache / "packages" / key / "root", packages)
    product.write_json(_pointer(name, entry, options.cache), {"key": key, "mirror": source})
    product.remove_tree(state)
    return found


def _unpack(
    name: str,
    key: str,
    manager: apt.Apt,
    archives: tuple[apt.Archive, ...],
    options: SetupOptions,
) -> None:
    options.progress.say(f"{name}: unpacking {len(archives)} packages")
    files = [manager.archives / archive.file for archive in archives]
    with product.building(options.cache / "packages" / key) as folder:
        root = folder / "root"
        root.mkdir()
        with ThreadPoolExecutor(UNPACKERS) as pool:
            for done in [
                pool.submit(apt.unpack, files[i::UNPACKERS], root) for i in range(UNPACKERS)
            ]:
                done.result()
        for pruned in _PRUNED:
            product.remove_tree(root / pruned)
        product.write_json(folder / "lock.json", lock.to_json(apt.to_lock(archives)))


def _identity(package: lock.LockedPackage) -> tuple[str, str, str, str]:
    return package.name, package.version, package.architecture, package.sha256


def _pointer(name: str, entry: PackageSet, cache: Path) -> Path:
    return cache / "current" / f"{_file_name(name)}-{digest(BUILDER, entry)}.json"


def _file_name(name: str) -> str:
    return name.replace(":", "-")


def _shortened(lines: tuple[str, ...], most: int = 6) -> str:
    text = "; ".join(lines[:most])
    return text + (f"; and {len(lines) - most} more" if len(lines) > most else "")
