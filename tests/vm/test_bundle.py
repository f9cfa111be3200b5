# SPDX-License-Identifier: Apache-2.0
"""Bundles of real runs, replayed on real machines: the same words, and what differs is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.bundle import archive, collect
from testbed.bundle.replay import Replayed, replay
from testbed.bundle.tell import Told, Wanted, tell
from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.harness.sources import TopologySource
from testbed.host.prepare import Installation
from testbed.instruments.mutations import Mutation
from testbed.reports.judge import Word
from testbed.reports.load import Overrides, load, shipped_reports
from testbed.reports.runner import run_reports
from testbed.results.verdicts import Verdict
from tests.vm.conftest import shipped
from tests.vm.runs import run

Replay = Callable[[Told, Wanted, Path], Replayed]

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def told(folder: Path, wanted: Wanted) -> Told:
    """What is in the run's bundle, by way of its bytes."""
    return tell(archive.parse("theirs.zip", collect.bundle(folder)[1]), wanted)


@pytest.fixture
def replayed(installation: Installation) -> Replay:
    def act(found: Told, wanted: Wanted, folder: Path) -> Replayed:
        folder.mkdir()
        return replay(found, folder, wanted, lambda *_: installation)

    return act


def test_a_reports_bundle(cold: StartOptions, replayed: Replay, tmp_path: Path) -> None:
    case = load(shipped_reports()["rccl-1129"], {})
    first = tmp_path / "first"
    first.mkdir()
    findings, _ = run_reports(
        [case], first, lambda each, to: TopologySource(each.topology, to, options=cold)
    )
    assert findings[0].word is Word.REPRODUCED
    same = Wanted({}, Overrides())
    again = replayed(told(first, same), same, tmp_path / "again")
    assert (again.word, again.code) == (Word.REPRODUCED, ExitCode.FAIL)
    assert again.differences == ()
    assert again.commands == ()
    passing = Wanted({}, Overrides(iommu_mode="passthrough"))
    other = replayed(told(first, passing), passing, tmp_path / "other")
    assert (other.word, other.code) == (Word.FIXED, ExitCode.PASS)
    assert [each.here for each in other.differences] == ["passthrough"]
    assert any("iommu=pt" in line for line in other.commands)


def test_a_bundle_of_suites(warm: StartOptions, replayed: Replay, tmp_path: Path) -> None:
    """Pristine machines, which are restored in the replays too."""
    first = tmp_path / "first"
    first.mkdir()
    source = TopologySource(shipped("minimal"), first, options=warm)
    broken = run("p2p-iommu", source, first, "MAP_06", Mutation.SKIP_UNMAP, pristine=True)
    assert broken.code is ExitCode.FAIL
    same = Wanted({}, Overrides())
    found = told(first, same)
    again = replayed(found, same, tmp_path / "again")
    assert (again.word, again.code) == (Word.REPRODUCED, ExitCode.FAIL), again.reason
    # Without the break that its maker chose, the requirement holds, and that is FIXED.
    content = dict(found.bundle.members)["options.json"]
    assert b"skip-unmap" in content
    (first / "options.json").write_bytes(content.replace(b"skip-unmap", b""))
    mended = replayed(told(first, same), same, tmp_path / "mended")
    assert (mended.word, mended.code) == (Word.FIXED, ExitCode.PASS), mended.reason
    assert {each.here for each in mended.changes} == {Verdict.PASS}
