# SPDX-License-Identifier: Apache-2.0
"""The p2p-iommu suite on a fake rack: all PASS when honest; each break makes just its IDs FAIL."""

from __future__ import annotations

import io
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed.errors import ExitCode, InputError
from testbed.harness.runner import Choice, RunResult, run_suites
from testbed.instruments.mutations import Mutation, parse_mutation
from testbed.results.record import load_record
from testbed.results.verdicts import Verdict
from testbed.topology.model import Topology, from_data, to_data
from tests.contract.fake_rack import FakeSource, quad_gpu

ALL_IDS = {f"MAP-{n:02}" for n in range(1, 11)} | {"TOPO-13", "TOPO-15", "TOPO-16", "FLT-05"}

# Whoever uses a mapping of a BAR fails when BARs are mapped wrongly.
USES_A_BAR = {"MAP-02", "MAP-04", "MAP-06", "MAP-08", "MAP-09", "MAP-10", "TOPO-15", "FLT-05"}

FAILING = {
    Mutation.SKIP_UNMAP: {"MAP-06"},
    Mutation.BAR_ADDRESS: USES_A_BAR,
    Mutation.READ_WRITE: {"MAP-04", "MAP-08"},
    Mutation.WRONG_PAGE: USES_A_BAR,
    Mutation.SHORT_MAP: {"MAP-02", "MAP-04", "MAP-06", "MAP-08", "MAP-10", "FLT-05"},
    Mutation.SWAP_CHUNKS: {"MAP-10"},
    Mutation.MAP_HOLES: {"MAP-01"},
    Mutation.TRUST_STATUS: {"TOPO-15"},
}


def run(
    tmp_path: Path, topology: Topology, *knobs: dict[str, Any], **choice: Any
) -> tuple[RunResult, dict[str, Verdict], str]:
    stream = io.StringIO()
    result = run_suites(
        Choice(["p2p-iommu"], **choice),
        FakeSource(topology, tmp_path, *knobs),
        tmp_path,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    return result, verdicts, stream.getvalue()


def with_iommu(topology: Topology, **changes: Any) -> Topology:
    data = to_data(topology)
    for node in data["nodes"].values():
        node["iommu"].update(changes)
    return from_data(data)


@pytest.mark.parametrize("pristine", [False, True])
def test_an_honest_rack_passes(tmp_path: Path, *, pristine: bool) -> None:
    result, verdicts, ktap = run(tmp_path, quad_gpu(), pristine=pristine)
    assert verdicts == dict.fromkeys(ALL_IDS, Verdict.PASS), ktap
    assert result.code is ExitCode.PASS
    assert load_record(tmp_path / "record.json") == result.record
    assert ktap.startswith("KTAP version 1\n1..")
    assert "not ok" not in ktap
    evidence = next(o for o in result.record.outcomes if "MAP-03" in o.requirements).evidence
    kinds = {e.kind for e in evidence}
    assert {"fault", "bytes"} <= kinds
    assert {getattr(e, "witness", None) for e in evidence} >= {"guest", "host", "machine"}


def test_who_has_a_machine_alone_opens_what_it_uses(tmp_path: Path) -> None:
    opened: list[set[str]] = []
    mapped: list[int] = []  # pages, at the end
    for pristine in (False, True):
        source = FakeSource(quad_gpu(), tmp_path)
        choice = Choice(["p2p-iommu"], keyword="mapped_both_ways", pristine=pristine)
        stream, console = io.StringIO(), Console(file=io.StringIO())
        result = run_suites(choice, source, tmp_path, stream=stream, console=console)
        assert result.code is ExitCode.PASS
        opened += [set(rack.nodes["host0"].opened) for rack in source.racks]
        mapped += [len(rack.nodes["host0"]._tables) for rack in source.racks]
    shared, *alone = opened
    assert len(alone) == len(result.record.outcomes) == 3  # the gate, and two kinds of path
    assert all(each < shared for each in alone)
    assert alone[-1] != alone[-2]  # of one test, with two pairs
    assert max(mapped) > mapped[0] > 0  # engines' rings alone; of machines that end, nothing


@pytest.mark.parametrize("pristine", [False, True])
@pytest.mark.parametrize("mutation", FAILING, ids=str)
def test_a_break_fails_what_guards_it(
    tmp_path: Path, mutation: Mutation, *, pristine: bool
) -> None:
    result, verdicts, ktap = run(tmp_path, quad_gpu(), mutation=mutation, pristine=pristine)
    failed = {name for name, verdict in verdicts.items() if verdict is Verdict.FAIL}
    assert failed == FAILING[mutation], ktap
    assert result.code is ExitCode.FAIL
    assert result.record.mutation == mutation
    others = {verdict for name, verdict in verdicts.items() if name not in failed}
    gated = mutation is Mutation.MAP_HOLES
    assert others == ({Verdict.PASS, Verdict.SKIP} if gated else {Verdict.PASS}), ktap


def test_a_set_up_that_does_not_translate_gates_the_rest(tmp_path: Path) -> None:
    _, verdicts, ktap = run(tmp_path, quad_gpu(), {"has_iommu": False})
    assert verdicts["MAP-01"] is Verdict.FAIL
    assert verdicts["MAP-02"] is Verdict.SKIP
    assert "# SKIP set-up invalid, MAP-01 failed: the topology has an intel IOMMU" in ktap


@pytest.mark.parametrize(
    ("changes", "reason", "passing"),
    [
        ({"mode": "off"}, "IOMMU off: translation cannot be shown", {"MAP-07"}),
        (
            {"mode": "passthrough"},
            "IOMMU in passthrough mode: translation cannot be shown",
            {"MAP-07", "TOPO-13"},
        ),
        ({"kind": "none", "mode": "off"}, "IOMMU off: translation", {"MAP-07"}),
        ({"kind": "amd"}, "the fault records of an AMD IOMMU", {"MAP-07", "TOPO-13"}),
    ],
)
def test_without_translation_the_rest_is_skipped_with_the_reason(
    tmp_path: Path, changes: dict[str, str], reason: str, passing: set[str]
) -> None:
    result, verdicts, ktap = run(tmp_path, with_iommu(quad_gpu(), **changes))
    assert {n for n, v in verdicts.items() if v is Verdict.PASS} == passing, ktap
    assert {v for n, v in verdicts.items() if n not in passing} == {Verdict.SKIP}
    assert reason in next(r.reason for r in result.record.requirements if r.requirement == "MAP-02")
    assert result.code is ExitCode.PASS


def test_a_keyword_keeps_the_gate(tmp_path: Path) -> None:
    _, verdicts, _ = run(tmp_path, quad_gpu(), keyword="scatter")
    assert verdicts == {"MAP-01": Verdict.PASS, "MAP-10": Verdict.PASS}


def test_a_rack_without_peers_says_what_it_lacks(tmp_path: Path) -> None:
    alone = to_data(quad_gpu(gpus="1"))
    alone["nodes"]["host0"]["pcie"] = alone["nodes"]["host0"]["pcie"][:1]
    _, verdicts, ktap = run(tmp_path, from_data(alone))
    assert verdicts["MAP-01"] is Verdict.SKIP
    assert "# SKIP this rack lacks two devices" in ktap
    assert verdicts["TOPO-13"] is Verdict.PASS


def test_a_device_s_own_pages_need_the_gpu_model(tmp_path: Path) -> None:
    stream = io.StringIO()
    result = run_suites(
        Choice(["p2p-hmm"], "whose_pages"),
        FakeSource(quad_gpu(engine="edu"), tmp_path),
        tmp_path,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    assert result.code is ExitCode.SKIP
    assert "# SKIP this rack lacks two GPUs with engines (the GPU model in both)" in (
        stream.getvalue()
    )


def test_a_nic_is_a_peer_too(tmp_path: Path) -> None:
    result, verdicts, ktap = run(tmp_path, quad_gpu(gpus="1"))
    assert verdicts.pop("TOPO-16") is Verdict.SKIP  # no switch in common
    assert set(verdicts.values()) == {Verdict.PASS}, ktap
    assert any("nic0-gpu0" in outcome.test for outcome in result.record.outcomes)


def test_death_is_lost_and_the_next_test_gets_a_fresh_rack(tmp_path: Path) -> None:
    result, verdicts, ktap = run(tmp_path, quad_gpu(), {"dies_on": "engine.storm"})
    lost = [outcome for outcome in result.record.outcomes if outcome.verdict is Verdict.LOST]
    assert [outcome.requirements for outcome in lost] == [("FLT-05",)]
    assert lost[0].console_tail == "Kernel panic"
    assert verdicts["MAP-07"] is Verdict.PASS, ktap
    assert result.code is ExitCode.LOST
    assert "# LOST the channel closed" in ktap


def test_an_agent_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tests.contract.fake_rack.FakeNode.do_engine_storm")
    result, verdicts, _ = run(tmp_path, quad_gpu())
    assert verdicts["FLT-05"] is Verdict.ERROR
    assert verdicts["MAP-07"] is Verdict.PASS
    assert result.code is ExitCode.ERROR


def test_wrong_groups_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = [{"id": 0, "type": "DMA", "devices": ["0000:00:00.0", "0000:00:1f.0"]}]
    monkeypatch.setattr("tests.contract.fake_rack.FakeNode.do_iommu_groups", lambda self: list(one))
    _, verdicts, _ = run(tmp_path, quad_gpu(), keyword="iommu_groups")
    assert verdicts == {"TOPO-13": Verdict.FAIL}


def test_a_host_that_sees_other_bytes_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second witness counts: here the host's view is not the memory that the guest sees."""
    monkeypatch.setattr(
        "tests.contract.fake_rack.FakeNode.host_memory", lambda self, function: mmap(-1, 1 << 20)
    )
    result, verdicts, _ = run(tmp_path, quad_gpu(), keyword="mapped_both_ways")
    assert verdicts["MAP-02"] is Verdict.FAIL
    assert "guest and host read different bytes" in result.record.requirements[-1].reason


def test_nothing_to_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no test to run"):
        run(tmp_path, quad_gpu(), keyword="no_such_test")


def test_an_unknown_suite_or_break_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such suite or file; expected p2p-iommu"):
        run_suites(Choice(["p2p-imu"]), FakeSource(quad_gpu(), tmp_path), tmp_path)
    with pytest.raises(InputError, match="unknown mutation 'x'; expected skip-unmap"):
        parse_mutation("x")
    assert parse_mutation("none") is parse_mutation("") is Mutation.NONE
