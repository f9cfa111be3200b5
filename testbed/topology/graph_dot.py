# SPDX-License-Identifier: Apache-2.0
"""A rack's picture in Graphviz's language (graphviz.org/doc/info/lang.html), for other layouts."""

from __future__ import annotations

from collections.abc import Iterator

from testbed.topology.graph import Box, Picture

_COLOURS = {"gpu": "palegreen", "nic": "lightblue", "nvme": "khaki", "switch": "thistle"}


def dot(picture: Picture) -> str:
    """The file's text: an undirected graph; machines and shared IOMMU groups are clusters."""
    return "\n".join(_lines(picture)) + "\n"


def _lines(picture: Picture) -> Iterator[str]:
    yield f"graph {_quoted(picture.title)} {{"
    yield "  rankdir=LR"
    yield '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=monospace]'
    shared = {group.number for group in picture.groups}
    for number, machine in enumerate(picture.machines):
        boxes = [box for box in picture.boxes if box.key.partition("/")[0] == machine.name]
        yield f"  subgraph cluster_machine{number} {{"
        yield f"    label={_quoted(f'{machine.name}  {machine.detail}')}"
        yield from (f"    {_box(box)}" for box in boxes if box.group not in shared)
        for group in sorted({box.group for box in boxes} & shared):
            yield f"    subgraph cluster_machine{number}_group{group} {{"
            yield f'      label="IOMMU group g{group}"; style=dashed'
            yield from (f"      {_box(box)}" for box in boxes if box.group == group)
            yield "    }"
        yield "  }"
    for box in picture.boxes:
        if box.parent:
            yield f"  {_quoted(box.parent)} -- {_quoted(box.key)}"
    for arc in picture.arcs:
        label = f"label={_quoted(arc.label)}, tooltip={_quoted(arc.kind)}"
        yield (
            f"  {_quoted(arc.one)} -- {_quoted(arc.other)}"
            f" [{label}, color=red, fontcolor=red, constraint=false]"
        )
    yield "}"


def _box(box: Box) -> str:
    more = f", fillcolor={_COLOURS[box.kind]}" if box.kind in _COLOURS else ""
    more += ", color=orangered, penwidth=2" if box.acs else ""
    label = _quoted(f"{box.name}\n{box.detail}")
    return f"{_quoted(box.key)} [label={label}, tooltip={_quoted(box.tip)}{more}]"


def _quoted(text: str) -> str:
    r"""A quoted string; a line break becomes ``\n``, which Graphviz's labels break at."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{"".join(c if c.isprintable() else " " for c in escaped)}"'
