# SPDX-License-Identifier: Apache-2.0
"""The agent's NIC methods against the NIC model: regions, page faults, requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError
from testbed.models.nic import NicModel
from testbed.models.witness import Event
from testbed.models.witness import Path as Way
from tests.unit.models.agent_rig import MIB, RAM, Rig

BASE = 0x10_0000_0000
TABLE = 4 * MIB  # in the machine's memory
ALL = ["local_write", "remote_read", "remote_write"]


class Nic(Rig):
    """A NIC opened with ``nic.open``, with region 1 pinned to the first MiB of memory."""

    def __init__(self) -> None:
        self.model = NicModel("nic0", address=4)
        super().__init__(self.model, "model-nic")
        assert self.on("nic.open") == {"address": 4, "regions": 64}
        self.local = self.region(1, RAM)

    def region(self, index: int, iova: int, **more: Any) -> int:
        params = {"base": BASE * index, "size_bytes": MIB, "rights": ALL, **more}
        key: int = self.on("nic.region", index=index, iova=iova, **params)["key"]
        return key

    def on_demand(self, index: int) -> int:
        table = {"ram": "ram", "offset": TABLE}
        return self.region(index, RAM + TABLE, table=table)

    def write(self, key: int, index: int, offset: int, size: int, **more: Any) -> dict[str, Any]:
        """A request in loopback, from the start of region 1."""
        request = {
            "op": "write", "peer": 4, "local_key": self.on("nic.keys")["1"], "local_address": BASE,
            "remote_key": key, "remote_address": BASE * index + offset, "size_bytes": size,
        }  # fmt: skip
        answer: dict[str, Any] = self.on("nic.submit", requests=[request], **more)
        return answer

    def bytes_at(self, offset: int, size: int) -> bytes:
        return bytes(self.ram.view[offset : offset + size])


@pytest.fixture
def nic() -> Iterator[Nic]:
    nic = Nic()
    nic.ram.view[:MIB] = pattern(1, 0, MIB)
    yield nic
    nic.close()


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_from_region_to_region(nic: Nic, by: str) -> None:
    key = nic.region(2, RAM + MIB)
    answer = nic.write(key, 2, 5, 9000, by=by)
    assert answer["completed"]
    assert nic.bytes_at(MIB, 9010) == bytes(5) + pattern(1, 0, 9000) + bytes(5)
    assert nic.model.witness.bytes_by(Way.IOMMU, write=True) >= 9000


def test_a_right_that_is_missing_refuses_and_regions_get_new_keys(nic: Nic) -> None:
    key = nic.region(2, RAM + MIB, rights=["remote_read"])
    answer = nic.write(key, 2, 0, 8)
    assert answer["status"] == {"cause": "link_refused", "address": 2 * BASE}
    assert nic.bytes_at(MIB, 8) == bytes(8)
    keys = nic.on("nic.keys")
    assert keys["1"] != nic.local
    assert keys["2"] not in (0, key)
    third = nic.region(3, RAM + 2 * MIB)
    assert nic.write(third, 3, 0, 8)["completed"]
    assert nic.write(nic.local, 3, 0, 8)["status"]["cause"] == "link_refused"  # an old key


def test_a_removed_region_is_out_of_reach(nic: Nic) -> None:
    key = nic.region(2, RAM + MIB)
    nic.on("nic.remove", index=2)
    assert nic.write(key, 2, 0, 8)["status"]["cause"] == "link_refused"
    with pytest.raises(ParameterError, match="no region 2"):
        nic.on("nic.remove", index=2)


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_page_on_demand_faults_is_set_and_replayed(nic: Nic, by: str) -> None:
    nic.ram.view[TABLE : TABLE + 4096] = b"\xff" * 4096  # what was there before counts for nothing
    key = nic.on_demand(2)
    batch = nic.write(key, 2, 4096 + 16, 8, wait=False, by=by)["batch"]
    found = nic.on("nic.faults", timeout_s=5.0, by=by)
    (fault,) = found["faults"]
    assert found["waiting"]
    assert fault["address"] == 2 * BASE + 4096 + 16
    assert (fault["command"], fault["write"], fault["cause"]) == (key, True, "not_valid")
    pages = [{"index": 2, "page": 1, "iova": RAM + 2 * MIB}]
    nic.on("nic.resolve", pages=pages)
    assert nic.on("nic.wait", batch=batch, by=by)["completed"]
    assert nic.bytes_at(2 * MIB, 24) == bytes(16) + pattern(1, 0, 8)


def test_a_page_taken_away_is_used_until_it_is_invalidated(nic: Nic) -> None:
    key = nic.on_demand(2)
    nic.on("nic.pages", index=2, page=0, count=3, iova=RAM + MIB)
    assert nic.write(key, 2, 0, 8192)["completed"]
    nic.on("nic.pages", index=2, page=0)
    assert nic.write(key, 2, 0, 8)["completed"]
    nic.on("nic.invalidate", index=2)
    batch = nic.write(key, 2, 0, 8, wait=False)["batch"]
    assert len(nic.on("nic.faults", timeout_s=5.0)["faults"]) == 1
    nic.on("nic.resolve", cancel=True)
    status = nic.on("nic.wait", batch=batch)["status"]
    assert status == {"cause": "page_fault", "address": 2 * BASE}


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_first_touches(nic: Nic, by: str) -> None:
    nic.on_demand(2)
    answer = nic.on(
        "nic.fault_latency", index=2, count=150, iova=RAM + 2 * MIB, backing_bytes=MIB, by=by
    )
    assert [len(answer[name]) for name in ("seen_ns", "serviced_ns", "done_ns")] == [150] * 3
    assert nic.model.witness.count(Event.PAGE_FAULT) == 150
    assert nic.bytes_at(TABLE, 8 * 256) == bytes(8 * 256)  # nothing is left


def test_the_old_way_to_copy_still_works(nic: Nic) -> None:
    answer = nic.on("engine.copy", source_iova=RAM, target_iova=RAM + MIB, size_bytes=4096)
    assert answer["completed"]
    assert nic.bytes_at(MIB, 4096) == pattern(1, 0, 4096)
    assert nic.on("nic.reset") == {"1": nic.on("nic.keys")["1"]}


@pytest.mark.parametrize(
    ("method", "params", "named"),
    [
        ("nic.submit", {"requests": [{"op": "send"}]}, r"requests\[0\].op: 'send' is none of"),
        ("nic.submit", {"requests": [{"op": "read"}]}, r"requests\[0\].peer: missing"),
        (
            "nic.region",
            {"index": 2, "base": 0, "size_bytes": 1, "iova": 0, "rights": ["fly"]},
            "rights: 'fly' is none of local_write",
        ),
        (
            "nic.region",
            {"index": 64, "base": 0, "size_bytes": 1, "iova": 0, "rights": []},
            "index: 1 to 63",
        ),
        (
            "nic.region",
            {"index": 1, "base": 0, "size_bytes": 1, "iova": 0, "rights": []},
            "there is a region 1",
        ),
        (
            "nic.region",
            {"index": 2, "base": 0, "size_bytes": 0, "iova": 0, "rights": []},
            "the NIC refuses",
        ),
        ("nic.pages", {"index": 1, "page": 0, "iova": 0}, "this region is pinned"),
        ("nic.resolve", {"pages": [{"index": 1}]}, r"pages\[0\].page: missing"),
        ("gpu.links", {}, "no GPU opened by gpu.open"),
    ],
)
def test_a_wrong_parameter_is_named(
    nic: Nic, method: str, params: dict[str, Any], named: str
) -> None:
    with pytest.raises(ParameterError, match=named):
        nic.on(method, **params)
