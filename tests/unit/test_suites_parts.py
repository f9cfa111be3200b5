# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the suites: which devices are paired, where things are mapped, what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.errors import TestbedError
from testbed.instruments import cases
from testbed.instruments.faults import parse_trace
from testbed.instruments.groups import judge_groups
from testbed.instruments.mapper import Chunk, Mapper, Mapping
from testbed.instruments.memory import Memory
from testbed.instruments.mutations import DESCRIPTIONS, Mutation
from testbed.instruments.reasons import FIRST_STAGE, LEGACY, VIRTIO, reasons_of, why_not_shown
from testbed.results.evidence import Access, FaultSeen, Witness
from testbed.topology import load
from testbed.topology.machine import Iommu
from testbed.topology.model import Topology
from testbed.topology.placement import place

GIB = 1 << 30
ROOT = Path(__file__).parents[2]


def shipped(name: str, **settings: str) -> Topology:
    return load.load(ROOT / "topologies" / f"{name}.yaml", settings)


class TestPairs:
    @pytest.mark.parametrize(
        ("topology", "settings", "expected"),
        [
            (
                "quad-gpu",
                {},
                [("gpu0-gpu1", "switch sw0"), ("nic0-gpu0", "root complex")],
            ),
            ("quad-gpu", {"engine": "edu"}, [("gpu0-gpu1", "switch sw0")]),
            ("quad-gpu", {"gpus": "1"}, [("nic0-gpu0", "root complex")]),
            ("two-root-ports", {}, [("gpu0-gpu1", "root complex")]),
        ],
    )
    def test_one_for_each_kind_of_path(
        self, topology: str, settings: dict[str, str], expected: list[tuple[str, str]]
    ) -> None:
        found = cases.pairs(place(shipped(topology, **settings)))
        assert [(str(pair), pair.path) for pair in found] == expected

    def test_a_big_rack_does_not_get_all_of_them(self) -> None:
        found = cases.pairs(place(shipped("dgx-8gpu")))
        kinds = [pair.path.split()[0] for pair in found]
        assert kinds[:2] == ["switch", "root"]
        assert len(found) <= 3

    def test_a_gpu_uses_its_own_memory_and_a_nic_has_none(self) -> None:
        (gpu, _) = cases.pairs(place(shipped("quad-gpu")))
        (nic,) = cases.pairs(place(shipped("quad-gpu", gpus="1")))
        assert gpu.local is not None
        assert gpu.local.name == "gpu0.vram"
        assert gpu.peer.name == "gpu1.vram"
        assert nic.local is None

    def test_a_doorbell_is_rung_from_other_slots(self) -> None:
        topology = shipped("quad-gpu")
        found = cases.doorbells(place(topology), topology)
        assert [str(doorbell) for doorbell in found] == ["gpu0-gpu1", "nic0-gpu1"]
        alone = shipped("quad-gpu", gpus="1")
        assert [str(d) for d in cases.doorbells(place(alone), alone)] == ["nic0-gpu0"]


class RecordingAgent:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, timeout_s: float = 30.0, /, **params: Any) -> Any:
        self.calls.append((method, params))


def bar(size_bytes: int = 1 << 20) -> Memory:
    target = {"bar": "0000:05:00.0", "index": 2}
    return Memory(None, "gpu1.vram", size_bytes, target, bus_address=0xE000_0000)  # type: ignore[arg-type]


class TestMapper:
    def map(self, mutation: Mutation, **options: Any) -> tuple[Mapping, dict[str, Any] | None]:
        agent = RecordingAgent()
        mapping = Mapper(agent, 1, [], mutation).map(bar(), 0x4000, 0x2000, **options)
        return mapping, agent.calls[0][1] if agent.calls else None

    def test_an_honest_mapping_is_what_was_asked_for(self) -> None:
        mapping, call = self.map(Mutation.NONE, write=False)
        assert call == {
            "container": 1,
            "iova": mapping.iova,
            "size_bytes": 0x2000,
            "source": {"bar": "0000:05:00.0", "index": 2, "offset": 0x4000},
            "read": True,
            "write": False,
            "page_bytes": 0,
        }

    def test_mutations_break_just_their_part(self) -> None:
        _, call = self.map(Mutation.WRONG_PAGE)
        assert call is not None
        assert call["source"]["offset"] == 0x5000
        _, call = self.map(Mutation.SHORT_MAP)
        assert call is not None
        assert call["size_bytes"] == 0x1000
        _, call = self.map(Mutation.READ_WRITE, write=False)
        assert call is not None
        assert call["write"] is True
        mapping, call = self.map(Mutation.BAR_ADDRESS)
        assert call is None
        assert mapping.iova == 0xE000_4000

    @pytest.mark.parametrize("mutation", DESCRIPTIONS, ids=str)
    def test_the_requesters_own_memory_is_left_alone(self, mutation: Mutation) -> None:
        _, honest = self.map(Mutation.NONE, own=True)
        _, call = self.map(mutation, own=True)
        assert call == honest

    def test_no_address_is_handed_out_twice_and_none_touch(self) -> None:
        mapper = Mapper(RecordingAgent(), 1, [])
        starts = [mapper.reserve(size) for size in (4096, 2 << 20, (2 << 20) + 1, 64)]
        for start, size, following in zip(
            starts, (4096, 2 << 20, (2 << 20) + 1), starts[1:], strict=False
        ):
            assert start % (2 << 20) == 0
            assert following >= start + size + 4096

    @pytest.mark.parametrize(
        ("bars", "base_gib"),
        [([], 64), ([(64 * GIB, GIB)], 128), ([(70 * GIB, 64 * GIB)], 192)],
    )
    def test_addresses_keep_clear_of_bars(self, bars: list[tuple[int, int]], base_gib: int) -> None:
        assert Mapper(RecordingAgent(), 1, bars).reserve(4096) == base_gib * GIB

    def test_bars_everywhere_leave_no_place(self) -> None:
        with pytest.raises(TestbedError, match="no free I/O address space"):
            Mapper(RecordingAgent(), 1, [(0, 512 * GIB)])

    def test_scattered_pieces_are_contiguous_for_the_device(self) -> None:
        agent = RecordingAgent()
        chunks = [Chunk(0x8000, 0x2000), Chunk(0x1000, 0x1000), Chunk(0x3000, 0x1000)]
        mappings = Mapper(agent, 1, []).map_scattered(bar(), chunks)
        base = mappings[0].iova
        assert [m.iova - base for m in mappings] == [0, 0x2000, 0x3000]
        assert [m.offset for m in mappings] == [0x8000, 0x1000, 0x3000]
        swapped = Mapper(agent, 1, [], Mutation.SWAP_CHUNKS).map_scattered(bar(), chunks)
        assert [m.offset for m in swapped] == [0x8000, 0x3000, 0x1000]

    def test_release_unmaps_all_but_what_is_kept_whatever_the_mutation(self) -> None:
        agent = RecordingAgent()
        mapper = Mapper(agent, 1, [], Mutation.SKIP_UNMAP)
        kept, gone = mapper.map(bar(), 0, 4096), mapper.map(bar(), 4096, 4096)
        mapper.keep(kept)
        mapper.unmap(gone)
        assert not [c for c in agent.calls if c[0].startswith("vfio.unmap")]
        mapper.release()
        mapper.release()
        (unmap,) = [c[1] for c in agent.calls if c[0].startswith("vfio.unmap")]
        assert unmap["ranges"] == [{"iova": gone.iova, "size_bytes": 4096}]


class TestTrace:
    LINE = "vtd_dmar_fault sid 0x{:x} fault {} addr 0x{:x} write {}\n"

    def test_source_reason_address_and_direction(self) -> None:
        text = "noise\n12@3.4:" + self.LINE.format(0x0501, 6, 0xF4000010, 0)
        assert parse_trace(text) == (
            FaultSeen("0000:05:00.1", 0xF4000010, Access.READ, 6, Witness.MACHINE),
        )
        (fault,) = parse_trace(self.LINE.format(0xFFFF, 0x71, 1 << 48, 1))
        assert (fault.requester, fault.access) == ("0000:ff:1f.7", Access.WRITE)

    def test_the_pieces_of_an_access_are_one_fault(self) -> None:
        pieces = "".join(self.LINE.format(0x501, 5, 0x1000 + 4 * n, 1) for n in range(16))
        other = self.LINE.format(0x501, 5, 0x2000, 1)
        assert [f.address for f in parse_trace(pieces + other + pieces)] == [0x1000, 0x2000, 0x1000]
        assert len(parse_trace(pieces + self.LINE.format(0x501, 6, 0x1000, 0))) == 2

    def test_other_iommus_tell_less(self) -> None:
        virtio = (
            "1@2:virtio_iommu_report_fault FAULT reason=2 flags={} endpoint=1280 address =0x{:x}\n"
        )
        text = virtio.format(256, 0x1000) + virtio.format(256, 0x1004) + virtio.format(258, 0x1008)
        amd = "amdvi_page_fault error: page fault accessing guest physical address 0x2000\n"
        assert parse_trace(text + amd) == (
            FaultSeen("0000:05:00.0", 0x1000, Access.UNKNOWN, 2, Witness.MACHINE),
            FaultSeen("0000:05:00.0", 0x1008, Access.WRITE, 2, Witness.MACHINE),
            FaultSeen("", 0x2000, Access.UNKNOWN, 0, Witness.MACHINE),
        )

    def test_half_a_line_is_no_fault(self) -> None:
        assert parse_trace("vtd_dmar_fault sid 0x501 fault 5 ad") == ()


class TestGroups:
    PREDICTED = (frozenset({"a", "b"}), frozenset({"c"}))

    def test_equal_but_for_what_was_not_predicted(self) -> None:
        assert judge_groups(self.PREDICTED, [*self.PREDICTED, frozenset({"chipset"})]).holds

    @pytest.mark.parametrize(
        ("observed", "reason"),
        [
            ([{"a"}, {"b"}, {"c"}], "IOMMU group {a, b} was predicted and is not there"),
            ([{"a", "b", "c"}], "IOMMU group {a, b} was predicted"),
            ([{"a", "b"}], "IOMMU group {c} was predicted"),
            ([{"a", "b"}, {"c", "chipset"}], "IOMMU group {c} was predicted"),
            ([{"a", "b"}, {"c"}, {"a", "x"}], "IOMMU group {a, x} is there and was not predicted"),
        ],
    )
    def test_any_difference_is_named(self, observed: list[set[str]], reason: str) -> None:
        judgement = judge_groups(self.PREDICTED, [frozenset(group) for group in observed])
        assert not judgement.holds
        assert reason in judgement.reason


def test_what_an_iommu_promises() -> None:
    assert reasons_of(Iommu()) is LEGACY
    assert reasons_of(Iommu(scalable=True)) is FIRST_STAGE
    assert why_not_shown(Iommu()) == ""
    assert why_not_shown(Iommu(mode="lazy")) == ""
    assert "IOMMU off" in why_not_shown(Iommu(mode="off"))
    assert "IOMMU off" in why_not_shown(Iommu(kind="none"))
    assert "passthrough" in why_not_shown(Iommu(mode="passthrough"))
    assert why_not_shown(Iommu(kind="virtio")) == ""
    assert "AMD" in why_not_shown(Iommu(kind="amd"))
    assert reasons_of(Iommu(kind="virtio")) is VIRTIO
