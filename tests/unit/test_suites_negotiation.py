# SPDX-License-Identifier: Apache-2.0
"""What the protocol core is told of a rack: links, their numbers, facts of each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.instruments.negotiation_board import refusal_of, takes_part
from testbed.suites.negotiation_fixtures import a_node, has_node
from testbed.topology import load
from testbed.topology.interconnects import links_of, tables
from testbed.topology.placement import place

ROOT = Path(__file__).parents[2]
GPUS = ["gpu0", "gpu1", "gpu2"]
MIXED = """
rack: mixed
nodes:
{% for node in ["one", "two"] %}
  {{ node }}:
    pcie: [{gpu: gpu0, vram: 16M, engine: model}, {gpu: gpu1, vram: 16M, engine: model}]
{% endfor %}
links:
  - {kind: xgmi, between: [one/gpu0, two/gpu0]}
  - {kind: ual, between: [two/gpu1, one/gpu0]}
  - {kind: xgmi, between: [one/gpu0, one/gpu1]}
"""


def mesh() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    topology = load.load(ROOT / "topologies" / "partial-mesh.yaml", {})
    plan = place(topology)
    links, _ = links_of(plan, "host0")
    return tables(plan.nodes["host0"], topology, links, [*GPUS, "nic0", "nic1"]), links


def test_neighbours_have_links_named_after_their_ends() -> None:
    _, links = mesh()
    assert [link["name"] for link in links] == ["gpu0-gpu1", "gpu1-gpu2"]
    assert {link["kind"] for link in links} == {"xgmi"}


def test_a_gpu_counts_all_of_its_links() -> None:
    plan = place(load.load(ROOT / "topologies" / "partial-mesh.yaml", {}))
    assert links_of(plan, "host0")[1] == {
        ("gpu0", "gpu0-gpu1"): 0,
        ("gpu1", "gpu0-gpu1"): 0,
        ("gpu1", "gpu1-gpu2"): 1,
        ("gpu2", "gpu1-gpu2"): 0,
    }


def test_links_to_other_nodes_and_the_fabric_s_count_but_are_not_listed(tmp_path: Path) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(MIXED)
    links, numbers = links_of(place(load.load(file, {})), "one")
    assert [link["name"] for link in links] == ["gpu0-gpu1"]
    assert numbers == {("gpu0", "gpu0-gpu1"): 2, ("gpu1", "gpu0-gpu1"): 0}


def test_facts_tell_a_redirect_from_a_way_through_the_root() -> None:
    found, _ = mesh()
    ways = {(each["exporter"], each["importer"]): each for each in found["pcie"]}
    assert len(ways) == 3 * 4  # each GPU's memory, by every other device
    below, beside = ways["gpu0", "nic0"], ways["gpu0", "nic1"]
    assert (len(below["redirects"]), below["host_bridge"], below["iommu"]) == (1, True, True)
    assert (beside["redirects"], beside["host_bridge"], beside["iommu"]) == ([], True, True)
    assert beside["hops"] > below["hops"]
    assert set(found["system"]) == {*GPUS, "nic0", "nic1"}


def test_of_a_shared_group_the_first_takes_part() -> None:
    """One address space cannot be two; where each slot has a group, all take part."""
    found = {}
    for name in ("nested-switches", "dgx-8gpu", "partial-mesh"):
        plan = place(load.load(ROOT / "topologies" / f"{name}.yaml", {}))
        gpus, nics = takes_part(plan, "host0")
        found[name] = ([f.device for f in gpus], [f.device for f in nics])
    assert found["nested-switches"] == (["gpu0", "gpu2"], ["nic0"])
    assert found["partial-mesh"] == (GPUS, ["nic0", "nic1"])
    # Of eight, one pair below a switch, and one across: what the others would show again.
    assert found["dgx-8gpu"] == (["gpu0", "gpu1", "gpu2"], ["nic0", "nic2"])


@pytest.mark.parametrize(
    ("name", "node"), [("four-node-ring", ""), ("minimal", "host0"), ("two-node-fabric", "one")]
)
def test_the_node_is_found_before_anything_boots(name: str, node: str) -> None:
    plan = place(load.load(ROOT / "topologies" / f"{name}.yaml", {}))
    assert (a_node(plan), has_node(plan)) == (node, bool(node))


def test_a_refusal_is_told_from_other_answers() -> None:
    refused = {"type": "NoPathError", "errno": 22, "message": "no"}
    assert refusal_of([{}, {"refused": refused}]) == refused
    assert refusal_of([{"refused": refused}, {}]) is None
    assert refusal_of([]) is None
    assert refusal_of([[]]) is None
