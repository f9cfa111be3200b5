# SPDX-License-Identifier: Apache-2.0
"""The agent's GPU methods against the GPU model: MMU, page faults, batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError
from testbed.models.witness import Event
from testbed.models.witness import Path as Way
from tests.unit.models.agent_rig import MIB, RAM, VIDEO_BYTES, VRAM
from tests.unit.models.gpu_rig import HUGE, Gpu, V, at, copy, fill, page_at, signal, virtual


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.close()


@pytest.mark.parametrize("page", [4096, HUGE])
@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_copy_between_pages_of_video_and_system_memory(gpu: Gpu, page: int, by: str) -> None:
    gpu.map(V, 2 * HUGE, 2 * MIB, page_bytes=page)
    gpu.map(V + 4 * HUGE, 2 * HUGE, RAM, "system", page_bytes=page)
    gpu.write(2 * MIB, pattern(1, 0, 2 * HUGE))
    size = HUGE + 5000
    gpu.do(copy(virtual(V + 3), virtual(V + 4 * HUGE + 7), size), by=by)
    assert bytes(gpu.ram.view[7 : 7 + size]) == pattern(1, 3, size)
    assert gpu.model.witness.bytes_by(Way.IOMMU, write=True) >= size


def test_pages_in_any_order_are_one_range_of_virtual_addresses(gpu: Gpu) -> None:
    gpu.map(V, 4096, 3 * MIB)
    gpu.map(V + 4096, 4096, RAM, "system")
    gpu.map(V + 8192, 4096, MIB)
    gpu.write(0, pattern(2, 0, 12288))
    gpu.do(copy(at("vram", 0), virtual(V), 12288))
    got = gpu.read(3 * MIB, 4096) + bytes(gpu.ram.view[:4096]) + gpu.read(MIB, 4096)
    assert got == pattern(2, 0, 12288)


def test_every_command_of_one_batch(gpu: Gpu) -> None:
    gpu.map(V, 1 * MIB, MIB)
    gpu.write(0, bytes(range(64)))
    rows = {"source_pitch": 16, "target_pitch": 4096, "rows": 4}
    gpu.do(
        fill(virtual(V), 0x0102030405060708, 20),
        {**copy(at("vram", 0), virtual(V + 64), 8), "op": "copy_2d", **rows},
        signal(virtual(V + 128), 40),
        {"op": "atomic_add", "target": virtual(V + 128), "value": 2, "size_bytes": 8},
        {"op": "wait", "source": virtual(V + 128), "value": 42},
        {"op": "nop", "fence": at("vram", 2 * MIB, value=77)},
        {"op": "invalidate", "target": virtual(V)},
        {"op": "invalidate"},
        {"op": "interrupt"},
        by="interrupt",
    )
    assert gpu.read(MIB, 20).hex() == "0807060504030201" * 2 + "08070605"
    for row in range(4):
        assert gpu.read(MIB + 64 + row * 4096, 8) == bytes(range(row * 16, row * 16 + 8))
    assert gpu.read(MIB + 128, 8) == (42).to_bytes(8, "little")
    assert gpu.read(2 * MIB, 8) == (77).to_bytes(8, "little")
    assert gpu.model.witness.count(Event.INVALIDATION) == 2


def test_batches_are_under_way_together_and_waited_for_in_any_order(gpu: Gpu) -> None:
    held = gpu.run({"op": "wait", "source": at("vram", 0), "value": 5}, wait=False)["batch"]
    after = gpu.run(signal(at("vram", 64), 9), wait=False)["batch"]
    late = gpu.on("gpu.wait", batch=after, timeout_s=0.01)
    assert (late["completed"], late["ended"]) == (False, False)
    assert late["status"] == {"cause": "no answer in time"}
    gpu.write(0, (5).to_bytes(8, "little"))
    assert gpu.on("gpu.wait", batch=after)["completed"]
    assert gpu.on("gpu.wait", batch=held)["completed"]
    with pytest.raises(ParameterError, match="batch"):
        gpu.on("gpu.wait", batch=held)


def test_a_full_ring_says_so_and_a_batch_that_never_fits_too(gpu: Gpu) -> None:
    gpu.run({"op": "wait", "source": at("vram", 0), "value": 1}, wait=False)
    gpu.run(*[{"op": "nop"}] * 500, wait=False)
    with pytest.raises(OSError, match="room for"):
        gpu.run(*[{"op": "nop"}] * 20, wait=False)
    with pytest.raises(ParameterError, match="at most 510"):
        gpu.run(*[{"op": "nop"}] * 511)
    gpu.write(0, (1).to_bytes(8, "little"))
    gpu.do(*[{"op": "nop"}] * 300)


def test_a_copy_never_overwrites_what_waits_in_the_ring(gpu: Gpu) -> None:
    held = gpu.run({"op": "wait", "source": at("vram", 0), "value": 1}, wait=False)["batch"]
    last = gpu.run(*[{"op": "nop"}] * 507, signal(at("vram", 8), 1), wait=False)["batch"]
    with pytest.raises(OSError, match="room for 0"):
        gpu.on("engine.copy", source_iova=RAM, target_iova=RAM + 64, size_bytes=8)
    gpu.write(0, (1).to_bytes(8, "little"))
    assert gpu.on("gpu.wait", batch=held)["completed"]
    assert gpu.on("gpu.wait", batch=last)["completed"]
    assert gpu.read(8, 1) == b"\1"
    copy = {"source_iova": RAM, "target_iova": RAM + 64, "size_bytes": 8}
    assert gpu.on("engine.copy", **copy)["completed"]


def test_copies_by_iova_and_batches_use_one_ring(gpu: Gpu) -> None:
    for number in range(300):
        gpu.do({"op": "nop"})
        answer = gpu.on("engine.copy", source_iova=RAM, target_iova=RAM + 64, size_bytes=8)
        assert answer["completed"], number


def test_a_command_that_fails_ends_all_batches_and_the_gpu_is_usable_again(gpu: Gpu) -> None:
    gpu.map(V, 4096, MIB)
    first = gpu.run(copy(at("system", 0x9000_0000), virtual(V), 8), wait=False)["batch"]
    second = gpu.run({"op": "nop"}, wait=False)["batch"]
    answer = gpu.on("gpu.wait", batch=first)
    assert (answer["completed"], answer["ended"]) == (False, True)
    assert answer["status"] == {"cause": "refused", "address": 0x9000_0000}
    assert gpu.on("gpu.wait", batch=second)["status"] == {"cause": "reset"}
    gpu.do(fill(virtual(V), 1))  # the page tables are still there


def test_commands_that_keep_going_are_counted(gpu: Gpu) -> None:
    bad = copy(at("system", 0x9000_0000), at("vram", 0), 8, keep_going=True)
    answer = gpu.run(bad, bad, signal(at("vram", 64), 3))
    assert (answer["completed"], answer["failed"]) == (True, 2)
    assert gpu.read(64, 1) == b"\3"


# --- what page tables promise


def test_what_is_mapped_is_not_mapped_twice(gpu: Gpu) -> None:
    gpu.map(V, 8192, 0)
    with pytest.raises(FileExistsError, match="0x700000001000"):
        gpu.map(V + 4096, 4096, MIB)
    with pytest.raises(FileExistsError):
        gpu.map(V, HUGE, 0, page_bytes=HUGE)
    gpu.map(V + HUGE, HUGE, 0, page_bytes=HUGE)
    with pytest.raises(FileExistsError):
        gpu.map(V + HUGE, 4096, 0)
    with pytest.raises(ParameterError, match="large page"):
        gpu.on("gpu.unmap", virtual=V + HUGE, size_bytes=4096)
    assert gpu.on("gpu.unmap", virtual=V, size_bytes=4 * HUGE)["unmapped_bytes"] == HUGE + 8192


def test_mapping_and_unmapping_for_ever_takes_no_more_tables(gpu: Gpu) -> None:
    """2 MiB are 511 tables: without reuse they would be gone after 170 rounds."""
    for number in range(600):
        where = (number << 39) % (1 << 47)
        gpu.map(where, 8192, 0)
        assert gpu.on("gpu.unmap", virtual=where, size_bytes=8192)["unmapped_bytes"] == 8192
        if number % 100 == 0:
            gpu.on("gpu.invalidate")
    with pytest.raises(OSError, match="no room for page tables"):
        gpu.on("gpu.map", pages=[page_at(number << 39) for number in range(256)])


def test_an_old_translation_is_used_until_it_is_invalidated(gpu: Gpu) -> None:
    gpu.map(V, 4096, MIB)
    gpu.do(fill(virtual(V), 1))
    gpu.map(V, 4096, 2 * MIB, replace=True)
    gpu.do(fill(virtual(V), 2))
    assert (gpu.read(MIB, 1), gpu.read(2 * MIB, 1)) == (b"\2", b"\0")
    gpu.on("gpu.invalidate", virtual=V)
    gpu.do(fill(virtual(V), 3))
    assert (gpu.read(MIB, 1), gpu.read(2 * MIB, 1)) == (b"\2", b"\3")


@pytest.mark.parametrize("everything", [False, True])
def test_a_command_can_invalidate_one_page_or_all(gpu: Gpu, everything: bool) -> None:
    for page in (V, V + 4096):
        gpu.map(page, 4096, MIB)
        gpu.do(fill(virtual(page), 1))
        gpu.map(page, 4096, 2 * MIB, replace=True)
    command: dict[str, Any] = {"op": "invalidate"}
    if not everything:
        command["target"] = virtual(V)
    gpu.do(command, fill(virtual(V), 2), fill(virtual(V + 4096), 3))
    assert gpu.read(2 * MIB, 1) == (b"\3" if everything else b"\2")
    assert gpu.read(MIB, 1) == (b"\1" if everything else b"\3")


# --- page faults


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_fault_is_read_mapped_and_replayed(gpu: Gpu, by: str) -> None:
    batch = gpu.run(fill(virtual(V + 0x18), 7), wait=False, by=by)["batch"]
    found = gpu.on("gpu.faults", timeout_s=5.0, by=by)
    assert (found["lost"], found["waiting"]) == (0, True)
    (fault,) = found["faults"]
    assert fault.pop("time_ns") > 0
    assert fault == {"address": V + 0x18, "command": 0, "write": True, "cause": "not_valid"}
    late = gpu.on("gpu.wait", batch=batch, timeout_s=0.01, by=by)
    assert not late["ended"]
    pages = [{"virtual": V, "size_bytes": 4096, "backing": at("vram", MIB)}]
    gpu.on("gpu.resolve", pages=pages)
    assert gpu.on("gpu.wait", batch=batch, by=by)["completed"]
    assert gpu.read(MIB + 0x18, 1) == b"\7"
    assert gpu.on("gpu.faults")["faults"] == []


def test_a_write_to_a_page_that_is_not_writable(gpu: Gpu) -> None:
    gpu.map(V, 4096, MIB, writable=False)
    batch = gpu.run(fill(virtual(V), 7), wait=False)["batch"]
    (fault,) = gpu.on("gpu.faults", timeout_s=5.0)["faults"]
    assert fault["cause"] == "not_writable"
    gpu.on("gpu.resolve", cancel=True)
    status = gpu.on("gpu.wait", batch=batch)["status"]
    assert status == {"cause": "page_fault", "address": V}
    assert gpu.read(MIB, 1) == b"\0"


def test_a_revoked_page_faults(gpu: Gpu) -> None:
    gpu.map(V, 4096, MIB)
    gpu.do(fill(virtual(V), 1))
    gpu.on("gpu.unmap", virtual=V, size_bytes=4096)
    gpu.on("gpu.invalidate", virtual=V)
    batch = gpu.run(fill(virtual(V), 2), wait=False)["batch"]
    assert len(gpu.on("gpu.faults", timeout_s=5.0)["faults"]) == 1
    gpu.on("gpu.resolve", cancel=True)
    assert gpu.on("gpu.wait", batch=batch)["status"]["cause"] == "page_fault"
    assert gpu.read(MIB, 1) == b"\1"


def test_without_replay_a_fault_fails_the_command(gpu: Gpu) -> None:
    gpu = Gpu(replayable=False)
    answer = gpu.run(fill(virtual(V), 7))
    assert answer["status"] == {"cause": "page_fault", "address": V}
    gpu.close()


def test_many_faults_go_around_the_fault_buffer(gpu: Gpu) -> None:
    for number in range(300):
        place = V + number * 4096
        batch = gpu.run(fill(virtual(place), number), wait=False)["batch"]
        (fault,) = gpu.on("gpu.faults", timeout_s=5.0)["faults"]
        assert fault["address"] == place
        pages = [{"virtual": place, "size_bytes": 4096, "backing": at("vram", MIB)}]
        gpu.on("gpu.resolve", pages=pages)
        assert gpu.on("gpu.wait", batch=batch)["completed"]


@pytest.mark.parametrize("by", ["poll", "interrupt"])
@pytest.mark.parametrize("page", [4096, HUGE])
@pytest.mark.parametrize("access", ["read", "write"])
def test_first_touches(gpu: Gpu, by: str, page: int, access: str) -> None:
    backing = at("vram", 2 * MIB)
    answer = gpu.on(
        "gpu.fault_latency", count=150, backing=backing, backing_bytes=4 * MIB,
        page_bytes=page, access=access, by=by, virtual=V,
    )  # fmt: skip
    for name in ("seen_ns", "serviced_ns", "done_ns"):
        assert len(answer[name]) == 150
        assert min(answer[name]) > 0
    assert gpu.model.witness.count(Event.PAGE_FAULT) == 150
    assert gpu.model.witness.count(Event.REPLAY) == 150
    touched = int.from_bytes(gpu.read(2 * MIB, 8), "little")
    assert (touched != 0) == (access == "write")
    # Everything is gone again: the next access faults.
    gpu.run(fill(virtual(V), 7), wait=False)
    assert len(gpu.on("gpu.faults", timeout_s=5.0)["faults"]) == 1


def test_interrupts_go_on_after_a_reset(gpu: Gpu) -> None:
    gpu.do({"op": "nop"}, by="interrupt")
    gpu.on("gpu.reset")
    before = gpu.model.witness.count(Event.INTERRUPT)
    gpu.run(fill(virtual(V), 7), wait=False)
    assert len(gpu.on("gpu.faults", timeout_s=5.0, by="interrupt")["faults"]) == 1
    assert gpu.model.witness.count(Event.INTERRUPT) > before


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_pages_come_when_they_are_touched(gpu: Gpu, by: str) -> None:
    gpu.write(0, pattern(3, 0, 5 * 4096))
    batch = gpu.run(copy(at("vram", 0), virtual(V + 100), 4 * 4096), wait=False, by=by)["batch"]
    windows = [
        {"virtual": V, "size_bytes": 2 * 4096, "backing": at("vram", MIB)},
        {"virtual": V + 2 * 4096, "size_bytes": MIB, "backing": at("system", RAM)},
    ]
    answer = gpu.on("gpu.serve", batch=batch, pages=windows, by=by)
    assert (answer["completed"], answer["served"], answer["cancelled"]) == (True, 5, 0)
    got = gpu.read(MIB + 100, 2 * 4096 - 100) + bytes(gpu.ram.view[: 2 * 4096 + 100])
    assert got == pattern(3, 0, 4 * 4096)
    assert gpu.on("gpu.unmap", virtual=V, size_bytes=HUGE)["unmapped_bytes"] == 5 * 4096


@pytest.mark.parametrize(("size", "writable"), [(4096, True), (MIB, False)])
def test_what_no_window_has_is_cancelled(gpu: Gpu, size: int, writable: bool) -> None:
    batch = gpu.run(fill(virtual(V), 1, 8192), wait=False)["batch"]
    window = {
        "virtual": V, "size_bytes": size, "backing": at("vram", MIB), "writable": writable,
    }  # fmt: skip
    answer = gpu.on("gpu.serve", batch=batch, pages=[window])
    assert (answer["completed"], answer["cancelled"]) == (False, 1)
    assert answer["status"] == {"cause": "page_fault", "address": V + 4096 * writable}


def test_touching_what_cannot_be_reached_is_an_error_and_leaves_nothing(gpu: Gpu) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="refused"):
            gpu.on(
                "gpu.fault_latency",
                count=2,
                backing=at("system", 0x9000_0000),
                backing_bytes=4096,
                virtual=V,
            )
    gpu.map(V, 8192, 0)
    with pytest.raises(FileExistsError):
        gpu.on("gpu.fault_latency", count=2, backing=at("vram", 0), backing_bytes=4096, virtual=V)


@pytest.mark.parametrize(
    ("method", "params", "named"),
    [
        ("gpu.submit", {"commands": [{}]}, r"commands\[0\].op: None is none of nop, copy"),
        ("gpu.submit", {"commands": [{"op": "nop", "size": 1}]}, r"commands\[0\].size: unknown"),
        ("gpu.submit", {"commands": [{"op": "signal", "value": 1}]}, "target: missing"),
        ("gpu.submit", {"commands": "nop"}, "commands: expected a list of objects"),
        ("gpu.submit", {"commands": [signal(at("moon", 0), 1)]}, "space: 'moon' is none of vram"),
        ("gpu.submit", {"commands": [signal(at("link", 0), 1)]}, "link: needed with"),
        ("gpu.submit", {"commands": [signal(at("vram", 0, link=1), 1)]}, "link: needed with"),
        ("gpu.submit", {"commands": [signal(at("link", 0, link=16), 1)]}, "more than 4 bits"),
        ("gpu.submit", {"commands": [signal(at("vram", 1 << 64), 1)]}, "more than 64 bits"),
        ("gpu.submit", {"commands": [], "by": "magic"}, "by: 'magic' is neither"),
        ("gpu.submit", {"commands": [], "timeout_s": 1e6}, "timeout_s: at most"),
        ("gpu.map", {"pages": [{"virtual": 0}]}, r"pages\[0\].size_bytes: missing"),
        (
            "gpu.map",
            {"pages": [{"virtual": 0, "size_bytes": 4096, "backing": virtual(0)}]},
            "not itself virtual",
        ),
        ("gpu.unmap", {"virtual": 1, "size_bytes": 4096}, "not whole pages"),
        ("gpu.unmap", {"virtual": 1 << 48, "size_bytes": 4096}, "beyond 48 bits"),
        ("gpu.unmap", {"virtual": 0, "size_bytes": 4096, "space": 3}, "space: there is no 3"),
        ("gpu.link_enable", {"link": 0, "on": True}, "has 0, counted from 0"),
        ("gpu.link_wait", {"link": 0, "state": "left"}, "state: 'left' is neither"),
        ("gpu.drop_space", {"space": 0}, "0 is the GPU's own"),
        (
            "gpu.fault_latency",
            {"count": 0, "backing": at("vram", 0), "backing_bytes": 4096},
            "count: 1 to",
        ),
        (
            "gpu.fault_latency",
            {"count": 1, "backing": at("vram", 0), "backing_bytes": 5000},
            "backing_bytes: 5000",
        ),
    ],
)
def test_a_wrong_parameter_is_named(
    gpu: Gpu, method: str, params: dict[str, Any], named: str
) -> None:
    with pytest.raises(ParameterError, match=named):
        gpu.on(method, **params)


def test_only_a_model_engine_becomes_a_gpu_and_once(gpu: Gpu) -> None:
    video = {"bar": VRAM, "index": 2, "offset": 0, "size_bytes": VIDEO_BYTES}
    with pytest.raises(ParameterError, match="no engine of kind 'model'"):
        gpu.on("gpu.open", video=video)


def test_a_lost_device_is_named(gpu: Gpu) -> None:
    gpu.function.registers.gone = True
    for by in ("poll", "interrupt"):
        with pytest.raises(OSError, match="the device is lost"):
            gpu.run(signal(at("vram", 0), 6), by=by)
