# SPDX-License-Identifier: Apache-2.0
"""Policies: the rule that a suite judges by against the core; what each would choose of a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.p2p import policies as core_policies
from guest_agent.p2p.errors import NoPathError
from guest_agent.p2p.negotiation import negotiate
from guest_agent.p2p.topology import topology_from
from guest_agent.p2p_device.room import offers_of as parsed
from testbed.errors import InputError
from testbed.instruments import negotiation_rules as rules
from testbed.topology import load, policies
from testbed.topology.interconnects import links_of, offers_of, tables
from testbed.topology.peers import peers
from testbed.topology.placement import place
from testbed.topology.plan import Role
from testbed.verbs.group import cli

ROOT = Path(__file__).parents[2]


def facts_of(name: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    topology = load.load(ROOT / "topologies" / f"{name}.yaml", {})
    plan = place(topology)
    node = next(iter(plan.nodes))
    links, _ = links_of(plan, node, planned=True)
    devices = [f.device for f in plan.nodes[node].by_role(Role.ENGINE)]
    return tables(plan.nodes[node], topology, links, devices), links, devices


KNOWN = {name: facts_of(name) for name in ("partial-mesh", "nested-switches", "dgx-8gpu")}


def test_rules_and_core_know_the_same_policies() -> None:
    assert set(rules.POLICIES) == set(core_policies.POLICIES)
    assert core_policies.BEST_QUALITY.name == rules.DEFAULT_POLICY


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_core_does_what_the_rule_says(data: st.DataObject) -> None:
    """Any devices of any shipped rack, any order of any of their offers, several devices a list."""
    facts, links, devices = KNOWN[data.draw(st.sampled_from(sorted(KNOWN)))]
    gpus = [device for device in devices if device.startswith("gpu")]
    kinds = ("link", "pcie", "system", "scatter-list")

    def some(names: list[str]) -> list[dict[str, Any]]:
        every = [offer for name in names for offer in offers_of(links, name, *kinds)]
        return data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=6, unique_by=str))

    ours = some([data.draw(st.sampled_from(gpus))])
    others = [device for device in devices if device != ours[0]["device"]]
    theirs = some(data.draw(st.lists(st.sampled_from(others), min_size=1, max_size=3)))
    policy = data.draw(st.sampled_from(rules.POLICIES))
    topology, lists = topology_from(facts), (parsed("ours", ours), parsed("theirs", theirs))
    try:
        path = negotiate(topology, *lists, core_policies.POLICIES[policy]).path
    except NoPathError:
        with pytest.raises(ValueError, match="empty"):
            rules.expected(policy, ours, theirs, facts)
        return
    right = rules.expected(policy, ours, theirs, facts)
    assert path.exporter == lists[0][right.exporter_index]
    assert path.importer == lists[1][right.importer_index]


def test_a_link_is_better_than_a_switch_that_has_more_lanes() -> None:
    """Twelve lanes of NVLink carry more than sixteen of PCI Express, however near the peer is."""
    facts, links, _ = KNOWN["dgx-8gpu"]
    ours, theirs = (offers_of(links, name, "pcie", "link") for name in ("gpu0", "gpu1"))
    way = next(w for w in facts["pcie"] if (w["exporter"], w["importer"]) == ("gpu0", "gpu1"))
    assert not way["host_bridge"]
    assert way["width"] > next(link["width"] for link in facts["links"])
    assert rules.expected("best-quality", ours, theirs, facts).kind == "nvlink"


def test_an_unknown_policy_is_named_with_the_nearest() -> None:
    assert rules.parse_policy("") == ""
    assert rules.parse_policy("mailing-list") == "mailing-list"
    with pytest.raises(InputError, match=r"'best-qality'.*did you mean 'best-quality'"):
        rules.parse_policy("best-qality")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("p2p-negotiation", "--policy", "x"), "unknown policy 'x'"),
        (("--policy", "mailing-list"), "--policy is of the suite p2p-negotiation"),
        (("p2p-iommu", "--policy", "mailing-list"), "--policy is of the suite p2p-negotiation"),
    ],
)
def test_a_policy_that_nobody_asks_for_is_bad_input(words: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(cli, ["run", *words])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


# --- testbed topo --explain


def choices(name: str, one: str, other: str) -> dict[str, policies.Choice]:
    plan = place(load.load(ROOT / "topologies" / f"{name}.yaml", {}))
    by_name = {peer.name: peer for peer in peers(plan)}
    return {each.policy: each for each in policies.compare(plan, by_name[one], by_name[other])}


def test_policies_differ_where_lists_and_facts_do() -> None:
    found = choices("partial-mesh", "gpu1", "gpu0")
    assert set(found) == set(rules.POLICIES)
    link = "xgmi gpu0:gpu0-gpu1 → xgmi gpu1:gpu0-gpu1 (device)"
    ram = "system gpu0 → system gpu1 (system)"
    assert {each.chosen for each in found.values()} == {link}
    assert {name: each.backwards for name, each in found.items()} == {
        "best-quality": link,
        "private-first": link,
        "exporter-priority": ram,
        "mailing-list": ram,
    }
    text = "\n".join(policies.lines(list(found.values())))
    assert f"best-quality: {link}" in text
    assert f"listed the other way round: {ram}" in text
    assert "not pcie gpu0 → pcie gpu1: more ACS redirects on the way (1 against 0)" in text


def test_between_machines_there_is_the_fabric_or_nothing() -> None:
    found = choices("two-node-fabric", "one/gpu0", "two/gpu0")
    way = "ual-virtual two/gpu0 → ual-virtual one/gpu0 (device)"
    assert {(each.chosen, each.backwards) for each in found.values()} == {(way, way)}
    apart = choices("two-node-fabric", "one/gpu1", "two/gpu0")
    assert {each.chosen for each in apart.values()} == {policies.NOTHING}
    inside = choices("two-node-fabric", "one/gpu0", "one/gpu2")
    assert inside["best-quality"].chosen.startswith("ual-physical")


def test_a_nic_imports_and_exports_nothing() -> None:
    assert choices("partial-mesh", "gpu0", "nic0") == {}
    assert choices("partial-mesh", "nic1", "gpu0")["best-quality"].chosen.startswith("pcie")


def test_the_verb_shows_them_as_text_and_json() -> None:
    words = ["topo", "partial-mesh", "--predict", "--explain", "gpu1", "gpu0"]
    text = CliRunner().invoke(cli, words).stdout
    assert "policies     exporter-priority: xgmi" in text
    data = json.loads(CliRunner().invoke(cli, [*words, "--format", "json"]).stdout)
    assert {each["policy"] for each in data["policies"]} == set(rules.POLICIES)
