# SPDX-License-Identifier: Apache-2.0
"""The switch router: NVMe disks read into each other's memory, as below a real switch or not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from testbed.deploy import StartOptions
from testbed.errors import CapabilityMissing
from testbed.guest import modules
from testbed.rack_node import RackNode
from testbed.topology import load
from tests.vm.conftest import Start

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

TOPOLOGY = """\
rack: router
nodes:
  host0:
    pcie:
      - root_port: rp0
        below:
          - switch: plain
            below:
              - {nvme: near0, size: 16M, cmb: 16M}
              - {nvme: near1, size: 16M}
              - {gpu: gpu0, vram: 16M, engine: edu}
              - {gpu: gpu1, vram: 16M, engine: edu}
      - root_port: rp1
        below:
          - switch: redirecting
            acs: redirect
            below:
              - {nvme: apart0, size: 16M, cmb: 16M}
              - {nvme: apart1, size: 16M}
              - {gpu: gpu2, vram: 16M, engine: edu}
              - {gpu: gpu3, vram: 16M, engine: edu}
"""

# Reads what the second disk holds into memory of the first one; says what arrived.
READ = """\
import glob, json, mmap, os, sys
provider, disk = sys.argv[1:]
size = 16384
name = glob.glob(f"/sys/bus/pci/devices/{disk}/nvme/nvme*/nvme*n1")[0].rpartition("/")[2]
drive = os.open(f"/dev/{name}", os.O_RDWR | os.O_DIRECT)
ram = mmap.mmap(-1, size)
ram[:] = os.urandom(size)
assert os.pwritev(drive, [ram], 0) == size
memory = os.open(f"/sys/bus/pci/devices/{provider}/p2pmem/allocate", os.O_RDWR)
peer = mmap.mmap(memory, size, mmap.MAP_SHARED)
before = os.urandom(size)
peer[:] = before
try:
    done = os.preadv(drive, [peer], 0)
except OSError as error:
    done = -error.errno
after = peer[:]
arrived = "right" if after == ram[:] else "stale" if after == before else "mixed"
print(json.dumps([done, arrived]))
"""
SIZE = 16384


@pytest.fixture(scope="module")
def node(start: Start, cold: StartOptions) -> RackNode:
    topology = load.load_text(TOPOLOGY, "router.yaml", {})
    node = start(topology, replace(cold, router=False)).node()
    node.link.run("cat >/run/read.py", stdin=READ.encode())
    return node


@pytest.fixture(scope="module")
def bdf(node: RackNode) -> dict[str, str]:
    return {function.name: function.bdf for function in node.plan.functions}


@pytest.fixture
def router(node: RackNode) -> Iterator[Callable[..., dict[str, Any]]]:
    """The router's state, while it is loaded."""
    try:
        modules.load(node, "p2p_router")
    except CapabilityMissing as error:
        pytest.skip(error.capability)

    def state(*, rescan: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = node.agent.call("p2p.router", rescan=rescan)
        assert not [window for window in found["windows"] if window["error"]]
        return found

    yield state
    modules.unload(node, "p2p_router")


def read(node: RackNode, provider: str, disk: str) -> tuple[int, str, set[str]]:
    """How many bytes the kernel says it read, what arrived, and whose accesses faulted."""
    mark = node.agent.call("faults.mark")["sequence"]
    done = node.link.run(f"python3 /run/read.py {provider} {disk}")
    assert done.exit_status == 0, done.stderr.decode()
    count, arrived = json.loads(done.stdout)
    faults = node.agent.call("faults.since", sequence=mark)["records"]
    return count, arrived, {fault["requester"] for fault in faults}


def pairs_of(state: dict[str, Any]) -> set[tuple[str, str]]:
    return {(pair["initiator"], pair["peer"]) for pair in state["pairs"]}


def below_the_plain_switch(bdf: dict[str, str]) -> set[tuple[str, str]]:
    return pairs_below(bdf, ("near0", "near1"), ("gpu0", "gpu1"))


def pairs_below(
    bdf: dict[str, str], disks: tuple[str, str], gpus: tuple[str, str]
) -> set[tuple[str, str]]:
    """The disks, which drivers use, reach one another and all functions of the GPUs."""
    peers = [*disks, *(f"{gpu}.{part}" for gpu in gpus for part in ("vram", "engine"))]
    return {(bdf[disk], bdf[peer]) for disk in disks for peer in peers if disk != peer}


def test_without_the_router_the_kernel_believes_stale_bytes(
    node: RackNode, bdf: dict[str, str]
) -> None:
    count, arrived, faults = read(node, bdf["near0"], bdf["near1"])
    assert (count, arrived) == (SIZE, "stale")
    assert faults == {bdf["near1"]}


def test_with_it_the_bytes_arrive(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    assert read(node, bdf["near0"], bdf["near1"]) == (SIZE, "right", set())


def test_unloading_removes_what_it_installed(node: RackNode, bdf: dict[str, str]) -> None:
    modules.load(node, "p2p_router")
    modules.unload(node, "p2p_router")
    count, arrived, faults = read(node, bdf["near0"], bdf["near1"])
    assert (count, arrived, faults) == (SIZE, "stale", {bdf["near1"]})


def test_only_what_a_plain_switch_joins_is_routed(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    state = router()
    assert pairs_of(state) == below_the_plain_switch(bdf)
    ranges = {(pair["start"], pair["size"]) for pair in state["pairs"]}
    assert {(window["start"], window["size"]) for window in state["windows"]} == ranges
    count, arrived, faults = read(node, bdf["apart0"], bdf["apart1"])
    assert (count, arrived, faults) == (-22, "stale", set()), "the kernel refuses"


def test_a_change_of_acs_is_followed(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    ports = sorted(port for name, port in bdf.items() if name.startswith("redirecting."))
    before = set_acs(node, ports, [0] * len(ports))
    joined = pairs_below(bdf, ("apart0", "apart1"), ("gpu2", "gpu3"))
    assert pairs_of(router(rescan=True)) == below_the_plain_switch(bdf) | joined
    # The port at which a request enters the switch decides, whatever the peer's port says.
    set_acs(node, ports[:1], before[:1])
    without = {pair for pair in joined if pair[0] != bdf["apart0"]}
    assert pairs_of(router(rescan=True)) == below_the_plain_switch(bdf) | without
    assert bdf["apart0"] in {peer for _, peer in without}
    set_acs(node, ports, before)
    assert pairs_of(router(rescan=True)) == below_the_plain_switch(bdf)


def set_acs(node: RackNode, ports: list[str], values: list[int]) -> list[int]:
    """Write the ports' ACS control registers; returns what they held."""
    script = (
        "import json, os, sys\n"
        "held = []\n"
        "for port, value in json.loads(sys.argv[1]):\n"
        "    fd = os.open(f'/sys/bus/pci/devices/{port}/config', os.O_RDWR)\n"
        "    at = 0x100\n"
        "    while (head := int.from_bytes(os.pread(fd, 4, at), 'little')) & 0xFFFF != 0x0D:\n"
        "        at = head >> 20\n"
        "    held.append(int.from_bytes(os.pread(fd, 2, at + 6), 'little'))\n"
        "    os.pwrite(fd, value.to_bytes(2, 'little'), at + 6)\n"
        "print(json.dumps(held))\n"
    )
    words = json.dumps(list(zip(ports, values, strict=True)))
    done = node.link.run(f"python3 - '{words}'", stdin=script.encode())
    assert done.exit_status == 0, done.stderr.decode()
    held: list[int] = json.loads(done.stdout)
    return held


def test_a_driver_that_comes_and_goes_is_followed(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    whole, leaving = below_the_plain_switch(bdf), bdf["near1"]
    bind = f"echo {leaving} >/sys/bus/pci/drivers/nvme"
    node.link.run(f"{bind}/unbind")
    assert pairs_of(router()) == {pair for pair in whole if pair[0] != leaving}
    container = node.agent.call("vfio.open", devices=[leaving])["container"]
    assert pairs_of(router()) == {pair for pair in whole if pair[0] != leaving}, "VFIO has it"
    node.agent.call("vfio.close", container=container)
    node.link.run(f"{bind}/bind")
    assert pairs_of(router()) == whole
    deadline = time.monotonic() + 20
    while node.link.run(f"ls /sys/bus/pci/devices/{leaving}/nvme/nvme*/nvme*n1").exit_status:
        assert time.monotonic() < deadline
    assert read(node, bdf["near0"], leaving) == (SIZE, "right", set())


def raw_copy(node: RackNode, bdf: dict[str, str], source: str, target: str) -> Any:
    """Have the source GPU's engine write its VRAM to the target's bus address; what came of it.

    Both memories are seen by the host alone: no CPU mapping in the guest has a part in it.
    """
    functions = {each["bdf"]: each for each in node.agent.call("pci.tree")["devices"]}

    def bus_address(gpu: str) -> int:
        bars = functions[bdf[f"{gpu}.vram"]]["bars"]
        return next(int(bar["address"]) for bar in bars if bar["index"] == 2)

    size = 4096
    memories = [node.host_memory(f"{gpu}.vram") for gpu in (source, target)]
    memories[0][:size], memories[1][:size] = os.urandom(size), bytes(size)
    engine = node.agent.call("engine.open", device=bdf[f"{source}.engine"], kind="edu")["engine"]
    mark = node.agent.call("faults.mark")["sequence"]
    addresses = {"source_iova": bus_address(source), "target_iova": bus_address(target)}
    node.agent.call("engine.copy", engine=engine, size_bytes=size, **addresses)
    faults = node.agent.call("faults.since", sequence=mark)["records"]
    node.agent.call("engine.close", engine=engine)
    arrived = memories[1][:size] == memories[0][:size]
    for memory in memories:
        memory.close()
    return arrived, {fault["requester"] for fault in faults}


def functions_of(bdf: dict[str, str], *gpus: str) -> list[str]:
    return [bdf[f"{gpu}.{part}"] for gpu in gpus for part in ("vram", "engine")]


def test_a_raw_address_of_vfio_works_below_a_plain_switch_once_it_is_routed(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    opened = node.agent.call("vfio.open", devices=functions_of(bdf, "gpu0", "gpu1"))["container"]
    try:
        arrived, faults = raw_copy(node, bdf, "gpu0", "gpu1")
        assert (arrived, faults) == (False, {bdf["gpu0.engine"]})
        answer = node.agent.call("p2p.route", container=opened)
        assert {bdf["gpu0.vram"], bdf["gpu1.vram"]} <= {each["peer"] for each in answer["windows"]}
        assert answer["widened"] == []
        assert {bdf["near0"], bdf["near1"]} <= {each["peer"] for each in answer["left_out"]}
        assert raw_copy(node, bdf, "gpu0", "gpu1") == (True, set())
    finally:
        node.agent.call("vfio.close", container=opened)


def test_a_raw_address_of_vfio_faults_below_a_redirecting_switch(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    opened = node.agent.call("vfio.open", devices=functions_of(bdf, "gpu2"))["container"]
    try:
        answer = node.agent.call("p2p.route", container=opened)
        assert answer == {"windows": [], "left_out": [], "widened": []}
        arrived, faults = raw_copy(node, bdf, "gpu2", "gpu3")
        assert (arrived, faults) == (False, {bdf["gpu2.engine"]})
    finally:
        node.agent.call("vfio.close", container=opened)


def test_hot_plug_is_followed(
    node: RackNode, bdf: dict[str, str], router: Callable[..., dict[str, Any]]
) -> None:
    # The last test: the slot keeps another device than the plan says.
    def until(wanted: set[tuple[str, str]]) -> None:
        deadline = time.monotonic() + 30
        while (found := pairs_of(router())) != wanted:
            assert time.monotonic() < deadline, found ^ wanted

    whole, plugged = below_the_plain_switch(bdf), bdf["near1"]
    function = next(each for each in node.plan.functions if each.name == "near1")
    node.qmp("device_del", id=function.qemu_id)
    until({pair for pair in whole if plugged not in pair})
    node.qmp("device_add", driver="edu", id="plugged0", bus=function.parent)
    until({pair for pair in whole if pair[0] != plugged})
    node.qmp("device_del", id="plugged0")
    until({pair for pair in whole if plugged not in pair})
