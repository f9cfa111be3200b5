# SPDX-License-Identifier: Apache-2.0
"""The topology that a user chose: a file, stdin or a shipped one's name, and what is set in it.

For whoever is told a topology in words: the verbs, the pytest plugin, bug reports.

A topology that was right is remembered, by its file's bytes and what is set in it: to read it again
takes pydantic, Jinja and a YAML parser, whose imports are half of what `testbed up` does itself.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.errors import Diagnostic, InputError
from testbed.host import paths, remembered
from testbed.host.digest import digest
from testbed.topology import values
from testbed.topology.problem import listing, nearest

if TYPE_CHECKING:
    from testbed.topology.model import Topology

_KIND = "topology"
_MOST = 64  # are kept
_MOST_BYTES = 1 << 16  # of a file


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
    from testbed.topology import model  # noqa: PLC0415  slow; most verbs load none

    file, chosen = find_topology(word), parse_settings(settings)
    overrides = {"kernel": kernel, "iommu_mode": iommu_mode, "engine": engine}
    content = _content(file)
    key = _key(content, chosen, overrides) if content else ""
    known = _recalled(key) if key else None
    if known is not None:
        return known
    from testbed.topology import load  # noqa: PLC0415  slower still

    admit = None
    if trust is not None:
        from testbed.machine import own_devices  # noqa: PLC0415

        admit = own_devices.admission(trust=trust)
    if content:
        folder = Path(file).absolute().parent
        topology = load.load_bytes(content, str(file), chosen, folder=folder, admit=admit)
    else:
        topology = load.load(file, chosen, admit=admit)
    if any(value is not None for value in overrides.values()):
        topology = model.with_overrides(topology, **overrides)
    if key and not _has_own_devices(topology):
        remembered.remember(_KIND, key, paths.cache_dir(), values.kept(topology), most=_MOST)
    return topology


def _content(file: str | Path) -> bytes:
    """What a file holds; nothing if that cannot be told, or is no file's: the loader knows why."""
    try:
        found = Path(file).stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES:
            return Path(file).read_bytes()
    except OSError:
        pass
    return b""


def _key(content: bytes, settings: Mapping[str, str], overrides: Mapping[str, str | None]) -> str:
    """A hash of all that a topology without devices of the user's own is made from."""
    ours = Path(__file__).parent
    code = [remembered.state_of(folder) for folder in (ours, ours / "topology", ours / "models")]
    packages = Path(click.__file__).parents[1]  # changes when one is installed
    return digest(content, settings, overrides, code, str(packages), packages.stat().st_mtime_ns)


def _recalled(key: str) -> Topology | None:
    from testbed.topology.model import Topology  # noqa: PLC0415

    try:
        found = values.taken_back(remembered.recall(_KIND, key, paths.cache_dir()))
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, Topology) else None


def _has_own_devices(topology: Topology) -> bool:
    """Other files decide what such devices are, and whether they may be."""
    from testbed.topology.model import OwnDevice  # noqa: PLC0415

    entries = (entry for node in topology.nodes.values() for entry in node.entries())
    return any(isinstance(entry, OwnDevice) for entry in entries)
