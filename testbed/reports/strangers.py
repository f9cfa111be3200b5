# SPDX-License-Identifier: Apache-2.0
"""What of this host somebody else's rack would use: nothing, unless they are trusted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from testbed.topology.checks import entries_with_places
from testbed.topology.model import Passthrough, Topology
from testbed.topology.problem import DataPath, Problem

EXPECTED = "--trust, if you do"
_KERNEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*")


def uses(topology: Topology, prefix: DataPath, whole: DataPath) -> Iterator[Problem]:
    """Paths of kernels, and real devices. Devices of their own code are `own_devices`' business.

    :param prefix: where the topology stands in what was read; ``whole`` is said for all of it if
        its parts have no places of their own.
    """
    for name, node in topology.nodes.items():
        place: DataPath = (*prefix, "nodes", name) if prefix else whole
        if not is_kernel_name(node.kernel):
            message = f"the kernel '{node.kernel}' is a path on this host"
            yield Problem((*place, "kernel"), message, EXPECTED)
        for entry, path in entries_with_places(node.pcie, (*place, "pcie")):
            if isinstance(entry, Passthrough):
                yield Problem(path, f"'{entry.name}' is a real device of this host", EXPECTED)


def is_kernel_name(kernel: str) -> bool:
    """A kernel from the package mirror, not one in a file (:mod:`testbed.host.prepare`)."""
    return _KERNEL_NAME.fullmatch(kernel) is not None and not Path(kernel).exists()
