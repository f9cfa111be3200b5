# SPDX-License-Identifier: Apache-2.0
"""All that GPU and NIC models can do, in a machine: bytes seen by host and guest, and the devices'
own count of the paths they took. gpu0 and gpu1 have a link, gpu2 has none.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from guest_agent.pattern import pattern
from testbed.errors import AgentError, DeviceLost, InputError
from testbed.instruments.bench import Bench
from testbed.instruments.memory import Memory
from testbed.instruments.model_devices import ModelGpu, ModelNic, copy, place
from testbed.instruments.paths import PathWatch
from testbed.rack import Rack
from testbed.topology.plan import Role
from tests.vm.conftest import Start, shipped

MIB = 1 << 20
HUGE = 2 * MIB
V = 0x7000_0000_0000
SIZE = 3 * 4096 + 100
BACKING = 8 * MIB  # where in a video memory the pages of these tests are
RAM_BYTES = 4 * MIB
WINDOW_BYTES = 32 * MIB


@pytest.fixture(scope="module")
def rack(start: Start) -> Rack:
    return start(shipped("quad-gpu", gpus="3"))


class Board:
    """Everything opened once."""

    def __init__(self, rack: Rack) -> None:
        self.node = rack.node()
        functions = [*self.node.plan.by_role(Role.VRAM), *self.node.plan.by_role(Role.ENGINE)]
        self.bench = Bench.open(self.node, functions)
        self.gpus = [ModelGpu(self.bench, f"gpu{n}") for n in range(3)]
        self.nic = ModelNic(self.bench, "nic0")
        self.ram = self.bench.buffer("pages", RAM_BYTES)
        self.ram_iova = self.bench.mapper.map(self.ram).iova
        self.peer_iova = self.bench.mapper.map(self.gpus[2].vram).iova

    def backing(self, kind: str) -> tuple[dict[str, Any], Memory, int]:
        """How gpu0 reaches that kind of memory, the memory itself, and where in it that is."""
        return {
            "vram": (place("vram", BACKING), self.gpus[0].vram, BACKING),
            "system": (place("system", self.ram_iova), self.ram, 0),
            "peer": (place("peer", self.peer_iova + BACKING), self.gpus[2].vram, BACKING),
            "link": (place("link", 0, 0), self.gpus[1].vram, BACKING),
        }[kind]

    def export(self, mode: str = "physical", **more: int) -> None:
        """Let gpu0 reach a part of gpu1's memory."""
        params = {"offset": BACKING, "size_bytes": WINDOW_BYTES} if mode == "physical" else {}
        answer = self.gpus[1].call("link_export", link=0, mode=mode, **{**params, **more})
        assert answer == {"synchronized": True}

    def clean(self) -> None:
        """No pages, nothing under way, the window open."""
        for gpu in self.gpus:
            gpu.call("reset")
            gpu.call("unmap", virtual=V, size_bytes=8 * HUGE)
            gpu.call("invalidate")
        self.export()


@pytest.fixture(scope="module")
def opened(rack: Rack) -> Board:
    return Board(rack)


@pytest.fixture
def board(opened: Board) -> Board:
    opened.clean()
    return opened


def pid_of(board: Board, device: str) -> int:
    (found,) = [d for d in board.node.models.call("devices") if d["device"] == device]
    return int(found["pid"])


def signal_command(address: int, value: int) -> dict[str, Any]:
    return {"op": "signal", "target": place("virtual", address), "value": value}


def begin_slowly(gpu: ModelGpu) -> int:
    """Start a copy of more than a second over the link, and see to it that it is under way."""
    gpu.model("link", peer="host0/gpu1", bytes_per_s=20e6)
    before = gpu.witness.moved()["link"]
    batch = gpu.begin(copy(place("vram", 0), place("link", 0, 0), WINDOW_BYTES))
    deadline = time.monotonic() + 10
    while gpu.witness.moved()["link"] == before:
        assert time.monotonic() < deadline
    return batch


PATHS = {"vram": "local", "system": "iommu", "peer": "iommu", "link": "link"}


@pytest.mark.parametrize("by", ["poll", "interrupt"])
@pytest.mark.parametrize("page", [4096, HUGE])
@pytest.mark.parametrize("kind", PATHS)
def test_bytes_go_through_pages_of_this_kind(board: Board, kind: str, page: int, by: str) -> None:
    gpu = board.gpus[0]
    backing, memory, offset = board.backing(kind)
    seed = 1 + list(PATHS).index(kind) + page + len(by)
    expected = gpu.vram.fill(0, SIZE, seed)
    gpu.map(V, 2 * HUGE, backing, page_bytes=page)
    at = HUGE - 4096 - 7  # over the border of the first large page
    with PathWatch(gpu.witness) as watch:
        answer = gpu.submit(copy(place("vram", 0), place("virtual", V + at), SIZE), by=by)
    assert answer["completed"], answer
    judgement = memory.judge(offset + at, expected)
    assert judgement.holds, judgement.reason
    moved = watch.judge(PATHS[kind], SIZE)
    assert moved.holds, moved.reason


def test_fills_rows_sums_and_signals_in_one_batch(board: Board) -> None:
    """gpu1 goes on only when gpu0's signal has come over the link."""
    one, two = board.gpus[:2]
    one.vram.fill(0, 4096, 5)
    one.map(V, HUGE, place("link", 0, 0))
    two.map(V, HUGE, place("vram", BACKING))
    two.vram.fill(BACKING, 4096, 6)
    wait = {"op": "wait", "source": place("virtual", V), "value": 1 << 63}
    held = two.begin(
        {"op": "signal", "target": place("virtual", V), "value": 40},
        {**wait, "value": 42},
        copy(place("virtual", V + 4096), place("vram", 0), 4096),
        by="interrupt",
    )
    assert not two.call("wait", batch=held, timeout_s=0.05, by="interrupt")["ended"]
    rows = {"source_pitch": 64, "target_pitch": 1024, "rows": 4}
    done = one.submit(
        {"op": "fill", "target": place("virtual", V + 4096), "value": 0x55, "size_bytes": 4096},
        {**copy(place("vram", 0), place("virtual", V + 4096), 16), "op": "copy_2d", **rows},
        {"op": "atomic_add", "target": place("virtual", V), "value": 2, "size_bytes": 8},
    )
    assert done["completed"]
    assert two.call("wait", batch=held, by="interrupt")["completed"]
    expected = bytearray((0x55).to_bytes(8, "little") * 512)
    for row in range(4):
        expected[row * 1024 : row * 1024 + 16] = pattern(5, row * 64, 16)
    assert two.vram.judge(0, bytes(expected)).holds


def test_an_old_translation_is_used_until_it_is_invalidated(board: Board) -> None:
    gpu = board.gpus[0]
    gpu.vram.fill(BACKING, 2 * 4096, 1)
    gpu.map(V, 4096, place("vram", BACKING))
    assert gpu.submit(signal_command(V, 7))["completed"]
    gpu.map(V, 4096, place("vram", BACKING + 4096), replace=True)
    assert gpu.submit(signal_command(V, 8))["completed"]
    assert gpu.vram.read(BACKING, 8) == (8).to_bytes(8, "little")
    gpu.call("invalidate", virtual=V)
    assert gpu.submit(signal_command(V, 9))["completed"]
    assert gpu.vram.read(BACKING, 8) == (8).to_bytes(8, "little")
    assert gpu.vram.read(BACKING + 4096, 8) == (9).to_bytes(8, "little")


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_revoked_page_faults_and_its_bytes_stay(board: Board, by: str) -> None:
    gpu = board.gpus[0]
    backing, memory, offset = board.backing("peer")
    gpu.map(V, 4096, backing)
    assert gpu.submit(signal_command(V + 8, 7))["completed"]
    gpu.call("unmap", virtual=V, size_bytes=4096)
    gpu.call("invalidate", virtual=V)
    batch = gpu.begin(signal_command(V + 8, 8), by=by)
    found = gpu.call("faults", timeout_s=5.0, by=by)
    assert found["waiting"]
    (fault,) = found["faults"]
    assert (fault["address"], fault["write"], fault["cause"]) == (V + 8, True, "not_valid")
    gpu.call("resolve", cancel=True)
    answer = gpu.call("wait", batch=batch, by=by)
    assert answer["status"] == {"cause": "page_fault", "address": V + 8}
    assert memory.read(offset + 8, 8) == (7).to_bytes(8, "little")


@pytest.mark.parametrize("by", ["poll", "interrupt"])
@pytest.mark.parametrize("kind", PATHS)
def test_first_touches_fault_are_answered_and_arrive(board: Board, kind: str, by: str) -> None:
    gpu = board.gpus[0]
    backing, memory, offset = board.backing(kind)
    before = gpu.model("counters")["events"]["page_faults"]
    answer = gpu.call(
        "fault_latency", count=20, backing=backing, backing_bytes=MIB, by=by, virtual=V
    )
    assert gpu.model("counters")["events"]["page_faults"] - before == 20
    assert all(len(answer[name]) == 20 for name in ("seen_ns", "serviced_ns", "done_ns"))
    for page in range(20):
        assert memory.read(offset + page * 4096, 8) == (V + page * 4096).to_bytes(8, "little")


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_pages_of_every_kind_come_when_they_are_touched(board: Board, by: str) -> None:
    """One copy over four pages, none of which is there: each is somewhere else."""
    gpu = board.gpus[0]
    expected = gpu.vram.fill(0, 4 * 4096, 17)
    places = [board.backing(kind) for kind in PATHS]
    pages = [
        {"virtual": V + number * 4096, "size_bytes": 4096, "backing": backing}
        for number, (backing, _, _) in enumerate(places)
    ]
    batch = gpu.begin(copy(place("vram", 0), place("virtual", V), 4 * 4096), by=by)
    answer = gpu.call("serve", batch=batch, pages=pages, by=by)
    assert (answer["completed"], answer["served"]) == (True, 4)
    for number, (_, memory, offset) in enumerate(places):
        assert memory.judge(offset, expected[number * 4096 : (number + 1) * 4096]).holds


def test_what_is_not_exported_is_refused_and_both_ends_say_who_asked(board: Board) -> None:
    one, two = board.gpus[:2]
    board.export(size_bytes=8192)
    assert one.call("links")[0]["peer_size_bytes"] == 8192
    two.vram.fill(BACKING + 8192, 4096, 3)
    for gpu in (one, two):
        gpu.model("reset_trace")
    answer = one.submit(copy(place("vram", 0), place("link", 8192, 0), 64))
    assert answer["status"] == {"cause": "link_refused", "address": 8192}
    assert two.vram.judge(BACKING + 8192, pattern(3, 0, 4096)).holds
    ours = [e for e in one.model("trace") if e["outcome"] == "link_refused"]
    assert [(e["path"], e["address"], e["what"]) for e in ours] == [("link", 8192, "write")]
    theirs = [e for e in two.model("trace") if e["what"] == "access_errors"]
    assert [e["outcome"] for e in theirs] == ["write by host0/gpu0 is not exported"]
    board.export("closed")
    assert one.submit(copy(place("vram", 0), place("link", 0, 0), 8))["status"]["cause"] == (
        "link_refused"
    )


def test_a_virtual_window_shows_pages_and_its_sync_takes_them_away(board: Board) -> None:
    one, two = board.gpus[:2]
    space = two.call("space")["space"]
    two.map(0x5000, 4096, place("vram", BACKING + MIB), space=space)
    board.export("virtual", space=space, size_bytes=1 << 30)
    expected = one.vram.fill(0, 4096, 8)
    assert one.submit(copy(place("vram", 0), place("link", 0x5000, 0), 4096))["completed"]
    assert two.vram.judge(BACKING + MIB, expected).holds
    two.call("unmap", virtual=0x5000, size_bytes=4096, space=space)
    board.export("virtual", space=space, size_bytes=1 << 30)
    answer = one.submit(copy(place("vram", 0), place("link", 0x5000, 0), 8))
    assert answer["status"] == {"cause": "link_refused", "address": 0x5000}
    board.export("closed")
    two.call("drop_space", space=space)


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_link_goes_down_and_up(board: Board, by: str) -> None:
    one, two = board.gpus[:2]
    if by == "interrupt":
        assert one.submit({"op": "nop"}, by=by)["completed"]
    two.call("link_enable", link=0, on=False)
    assert one.call("link_wait", link=0, state="down", by=by)["reached"]
    answer = one.submit(copy(place("vram", 0), place("link", 0, 0), 8))
    assert answer["status"] == {"cause": "link_down", "address": 0}
    two.call("link_enable", link=0, on=True)
    assert one.call("link_wait", link=0, state="up", by=by)["reached"]
    assert one.submit(copy(place("vram", 0), place("link", 0, 0), 8))["completed"]


def test_a_link_cut_in_the_middle_of_a_copy_is_a_clean_error(board: Board) -> None:
    one, two = board.gpus[:2]
    last = WINDOW_BYTES - 4096
    one.vram.fill(last, 4096, 4)
    stays = two.vram.fill(BACKING + last, 4096, 5)
    batch = begin_slowly(one)
    one.model("link", peer="host0/gpu1", up=False)
    answer = one.call("wait", batch=batch)
    assert answer["status"]["cause"] == "link_down"
    assert 0 < answer["status"]["address"] < WINDOW_BYTES
    assert two.vram.judge(BACKING + last, stays).holds
    one.model("link", peer="host0/gpu1", restore=True)
    assert two.call("link_wait", link=0, state="up")["reached"]
    assert one.submit(copy(place("vram", 0), place("link", 0, 0), 4096))["completed"]


BASE = 0x10_0000_0000


def nic_region(board: Board, index: int, iova: int, **more: Any) -> int:
    rights = ["local_write", "remote_read", "remote_write"]
    params = {"base": BASE * index, "size_bytes": MIB, "rights": rights, **more}
    return int(board.nic.call("region", index=index, iova=iova, **params)["key"])


def nic_write(board: Board, local: int, remote: int, target: int, size: int) -> dict[str, Any]:
    return {
        "op": "write", "peer": board.nic.address, "local_key": local, "local_address": BASE,
        "remote_key": remote, "remote_address": target, "size_bytes": size,
    }  # fmt: skip


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_nic_moves_memory_between_regions_pinned_and_on_demand(board: Board, by: str) -> None:
    nic = board.nic
    expected = board.ram.fill(0, MIB, 11)
    local = nic_region(board, 1, board.ram_iova)
    pinned = nic_region(board, 2, board.peer_iova + BACKING)
    table = {**board.ram.target, "offset": 2 * MIB}
    lazy = nic_region(board, 3, board.ram_iova + 2 * MIB, table=table)
    with PathWatch(nic.witness) as watch:
        request = nic_write(board, local, pinned, 2 * BASE, MIB)
        assert nic.call("submit", requests=[request], by=by)["completed"]
    assert board.gpus[2].vram.judge(BACKING, expected).holds
    assert watch.judge("iommu", MIB).holds

    request = nic_write(board, local, lazy, 3 * BASE + 4096, 4096)
    batch = nic.call("submit", requests=[request], by=by, wait=False)["batch"]
    (fault,) = nic.call("faults", timeout_s=5.0, by=by)["faults"]
    assert (fault["address"], fault["command"]) == (3 * BASE + 4096, lazy)
    pages = [{"index": 3, "page": 1, "iova": board.peer_iova + BACKING + 2 * MIB}]
    nic.call("resolve", pages=pages)
    assert nic.call("wait", batch=batch, by=by)["completed"]
    assert board.gpus[2].vram.judge(BACKING + 2 * MIB, expected[:4096]).holds

    params = {"count": 20, "iova": board.peer_iova + BACKING, "backing_bytes": MIB, "by": by}
    assert len(nic.call("fault_latency", index=3, **params)["seen_ns"]) == 20
    bad = nic_write(board, local, lazy, 2 * BASE, 8)
    answer = nic.call("submit", requests=[bad])
    assert answer["status"] == {"cause": "link_refused", "address": 2 * BASE}
    for index in (1, 2, 3):
        nic.call("remove", index=index)


def test_what_models_know_nothing_of_is_bad_input(board: Board) -> None:
    with pytest.raises(InputError, match="node 'host0': no device 'gpu9'"):
        board.node.models.call("counters", device="gpu9")


def test_a_peer_whose_process_dies_takes_the_link_down_and_nothing_else(board: Board) -> None:
    """The last but one: gpu1 is lost."""
    one, _, three = board.gpus
    one.submit({"op": "nop"}, by="interrupt")
    batch = begin_slowly(one)
    os.kill(pid_of(board, "gpu1"), signal.SIGKILL)
    assert one.call("link_wait", link=0, state="down", by="interrupt")["reached"]
    assert one.call("wait", batch=batch)["status"]["cause"] == "link_down"
    with pytest.raises(AgentError, match="the device is lost"):
        board.gpus[1].submit({"op": "nop"})
    one.map(V, 4096, board.backing("peer")[0])
    expected = one.vram.fill(0, 4096, 13)
    assert one.submit(copy(place("vram", 0), place("virtual", V), 4096))["completed"]
    assert three.vram.judge(BACKING, expected).holds


def test_a_gpu_whose_process_dies_in_its_own_copy_is_one_lost_device(opened: Board) -> None:
    """The last one: gpu0 is lost too. Its video memory is no part of the process that died."""
    one, _, three = opened.gpus
    target = opened.bench.mapper.map(one.vram).iova
    # A rule holds the copy up, so that it is under way when the process is killed.
    one.model("inject", rule={"name": "slow", "action": "delay", "delay_s": 5.0, "write": True})
    killer = threading.Timer(0.5, os.kill, (pid_of(opened, "gpu0"), signal.SIGKILL))
    killer.start()
    began_s = time.monotonic()
    with pytest.raises(AgentError, match="the device is lost"):
        one.submit(copy(place("vram", 0), place("peer", opened.peer_iova), SIZE))
    assert 0.4 < time.monotonic() - began_s < 4
    killer.join()
    with pytest.raises(DeviceLost, match="device 'gpu0' is lost"):
        one.model("counters")
    assert opened.node.alive
    expected = three.vram.fill(0, SIZE, 14)
    assert three.submit(copy(place("vram", 0), place("peer", target), SIZE))["completed"]
    with opened.node.host_memory("gpu0.vram") as view:
        assert view[:SIZE] == expected
