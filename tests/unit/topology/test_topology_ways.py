# SPDX-License-Identifier: Apache-2.0
"""What the ways through a PCIe tree carry."""

from __future__ import annotations

import json

from testbed.machine.models import models_spec
from testbed.models.inject import Action
from testbed.models.spec import parse
from testbed.topology.load import load_bytes
from testbed.topology.placement import place
from testbed.topology.ways import Way, ways_of

RACK = b"""
rack: ways
nodes:
  host0:
    pcie:
      - root_port: rp0
        bandwidth: 1GB/s
        latency: 1us
        below:
          - switch: sw0
            bandwidth: 4GB/s
            latency: 100ns
            below:
              - {gpu: gpu0, vram: 1M, engine: model, faults: [drop write nth=3]}
              - {gpu: gpu1, vram: 1M, engine: model, bandwidth: 500MB/s, latency: 2us}
              - switch: sw1
                below: [{gpu: gpu2, vram: 1M, engine: model, bandwidth: 2GB/s}]
      - {nic: nic0, engine: model, latency: 5us}
  host1:
    pcie: [{gpu: gpu0, vram: 1M, engine: model}]
links:
  - {kind: xgmi, between: [host0/gpu0, host0/gpu1], bandwidth: 3GB/s, latency: 500ns}
"""
TOPOLOGY = load_bytes(RACK, "ways.yaml", {})
HOST0 = TOPOLOGY.nodes["host0"]


def test_to_memory_the_narrowest_link_up_to_the_root_counts() -> None:
    assert ways_of(HOST0, "gpu0").memory == Way(10**9, 1100)
    assert ways_of(HOST0, "gpu1").memory == Way(5 * 10**8, 3100)
    assert ways_of(HOST0, "nic0").memory == Way(0, 5000)


def test_through_the_root_a_transfer_passes_links_twice_and_across_only_those_below() -> None:
    ways = ways_of(HOST0, "gpu0")
    assert ways.up["gpu1"] == Way(5 * 10**8, 2 * 1100 + 2000)
    assert ways.across["gpu1"] == Way(5 * 10**8, 2000)
    assert ways.up["gpu2"] == Way(10**9, 2200)
    assert ways.across["gpu2"] == Way(2 * 10**9, 0)


def test_a_gpu_s_own_memory_is_across_no_link() -> None:
    ways = ways_of(HOST0, "gpu1")
    assert ways.across["gpu1"] == Way()
    assert ways.up["gpu1"] == Way(5 * 10**8, 2 * 3100)


def test_what_shares_no_port_has_no_way_across() -> None:
    ways = ways_of(HOST0, "nic0")
    assert ways.across == {}
    assert set(ways.up) == {"gpu0", "gpu1", "gpu2"}


def test_a_node_without_a_word_of_timing_is_not_timed() -> None:
    assert not ways_of(TOPOLOGY.nodes["host1"], "gpu0").are_timed
    plan = place(TOPOLOGY)
    (device,) = models_spec(plan, plan.nodes["host1"])["devices"]
    assert not {"bus_timing", "faults"} & set(device)


def test_the_models_process_is_told_all_of_it() -> None:
    plan = place(TOPOLOGY)
    spec = parse(json.loads(json.dumps(models_spec(plan, plan.nodes["host0"]))))
    gpu0 = next(device for device in spec.devices if device.name == "gpu0")
    (rule,) = gpu0.faults
    assert (rule.action, rule.write, rule.skip, rule.by) == (Action.DROP, True, 2, "topology")
    assert gpu0.bus_timing.across["gpu1.vram"].bytes_per_s == 5e8
    assert gpu0.bus_timing.up["gpu1.vram"].latency_s == 4.2e-6
    (link,) = gpu0.links
    assert (link.timing.bytes_per_s, link.timing.latency_s) == (3e9, 5e-7)
