# SPDX-License-Identifier: Apache-2.0
"""A rack's picture as one SVG file that needs nothing else (SVG 2; CSS Color 4 for the scheme).

It follows the reader's light or dark scheme (``prefers-color-scheme``), names everything for screen
readers and pointers (``title``), and is the same to the byte for the same rack.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from testbed.topology.graph import (
    BOX_PADDING,
    LEGEND,
    MARGIN,
    Arc,
    Box,
    Group,
    Machine,
    Picture,
    Rect,
)

# As the file itself has it; a page that holds the picture nests it (CSS Nesting).
STYLE = """\
:root { color-scheme: light dark }
svg { background: #ffffff }
text {
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: 12px; fill: #1b1f24
}
.title { font-size: 17px; font-weight: bold }
.name { font-weight: bold }
.detail, .legend { fill: #57606a; font-size: 11px }
.machine { fill: #f6f8fa; stroke: #d0d7de }
.group { fill: #8250df14; stroke: #8250df; stroke-dasharray: 5 3 }
.edge { fill: none; stroke: #8c959f; stroke-width: 1.5 }
.box { fill: #ffffff; stroke: #8c959f }
.acs { stroke: #bc4c00; stroke-width: 2 }
.mark { fill: #8c959f }
.gpu .mark { fill: #1a7f37 }
.nic .mark { fill: #0969da }
.nvme .mark { fill: #9a6700 }
.switch .mark { fill: #8250df }
.link { fill: none; stroke: #cf222e; stroke-width: 1.5 }
.end { fill: #cf222e }
.label { fill: #cf222e; font-size: 10px }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117 }
  text { fill: #e6edf3 }
  .detail, .legend { fill: #9198a1 }
  .machine { fill: #151b23; stroke: #3d444d }
  .group { fill: #ab7df826; stroke: #ab7df8 }
  .edge { stroke: #7d8590 }
  .box { fill: #212830; stroke: #7d8590 }
  .acs { stroke: #f0883e }
  .mark { fill: #7d8590 }
  .gpu .mark { fill: #3fb950 }
  .nic .mark { fill: #4493f8 }
  .nvme .mark { fill: #d29922 }
  .switch .mark { fill: #ab7df8 }
  .link { stroke: #f85149 }
  .end, .label { fill: #ff7b72 }
}"""


def svg(picture: Picture, *, style: bool = True) -> str:
    """The file's text, with a newline at its end.

    :param style: with its style sheet; without for a page that has :data:`STYLE` already.
    """
    return "\n".join(_lines(picture, style)) + "\n"


def _lines(picture: Picture, style: bool) -> Iterator[str]:
    width, height = _n(picture.width), _n(picture.height)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="img">'
    )
    yield f"<title>{_text(picture.title)}</title>"
    if picture.description:
        yield f"<desc>{_text(picture.description)}</desc>"
    if style:
        yield f"<style>\n{STYLE}\n</style>"
    yield _words("title", MARGIN, MARGIN + 8, picture.title)
    yield _words("detail", MARGIN, MARGIN + 26, picture.description)
    for machine in picture.machines:
        yield from _machine(machine)
    for group in picture.groups:
        yield from _group(group)
    for box in picture.boxes:
        if box.parent:
            yield _edge(picture.box(box.parent), box)
    for arc in picture.arcs:
        yield from _arc(picture, arc)
    for box in picture.boxes:
        yield from _box(box)
    yield _words("legend", MARGIN, picture.height - MARGIN, LEGEND)
    yield "</svg>"


def _machine(machine: Machine) -> Iterator[str]:
    rect = machine.rect
    yield f'<rect class="machine" {_place(rect)} rx="8"/>'
    name = f'<tspan class="name">{_text(machine.name)}</tspan>'
    detail = f'<tspan class="detail" dx="8">{_text(machine.detail)}</tspan>'
    yield f'<text x="{_n(rect.x + BOX_PADDING)}" y="{_n(rect.y + 20)}">{name}{detail}</text>'


def _group(group: Group) -> Iterator[str]:
    yield "<g>"
    yield f"<title>IOMMU group g{group.number}</title>"
    yield f'<rect class="group" {_place(group.rect)} rx="8"/>'
    yield "</g>"


def _edge(parent: Box, child: Box) -> str:
    start, end = parent.rect, child.rect
    middle = (start.right + end.x) / 2
    # All children of a bridge branch off at the same place, the right half of the gap.
    bend = max(middle, end.x - 17)
    return (
        f'<path class="edge" d="M{_n(start.right)} {_n(start.middle)}H{_n(bend)}'
        f'V{_n(end.middle)}H{_n(end.x)}"/>'
    )


def _arc(picture: Picture, arc: Arc) -> Iterator[str]:
    one, other = picture.box(arc.one).rect, picture.box(arc.other).rect
    middle = (one.middle + other.middle) / 2
    yield "<g>"
    yield f"<title>{_text(f'{arc.label}: {arc.kind}, {arc.one} to {arc.other}')}</title>"
    yield (
        f'<path class="link" d="M{_n(one.right)} {_n(one.middle)}H{_n(arc.x)}'
        f'V{_n(other.middle)}H{_n(other.right)}"/>'
    )
    for end in (one, other):
        yield f'<circle class="end" cx="{_n(arc.x)}" cy="{_n(end.middle)}" r="2.5"/>'
    at = f"{_n(arc.x - 3)} {_n(middle)}"
    yield (
        f'<text class="label" text-anchor="middle" transform="translate({at}) rotate(-90)">'
        f"{_text(arc.label)}</text>"
    )
    yield "</g>"


def _box(box: Box) -> Iterator[str]:
    rect = box.rect
    yield f'<g class="{box.kind}">'
    yield f"<title>{_text(box.tip)}</title>"
    yield f'<rect class="box{" acs" if box.acs else ""}" {_place(rect)} rx="5"/>'
    mark = Rect(rect.x, rect.y + 5, 4, rect.height - 10)
    yield f'<rect class="mark" {_place(mark)}/>'
    yield _words("name", rect.x + BOX_PADDING, rect.y + 15, box.name)
    yield _words("detail", rect.x + BOX_PADDING, rect.y + 30, box.detail)
    yield "</g>"


def _place(rect: Rect) -> str:
    values = {"x": rect.x, "y": rect.y, "width": rect.width, "height": rect.height}
    return " ".join(f'{name}="{_n(value)}"' for name, value in values.items())


def _words(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}">{_text(text)}</text>'


def _text(text: str) -> str:
    """Escaped; control characters, which XML 1.0 has not, become spaces."""
    return escape("".join(c if c.isprintable() or c == "\n" else " " for c in text))


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
