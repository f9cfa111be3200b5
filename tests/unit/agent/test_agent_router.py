# SPDX-License-Identifier: Apache-2.0
"""Reading the router's report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from guest_agent.p2p import router
from guest_agent.rpc import ParameterError

if TYPE_CHECKING:
    from guest_agent.hw.vfio import VfioContainer

REPORT = """\
initiator 0000:03:00.0 translated=1
initiator 0000:00:1e.0 translated=0
window group=6 start=0xfa000000 size=0x1000000 error=0
window group=6 start=0xfe200000 size=0x1000 error=17
pair initiator=0000:03:00.0 peer=0000:05:00.0 bar=2 start=0xfa000000 size=0x1000000
outside initiator=0000:06:00.0 peer=0000:05:00.0 bar=2 start=0xfa000000 size=0x1000000
outside initiator=0000:06:00.0 peer=0000:05:00.0 bar=0 start=0xfe200000 size=0x100
outside initiator=0000:06:00.0 peer=0000:05:00.0 bar=1 start=0xfe400000 size=0x1000
outside initiator=0000:06:00.0 peer=0000:07:00.0 bar=0 start=0xfe300000 size=0x1000
outside initiator=0000:08:00.0 peer=0000:05:00.0 bar=2 start=0xfa000000 size=0x1000000
"""


def test_the_report_as_values(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(REPORT)
    state = router.state(str(tmp_path / "report"))
    assert state["initiators"] == {"0000:03:00.0": True, "0000:00:1e.0": False}
    assert state["windows"] == [
        {"group": 6, "start": 0xFA000000, "size": 0x1000000, "error": 0},
        {"group": 6, "start": 0xFE200000, "size": 0x1000, "error": 17},
    ]
    pair = {"initiator": "0000:03:00.0", "peer": "0000:05:00.0", "bar": 2}
    assert state["pairs"] == [{**pair, "start": 0xFA000000, "size": 0x1000000}]


class Member:
    def region(self, index: int) -> str:
        if index != 2:
            raise ParameterError(f"index: region {index} cannot be mapped")
        return "region"


class Container:
    """A VFIO container that notes what is mapped; the third mapping is refused."""

    def __init__(self, *members: str) -> None:
        self.devices = {bdf: Member() for bdf in members}
        self.mapped: list[tuple[object, ...]] = []
        self.refuse = 99

    def map(self, region: str, offset: int, iova: int, size_bytes: int, **_: object) -> None:
        if len(self.mapped) == self.refuse:
            raise FileExistsError(17, "occupied")
        self.mapped.append((region, offset, iova, size_bytes))

    def unmap(self, iova: int, size_bytes: int) -> int:
        self.mapped.pop()
        return size_bytes


def routed(container: Container, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "report").write_text(REPORT)
    return router.route(cast("VfioContainer", container), str(tmp_path / "report"))


def test_vfio_functions_get_the_windows_that_can_be_mapped(tmp_path: Path) -> None:
    container = Container("0000:05:00.0", "0000:06:00.0")
    answer = routed(container, tmp_path)
    assert container.mapped == [("region", 0, 0xFA000000, 0x1000000)]
    assert [(each["peer"], each["bar"]) for each in answer["windows"]] == [("0000:05:00.0", 2)]
    assert [(each["peer"], each["why"]) for each in answer["left_out"]] == [
        ("0000:05:00.0", "not whole pages"),
        ("0000:05:00.0", "index: region 1 cannot be mapped"),
        ("0000:07:00.0", "VFIO does not own it"),
    ]
    assert answer["widened"] == []


def test_a_function_that_no_switch_routes_is_named(tmp_path: Path) -> None:
    container = Container("0000:05:00.0", "0000:06:00.0", "0000:09:00.0")
    assert routed(container, tmp_path)["widened"] == ["0000:09:00.0"]


def test_an_occupied_window_leaves_nothing_mapped(tmp_path: Path) -> None:
    container = Container("0000:05:00.0", "0000:06:00.0")
    container.refuse = 0
    with pytest.raises(FileExistsError):
        routed(container, tmp_path)
    assert container.mapped == []


def test_a_rescan_is_one_write(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    router.rescan(str(tmp_path / "report"))
    assert (tmp_path / "report").read_text() == "rescan"


def test_without_the_module_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        router.state(str(tmp_path / "report"))
