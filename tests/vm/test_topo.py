# SPDX-License-Identifier: Apache-2.0
"""`testbed topo` on a running rack: prediction, kernel and moved bytes agree, or it is loud."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.guest import modules, switch_router
from testbed.instruments.devices import find_device
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.topology import load
from testbed.topology import matrix as matrices
from testbed.topology.oracle import P2pDecision, p2p_decision
from testbed.verbs.group import cli
from tests.vm.conftest import Start

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

NAME = "topo-test"
TOPOLOGY = f"""\
rack: {NAME}
nodes:
  host0:
    machine: {{cpu: max, vcpus: 1, memory: 512M}}
    iommu: {{kind: intel, mode: strict}}
    pcie:
      - root_port: rp0
        below:
          - switch: plain
            below:
              - {{gpu: gpu0, vram: 16M}}
              - {{gpu: gpu1, vram: 16M}}
              - {{nvme: nvme0, cmb: 16M}}
      - root_port: rp1
        below:
          - switch: strict
            acs: redirect
            below:
              - {{gpu: gpu2, vram: 16M}}
              - {{gpu: gpu3, vram: 16M}}
links:
  - {{kind: xgmi, between: [host0/gpu0, host0/gpu1], width: 4}}
"""
REDIRECT_OFF = 0x11  # source validation and upstream forwarding

Cells = Mapping[tuple[str, str], Mapping[str, Any]]


@pytest.fixture(scope="module")
def rack(start: Start, cold: StartOptions) -> Rack:
    return start(load.load_text(TOPOLOGY, "topo.yaml", {}), replace(cold, name=NAME))


@pytest.fixture
def node(rack: Rack) -> RackNode:
    return rack.node()


def topo(*words: str) -> tuple[int, Cells, dict[str, Any]]:
    """Exit code, cells by pair, and everything."""
    done = CliRunner().invoke(cli, ["topo", NAME, "--format", "json", *words])
    assert done.exit_code in (0, ExitCode.FAIL), done.output
    data = json.loads(done.stdout)
    return done.exit_code, {(c["from"], c["to"]): c for c in data["cells"]}, data


def test_all_three_agree_and_the_rack_is_as_it_was(node: RackNode) -> None:
    for name in ("gpu0.vram", "gpu1.vram"):
        with node.host_memory(name) as view:
            view[:] = b"mine" * (len(view) // 4)
    drivers = [device["driver"] for device in node.agent.call("pci.tree")["devices"]]

    code, cells, data = topo()

    assert code == 0, [c["disagreements"] for c in cells.values() if c["disagreements"]]
    assert data["format"] == "testbed.topo/1"
    plain, strict, far = cells["gpu0", "gpu1"], cells["gpu2", "gpu3"], cells["gpu0", "gpu2"]
    assert [c["word"] for c in (plain, strict, far)] == ["XG4", "PIX", "PHB"]
    assert plain["kernel"] == {"type": "bus", "distance": 4}
    assert plain["measured"] == {"moves": {"raw": "peer", "iova": "iommu"}}
    for refused in (strict, far):
        assert refused["kernel"] == {"type": "none", "distance": None}
        assert refused["measured"] == {"moves": {"raw": "refused", "iova": "iommu"}}
    assert cells["nvme0", "gpu0"]["measured"] == {"moves": {"disk": "peer"}}
    assert cells["nvme0", "gpu2"]["measured"] == {"moves": {"disk": "refused"}}
    assert cells["gpu0", "nvme0"]["kernel"] == {"type": "bus", "distance": 4}
    assert "driver's" in cells["gpu0", "nvme0"]["measured"]["unknown"]
    for name in ("gpu0.vram", "gpu1.vram"):
        with node.host_memory(name) as view:
            assert view[:] == b"mine" * (len(view) // 4)
    assert [d["driver"] for d in node.agent.call("pci.tree")["devices"]] == drivers
    assert node.agent.call("modules.loaded", names=["p2p_probe"]) == {"p2p_probe": False}


def test_a_wrong_prediction_is_loud(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **more: Any) -> P2pDecision:
        decision = p2p_decision(*arguments, **more)
        return replace(decision, distance=decision.distance + 2)

    monkeypatch.setattr(matrices, "p2p_decision", wrong)
    code, cells, _ = topo("--no-measure")
    assert code == ExitCode.FAIL
    assert cells["gpu0", "gpu1"]["disagreements"] == ["predicted bus 6, the kernel says bus 4"]
    done = CliRunner().invoke(cli, ["topo", NAME, "--no-measure"])
    assert done.exit_code == ExitCode.FAIL
    assert "bus 4!" in done.stdout
    assert "DISAGREES gpu0 → gpu1: predicted bus 6, the kernel says bus 4" in done.stdout


def test_redirection_turned_off_shows_up(node: RackNode) -> None:
    ports = [node.plan.function(f"strict.port{number}").bdf for number in range(2)]
    held = [node.agent.call("acs.set", device=port, control=REDIRECT_OFF)["old"] for port in ports]
    try:
        code, cells, data = topo()
    finally:
        for port, control in zip(ports, held, strict=True):
            node.agent.call("acs.set", device=port, control=control)
    assert code == ExitCode.FAIL
    assert "strict.port0" in data["disagreements"]["host0"][0]
    changed = cells["gpu2", "gpu3"]
    assert changed["kernel"] == {"type": "bus", "distance": 4}
    assert changed["measured"]["moves"]["raw"] == "peer"
    assert all("as they are set now that is right" in t for t in changed["disagreements"])
    assert cells["gpu0", "gpu1"]["disagreements"] == []
    assert topo("--no-measure")[0] == 0


def test_bytes_that_a_device_loses_are_missed(rack: Rack) -> None:
    """The engine says that it copied, and nothing faulted."""
    device = find_device(rack.nodes, "gpu0")
    device.arm("drop write path=peer")
    try:
        code, cells, _ = topo("--explain", "gpu0", "gpu1")
    finally:
        device.restore()
    assert code == ExitCode.FAIL
    assert cells["gpu0", "gpu1"]["measured"]["moves"]["raw"] == "lost"
    assert cells["gpu0", "gpu1"]["disagreements"][0] == (
        "by raw bus address: predicted peer, measured lost"
    )


def test_a_driver_is_not_disturbed(node: RackNode) -> None:
    """Video memory that somebody's driver has is neither asked about nor written to."""
    gpu = node.plan.function("gpu0.vram")
    bind = (
        f"modprobe vfio-pci; cd /sys/bus/pci/devices/{gpu.bdf} && echo vfio-pci > driver_override"
        f" && echo {gpu.bdf} > /sys/bus/pci/drivers_probe && readlink driver"
    )
    assert b"vfio-pci" in node.link.run(bind).stdout
    try:
        _, cells, _ = topo("--no-measure")
    finally:
        node.link.run(
            f"cd /sys/bus/pci/devices/{gpu.bdf} && echo {gpu.bdf} > driver/unbind;"
            " echo > driver_override"
        )
    assert cells["gpu1", "gpu0"]["kernel"] == {
        "unknown": "gpu0.vram belongs to the driver vfio-pci"
    }
    assert cells["gpu0", "gpu1"]["kernel"] == {"type": "bus", "distance": 4}


def test_a_disk_whose_bytes_no_switch_routes_is_loud(node: RackNode) -> None:
    """QEMU alone sends them to the IOMMU, and the kernel says that all was read."""
    modules.unload(node, switch_router.MODULE)
    try:
        code, cells, _ = topo("--explain", "nvme0", "gpu0")
    finally:
        switch_router.start(node)
    assert code == ExitCode.FAIL
    assert cells["nvme0", "gpu0"]["disagreements"] == [
        "by direct I/O: predicted peer, measured lost"
    ]
