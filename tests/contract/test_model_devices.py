# SPDX-License-Identifier: Apache-2.0
"""Model devices from the host's side: real device processes, and a plan that no machine runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import DeviceLost, HostError, InputError
from testbed.harness.device_faults import Faults
from testbed.instruments.device_records import records
from testbed.instruments.devices import LinkChange, ModelDevice, find_device, model_devices
from testbed.machine.models import Models, models_spec
from testbed.models import registers as hw
from testbed.results.record import DeviceRecord
from testbed.topology.load import load_bytes
from testbed.topology.placement import place
from testbed.topology.plan import NodePlan
from tests.contract.model_process import Process, Vfio, memory, runs, wait_for

RACK = b"""
rack: devices
nodes:
  host0:
    pcie:
      - {gpu: gpu0, vram: 1M, engine: model, faults: [drop write nth=3]}
      - {gpu: gpu1, vram: 1M, engine: model}
      - {nic: nic0, engine: model}
      - {nic: nic1, engine: edu}
links:
  - {kind: xgmi, between: [host0/gpu0, host0/gpu1], width: 8, bandwidth: 1GB/s}
"""


@dataclass(frozen=True)
class Node:
    name: str
    plan: NodePlan
    models: Models


@dataclass
class FakeRack:
    """A LiveRack as far as faults go."""

    nodes: dict[str, Node]
    ours: bool = True
    is_running: bool = True
    is_dead: bool = False
    renewed: int = 0

    def renew(self) -> None:
        self.renewed += 1


@dataclass(frozen=True)
class Served:
    """The rack, and the processes behind it."""

    rack: FakeRack
    process: Process

    def device(self, word: str) -> ModelDevice:
        return find_device(self.rack.nodes, word)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    plan = place(load_bytes(RACK, "rack.yaml", {}))
    fds = {f.memory_fd: memory(f.name) for f in plan.nodes["host0"].functions if f.memory_fd}
    spec = models_spec(plan, plan.nodes["host0"])
    spec["control"] = str(tmp_path / "control.sock")
    del spec["ready"]
    for item in spec["memories"]:
        item["fd"] = fds[item["fd"]]
    for device in spec["devices"]:
        device["socket"] = str(tmp_path / device["socket"])
        for link in device.get("links", ()):
            link["socket"] = str(tmp_path / link["socket"])
        if "wire" in device:
            device["wire"] = str(tmp_path / device["wire"])
    process = Process(tmp_path, spec, fds=fds.values())
    node = Node("host0", plan.nodes["host0"], Models("host0", tmp_path / "control.sock"))
    yield Served(FakeRack({"host0": node}), process)
    process.popen.kill()
    process.popen.communicate()
    wait_for(lambda: not any(map(runs, process.pids.values())))


class TestWhich:
    def test_every_model_device_and_no_other(self, served: Served) -> None:
        found = [str(device) for device in model_devices(served.rack.nodes)]
        assert found == ["host0/gpu0", "host0/gpu1", "host0/nic0"]

    def test_by_name_alone_or_with_its_node(self, served: Served) -> None:
        assert served.device("gpu0") == served.device("host0/gpu0")

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("gpuu0", "did you mean 'gpu0'"),
            ("host1/gpu0", "did you mean 'host0/gpu0'"),
            ("nic1", "no model device"),
            ("", "no such device"),
        ],
    )
    def test_what_is_wrong_is_said(self, served: Served, word: str, says: str) -> None:
        with pytest.raises(InputError, match=says):
            served.device(word)


class TestRules:
    def test_a_topology_s_rules_are_armed_from_the_start(self, served: Served) -> None:
        (rule,) = served.device("gpu0").report()["rules"]
        assert (rule["name"], rule["by"], rule["armed"]) == ("drop write nth=3", "topology", True)

    def test_wrong_words_arm_nothing(self, served: Served) -> None:
        with pytest.raises(InputError, match="did you mean 'drop'"):
            served.device("gpu1").arm("drop write", "dorp")
        assert served.device("gpu1").rules() == []

    def test_disarm_names_the_nearest(self, served: Served) -> None:
        gpu1 = served.device("gpu1")
        gpu1.arm("drop  write", "delay read for=1ms")
        with pytest.raises(InputError, match="did you mean 'drop write'"):
            gpu1.disarm("drop writ")
        gpu1.disarm("drop write")
        assert [rule["name"] for rule in gpu1.rules()] == ["delay read for=1ms"]
        assert [rule["armed"] for rule in gpu1.report()["rules"]] == [False, True]


class TestLinks:
    @pytest.mark.parametrize(
        ("word", "params"),
        [
            ("down", {"up": False}),
            ("up", {"up": True}),
            ("restore", {"restore": True}),
            ("narrow=4", {"lanes": 4}),
            ("slow=1GB/s", {"bytes_per_s": 1e9, "latency_s": 0.0}),
            ("slow=1GB/s,5us", {"bytes_per_s": 1e9, "latency_s": 5e-6}),
        ],
    )
    def test_words(self, word: str, params: dict[str, Any]) -> None:
        assert LinkChange.parse(word).params == params

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("dwn", "did you mean 'down'"),
            ("down=1", "expected down"),
            ("narrow", "narrow=LANES"),
            ("slow", "slow=BANDWIDTH"),
            ("slow=1G", "did you mean 'slow=1GB/s'"),
            ("slow=1GB/s,2", "expected"),
        ],
    )
    def test_wrong_words(self, word: str, says: str) -> None:
        with pytest.raises(InputError, match=says):
            LinkChange.parse(word)

    def test_both_ends_change_and_are_restored(self, served: Served) -> None:
        gpu0, gpu1 = served.device("gpu0"), served.device("gpu1")
        gpu0.change_link("gpu1", LinkChange.parse("narrow=2"))
        gpu0.change_link("gpu1", LinkChange.parse("slow=500MB/s,1ms"))
        changed = {"width": 2, "bytes_per_s": 5e8, "latency_s": 0.001}
        ends = ((gpu0, "host0/gpu1"), (gpu1, "host0/gpu0"))
        for device, peer in ends:
            assert changed.items() <= device.call("link", peer=peer).items()
        gpu1.restore()
        made = {"width": 8, "bytes_per_s": 1e9, "latency_s": 0.0}
        for device, peer in ends:
            assert made.items() <= device.call("link", peer=peer).items()

    def test_no_such_link(self, served: Served) -> None:
        with pytest.raises(InputError, match="it has host0/gpu1"):
            served.device("gpu0").change_link("gpu7", LinkChange.parse("down"))
        with pytest.raises(InputError, match="has no links"):
            served.device("nic0").change_link("gpu0", LinkChange.parse("down"))


def test_a_watch_counts_what_happens_in_its_block(served: Served) -> None:
    gpu1 = served.device("gpu1")
    with served.process.connect("gpu1-engine.vfu") as connection:
        client = Vfio(connection)
        client.write(hw.Common.DOORBELL_NOTIFY, 1)
        with gpu1.watch() as watch:
            client.write(hw.Common.DOORBELL_NOTIFY, 2)
            client.write(hw.Common.DOORBELL_NOTIFY, 3)
            assert watch.seen.events["doorbells"] == 2
        client.write(hw.Common.DOORBELL_NOTIFY, 4)
        assert watch.seen.events["doorbells"] == 2
        assert watch.seen.written_bytes("iommu") == watch.seen.read_bytes("link") == 0
        assert gpu1.seen().events["doorbells"] == 4
        assert [entry["what"] for entry in gpu1.trace()].count("doorbells") == 4


class TestFixture:
    """What the fixture ``faults`` does."""

    def faults(self, served: Served) -> Faults:
        return Faults(served.rack)  # type: ignore[arg-type]

    def test_everything_is_taken_back(self, served: Served) -> None:
        faults = self.faults(served)
        faults.arm("gpu1", "drop write", "delay read for=1ms")
        faults.stick("gpu1")
        faults.lose("nic0", "interrupt", 3)
        assert faults.link("gpu1", "gpu0", "narrow=1")["width"] == 1
        faults.disarm()
        gpu1 = served.device("gpu1")
        assert gpu1.rules() == []
        assert gpu1.call("link", peer="host0/gpu0")["width"] == 8
        report = gpu1.report()
        assert [action["what"] for action in report["actions"]] == [
            "engine stuck",
            "link to host0/gpu0: lanes 1",
        ]
        assert {each["by"] for each in report["rules"] + report["actions"]} == {"test"}
        assert all(action["undone"] for action in report["actions"])
        assert served.rack.renewed == 0

    def test_what_still_holds_is_not_said_to_be_undone(self, served: Served) -> None:
        faults = self.faults(served)
        faults.lose("gpu1", "doorbell", 2)
        faults.stick("gpu1")
        faults.stick("gpu1", on=False)
        faults.link("gpu1", "gpu0", "down")
        actions = served.device("gpu1").report()["actions"]
        assert [(action["what"], action["undone"]) for action in actions] == [
            ("2 doorbells to be lost", False),
            ("engine stuck", True),
            ("link to host0/gpu0: down", False),
        ]

    def test_what_nobody_touched_is_left_alone(self, served: Served) -> None:
        self.faults(served).disarm()
        assert [rule["name"] for rule in served.device("gpu0").rules()] == ["drop write nth=3"]

    def test_a_device_that_dies_meanwhile_is_an_error_and_the_rack_is_renewed(
        self, served: Served
    ) -> None:
        faults = self.faults(served)
        faults.arm("gpu0", "drop write")
        faults.arm("nic0", "drop write")
        served.device("gpu0").kill()
        with pytest.raises(HostError, match="faults of host0/gpu0 could not be taken back"):
            faults.disarm()
        assert served.device("nic0").rules() == []
        assert served.rack.renewed == 1

    def test_one_killed_on_purpose_is_no_error(self, served: Served) -> None:
        faults = self.faults(served)
        faults.arm("gpu0", "drop write")
        faults.kill("gpu0")
        faults.disarm()
        assert served.rack.renewed == 1

    def test_a_dead_machine_has_nothing_to_take_back(self, served: Served) -> None:
        faults = self.faults(served)
        faults.arm("gpu0", "drop write")
        served.rack.is_dead = True
        faults.disarm()
        assert served.rack.renewed == 0


def test_a_killed_device_is_lost_and_the_others_are_not(served: Served) -> None:
    gpu0 = served.device("gpu0")
    gpu0.kill()
    with pytest.raises(DeviceLost):
        gpu0.seen()
    with pytest.raises(InputError, match="lost already"):
        gpu0.kill()
    served.device("gpu1").arm("drop")
    lost, other, _ = records(served.rack, "rack")  # type: ignore[arg-type]
    assert lost == DeviceRecord("rack", "host0", "gpu0", lost=256 + 9)
    assert [rule.name for rule in other.rules] == ["drop"]
    assert other.counters["iommu"]["writes"] == 0


def test_of_a_node_that_is_gone_the_record_has_the_names(served: Served) -> None:
    served.process.popen.kill()
    served.process.popen.wait()
    found = records(served.rack, "rack")  # type: ignore[arg-type]
    assert [(d.device, d.counters, d.lost) for d in found] == [
        ("gpu0", {}, None),
        ("gpu1", {}, None),
        ("nic0", {}, None),
    ]
