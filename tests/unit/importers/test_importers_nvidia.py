# SPDX-License-Identifier: Apache-2.0
"""The matrix of nvidia-smi topo -m."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from testbed.topology.importers.convert import Options
from testbed.topology.importers.fold import Choice
from testbed.topology.importers.machine import Kind
from tests.unit.importers.shapes import imported, refusal, shape_of

TEXT = (Path(__file__).parents[2] / "data" / "import" / "nvlinks.topo-m.txt").read_text()


def test_devices_that_share_a_switch_stand_behind_one() -> None:
    result = imported("nvidia", TEXT)
    single = ("switch", "", ("gpu",))
    assert shape_of(result.topology, acs=False) == (
        ("root_port", "", ("switch", "", ("gpu",), ("gpu",), ("nic",))),
        ("root_port", "", ("switch", "", single, single, ("switch", "", ("nic",)))),
        ("root_port", "", ("nic",)),
    )
    assert result.origins["gpu3"] == "GPU3"
    assert "# NIC1 mlx5_1" in result.text


def test_nvlinks_become_links() -> None:
    links = imported("nvidia", TEXT).topology.links
    assert {link.between for link in links} == {
        (f"host0/gpu{a}", f"host0/gpu{b}") for a, b in itertools.combinations(range(4), 2)
    }
    assert {link.width for link in links} == {12}


def test_a_link_to_what_is_said_to_be_no_gpu_is_folded() -> None:
    result = imported("nvidia", TEXT, Options(Choice(kinds={"GPU3": Kind.NIC})))
    assert len(result.topology.links) == 3
    assert len(result.origins) == 7


def test_one_gpu_alone() -> None:
    text = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-7\t\tN/A\n"
    assert shape_of(imported("nvidia", text).topology, acs=False) == (("root_port", "", ("gpu",)),)


def test_powershell_writes_utf_16() -> None:
    assert len(imported("nvidia", TEXT.encode("utf-16")).origins) == 7


def test_pairs_that_contradict_the_others_are_named() -> None:
    text = """\
     GPU0 GPU1 NIC0
GPU0  X   SYS  PIX
GPU1 SYS   X   PIX
NIC0 PIX  PIX   X
"""
    result = imported("nvidia", text)
    assert any("GPU0 and GPU1" in note for note in result.notes.changed)
    assert shape_of(result.topology, acs=False)[0][2][0] == "switch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a-file.txt:1:1: no line names the matrix's columns"),
        ("GPU0 GPU0\n", "a-file.txt:1:6: 'GPU0' cannot name a column here"),
        ("GPU0 GPU1\nGPU0 X NV4\n", "a-file.txt:3:1: the matrix ends without a row for GPU1"),
        ("GPU0 GPU1\nGPU0 X\n", "a-file.txt:2:6: the row of GPU0 ends before its column GPU1"),
        ("GPU0 GPU1\nGPU0 X OK\n", "a-file.txt:2:8: 'OK' for GPU0 and GPU1; expected PIX"),
        ("GPU0 GPU1\nGPU0 PIX PIX\n", "a-file.txt:2:6: 'PIX' for GPU0 and GPU0; expected X"),
        ("GPU0 GPU1\nGPU0 X NV99\n", "a-file.txt:2:8: NV99 is no number of links"),
        ("GPU0\nGPU0 X\nGPU0 X\n", "a-file.txt:3:1: a second row for GPU0"),
        (
            "GPU0 GPU1\nGPU0 X SYS\nGPU1 PIX X\n",
            "a-file.txt:2:8: GPU0 to GPU1 is SYS, and GPU1 to GPU0 is PIX",
        ),
        (
            "GPU0 " + " ".join(f"N{n}" for n in range(300)),
            "a-file.txt:1:1171: more than 256 columns",
        ),
    ],
)
def test_what_is_wrong_and_where(text: str, message: str) -> None:
    assert refusal("nvidia", text).startswith(message)
