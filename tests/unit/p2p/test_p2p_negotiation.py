# SPDX-License-Identifier: Apache-2.0
"""Which interconnect an attachment uses: NEG-01 to NEG-11, as far as no device is needed."""

from __future__ import annotations

import errno
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.p2p.errors import AbortedError, GoneError, NoPathError, P2PError, UnknownKindError
from guest_agent.p2p.interconnect import Constraints, Kind, Offer, Path
from guest_agent.p2p.matching import refusal
from guest_agent.p2p.negotiation import Outcome, negotiate
from guest_agent.p2p.policies import (
    BEST_QUALITY,
    EXPORTER_PRIORITY,
    MAILING_LIST,
    POLICIES,
    PRIVATE_FIRST,
    Policy,
    policy_of,
)
from guest_agent.p2p.report import Refusal
from tests.unit.p2p.machines import BOTH, DEVICE, SYSTEM, gpu_offers, offer, tree
from tests.unit.p2p.memory_backend import Tree, link

GPU0 = gpu_offers("gpu0", [(Kind.XGMI, "x01")])
GPU1 = gpu_offers("gpu1", [(Kind.XGMI, "x01")])
NIC = (offer(Kind.PCIE, "nic0.0"), offer(Kind.PCIE, "nic0.1"))


def choose(
    exporter: Sequence[Offer],
    importer: Sequence[Offer],
    policy: Policy = BEST_QUALITY,
    topology: Tree | None = None,
) -> Outcome:
    return negotiate(topology or tree(), exporter, importer, policy)


def reasons(outcome: Outcome | NoPathError | AbortedError) -> dict[tuple[int, int], str]:
    return {
        (each.exporter_index, each.importer_index): each.reason
        for each in outcome.report.candidates()
    }


def test_the_link_wins_over_pcie_because_of_its_facts() -> None:
    assert choose(GPU0, GPU1).path.kind is Kind.XGMI


def test_among_equals_the_exporter_s_list_decides() -> None:
    mine = [offer(Kind.SCATTER_LIST, "gpu0"), offer(Kind.PCIE, "gpu0")]
    theirs = [offer(Kind.PCIE, "gpu1"), offer(Kind.SCATTER_LIST, "gpu1")]
    assert choose(mine, theirs).path.kind is Kind.SCATTER_LIST
    assert choose(mine[::-1], theirs).path.kind is Kind.PCIE
    assert choose(mine, theirs).report.candidate((1, 0)).reason == (
        "the exporter lists scatter-list gpu0 first"
    )


def test_of_a_nic_with_two_functions_the_nearer_one_is_used() -> None:
    for gpu, near in (("gpu0", "nic0.0"), ("gpu2", "nic0.1")):
        for nic in itertools.permutations(NIC):
            outcome = choose([offer(Kind.PCIE, gpu)], nic)
            assert outcome.path.importer.device == near
            (why,) = (reason for reason in reasons(outcome).values() if reason)
            assert why == "it goes through the root complex"


def test_the_rfc_takes_the_first_match_of_both_lists_whatever_its_quality() -> None:
    far_first = NIC[::-1]
    outcome = choose([offer(Kind.PCIE, "gpu0")], far_first, EXPORTER_PRIORITY)
    assert outcome.path.importer.device == "nic0.1"
    assert reasons(outcome)[0, 1] == "the importer lists pcie nic0.1 first"
    # the discussion's way: the exporter says which type, quality says which path of it
    assert choose(GPU0[::-1], [*GPU1, *far_first], MAILING_LIST).path.kind is Kind.SYSTEM
    mine = [offer(Kind.PCIE, "gpu0"), offer(Kind.XGMI, "gpu0", "x01")]
    outcome = choose(mine, GPU1, MAILING_LIST)
    assert outcome.path.kind is Kind.PCIE
    assert reasons(outcome)[1, 0] == "the exporter lists pcie before xgmi"
    outcome = choose(mine, GPU1, PRIVATE_FIRST)
    assert outcome.path.kind is Kind.XGMI
    assert reasons(outcome)[0, 1] == "xgmi is tried before pcie"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_eopnotsupp_goes_on_another_errno_aborts_and_none_left_is_einval(policy: Policy) -> None:
    def refuse(code: int, kind: Kind) -> Outcome:
        def check(path: Path) -> Refusal | None:
            return Refusal(code, f"no {kind.value} today") if path.kind is kind else None

        return negotiate(tree(), GPU0, GPU1, policy, check=check)

    outcome = refuse(errno.EOPNOTSUPP, Kind.XGMI)
    assert outcome.path.kind is Kind.PCIE
    assert reasons(outcome)[0, 0] == "no xgmi today"
    with pytest.raises(AbortedError, match="no xgmi today") as aborted:
        refuse(errno.ENOMEM, Kind.XGMI)
    assert aborted.value.errno == errno.ENOMEM
    assert all("no xgmi today" in reason for reason in reasons(aborted.value).values())
    with pytest.raises(NoPathError) as none:
        negotiate(tree(), GPU0, [offer(Kind.NVLINK, "gpu1", "n")], policy)
    assert none.value.errno == errno.EINVAL


def test_falls_back_from_link_to_pcie_to_ram() -> None:
    assert choose(GPU0, GPU1).path.kind is Kind.XGMI
    disk = gpu_offers("disk")
    assert choose(GPU0, disk).path.kind is Kind.PCIE
    no_p2p = tree(no_host_bridge=True)
    outcome = choose(GPU0, disk, topology=no_p2p)
    assert (outcome.path.kind, outcome.path.placement) == (Kind.SYSTEM, SYSTEM)
    assert "passes no peer-to-peer" in reasons(outcome)[1, 0]


def test_a_peer_to_peer_scatter_list_needs_acceptance_and_a_distance() -> None:
    exporter = [offer(Kind.SCATTER_LIST, "gpu0", constraints=Constraints(requires_p2p=True))]

    def importer(device: str, accepts: bool) -> list[Offer]:
        return [
            offer(Kind.SCATTER_LIST, device, constraints=Constraints(accepts_p2p=accepts)),
        ]

    for policy in POLICIES.values():
        assert choose(exporter, importer("gpu1", True), policy).path.kind is Kind.SCATTER_LIST
        with pytest.raises(NoPathError) as refused:
            choose(exporter, importer("gpu1", False), policy)
        assert "accepts no peer-to-peer" in reasons(refused.value)[0, 0]
        with pytest.raises(NoPathError):
            choose(exporter, importer("disk", True), policy, tree(no_host_bridge=True))


def test_a_negative_distance_is_no_path() -> None:
    class Far(Tree):
        def facts(self, *args: object) -> object:  # type: ignore[override]
            return replace(super().facts(*args), distance=-1)  # type: ignore[arg-type]

    exporter = [offer(Kind.SCATTER_LIST, "gpu0", constraints=Constraints(requires_p2p=True))]
    with pytest.raises(NoPathError) as refused:
        choose(
            exporter, [offer(Kind.SCATTER_LIST, "gpu1")], EXPORTER_PRIORITY, Far(dict(tree().ways))
        )
    assert reasons(refused.value)[0, 0] == "peer-to-peer distance -1"


def test_cpu_access_and_dma_masks_are_kept() -> None:
    hidden = [offer(Kind.PCIE, "gpu0", constraints=Constraints(allows_cpu=False))]
    software = [offer(Kind.PCIE, "nic0.0", constraints=Constraints(needs_cpu=True))]
    with pytest.raises(NoPathError) as refused:
        choose(hidden, software)
    assert "needs the CPU" in reasons(refused.value)[0, 0]
    high = [offer(Kind.PCIE, "gpu0", constraints=Constraints(top_address=1 << 40))]
    narrow = [offer(Kind.PCIE, "nic0.0", constraints=Constraints(address_bits=32))]
    with pytest.raises(NoPathError) as refused:
        choose(high, narrow)  # same switch: bus addresses, nothing translates
    assert "32 bits" in reasons(refused.value)[0, 0]
    far = [offer(Kind.PCIE, "nic0.1", constraints=Constraints(address_bits=32))]
    assert choose(high, far).path.facts.iommu


def test_an_acs_redirect_costs_the_path_its_place() -> None:
    ways = {"gpu0": ("rp", "a"), "nic0.0": ("rp", "b"), "nic0.1": ("rp", "c", "d", "e")}
    plain = choose([offer(Kind.PCIE, "gpu0")], NIC, topology=Tree(ways))
    assert plain.path.importer.device == "nic0.0"
    assert reasons(plain)[0, 1] == "more hops (4 against 2)"
    redirected = choose([offer(Kind.PCIE, "gpu0")], NIC, topology=Tree(ways, redirecting=["b"]))
    assert redirected.path.importer.device == "nic0.1"
    assert reasons(redirected)[0, 0] == "more ACS redirects on the way (1 against 0)"


def test_a_device_is_nearest_to_itself() -> None:
    both = [offer(Kind.PCIE, "gpu1"), offer(Kind.PCIE, "gpu0")]
    outcome = choose([offer(Kind.PCIE, "gpu0")], both)
    assert outcome.path.importer.device == "gpu0"
    assert reasons(outcome)[0, 0] == "more hops (2 against 0)"


def test_equals_of_different_places_are_tried_in_the_lists_order() -> None:
    ways = {"a": ("p", "x", "1"), "b": ("p", "y", "2"), "c": ("p", "x", "3"), "n": ("p", "z", "4")}
    asked: list[str] = []

    def refuse(path: Path) -> Refusal:
        asked.append(path.exporter.device)
        return Refusal(errno.EOPNOTSUPP, "busy")

    with pytest.raises(NoPathError):
        negotiate(
            Tree(ways),
            [offer(Kind.PCIE, device) for device in "abc"],
            [offer(Kind.PCIE, "n")],
            BEST_QUALITY,
            check=refuse,
        )
    assert asked == ["a", "b", "c"]


def test_a_wider_link_wins() -> None:
    links = [link(Kind.XGMI, "thin", "a", "b", 8), link(Kind.XGMI, "wide", "a", "b", 16)]
    mine, theirs = ([offer(Kind.XGMI, dev, port) for port in ("thin", "wide")] for dev in "ab")
    outcome = choose(mine, theirs, topology=Tree({"a": (), "b": ()}, links))
    assert outcome.path.exporter.port == "wide"
    assert reasons(outcome)[0, 0] == "less bandwidth (25000 MB/s against 50000)"


class Host:
    """Answers for the fabric."""

    def __init__(self, answer: Refusal | OSError | None) -> None:
        self.answer = answer
        self.asked = 0

    def forward(self, path: Path) -> Refusal | None:
        self.asked += 1
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def test_a_virtual_interconnect_works_only_if_the_host_is_asked() -> None:
    mine = [offer(Kind.VIRTUAL, "gpu0"), offer(Kind.PCIE, "gpu0")]
    theirs = [offer(Kind.VIRTUAL, "gpu2"), offer(Kind.PCIE, "gpu2")]
    with pytest.raises(NoPathError) as alone:
        choose(mine[:1], theirs[:1])
    assert "nothing forwards the question" in reasons(alone.value)[0, 0]
    assert choose(mine, theirs, PRIVATE_FIRST).path.kind is Kind.PCIE  # it can fall back

    def forwarded(answer: Refusal | OSError | None) -> Outcome:
        return negotiate(tree(), mine, theirs, PRIVATE_FIRST, forwarder=Host(answer))

    assert forwarded(None).path.kind is Kind.VIRTUAL
    assert forwarded(Refusal(errno.EOPNOTSUPP, "no window")).path.kind is Kind.PCIE
    with pytest.raises(AbortedError, match="node1 is gone") as gone:
        forwarded(GoneError("node1 is gone"))
    assert gone.value.errno == errno.ENODEV


def test_unknown_words_are_named_with_the_nearest() -> None:
    with pytest.raises(UnknownKindError, match="did you mean nvlink"):
        Kind.parse("nvlnk")
    with pytest.raises(P2PError, match="did you mean best-quality"):
        policy_of("best-qualty")
    assert policy_of("exporter-priority") is EXPORTER_PRIORITY


def test_what_meets_nothing_is_said_too() -> None:
    mine = [offer(Kind.XGMI, "gpu0", "x09"), offer(Kind.NVLINK, "gpu0", "n"), *GPU0]
    theirs = [*GPU1[:2], offer(Kind.UAL_PHYSICAL, "gpu2")]
    why = {(a.side, a.index): a.reason for a in choose(mine, theirs).report.unmatched()}
    assert why == {
        ("exporter", 0): "xgmi gpu0:x09 is not connected",
        ("exporter", 1): "nvlink gpu0:n is not connected",
        ("exporter", 4): "the importer does not offer system",
        ("importer", 2): "the exporter does not offer ual-physical",
    }


def test_the_report_is_text_and_json() -> None:
    report = choose(GPU0, GPU1).report
    lines = list(report.lines())
    assert lines[0] == "policy best-quality: xgmi gpu0:x01 → xgmi gpu1:x01 (device)"
    assert "  pcie gpu0 → pcie gpu1: less bandwidth (31504 MB/s against 50000)" in lines
    assert json.loads(json.dumps(report.as_json()))["chosen"]


# --- properties

_KINDS = st.sampled_from([Kind.PCIE, Kind.SCATTER_LIST, Kind.SYSTEM, Kind.XGMI, Kind.UAL_PHYSICAL])
_OFFERS = st.lists(
    st.builds(
        offer,
        _KINDS,
        st.sampled_from(["gpu0", "gpu1", "gpu2", "nic0.0", "nic0.1", "disk", "unknown"]),
        st.sampled_from(["", "x01"]),
        st.sampled_from([(DEVICE,), (SYSTEM,), BOTH]),
        st.builds(
            Constraints,
            requires_p2p=st.booleans(),
            accepts_p2p=st.booleans(),
            needs_cpu=st.booleans(),
            allows_cpu=st.booleans(),
        ),
    ),
    max_size=6,
)
_TREES = st.builds(
    tree,
    no_host_bridge=st.booleans(),
    redirecting=st.sets(st.sampled_from(["dp0", "dp1", "rp1"])),
)


@settings(max_examples=150, deadline=None)
@given(_OFFERS, _OFFERS, st.sampled_from(list(POLICIES.values())), _TREES)
def test_the_choice_is_what_looking_at_every_pair_would_find(
    mine: list[Offer], theirs: list[Offer], policy: Policy, topology: Tree
) -> None:
    every = []
    for (i, a), (j, b) in itertools.product(enumerate(mine), enumerate(theirs)):
        met = topology.meeting(a)
        common = [p for p in a.placements if p in b.placements]
        if a.kind is not b.kind or met is None or met != topology.meeting(b) or not common:
            continue
        facts = topology.facts(a, b, common[0])
        if hasattr(facts, "reason"):
            continue
        path = Path(a, b, common[0], facts)
        if not refusal(path):
            stage = [a.kind in kinds for kinds in policy.stages_of(mine)].index(True)
            every.append(((stage, path.quality, i, j) if policy.by_quality else (i, j), path))
    asked: list[Path] = []

    def refuse_all(path: Path) -> Refusal:
        asked.append(path)
        return Refusal(errno.EOPNOTSUPP, "not today")

    with pytest.raises(NoPathError):
        negotiate(topology, mine, theirs, policy, check=refuse_all)
    assert asked == [path for _, path in sorted(every, key=lambda entry: entry[0])]
    try:
        outcome: Outcome | None = negotiate(topology, mine, theirs, policy)
    except NoPathError:
        outcome = None
    assert (outcome.path if outcome else None) == (
        min(every, key=lambda entry: entry[0])[1] if every else None
    )
    if outcome is None:
        return
    lost = [each for each in outcome.report.candidates() if each.reason]
    won = [each for each in outcome.report.candidates() if not each.reason]
    assert [(e.exporter_index, e.importer_index) for e in won] == [outcome.report.chosen]
    seen = {(e.exporter_index, e.importer_index) for e in lost + won}
    assert len(seen) == len(lost) + len(won)
    assert negotiate(topology, mine, theirs, policy).path == outcome.path


# --- scale


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_a_thousand_by_a_thousand_paths_take_less_than_a_second(policy: Policy) -> None:
    ways = {f"gpu{n}": (f"rp{n % 8}", f"sw{n % 32}", f"dp{n}") for n in range(1000)}
    ways |= {f"nic{n}": (f"rp{n % 8}", f"sw{n % 32}", f"np{n}") for n in range(1000)}
    topology = Tree(ways, redirecting=[f"dp{n}" for n in range(0, 1000, 3)])
    mine = [offer(Kind.PCIE, f"gpu{n}") for n in range(1000)]
    theirs = [offer(Kind.PCIE, f"nic{n}") for n in range(1000)]
    start = time.process_time()
    outcome = negotiate(topology, mine, theirs, policy)
    took_s = time.process_time() - start
    assert outcome.path.quality.redirects == (0 if policy.by_quality else 1)
    assert took_s < 1
    assert topology.asked < 10_000
    start = time.process_time()
    some = list(itertools.islice(outcome.report.candidates(), 5000))
    assert all(each.reason for each in some if outcome.report.chosen != (0, 0)) or some
    assert outcome.report.candidate((999, 999)).reason
    assert time.process_time() - start < 1


def test_a_thousand_by_a_thousand_paths_of_which_none_works_are_refused_as_fast() -> None:
    ways = {f"{kind}{n}": (f"rp{kind}{n % 16}", f"p{n}") for n in range(1000) for kind in "ab"}
    topology = Tree(ways, no_host_bridge=True)
    start = time.process_time()
    for policy in (BEST_QUALITY, EXPORTER_PRIORITY):
        with pytest.raises(NoPathError) as none:
            negotiate(
                topology,
                [offer(Kind.PCIE, f"a{n}") for n in range(1000)],
                [offer(Kind.PCIE, f"b{n}") for n in range(1000)],
                policy,
            )
        assert "no peer-to-peer" in none.value.report.candidate((7, 993)).reason
    assert time.process_time() - start < 2
