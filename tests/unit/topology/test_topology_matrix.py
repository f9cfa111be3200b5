# SPDX-License-Identifier: Apache-2.0
"""The peer matrix: its words, its predictions, and that no contradiction in a cell goes unsaid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from testbed.topology import load, matrix_drawing
from testbed.topology.matrix import (
    Arrival,
    Cell,
    Decision,
    Findings,
    MapKind,
    Matrix,
    Measured,
    Platform,
    Unknown,
    Way,
    changed_ports,
    matrix,
    planned_platform,
)
from testbed.topology.oracle import FIRST_ZEN_FAMILY, Q35_HOST_BRIDGE, Cpu, Route
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

SHIPPED = Path(__file__).parents[3] / "topologies"
NODES = """\
rack: two
nodes:
  a: {pcie: [{gpu: gpu0, vram: 16M}, {gpu: gpu1, vram: 16M}, {nic: nic0}]}
  b: {pcie: [{gpu: gpu0, vram: 16M}]}
links:
  - {kind: xgmi, between: [a/gpu0, b/gpu0], width: 8}
  - {kind: nvlink, between: [a/gpu0, a/gpu1], width: 4}
  - {kind: ual, between: [a/gpu1, a/gpu0], width: 2}
"""


def shipped(name: str, **settings: str) -> RackPlan:
    return place(load.load(SHIPPED / f"{name}.yaml", settings))


def cell(plan: RackPlan, one: str, other: str, findings: Findings | None = None) -> Cell:
    return matrix(plan, findings).cells[one, other]


def findings(
    plan: RackPlan,
    kernel: Decision | Unknown = Unknown("not asked"),  # noqa: B008  it is frozen
    measured: Measured | Unknown = Unknown("not tried"),  # noqa: B008
    redirecting: frozenset[str] | None = None,
) -> Findings:
    """As from a machine where every pair answers the same."""
    node = next(iter(plan.nodes))
    planned = planned_platform(plan, node)
    platform = replace(planned, redirecting=planned.redirecting)
    if redirecting is not None:
        platform = replace(planned, redirecting=redirecting)
    pairs = matrix(plan).cells
    return Findings({node: platform}, dict.fromkeys(pairs, kernel), dict.fromkeys(pairs, measured))


@pytest.mark.parametrize(
    ("rack", "one", "other", "word"),
    [
        ("quad-gpu", "gpu2", "gpu3", "PIX"),
        ("quad-gpu", "gpu0", "gpu1", "XG16"),
        ("quad-gpu", "gpu0", "nic0", "PHB"),
        ("nested-switches", "gpu0", "gpu1", "PIX"),
        ("nested-switches", "gpu0", "gpu2", "PXB"),
        ("nested-switches", "nic0", "gpu0", "PXB"),
        ("two-root-ports", "gpu0", "gpu1", "PHB"),
        ("dgx-8gpu", "gpu0", "gpu7", "NV12"),
        ("dgx-8gpu", "gpu0", "nic1", "PIX"),
    ],
)
def test_words_are_those_of_nvidia_smi(rack: str, one: str, other: str, word: str) -> None:
    plan = shipped(rack)
    assert cell(plan, one, other).predicted.word == word
    assert cell(plan, other, one).predicted.word == word


def test_a_link_hides_the_pcie_word_but_not_what_it_is() -> None:
    found = cell(shipped("quad-gpu"), "gpu0", "gpu1").predicted
    assert (found.word, found.near) == ("XG16", "PIX")


def test_machines_have_a_word_links_and_no_pcie_in_common() -> None:
    plan = place(load.load_text(NODES, "two", {}))
    assert cell(plan, "a/gpu0", "b/gpu0").predicted.word == "XG8"
    far = cell(plan, "a/nic0", "b/gpu0").predicted
    assert (far.word, far.decision, far.moves) == ("SYS", Decision(MapKind.NONE, None), {})
    assert cell(plan, "a/gpu0", "a/gpu1").predicted.word == "NV4+UA2"


@pytest.mark.parametrize(
    ("rack", "settings", "one", "other", "decision", "moves"),
    [
        ("dgx-8gpu", {}, "gpu0", "gpu1", Decision(MapKind.BUS, 4), ("peer", "iommu")),
        (
            "dgx-8gpu",
            {"engine": "edu"},
            "gpu0",
            "gpu1",
            Decision(MapKind.BUS, 4),
            ("refused", "iommu"),
        ),
        ("dgx-8gpu", {}, "nic0", "gpu1", Decision(MapKind.BUS, 4), ("peer", "iommu")),
        ("quad-gpu", {}, "gpu0", "gpu1", Decision(MapKind.NONE, None), ("refused", "iommu")),
        ("two-root-ports", {}, "gpu0", "gpu1", Decision(MapKind.NONE, None), ("refused", "iommu")),
        (
            "two-root-ports",
            {"cpu": "EPYC-Rome"},
            "gpu0",
            "gpu1",
            Decision(MapKind.IOVA, 4),
            ("refused", "iommu"),
        ),
        ("two-root-ports", {"cpu": "EPYC"}, "nvme0", "gpu1", Decision(MapKind.IOVA, 4), ("iommu",)),
        ("dgx-8gpu", {}, "nvme0", "gpu1", Decision(MapKind.BUS, 4), ("peer",)),
        ("dgx-8gpu", {}, "nvme0", "gpu7", Decision(MapKind.NONE, None), ("refused",)),
        ("dgx-8gpu", {}, "gpu0", "nic0", Decision(MapKind.BUS, 4), ()),
    ],
)
def test_predicted_are_the_decision_and_where_bytes_go(
    rack: str,
    settings: dict[str, str],
    one: str,
    other: str,
    decision: Decision,
    moves: tuple[str, ...],
) -> None:
    found = cell(shipped(rack, **settings), one, other).predicted
    assert found.decision == decision
    assert tuple(found.moves.values()) == moves


@pytest.mark.parametrize(
    ("mode", "kind", "moves"),
    [
        ("off", MapKind.PHYSICAL, {Way.RAW: Arrival.ROOT}),
        ("passthrough", MapKind.PHYSICAL, {Way.RAW: Arrival.REFUSED, Way.IOVA: Arrival.IOMMU}),
        ("lazy", MapKind.IOVA, {Way.RAW: Arrival.REFUSED, Way.IOVA: Arrival.IOMMU}),
    ],
)
def test_the_iommus_mode_decides_what_is_between(
    mode: str, kind: MapKind, moves: dict[Way, Arrival]
) -> None:
    gpus = "[{gpu: a, vram: 16M}, {gpu: b, vram: 16M}]"
    node = f"{{machine: {{cpu: EPYC}}, iommu: {{mode: {mode}}}, pcie: {gpus}}}"
    text = f"rack: r\nnodes: {{h: {node}}}\n"
    found = cell(place(load.load_text(text, "r", {})), "a", "b").predicted
    assert (found.decision.kind, dict(found.moves)) == (kind, moves)


def test_a_device_of_ones_own_is_routed_as_a_model_is() -> None:
    text = (
        "rack: r\nnodes: {h: {pcie: [{root_port: p, below: [{switch: s, below: "
        "[{gpu: a, vram: 16M}, {device: c, model: 'x.py:C', bars: 1M}]}]}]}}\n"
    )
    plan = place(load.load_text(text, "r", {}))
    assert "QEMU" not in explanation(plan, "c", "a")
    assert "routed to the peer" in explanation(plan, "c", "a")


def test_linux_may_be_stricter_than_hardware_and_that_is_no_disagreement() -> None:
    plan = shipped("nested-switches")
    measured = Measured({Way.RAW: Arrival.PEER, Way.IOVA: Arrival.IOMMU})
    found = cell(plan, "gpu2", "gpu0", findings(plan, Decision(MapKind.NONE, None), measured))
    assert found.predicted.route is Route.SWITCH
    assert "redirecting.port0 on the way redirects" in found.notes[0]
    assert not found.disagreements


@pytest.mark.parametrize(
    ("kernel", "raw", "iova", "says"),
    [
        (Decision(MapKind.BUS, 4), "peer", "iommu", []),
        (Decision(MapKind.BUS, 4), "arrived", "arrived", []),
        (Unknown("no module"), "peer", "iommu", []),
        (Decision(MapKind.BUS, 6), "peer", "iommu", ["predicted bus 4, the kernel says bus 6"]),
        (Decision(MapKind.NONE, None), "peer", "iommu", ["predicted bus 4, the kernel says none"]),
        (
            Decision(MapKind.BUS, 4),
            "refused",
            "iommu",
            [
                "by raw bus address: predicted peer, measured refused",
                "the kernel gives out its bus address, where bytes are refused",
            ],
        ),
        (Decision(MapKind.BUS, 4), "peer", "lost", ["by IOVA: predicted iommu, measured lost"]),
        (Decision(MapKind.BUS, 4), "peer", "peer", ["by IOVA: predicted iommu, measured peer"]),
    ],
)
def test_every_contradiction_is_said(
    kernel: Decision | Unknown, raw: str, iova: str, says: list[str]
) -> None:
    plan = shipped("nested-switches")
    measured = Measured({Way.RAW: Arrival(raw), Way.IOVA: Arrival(iova)})
    told = findings(plan, kernel, measured)
    found = cell(plan, "gpu0", "gpu1", told)
    assert list(found.disagreements) == says
    assert bool(found.disagreements) == any(
        line.startswith("gpu0 → gpu1: ") for line in matrix(plan, told).disagreements
    )


def test_a_disagreement_that_changed_ports_explain_says_so() -> None:
    plan = shipped("nested-switches")
    planned = planned_platform(plan, "host0").redirecting
    port = plan.nodes["host0"].function("redirecting.port0")
    measured = Measured({Way.RAW: Arrival.PEER, Way.IOVA: Arrival.IOMMU})
    now = planned - {port.bdf}
    found = cell(plan, "gpu2", "gpu3", findings(plan, measured=measured, redirecting=now))
    (text,) = found.disagreements
    assert text.endswith(
        "predicted refused, measured peer; with its ports as they are set now that is right"
    )
    assert changed_ports(plan, "host0", now) == (
        f"redirecting.port0 at {port.bdf} redirects peers as planned, and does not now",
    )
    assert "redirects peers now" in changed_ports(plan, "host0", planned | {"0000:04:00.0"})[0]
    assert not changed_ports(plan, "host0", planned)


def test_an_unknown_value_never_disagrees() -> None:
    plan = shipped("dgx-8gpu")
    assert not matrix(plan).disagreements
    assert not matrix(plan, findings(plan)).disagreements


def all_agree(plan: RackPlan) -> Matrix:
    """A machine that does as predicted."""
    predicted = matrix(plan).cells
    node = next(iter(plan.nodes))
    return matrix(
        plan,
        Findings(
            {node: planned_platform(plan, node)},
            {pair: each.predicted.decision for pair, each in predicted.items()},
            {
                pair: Measured(each.predicted.moves) if each.predicted.moves else Unknown("none")
                for pair, each in predicted.items()
            },
        ),
    )


@pytest.mark.parametrize("name", ["quad-gpu", "nested-switches", "two-root-ports", "dgx-8gpu"])
def test_the_text_fits_eighty_columns_and_has_every_pair(name: str) -> None:
    plan = shipped(name)
    found = all_agree(plan)
    assert not found.disagreements
    lines = matrix_drawing.text(found, 80).splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split()[2:] for line in lines if line.startswith(" from ")]
    assert [column for head in heads for column in head] == [peer.name for peer in found.peers]
    assert sum(line.startswith(" gpu0 ") for line in lines) == len(heads)
    assert len(heads) == 1 or name in ("dgx-8gpu", "nested-switches")


def test_what_disagrees_is_marked_and_what_is_unknown_says_why() -> None:
    plan = shipped("nested-switches")
    told = findings(plan, Decision(MapKind.NONE, None), Unknown("nothing was tried"))
    text = matrix_drawing.text(matrix(plan, told), 80)
    assert "none!" in text
    assert "DISAGREES, see below" in text
    assert "nothing was tried" in text
    assert "!" not in matrix_drawing.text(all_agree(plan), 80)


def explanation(plan: RackPlan, one: str, other: str, platform: Platform | None = None) -> str:
    chosen = cell(plan, one, other)
    platform = platform or planned_platform(plan, chosen.requester.node)
    return "\n".join(matrix_drawing.explanation(plan, chosen, platform))


def test_an_explanation_has_every_fact() -> None:
    plan = shipped("nested-switches")
    text = explanation(plan, "gpu2", "gpu0")
    for fact in (
        "gpu2.engine (0000:0b:00.1) does DMA to gpu0.vram (0000:05:00.0)",
        "PXB",
        "redirecting.port0 (ACS redirects)",
        "they meet    in top",
        "distance     8",
        "8086:29c0",
        "redirected by redirecting.port0",
        "through top.port1, which does not redirect: it is routed to the peer",
        "raw → peer",
    ):
        assert fact in text
    trusted = Platform(Cpu("AuthenticAMD", FIRST_ZEN_FAMILY), Q35_HOST_BRIDGE, frozenset())
    assert "Linux lets peers through it" in explanation(plan, "gpu2", "gpu0", trusted)
    assert "no PCIe joins them" in explanation(
        place(load.load_text(NODES, "two", {})), "a/gpu0", "b/gpu0"
    )


def test_the_distance_explained_is_the_one_that_linux_counts() -> None:
    for name in ("quad-gpu", "nested-switches", "two-root-ports"):
        plan = shipped(name, **({"cpu": "EPYC"} if name == "two-root-ports" else {}))
        for (one, other), each in matrix(plan).cells.items():
            distance = each.predicted.decision.distance
            if distance is not None:
                assert f"\ndistance     {distance} " in explanation(plan, one, other)
