# SPDX-License-Identifier: Apache-2.0
"""TOPO-12 and TOPO-13 on random trees: several below the root ports of each machine that boots.

Two machines by default. `TESTBED_RANDOM_RACKS=13 pytest tests/vm/test_oracle_random.py` boots as
many as it takes for a hundred trees.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from testbed.deploy import StartOptions
from testbed.harness.sources import TopologySource
from testbed.results.verdicts import Verdict
from testbed.topology.model import Topology, from_data
from tests.vm.runs import run

RACKS = int(os.environ.get("TESTBED_RANDOM_RACKS", "2"))
TREES = 8  # below the root ports of one machine
MOST_DEPTH = 2
MOST_DEVICES = 26

pytestmark = pytest.mark.timeout(240)


class _Trees:
    """Random trees for one machine; the same seed gives the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # nothing secret
        self.count = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def device(self) -> dict[str, Any]:
        kind = self.random.choice(("gpu", "gpu", "nic", "nvme"))
        if kind == "gpu":
            doorbell = self.random.random() < 0.3
            return {"gpu": self.name("gpu"), "vram": "16M", "engine": "edu", "doorbell": doorbell}
        if kind == "nic":
            return {"nic": self.name("nic"), "engine": "edu"}
        disk = {"nvme": self.name("nvme"), "size": "16M"}
        return disk | ({"cmb": "16M"} if self.random.random() < 0.5 else {})

    def below(self, depth: int) -> dict[str, Any]:
        if depth == MOST_DEPTH or self.count > MOST_DEVICES or self.random.random() < 0.3:
            return self.device()
        return {
            "switch": self.name("sw"),
            "acs": self.random.choice(("redirect", "none")),
            "below": [self.below(depth + 1) for _ in range(self.random.randint(1, 3))],
        }

    def port(self) -> dict[str, Any]:
        acs = self.random.choice(("redirect", "none"))
        return {"root_port": self.name("rp"), "acs": acs, "below": [self.below(0)]}


def topology(seed: int) -> Topology:
    trees = _Trees(seed)
    machine = {"cpu": trees.random.choice(("max", "EPYC")), "memory": "768M"}
    node = {"machine": machine, "pcie": [trees.port() for _ in range(TREES)]}
    return from_data({"rack": f"random-{seed}", "nodes": {"host0": node}})


@pytest.mark.parametrize("seed", range(RACKS))
def test_random_trees_are_as_predicted(seed: int, cold: StartOptions, tmp_path: Path) -> None:
    source = TopologySource(topology(seed), tmp_path, options=cold)
    ran = run("all", source, tmp_path, "prediction or iommu_groups")
    assert ran.verdicts == dict.fromkeys(("TOPO-12", "TOPO-13"), Verdict.PASS), ran.ktap
