# SPDX-License-Identifier: Apache-2.0
"""The topology that a user chose: a file, stdin or a shipped one's name, and what is set in it.

For whoever is told a topology in words: the verbs, the pytest plugin, bug reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import Diagnostic, InputError
from testbed.host import paths
from testbed.topology.problem import listing, nearest

if TYPE_CHECKING:
    from testbed.topology.model import Topology


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """``["gpus=8"]`` → ``{"gpus": "8"}``.

    :raises InputError: a word without ``=``.
    """
    settings: dict[str, str] = {}
    wrong: list[Diagnostic] = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            wrong.append(Diagnostic("-s", 0, 0, f"'{pair}' has no '='", expected="NAME=VALUE"))
        settings[name.strip()] = value
    if wrong:
        raise InputError(diagnostics=wrong)
    return settings


def shipped_topologies() -> dict[str, Path]:
    """The topologies that come with the testbed, by name."""
    return {path.stem: path for path in sorted(paths.data_dir("topologies").glob("*.yaml"))}


def find_topology(word: str) -> str | Path:
    """A file as given, ``-`` for stdin, or a shipped topology by its name.

    :raises InputError: neither a file nor such a name.
    """
    if word == "-" or Path(word).exists() or "/" in word or word.endswith((".yaml", ".yml")):
        return word
    shipped = shipped_topologies()
    if word not in shipped:
        expected = f"a file, or {listing(shipped)}"
        raise InputError(
            diagnostics=[
                Diagnostic(word, 0, 0, "no such topology", expected, nearest(word, shipped))
            ]
        )
    return shipped[word]


def load_topology(
    word: str,
    settings: Sequence[str],
    *,
    kernel: str | None = None,
    iommu_mode: str | None = None,
    engine: str | None = None,
    trust: bool | None = None,
) -> Topology:
    """The topology that the user named, with what the command line changes in it.

    :param trust: whether the files that it names as devices may be run; None if nothing is started.
    :raises InputError: all that is wrong with it.
    """
    from testbed.topology import load, model  # noqa: PLC0415  slow; most verbs load none

    admit = None
    if trust is not None:
        from testbed.machine import own_devices  # noqa: PLC0415

        admit = own_devices.admission(trust=trust)
    topology = load.load(find_topology(word), parse_settings(settings), admit=admit)
    if (kernel, iommu_mode, engine) != (None, None, None):
        topology = model.with_overrides(
            topology, kernel=kernel, iommu_mode=iommu_mode, engine=engine
        )
    return topology
