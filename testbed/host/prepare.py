# SPDX-License-Identifier: Apache-2.0
"""The set-up as the rest sees it: ask for what is needed, get values that are ready to use.

A finished part is found in milliseconds and asks no mirror; a missing one is made. The three
package sets come from different indices and are fetched at the same time.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testbed.errors import InputError
from testbed.host import agent, image, kernel, lock, manifest, packages, paths, toolroot
from testbed.host.image import GuestImage
from testbed.host.installation import DEFAULT_KERNEL as DEFAULT_KERNEL  # noqa: PLC0414
from testbed.host.installation import Installation as Installation  # noqa: PLC0414
from testbed.host.installation import remember
from testbed.host.kernel import KernelImage
from testbed.host.lock import Lock
from testbed.host.manifest import Manifest
from testbed.host.packages import PackageRoot, SetupOptions
from testbed.host.progress import Progress, Silent

TOOLROOT, GUEST = "toolroot", "guest"


def lock_file() -> Path:
    """Where the reviewed versions are recorded."""
    return paths.data_dir("images") / "lock.json"


def options(
    *,
    mirror: str | None = None,
    locked: bool = False,
    refresh: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> SetupOptions:
    """The options of a set-up into this user's cache."""
    return SetupOptions(
        cache=paths.cache_dir().absolute(),
        mirror=mirror,
        locked=locked,
        refresh=refresh,
        offline=offline,
        reviewed=lock.read_reviewed(lock_file()),
        progress=progress or Silent(),
    )


def prepare(
    kernels: Sequence[str] = (DEFAULT_KERNEL,),
    *,
    qemu: str | None = None,
    setup: SetupOptions | None = None,
) -> Installation:
    """Make or find everything.

    :param kernels: names from the manifest, or paths of kernels of the user's own.
    :param qemu: another QEMU than the tool root's; ``TESTBED_QEMU`` if None.
    :raises InputError: a kernel that does not exist.
    :raises MirrorError: something has to be downloaded and the mirror does not answer.
    :raises SetupError: anything else that keeps it from being made.
    """
    setup = setup or options()
    described = manifest.load()
    named = tuple(dict.fromkeys(kernels))
    for name in named:
        _is_packaged(name, described)  # refuses what is neither, before anything is made
    sets = {GUEST: described.guest}
    qemu = qemu or os.environ.get(toolroot.QEMU_VARIABLE) or None
    if qemu is None:
        sets[TOOLROOT] = described.toolroot

    def ensure(name: str) -> PackageRoot:
        return packages.ensure(name, sets[name], setup)

    def ready_image() -> tuple[PackageRoot, GuestImage]:
        root = ensure(GUEST)
        return root, image.prepare(root, described.image, setup)

    with ThreadPoolExecutor(max_workers=len(sets) + len(named)) as pool:
        guest = pool.submit(ready_image)
        tools = pool.submit(ensure, TOOLROOT) if TOOLROOT in sets else None
        each = {name: pool.submit(prepare_kernel, name, described, setup) for name in named}
        try:
            guest_root, guest_image = guest.result()
            roots = [guest_root]
            if tools:
                roots.append(tools.result())
            made = {name: future.result() for name, future in each.items()}
        except BaseException:
            setup.cancelled.set()
            raise
    packaged = [root for root, _ in made.values() if root is not None]
    roots += packaged
    installation = Installation(
        qemu=toolroot.packaged_qemu(roots[1]) if tools else toolroot.named_qemu(qemu or ""),
        image=guest_image,
        agent=agent.bundle(paths.data_dir(agent.PACKAGE), guest_image.python, setup.cache),
        kernels={name: image for name, (_, image) in made.items()},
        packages={root.name: root.packages for root in roots},
    )
    if tools and len(packaged) == len(made):  # what the user brought may change
        remember(installation, setup.cache)
    return installation


def update_lock(sets: Mapping[str, Lock], file: Path | None = None) -> None:
    """Record what these package sets consist of as reviewed.

    :raises SetupError: the file cannot be written.
    """
    lock.write_reviewed(file or lock_file(), sets)


def prepare_kernel(
    name: str, described: Manifest, setup: SetupOptions
) -> tuple[PackageRoot | None, KernelImage]:
    """One kernel, and the packages that it is from if it is one of the manifest's.

    :param name: a name from the manifest, a path, or ``PATH,modules=FOLDER``.
    :raises InputError: it does not exist or is no kernel. :raises SetupError: as :func:`prepare`.
    """
    if _is_packaged(name, described):
        root = packages.ensure(f"kernel:{name}", described.kernels[name], setup)
        return root, kernel.prepare(name, root.root, described.modules, setup, origin=root.key)
    path, module_folder = kernel.split_word(name)
    image = kernel.prepare(
        name, Path(path).expanduser(), described.modules, setup, module_folder=module_folder
    )
    return None, image


def _is_packaged(name: str, described: Manifest) -> bool:
    """True for a kernel of the manifest, False for a path.

    :raises InputError: neither.
    """
    if name in described.kernels:
        return True
    path, _ = kernel.split_word(name)
    if "/" not in path and not Path(path).exists():
        known = sorted(described.kernels)
        near = difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"kernel '{name}' is neither one of {', '.join(known)} nor a path",
            hint=f"did you mean '{near[0]}'?" if near else "",
        )
    return False
