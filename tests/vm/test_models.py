# SPDX-License-Identifier: Apache-2.0
"""Racks whose GPUs are models: what happens to the rest when one of them dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from guest_agent.pattern import pattern
from testbed import deploy
from testbed.errors import AgentError, DeviceLost, InputError
from testbed.instruments.bench import Bench, Engine
from testbed.instruments.memory import Memory
from testbed.machine.models import Models
from testbed.rack import Rack, RackNode
from testbed.topology.plan import Role
from tests.vm.conftest import Start, shipped

SIZE_BYTES = 32 << 20


@pytest.fixture(scope="module")
def quad(start: Start) -> Rack:
    return start(shipped("quad-gpu", gpus="3"))


@pytest.fixture(scope="module")
def bench(quad: Rack) -> Bench:
    """All GPUs in one container. Not closed: the machine's end does that."""
    plan = quad.node().plan
    gpus = [f for f in plan.by_role(Role.VRAM, Role.ENGINE) if f.device.startswith("gpu")]
    return Bench.open(quad.node(), gpus)


class Gpu:
    """One GPU of the bench, with its video memory mapped."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.vram: Memory = bench.vram(bench.node.plan.function(f"{name}.vram"))
        self.engine: Engine = bench.engine(bench.node.plan.function(f"{name}.engine"))
        self.iova = bench.mapper.map(self.vram).iova


def pid_of(models: Models, device: str) -> int:
    (found,) = [d for d in models.call("devices") if d["device"] == device]
    assert found["lost"] is None
    pid: int = found["pid"]
    return pid


def holds(node: RackNode, function: str, expected: bytes) -> bool:
    with node.host_memory(function) as view:
        return view[: len(expected)] == expected


def test_what_models_know_nothing_of_is_bad_input(quad: Rack) -> None:
    with pytest.raises(InputError, match="node 'host0': no device 'gpu9'"):
        quad.node().models.call("counters", device="gpu9")


def test_a_model_that_dies_in_the_middle_of_a_copy_is_one_lost_device(
    quad: Rack, bench: Bench
) -> None:
    node = quad.node()
    gpus = [Gpu(bench, f"gpu{n}") for n in range(3)]
    gpus[0].vram.fill(0, SIZE_BYTES, 1)
    assert gpus[0].engine.copy(gpus[0].iova, gpus[1].iova, SIZE_BYTES).completed
    assert holds(node, "gpu1.vram", pattern(1, 0, SIZE_BYTES))

    # A rule holds the copy up, so that it is under way when the process is killed.
    rule = {"name": "slow", "action": "delay", "delay_s": 5.0, "write": True}
    node.models.call("inject", device="gpu0", rule=rule)
    pid = pid_of(node.models, "gpu0")
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    began_s = time.monotonic()
    with pytest.raises(AgentError, match="the device is lost"):
        gpus[0].engine.copy(gpus[0].iova, gpus[1].iova, SIZE_BYTES)
    assert 0.4 < time.monotonic() - began_s < 4
    killer.join()

    with pytest.raises(DeviceLost, match="device 'gpu0' is lost"):
        node.models.call("counters", device="gpu0")
    assert node.alive
    gpus[1].vram.fill(0, SIZE_BYTES, 2)
    assert gpus[1].engine.copy(gpus[1].iova, gpus[2].iova, SIZE_BYTES).completed
    assert holds(node, "gpu2.vram", pattern(2, 0, SIZE_BYTES))
    # Its video memory is no part of the process that died.
    assert gpus[2].engine.copy(gpus[2].iova, gpus[0].iova, SIZE_BYTES).completed
    assert holds(node, "gpu0.vram", pattern(2, 0, SIZE_BYTES))


def test_the_end_of_the_rack_is_the_end_of_every_model(
    warm: deploy.StartOptions, tmp_path: Path
) -> None:
    with deploy.start(shipped("minimal"), run_dir=tmp_path, options=warm) as rack:
        devices = rack.node().models.call("devices")
        assert {d["device"] for d in devices} == {"gpu0", "gpu1", "nic0"}
        assert all(d["connected"] for d in devices)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{d['pid']}/exe").exists() for d in devices):
        assert time.monotonic() < deadline
        time.sleep(0.01)
