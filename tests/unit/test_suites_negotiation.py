# SPDX-License-Identifier: Apache-2.0
"""What the protocol core is told of a rack: links, their numbers, facts of each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testbed.suites.negotiation_board import link_numbers, links_of, refusal_of, tables
from testbed.topology import load
from testbed.topology.placement import place

ROOT = Path(__file__).parents[2]
GPUS = ["gpu0", "gpu1", "gpu2"]


def mesh() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    topology = load.load(ROOT / "topologies" / "partial-mesh.yaml", {})
    plan = place(topology)
    links = links_of(topology, "host0", GPUS)
    return tables(plan.nodes["host0"], topology, links, [*GPUS, "nic0", "nic1"]), links


def test_neighbours_have_links_named_after_their_ends() -> None:
    _, links = mesh()
    assert [link["name"] for link in links] == ["gpu0-gpu1", "gpu1-gpu2"]
    assert {link["kind"] for link in links} == {"xgmi"}


def test_a_gpu_counts_its_own_links() -> None:
    _, links = mesh()
    assert link_numbers(links) == [
        (("gpu0", "gpu0-gpu1"), 0),
        (("gpu1", "gpu0-gpu1"), 0),
        (("gpu1", "gpu1-gpu2"), 1),
        (("gpu2", "gpu1-gpu2"), 0),
    ]


def test_facts_tell_a_redirect_from_a_way_through_the_root() -> None:
    found, _ = mesh()
    ways = {(each["exporter"], each["importer"]): each for each in found["pcie"]}
    assert len(ways) == 3 * 4  # each GPU's memory, by every other device
    below, beside = ways["gpu0", "nic0"], ways["gpu0", "nic1"]
    assert (len(below["redirects"]), below["host_bridge"], below["iommu"]) == (1, True, True)
    assert (beside["redirects"], beside["host_bridge"], beside["iommu"]) == ([], True, True)
    assert beside["hops"] > below["hops"]
    assert set(found["system"]) == {*GPUS, "nic0", "nic1"}


def test_a_refusal_is_told_from_other_answers() -> None:
    refused = {"type": "NoPathError", "errno": 22, "message": "no"}
    assert refusal_of([{}, {"refused": refused}]) == refused
    assert refusal_of([{"refused": refused}, {}]) is None
    assert refusal_of([]) is None
    assert refusal_of([[]]) is None
