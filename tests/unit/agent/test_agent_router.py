# SPDX-License-Identifier: Apache-2.0
"""Reading the router's report."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_agent.p2p import router

REPORT = """\
initiator 0000:03:00.0 translated=1
initiator 0000:00:1e.0 translated=0
window group=6 start=0xfa000000 size=0x1000000 error=0
window group=6 start=0xfe200000 size=0x1000 error=17
pair initiator=0000:03:00.0 peer=0000:05:00.0 bar=2 start=0xfa000000 size=0x1000000
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


def test_a_rescan_is_one_write(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    router.rescan(str(tmp_path / "report"))
    assert (tmp_path / "report").read_text() == "rescan"


def test_without_the_module_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        router.state(str(tmp_path / "report"))
