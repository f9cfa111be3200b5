# SPDX-License-Identifier: Apache-2.0
"""What a single value cannot show: names used twice, links to nowhere, two cards in one port."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from testbed.topology.model import RESERVED_NAMES, Entry, Gpu, Node, RootPort, Topology
from testbed.topology.problem import DataPath, Problem, nearest


def problems(topology: Topology) -> tuple[Problem, ...]:
    """Every fault of a topology whose single values are right."""
    found: list[Problem] = []
    for name, node in topology.nodes.items():
        found.extend(_entry_problems(name, node))
    found.extend(_link_problems(topology))
    return tuple(found)


def _entry_problems(node_name: str, node: Node) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for entry, path in entries_with_places(node.pcie, ("nodes", node_name, "pcie")):
        place = (*path, entry.kind)
        if entry.name in RESERVED_NAMES:
            yield Problem(place, f"the name '{entry.name}' is the testbed's own")
        elif entry.name in seen:
            yield Problem(
                place, f"the name '{entry.name}' is used twice; it is a {seen[entry.name]} already"
            )
        seen.setdefault(entry.name, entry.kind)
        if isinstance(entry, RootPort) and len(entry.below) > 1:
            second = entry.below[1]
            yield Problem(
                (*path, "below", 1, second.kind),
                f"root port '{entry.name}' has room for one entry; '{second.name}' is one too many",
                expected="a switch between them, or a root port each",
            )


def entries_with_places(
    entries: tuple[Entry, ...], path: DataPath
) -> Iterator[tuple[Entry, DataPath]]:
    """Every entry of a list that stands at ``path`` in the data, parents first, and its place."""
    stack = [(entry, (*path, index)) for index, entry in reversed(list(enumerate(entries)))]
    while stack:
        entry, place = stack.pop()
        yield entry, place
        below = reversed(list(enumerate(entry.children)))
        stack.extend((child, (*place, "below", index)) for index, child in below)


def _link_problems(topology: Topology) -> Iterator[Problem]:
    gpus = {
        f"{name}/{entry.name}": entry
        for name, node in topology.nodes.items()
        for entry in node.entries()
        if isinstance(entry, Gpu)
    }
    seen: dict[tuple[str, frozenset[str]], int] = {}
    for index, link in enumerate(topology.links):
        for side, end in enumerate(link.between):
            if end not in gpus:
                yield _no_such_gpu(end, ("links", index, "between", side), gpus)
        if len(link.between) != 2:
            message = f"a link has two ends, and this one {len(link.between)}"
            yield Problem(("links", index, "between"), message)
            continue
        first, second = link.between
        if first == second:
            yield Problem(("links", index, "between"), f"'{first}' cannot be linked to itself")
        other = seen.setdefault((link.kind, frozenset(link.between)), index)
        if other != index:
            yield Problem(
                ("links", index, "between"),
                f"a second {link.kind} link between '{first}' and '{second}'",
                expected="one link, with a larger width",
            )


def _no_such_gpu(end: str, path: DataPath, gpus: Mapping[str, Gpu]) -> Problem:
    return Problem(path, f"there is no GPU '{end}'", nearest=nearest(end, gpus))
