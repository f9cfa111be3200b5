# SPDX-License-Identifier: Apache-2.0
"""Set-up from within a verb, with progress on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from testbed.host import prepare
from testbed.host.progress import shown

if TYPE_CHECKING:
    from testbed.topology.model import Topology


def install(
    kernels: Sequence[str],
    *,
    qemu: str | None = None,
    mirror: str | None = None,
    locked: bool = False,
    refresh: bool = False,
) -> prepare.Installation:
    """Make or find everything that racks with these kernels need.

    :raises SetupError: as :func:`testbed.host.prepare.prepare`.
    """
    with shown() as progress:
        options = prepare.options(
            # The verbs that set up on the way have no --mirror of their own.
            mirror=mirror or os.environ.get("TESTBED_SETUP_MIRROR") or None,
            locked=locked,
            refresh=refresh,
            progress=progress,
        )
        return prepare.prepare(tuple(dict.fromkeys(kernels)), qemu=qemu, setup=options)


def install_for(topologies: Iterable[Topology], *, qemu: str | None = None) -> prepare.Installation:
    """What these topologies' nodes need."""
    kernels = [node.kernel for topology in topologies for node in topology.nodes.values()]
    return install(kernels, qemu=qemu)
