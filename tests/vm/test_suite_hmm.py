# SPDX-License-Identifier: Apache-2.0
"""The suite about device-private memory, on a kernel; one rack for all deliberate breaks.

With edu, and through the IOMMU, it runs in ``test_suite_dmabuf.py``.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.guest import modules
from testbed.harness.sources import RunningSource
from testbed.instruments.mutations import Mutation
from testbed.instruments.private_memory import MODULE
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.results.verdicts import Verdict
from testbed.topology import load
from tests.vm.conftest import Start
from tests.vm.runs import run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

# A pair with a way that Linux knows, below the switch, and pairs without one.
BOTH = """\
rack: private
nodes:
  host0:
    machine: {memory: 512M}
    pcie:
      - root_port: rp0
        below:
          - switch: sw0
            below:
              - {gpu: gpu0, vram: 16M, engine: model}
              - {gpu: gpu1, vram: 16M, engine: model}
      - root_port: rp1
        below:
          - {gpu: gpu2, vram: 16M, engine: model}
"""
ALL = {"HMM-02", "HMM-03", "HMM-04"}
FAILING: dict[Mutation, set[str]] = {
    Mutation.NONE: set(),
    Mutation.HMM_MIGRATE_ALL: {"HMM-02"},
    Mutation.HMM_NO_CHECK: {"HMM-02", "HMM-03"},  # the address is right, and not by the rule
    Mutation.HMM_FAKE_PAGE: {"HMM-02", "HMM-03"},
    Mutation.HMM_ANY_GROUP: {"HMM-04"},
    Mutation.HMM_NO_GROUP: {"HMM-04"},
}


@pytest.fixture(scope="module")
def rack(start: Start, cold: StartOptions) -> Rack:
    return start(load.load_text(BOTH, "private.yaml", {}), cold)


@pytest.fixture
def node(rack: Rack) -> RackNode:
    return rack.node()


@pytest.fixture
def bdf(node: RackNode) -> dict[str, str]:
    return {function.name: function.bdf for function in node.plan.functions}


@pytest.mark.parametrize("mutation", FAILING, ids=lambda each: str(each) or "none")
def test_each_break_fails_what_guards_it(rack: Rack, tmp_path: Path, mutation: Mutation) -> None:
    ran = run("p2p-hmm", RunningSource(rack.name, tmp_path), tmp_path, mutation=mutation)
    failing = FAILING[mutation]
    assert ran.failed == failing, ran.ktap
    assert {ran.verdicts[name] for name in ALL - failing} <= {Verdict.PASS}, ran.ktap


def in_use(node: RackNode, bdf: dict[str, str]) -> None:
    """Pages of the agent are in gpu0's memory, and gpu1 has them mapped."""
    modules.load(node, MODULE)
    for name in ("gpu0.vram", "gpu1.engine"):
        node.agent.call("hmm.bind", device=bdf[name])
    node.agent.call("hmm.alloc", name="a", pages=4)
    for page in range(4):
        node.agent.call("hmm.write", name="a", page=page, hex=f"{page:02x}" * 4096)
    assert node.agent.call("hmm.take", name="a", device=bdf["gpu0.vram"])["moved"] == 4
    words = {"mirror": "m", "name": "a", "manners": ["peer2peer"]}
    seen = node.agent.call("hmm.mirror", device=bdf["gpu1.engine"], **words)
    assert [page["kind"] for page in seen["pages"]] == ["peer"] * 4


def test_a_memory_that_goes_gives_its_pages_back(node: RackNode, bdf: dict[str, str]) -> None:
    in_use(node, bdf)
    node.agent.call("hmm.unbind", device=bdf["gpu0.vram"])
    told = node.agent.call("hmm.state", mirror="m")
    assert (told["told"], {page["kind"] for page in told["pages"]}) == (4, {"none"})
    assert min(node.agent.call("hmm.pages", name="a")["physical"]) >= 0
    for page in range(4):
        found = node.agent.call("hmm.read", name="a", page=page)["hex"]
        assert found == f"{page:02x}" * 4096
    node.agent.call("hmm.release")
    modules.unload(node, MODULE)


def test_a_process_that_dies_leaves_nothing(node: RackNode, bdf: dict[str, str]) -> None:
    in_use(node, bdf)
    node.restart_agent()
    deadline = time.monotonic() + 60
    while node.agent.call("modules.loaded", names=[MODULE])[MODULE]:
        assert time.monotonic() < deadline
    in_use(node, bdf)
    node.agent.call("hmm.release")
    modules.unload(node, MODULE)
