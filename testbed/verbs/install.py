# SPDX-License-Identifier: Apache-2.0
"""Set-up from within a verb, with progress on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from testbed.errors import CapabilityMissing
from testbed.host import paths
from testbed.host.installation import Installation, recall
from testbed.host.progress import shown
from testbed.host.toolroot import QEMU_VARIABLE

if TYPE_CHECKING:
    from testbed.host.guest_modules import ModuleBuilder
    from testbed.host.packages import SetupOptions
    from testbed.topology.model import Topology


def install(
    kernels: Sequence[str],
    *,
    qemu: str | None = None,
    mirror: str | None = None,
    locked: bool = False,
    refresh: bool = False,
) -> Installation:
    """Make or find everything that racks with these kernels need.

    :raises SetupError: as :func:`testbed.host.prepare.prepare`.
    """
    qemu = qemu or os.environ.get(QEMU_VARIABLE) or None
    if qemu is None and not (mirror or locked or refresh):
        found = recall(kernels, paths.cache_dir().absolute())
        if found is not None:
            return found
    from testbed.host import prepare  # slow

    with options(mirror, locked, refresh) as setup:
        return prepare.prepare(tuple(dict.fromkeys(kernels)), qemu=qemu, setup=setup)


def install_for(topologies: Iterable[Topology], *, qemu: str | None = None) -> Installation:
    """What these topologies' nodes need."""
    kernels = [node.kernel for topology in topologies for node in topology.nodes.values()]
    return install(kernels, qemu=qemu)


def builders(
    kernels: Iterable[str],
    *,
    mirror: str | None = None,
    locked: bool = False,
    refresh: bool = False,
) -> list[ModuleBuilder]:
    """What builds modules for these kernels; one for which nothing can be had is named and left.

    :raises SetupError: as :func:`testbed.host.guest_modules.builder`.
    """
    from testbed.host import guest_modules

    made = []
    with options(mirror, locked, refresh) as setup:
        for kernel in dict.fromkeys(kernels):
            try:
                made.append(guest_modules.builder(kernel, setup))
            except CapabilityMissing as error:
                setup.progress.say(f"no modules can be built for kernel {kernel}: {error}")
    return made


@contextmanager
def options(
    mirror: str | None = None, locked: bool = False, refresh: bool = False
) -> Iterator[SetupOptions]:
    """The options of a set-up within a verb, with progress on stderr."""
    from testbed.host import prepare  # slow

    with shown() as progress:
        yield prepare.options(
            # The verbs that set up on the way have no --mirror of their own.
            mirror=mirror or os.environ.get("TESTBED_SETUP_MIRROR") or None,
            locked=locked,
            refresh=refresh,
            progress=progress,
        )
