# SPDX-License-Identifier: Apache-2.0
"""The suite about scale-up fabrics, on two small machines; without what boots nodes again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from testbed import deploy
from testbed.errors import ExitCode
from testbed.harness.runner import Choice, run_suites
from testbed.harness.sources import TopologySource
from testbed.host.prepare import Installation
from testbed.results.verdicts import Verdict
from testbed.topology import load

pytestmark = pytest.mark.timeout(240)

TOPOLOGY = """\
rack: pair
nodes:
{% for node in ["one", "two"] %}
  {{ node }}:
    machine: {vcpus: 1, memory: 512M}
    iommu: {kind: intel, mode: strict}
    pcie:
      - root_port: rp0
        below: [{gpu: gpu0, vram: 16M, engine: model}]
{% endfor %}
links:
  - {kind: ual, between: [one/gpu0, two/gpu0]}
"""
CHOSEN = "needs_no_mapping or link_sync or goes_down or one_system"


def test_the_other_machine_s_memory_by_physical_and_by_virtual_addresses(
    installation: Installation, accelerator: str, tmp_path: Path
) -> None:
    options = deploy.StartOptions(accelerator=accelerator, installation=installation)
    topology = load.load_text(TOPOLOGY, "pair.yaml", {})
    stream = io.StringIO()
    result = run_suites(
        Choice(["p2p-fabric"], CHOSEN),
        TopologySource(topology, tmp_path, options=options),
        tmp_path,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    shown = dict.fromkeys(("FAB-01", "FAB-05", "FAB-08"), Verdict.PASS)
    assert verdicts == {**shown, "FAB-04": Verdict.SKIP}, stream.getvalue()
    assert "of one node" in stream.getvalue()  # what FAB-04 lacks here
    assert result.code is ExitCode.PASS
