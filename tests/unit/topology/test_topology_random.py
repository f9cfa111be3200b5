# SPDX-License-Identifier: Apache-2.0
"""Properties that every right topology keeps, whatever it looks like."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from testbed.machine import argv
from testbed.machine.command import LaunchContext
from testbed.topology import drawing, load, values
from testbed.topology.model import Node, from_data, to_data
from testbed.topology.oracle import CHIPSET_BDFS, iommu_groups
from testbed.topology.placement import place
from testbed.topology.plan import NodePlan, Role
from tests.unit.topology.random_topologies import random_topology

CONTEXT = LaunchContext(("QEMU",), {}, "tcg", Path("KERNEL"), Path("INITRD"))
SEEDS = range(150)


@pytest.mark.parametrize("seed", SEEDS)
def test_places_renders_and_survives_storage(seed: int) -> None:
    text = json.dumps(random_topology(seed))
    topology = load.load_text(text, "random", {})
    assert from_data(json.loads(json.dumps(to_data(topology)))) == topology
    assert repr(values.taken_back(json.loads(json.dumps(values.kept(topology))))) == repr(topology)
    plan = place(topology)
    assert drawing.tree(plan)
    for name, node_plan in plan.nodes.items():
        node = topology.nodes[name]
        check_tree(node_plan)
        check_command(node_plan, node)
        check_groups(node_plan, node)


def check_tree(plan: NodePlan) -> None:
    """No two functions at one address or of one name; buses nest; one slot below a port."""
    for key in ("bdf", "qemu_id", "name"):
        counts = Counter(getattr(f, key) for f in plan.functions)
        assert max(counts.values()) == 1, key
    bridges = {"": (0, 0, 255)}
    for function in plan.functions:
        bus, first, last = bridges[function.parent]  # KeyError: a child before its parent
        assert function.bus == bus
        if function.secondary_bus:
            span = (function.secondary_bus, function.secondary_bus, function.subordinate_bus)
            bridges[function.qemu_id] = span
            assert first < function.secondary_bus <= function.subordinate_bus <= last
    ports = {f.qemu_id for f in plan.functions if f.chassis}
    assert all(f.slot == 0 for f in plan.functions if f.parent in ports)
    chassis = [f.chassis for f in plan.functions if f.chassis]
    assert len(set(chassis)) == len(chassis)
    assert max((f.bus for f in plan.functions), default=0) <= plan.last_bus


def check_command(plan: NodePlan, node: Node) -> None:
    """Each function is one device at its address; each bus that is named exists by then."""
    command = argv.command(plan, node, CONTEXT)
    pairs = list(itertools.pairwise(command.argv))
    devices = [json.loads(value) for option, value in pairs if option == "-device"]
    known = {"pcie.0"}
    for device in devices:
        if "bus" in device:
            assert device["bus"] in known
            known.add(device["id"])
    placed = {d["id"]: (d["bus"], d["addr"]) for d in devices if "id" in d}
    for f in plan.functions:
        assert placed[f.qemu_id] == (f.parent or "pcie.0", f"{f.slot:02x}.{f.number:x}")
    fds = [memory.fd for memory in command.memory]
    assert len(set(fds)) == len(fds) == len(plan.by_role(Role.VRAM, Role.NVME))


def check_groups(plan: NodePlan, node: Node) -> None:
    """With an IOMMU in use, each function but the IOMMU's own is in exactly one group."""
    grouped = Counter(bdf for group in iommu_groups(plan, node) for bdf in group)
    if node.iommu.mode == "off":
        assert not grouped
        return
    expected = {f.bdf for f in plan.functions if f.role is not Role.IOMMU} | set(CHIPSET_BDFS)
    assert grouped == Counter(expected)


def test_a_thousand_are_rendered_in_under_ten_seconds() -> None:
    topologies = [random_topology(seed) for seed in range(1000)]
    start_s = time.process_time()
    for data in topologies:
        topology = from_data(data)
        plan = place(topology)
        for name, node in topology.nodes.items():
            argv.command(plan.nodes[name], node, CONTEXT)
    assert time.process_time() - start_s < 10
