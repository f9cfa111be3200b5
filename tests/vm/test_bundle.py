# SPDX-License-Identifier: Apache-2.0
"""Bundles of real runs, replayed on real machines: the same words, and what differs is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from testbed import deploy
from testbed.bundle import archive, collect
from testbed.bundle.replay import Replayed, replay
from testbed.bundle.tell import Told, Wanted, tell
from testbed.errors import ExitCode
from testbed.harness import runner
from testbed.harness.sources import TopologySource
from testbed.host.prepare import Installation
from testbed.instruments.mutations import Mutation
from testbed.reports.judge import Word
from testbed.reports.load import Overrides, load, shipped_reports
from testbed.reports.runner import run_reports
from testbed.results.verdicts import Verdict
from tests.vm.conftest import shipped

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture
def options(installation: Installation, accelerator: str) -> deploy.StartOptions:
    return deploy.StartOptions(accelerator=accelerator, installation=installation)


def told(folder: Path, wanted: Wanted) -> Told:
    """What is in the run's bundle, by way of its bytes."""
    return tell(archive.parse("theirs.zip", collect.bundle(folder)[1]), wanted)


def replayed(found: Told, wanted: Wanted, folder: Path, options: deploy.StartOptions) -> Replayed:
    folder.mkdir()
    assert options.installation is not None
    installation = options.installation
    return replay(found, folder, wanted, lambda *_: installation)


def test_a_reports_bundle(options: deploy.StartOptions, tmp_path: Path) -> None:
    case = load(shipped_reports()["rccl-1129"], {})
    first = tmp_path / "first"
    first.mkdir()
    findings, _ = run_reports(
        [case], first, lambda each, to: TopologySource(each.topology, to, options=options)
    )
    assert findings[0].word is Word.REPRODUCED
    same = Wanted({}, Overrides())
    again = replayed(told(first, same), same, tmp_path / "again", options)
    assert (again.word, again.code) == (Word.REPRODUCED, ExitCode.FAIL)
    assert again.differences == ()
    assert again.commands == ()
    passing = Wanted({}, Overrides(iommu_mode="passthrough"))
    other = replayed(told(first, passing), passing, tmp_path / "other", options)
    assert (other.word, other.code) == (Word.FIXED, ExitCode.PASS)
    assert [each.here for each in other.differences] == ["passthrough"]
    assert any("iommu=pt" in line for line in other.commands)


def test_a_bundle_of_suites(options: deploy.StartOptions, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    broken = runner.Choice(("p2p-iommu",), "MAP_06", Mutation.SKIP_UNMAP)
    source = TopologySource(shipped("minimal"), first, options=options)
    quiet = Console(file=io.StringIO())
    result = runner.run_suites(broken, source, first, stream=io.StringIO(), console=quiet)
    assert result.code is ExitCode.FAIL
    same = Wanted({}, Overrides())
    found = told(first, same)
    again = replayed(found, same, tmp_path / "again", options)
    assert (again.word, again.code) == (Word.REPRODUCED, ExitCode.FAIL), again.reason
    # Without the break that its maker chose, the requirement holds, and that is FIXED.
    content = dict(found.bundle.members)["options.json"]
    assert b"skip-unmap" in content
    (first / "options.json").write_bytes(content.replace(b"skip-unmap", b""))
    mended = replayed(told(first, same), same, tmp_path / "mended", options)
    assert (mended.word, mended.code) == (Word.FIXED, ExitCode.PASS), mended.reason
    assert {each.here for each in mended.changes} == {Verdict.PASS}
