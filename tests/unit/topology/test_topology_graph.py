# SPDX-License-Identifier: Apache-2.0
"""The rack's picture: nothing overlaps, nothing is cut off, and text cannot become markup."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.parsers import expat

import pytest

from testbed.topology import graph, graph_dot, graph_svg, load
from testbed.topology.graph import CHARACTER, Picture, Rect
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan
from tests.unit.topology.random_topologies import random_topology

SHIPPED = sorted((Path(__file__).parents[3] / "topologies").glob("*.yaml"))
SEEDS = range(60)


def shipped(path: Path) -> RackPlan:
    return place(load.load(path, {}))


def random_plan(seed: int) -> RackPlan:
    return place(load.load_text(json.dumps(random_topology(seed)), "random", {}))


def elements(text: str) -> list[tuple[str, dict[str, str]]]:
    """Well-formed, or an error."""
    found: list[tuple[str, dict[str, str]]] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda name, attributes: found.append((name, attributes))
    parser.Parse(text.encode(), True)
    return found


def check_geometry(picture: Picture) -> None:
    page = Rect(0, 0, picture.width, picture.height)
    boxes = [box.rect for box in picture.boxes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    groups = [group.rect for group in picture.groups]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(groups, 2))
    for machine in picture.machines:
        assert page.contains(machine.rect)
        inside = [b for b in picture.boxes if b.key.startswith(f"{machine.name}/")]
        assert all(machine.rect.contains(box.rect) for box in inside)
    assert not any(
        one.rect.overlaps(other.rect) for one, other in itertools.combinations(picture.machines, 2)
    )
    for group in picture.groups:
        assert any(machine.rect.contains(group.rect) for machine in picture.machines)
        for box in picture.boxes:
            if group.rect.overlaps(box.rect):
                assert group.rect.contains(box.rect)
                assert box.group == group.number
    for box in picture.boxes:
        assert max(len(box.name), len(box.detail)) * CHARACTER < box.rect.width
        assert not box.parent or picture.box(box.parent).rect.right < box.rect.x
    right = max(machine.rect.right for machine in picture.machines)
    uprights = [arc.x for arc in picture.arcs]
    assert len(set(uprights)) == len(uprights)
    assert all(right < x < picture.width for x in uprights)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_racks_are_drawn_whole(path: Path) -> None:
    plan = shipped(path)
    picture = graph.layout(plan)
    check_geometry(picture)
    assert len(picture.arcs) == len(plan.topology.links)
    drawn = {box.key for box in picture.boxes}
    for name, node in plan.nodes.items():
        assert {f"{name}/{f.device}" for f in node.functions} <= drawn


@pytest.mark.parametrize("seed", SEEDS)
def test_any_rack_is_drawn_without_overlap(seed: int) -> None:
    plan = random_plan(seed)
    picture = graph.layout(plan)
    check_geometry(picture)
    found = elements(graph_svg.svg(picture))
    width, height = (float(found[0][1][name]) for name in ("width", "height"))
    for name, attributes in found:
        if name == "rect":
            assert 0 <= float(attributes["x"]) <= width
            assert 0 <= float(attributes["y"]) <= height
    assert graph_svg.svg(graph.layout(plan)) == graph_svg.svg(picture)
    assert graph_dot.dot(graph.layout(plan)) == graph_dot.dot(picture)


def described(text: str) -> RackPlan:
    data: dict[str, Any] = {
        "rack": "r",
        "description": text,
        "nodes": {"h": {"pcie": [{"gpu": "a", "vram": "16M"}]}},
    }
    return place(load.load_text(json.dumps(data), "r", {}))


NASTY = "</text><script>alert(1)</script> & \"quoted\" 'so' \\ ]]>"


def test_text_cannot_become_markup() -> None:
    text = graph_svg.svg(graph.layout(described(NASTY)))
    names = {name for name, _ in elements(text)}
    assert names <= {
        "svg",
        "title",
        "desc",
        "style",
        "rect",
        "text",
        "tspan",
        "g",
        "path",
        "circle",
    }
    assert "&lt;script&gt;" in text


def test_the_file_needs_nothing_else() -> None:
    text = graph_svg.svg(graph.layout(shipped(SHIPPED[0])))
    assert "prefers-color-scheme: dark" in text
    assert text.count("http") == 1  # the namespace
    for word in ("@import", "url(", "href", "<script"):
        assert word not in text


def test_words_for_graphviz_are_quoted() -> None:
    picture = graph.layout(described("x"))
    machine = picture.machines[0]
    odd = graph.Machine(machine.name, 'say "hi" \\ {', machine.rect)
    changed = graph.Picture(
        **{**{f: getattr(picture, f) for f in picture.__dataclass_fields__}, "machines": (odd,)}
    )
    assert '"h  say \\"hi\\" \\\\ {"' in graph_dot.dot(changed)
