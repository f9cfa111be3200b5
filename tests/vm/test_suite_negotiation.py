# SPDX-License-Identifier: Apache-2.0
"""The p2p-negotiation suite on a real machine: all PASS, and deliberate breaks that must FAIL."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed import deploy
from testbed.benchmarks import faults
from testbed.benchmarks.cycles import cycles
from testbed.errors import ExitCode
from testbed.harness.runner import Choice, RunResult, run_suites
from testbed.host.prepare import Installation
from testbed.instruments.mutations import Mutation
from testbed.instruments.negotiation_board import EVENTS
from testbed.rack import Rack
from testbed.results.verdicts import Verdict
from tests.vm.conftest import shipped
from tests.vm.test_suite_p2p import BorrowingSource

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

IDS = (
    {f"NEG-{n:02}" for n in range(1, 12)}
    | {f"LIFE-{n:02}" for n in (1, 3, 5, 6, 7, 10, 12)}
    | {f"HMM-{n:02}" for n in (1, 2, 3, 5, 6)}
    | {f"FLT-{n:02}" for n in (1, 2, 3, 6)}
    | {"TOPO-14"}
)
BREAKS = Path(__file__).parents[1] / "breaks" / "negotiation_breaks.py"


@pytest.fixture(scope="module")
def options(installation: Installation, accelerator: str) -> deploy.StartOptions:
    return deploy.StartOptions(accelerator=accelerator, installation=installation)


@pytest.fixture(scope="module")
def mesh(options: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with deploy.start(
        shipped("partial-mesh"), run_dir=tmp_path_factory.mktemp("mesh"), options=options
    ) as rack:
        yield rack


def run(
    source: BorrowingSource, run_dir: Path, suite: str = "p2p-negotiation", **choice: Any
) -> tuple[RunResult, str]:
    stream = io.StringIO()
    result = run_suites(
        Choice([suite], **choice),
        source,
        run_dir,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    return result, stream.getvalue()


def test_every_requirement_is_shown_and_its_events_are_kept(
    mesh: Rack, options: deploy.StartOptions, tmp_path: Path
) -> None:
    result, ktap = run(BorrowingSource(mesh, tmp_path, options), tmp_path)
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    assert verdicts == dict.fromkeys(IDS, Verdict.PASS), ktap
    for outcome in result.record.outcomes:
        assert any(evidence.kind == "bytes" for evidence in outcome.evidence), outcome.test
    events = [json.loads(line) for line in (mesh.run_dir / EVENTS).read_text().splitlines()]
    assert {"negotiate", "attach", "map", "move", "revoke", "fault"} <= {e["kind"] for e in events}


def test_a_break_fails_what_guards_it_and_nothing_else(
    mesh: Rack, options: deploy.StartOptions, tmp_path: Path
) -> None:
    keyword = "pipelined or a_peer_s_scatter_list"
    source = BorrowingSource(mesh, tmp_path, options)
    result, ktap = run(source, tmp_path, mutation=Mutation.NEGO_SKIP_FENCE, keyword=keyword)
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    assert verdicts == {"LIFE-06": Verdict.FAIL, "NEG-10": Verdict.PASS}, ktap
    assert result.code is ExitCode.FAIL


def test_of_every_requirement_some_break_is_seen_and_mended(
    mesh: Rack, options: deploy.StartOptions, tmp_path: Path
) -> None:
    result, ktap = run(BorrowingSource(mesh, tmp_path, options), tmp_path, suite=str(BREAKS))
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    assert verdicts == dict.fromkeys(IDS, Verdict.PASS), ktap
    assert result.code is ExitCode.PASS


def test_three_hundred_cycles_leave_nothing_behind(mesh: Rack) -> None:
    """The short form of `testbed bench cycles`: on real devices, nothing grows anywhere."""
    found = cycles(mesh, 300)
    assert (found["wrong"], found["grown"]) == (0, []), found
    assert found["before"]["mappings_left"] > 0  # the kernel's own count is there


def test_page_faults_are_timed_for_each_device_and_place(mesh: Rack) -> None:
    """FLT-04: `testbed faultlat`; the device's own trace has as many faults and replays."""
    result = faults.measure(mesh, 8)
    kinds = {(each["device"], each["path"]) for each in result["series"]}
    gpu = {("gpu", path) for path in ("VRAM", "system memory", "PCIe peer", "link")}
    assert kinds == gpu | {("nic", path) for path in ("system memory", "PCIe peer")}
    for each in result["series"]:
        assert each["count"] == sum(bucket["count"] for bucket in each["histogram"]) == 8
        assert 0 < each["on_device"]["median"] < each["total"]["max"]
    assert "gpu, link, 4 KiB pages, by poll: 8 faults, in us" in faults.text(result)
