# SPDX-License-Identifier: Apache-2.0
"""A machine's paths as tables give the same choices as the machine itself."""

from __future__ import annotations

import itertools

import pytest

from guest_agent.p2p.errors import NoPathError, UnknownKindError
from guest_agent.p2p.interconnect import Facts, Kind, NoWay
from guest_agent.p2p.negotiation import negotiate
from guest_agent.p2p.policies import POLICIES
from guest_agent.p2p.topology import Fabric, Link, TableTopology
from tests.unit.p2p.machines import DEVICE, SYSTEM, WAYS, gpu_offers, offer, tree
from tests.unit.p2p.memory_backend import Tree, link


def tables(machine: Tree) -> TableTopology:
    def pcie(a: str, b: str) -> Facts | NoWay:
        return machine.facts(offer(Kind.PCIE, a), offer(Kind.PCIE, b), DEVICE)

    system = offer(Kind.SYSTEM, "gpu0")
    ram = {device: machine.facts(system, offer(Kind.SYSTEM, device), SYSTEM) for device in WAYS}
    fabric = Fabric("fabric0", frozenset(("gpu0", "gpu2")), Facts(hops=2, width_lanes=4))
    return TableTopology(
        {(a, b): pcie(a, b) for a, b in itertools.permutations(WAYS, 2)},
        {device: facts for device, facts in ram.items() if isinstance(facts, Facts)},
        [link(Kind.XGMI, "x01", "gpu0", "gpu1")],
        [fabric],
        {device: way[:-1] for device, way in WAYS.items()},
    )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
@pytest.mark.parametrize("no_host_bridge", [False, True])
def test_the_choice_is_that_of_the_machine(policy: object, no_host_bridge: bool) -> None:
    machine = tree(no_host_bridge=no_host_bridge, redirecting=["dp1"])
    for a, b in itertools.permutations(WAYS, 2):
        links = [(Kind.XGMI, "x01"), (Kind.UAL_PHYSICAL, "")]
        lists = gpu_offers(a, links), gpu_offers(b, links)
        paths = [
            negotiate(topology, *lists, policy).path  # type: ignore[arg-type]
            for topology in (machine, tables(machine))
        ]
        assert paths[0] == paths[1]


def test_the_two_ends_of_a_link_and_unknown_devices() -> None:
    topology = tables(tree())
    end = [offer(Kind.XGMI, "gpu0", "x01")]
    with pytest.raises(NoPathError) as refused:
        negotiate(topology, end, end, POLICIES["best-quality"])
    (candidate,) = refused.value.report.candidates()
    assert candidate.reason == "both are the same end of the link"
    assert topology.meeting(offer(Kind.PCIE, "gpu9")) is None
    assert topology.meeting(offer(Kind.UAL_PHYSICAL, "gpu1")) is None
    lonely = TableTopology({}, {"a": Facts(), "b": Facts()})
    assert isinstance(lonely.facts(offer(Kind.PCIE, "a"), offer(Kind.PCIE, "b"), DEVICE), NoWay)


def test_a_link_of_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(UnknownKindError, match="link l0: pcie is none of xgmi, nvlink, xelink"):
        Link(Kind.PCIE, "l0", (("a", "0"), ("b", "0")))
