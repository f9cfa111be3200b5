# SPDX-License-Identifier: Apache-2.0
"""Devices of one's own in a running rack: the documentation's example, and cards that break."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import deploy
from testbed.driver import Driver
from testbed.errors import DeviceLost, InputError, LaunchError
from testbed.host import paths
from testbed.host.prepare import Installation
from testbed.machine import own_devices, registry
from testbed.rack import Rack, attach
from testbed.rack_node import RackNode
from testbed.topology.compare import compare
from testbed.topology.load import load
from testbed.topology.oracle import iommu_groups
from testbed.topology.units import GIB
from tests.contract.own_cards import FIRST_LINE, write_card, write_topology
from tests.vm.conftest import ROOT, Start

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

EXAMPLES = ROOT / "docs" / "examples"
ADDRESS, COUNT, SUM, STATE = 0x00, 0x08, 0x10, 0x18
DONE, REFUSED = 2, 3
ALL_ONES = 0xFFFFFFFF

RACK = f"""
rack: own
nodes:
  host0:
    pcie:
      - device: large
        model: large.py:Card
      - root_port: rp0
        below:
          - switch: sw0
            below:
              - device: adder0
                model: {EXAMPLES}/adder.py:Adder
              - device: adder1
                model: {EXAMPLES}/adder.py:Adder
      - root_port: rp1
        below:
          - device: broken
            model: raises_when_used.py:Card
"""


@pytest.fixture(scope="module")
def own(start: Start, cold: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Rack:
    folder = tmp_path_factory.mktemp("own")
    for name in ("large", "raises_when_used"):
        write_card(folder, name)
    (folder / "rack.yaml").write_text(RACK)
    topology = load(folder / "rack.yaml", {}, admit=own_devices.admission(trust=True))
    return start(topology, replace(cold, trust=True))


@pytest.fixture
def node(own: Rack) -> RackNode:
    return own.node()


def add(card: Driver, address: int, count: int) -> int:
    card.write64(ADDRESS, address)
    card.write32(COUNT, count)
    assert card.wait_interrupt(0) == 1
    return card.read32(STATE)


def test_the_example_works_as_the_documentation_says(
    installation: Installation, tmp_path: Path
) -> None:
    """The README's very command, in the user's own pytest."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "docs/examples/test_adder.py",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--testbed-topology", "docs/examples/adder.yaml", "--testbed-trust"]
    done = subprocess.run(
        [*command, "--testbed-run-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_each_is_a_function_where_it_was_placed(own: Rack, node: RackNode) -> None:
    tree = node.agent.call("pci.tree")["devices"]
    assert compare(node.plan, tree) == []
    groups = {frozenset(group["devices"]) for group in node.agent.call("iommu.groups")}
    assert groups == set(iommu_groups(node.plan, node.spec))
    (large,) = (d for d in tree if d["bdf"] == node.plan.function("large").bdf)
    assert [bar["size_bytes"] for bar in large["bars"]] == [4096, 8 * GIB]
    assert large["bars"][1]["address"] >= 4 * GIB


def test_its_dma_goes_through_the_iommu_and_is_refused_there(node: RackNode) -> None:
    with Driver(node, "adder0") as card:
        card.arm(0)
        buffer = card.buffer(4096)
        buffer.write(struct.pack("<3I", 1, 2, ALL_ONES))
        assert (add(card, buffer.iova, 3), card.read64(SUM)) == (DONE, 0x1_0000_0002)
        buffer.unmap()
        with card.watch_faults() as watch:
            assert add(card, buffer.iova, 3) == REFUSED
        seen = {(f.requester, f.address, str(f.access)) for f in watch.window.records}
        assert seen == {(card.bdf, buffer.iova, "read")}
        card.check()
        paths = node.models.call("counters", device="adder0")
        assert paths  # the witness counts for devices of one's own too


def test_code_that_raises_is_that_devices_failure_with_file_and_line(node: RackNode) -> None:
    with Driver(node, "broken") as card:
        assert card.read32(0) == 0x5EED
        card.check()
        card.read32(8)
        with pytest.raises(DeviceLost, match=r"device 'broken': KeyError: 8 at raises_when_used"):
            card.check()
        assert card.read32(0) == 0x5EED  # it goes on


def test_a_device_that_the_machine_lacks_is_named(node: RackNode) -> None:
    with pytest.raises(InputError, match="no device 'adder9'"):
        Driver(node, "adder9")


def test_other_commands_find_the_rack_and_what_runs_in_it(own: Rack) -> None:
    own.detach()
    try:
        with attach(own.name) as found:
            assert found.plan == own.plan
            digests = [len(each["sha256"]) for each in found.versions["own_devices"].values()]
            assert digests == [64] * 4
    finally:
        own.owner = True


def names() -> list[str]:
    return [info.name for info in registry.list_racks(paths.runtime_dir())]


def test_one_that_fails_only_when_it_is_served_is_a_launch_error_with_file_and_line(
    cold: deploy.StartOptions, tmp_path: Path
) -> None:
    write_card(tmp_path, "works_once")
    before = names()
    topology = load(write_topology(tmp_path, "device: card0, model: works_once.py:Card"), {})
    options = replace(cold, trust=True)
    with pytest.raises(LaunchError, match=r"host0\.models ended before it was ready") as error:
        deploy.start(topology, run_dir=tmp_path / "run", options=options)
    assert f"device 'card0': {tmp_path}/works_once.py:{FIRST_LINE}: FileExistsError" in str(
        error.value
    )
    assert names() == before


def test_when_its_process_is_killed_the_guest_reads_all_ones_and_the_rest_goes_on(
    node: RackNode,
) -> None:
    (victim,) = (d for d in node.models.call("devices") if d["device"] == "adder0")
    with Driver(node, "adder0") as dead, Driver(node, "adder1") as card:
        card.arm(0)
        os.kill(victim["pid"], signal.SIGKILL)
        assert dead.poll32(STATE, lambda value: value == ALL_ONES) == ALL_ONES
        with pytest.raises(DeviceLost, match=r"device 'adder0': its process is gone .status 265"):
            dead.check()
        buffer = card.buffer(4096)
        buffer.write(struct.pack("<2I", 3, 4))
        assert (add(card, buffer.iova, 2), card.read64(SUM)) == (DONE, 7)
        card.check()
    assert node.alive
