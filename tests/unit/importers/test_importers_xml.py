# SPDX-License-Identifier: Apache-2.0
"""NCCL's and hwloc's XML: what is read, what is said, and hostile documents."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from testbed.topology import load
from testbed.topology.importers import markup
from testbed.topology.importers.convert import Options
from testbed.topology.importers.fold import Choice
from testbed.topology.importers.machine import Kind
from tests.unit.importers.shapes import imported, refusal, shape_of, vrams

DATA = Path(__file__).parents[2] / "data" / "import"
NESTED = load.load(DATA / "nested-switches.yaml", {})
NVSWITCH = (DATA / "nvswitch.nccl.xml").read_text()
LSTOPO = (DATA / "nested-switches.lstopo.xml").read_text()


def _links(form: str, text: str) -> list[tuple[str, str, str, int]]:
    return [(w.kind, *w.between, w.width) for w in imported(form, text).topology.links]  # type: ignore[misc]


def test_nccl_switches_and_devices() -> None:
    result = imported("nccl", NVSWITCH)
    assert shape_of(result.topology, acs=False) == (
        ("root_port", "", ("switch", "", ("gpu",), ("nic",))),
        ("root_port", "", ("switch", "", ("switch", "", ("gpu",)), ("gpu",))),
        ("root_port", "", ("nic",)),
    )
    assert result.origins["gpu1"] == "0000:94:00.0"
    assert "# 0000:14:00.0 15b3:1021, mlx5_0" in result.text
    assert "1 other host of 2" in result.notes.folded
    (node,) = result.topology.nodes.values()
    assert node.machine.cpu == "EPYC"  # family 175 as NCCL counts is 0x19, a Zen


def test_nvswitches_become_a_link_for_each_pair() -> None:
    assert _links("nccl", NVSWITCH) == [
        ("nvlink", "host0/gpu0", "host0/gpu1", 8),
        ("nvlink", "host0/gpu0", "host0/gpu2", 9),
        ("nvlink", "host0/gpu1", "host0/gpu2", 8),
    ]


def test_direct_links_are_taken_once() -> None:
    text = (DATA / "direct.rccl.xml").read_text()
    assert _links("nccl", text) == [("xgmi", "host0/gpu0", "host0/gpu1", 4)]


def test_links_of_gpus_that_are_not_kept_are_folded() -> None:
    result = imported("nccl", NVSWITCH, Options(Choice(around=("gpu1",))))
    assert set(result.origins) == {"gpu1", "gpu2"}
    assert len(result.topology.links) == 1
    assert any("2 links to GPUs that are not kept" in note for note in result.notes.folded)


def test_devices_without_a_class_are_settable() -> None:
    text = (
        '<system version="1"><cpu><pci busid="0000:00:15.0"/><pci busid="3b:00.0"/></cpu></system>'
    )
    result = imported("nccl", text, Options(Choice(kinds={"00:15.0": Kind.NIC})))
    assert shape_of(result.topology, acs=False) == (("nic",), ("root_port", "", ("gpu",)))
    assert any("2 devices without a class" in note for note in result.notes.unknown)


def test_lstopo_in_our_own_rack_comes_back() -> None:
    result = imported("hwloc", LSTOPO)
    assert shape_of(result.topology, acs=False) == shape_of(NESTED, acs=False)


def test_hwloc_without_pci_is_an_empty_rack_and_says_so() -> None:
    result = imported("hwloc", '<topology version="2.0"><object type="Machine"/></topology>')
    assert shape_of(result.topology) == ()
    assert any("the file has none" in note for note in result.notes.unknown)


HWLOC_GPUS = """\
<topology version="2.0"><object type="Machine">
 <object type="Bridge" bridge_type="0-1" depth="0" bridge_pci="0000:[00-02]">
  <object type="Bridge" pci_busid="0000:00:01.0" pci_type="0604 [8086:2030] [0000:0000] 00">
   <object type="PCIDev" pci_busid="0000:01:00.0" pci_type="0302 [10de:1db1] [10de:0001] a1">
    <object type="OSDev" gp_index="31" name="nvml0" osdev_type="5"/>
    <object type="OSDev" gp_index="32" name="cuda0" osdev_type="5">
     <info name="CUDAGlobalMemorySize" value="16000000"/>
    </object>
   </object>
   <object type="PCIDev" pci_busid="0000:01:10.0" pci_type="0302 [10de:1db1] [10de:0001] a1"/>
  </object>
  <object type="PCIDev" pci_busid="0000:00:02.0" pci_type="0380 [8086:56c0] [8086:0001] 00">
   <object type="OSDev" gp_index="41" name="ze0" osdev_type="5"/>
  </object>
 </object>
</object>
<distances2 type="OSDev" nbobjs="2" kind="9" name="XeLinkBandwidth" indexing="gp">
 <indexes length="5">31 41</indexes><u64values length="9">0 100000</u64values>
 <u64values length="9">100000 0</u64values>
</distances2>
</topology>
"""


def test_hwloc_memory_links_and_virtual_functions() -> None:
    result = imported("hwloc", HWLOC_GPUS, Options(vram_bytes=None))
    assert shape_of(result.topology, acs=False) == (("root_port", "", ("gpu",)), ("gpu",))
    assert vrams(result.topology) == {16 << 30, 64 << 20}
    (link,) = result.topology.links
    assert (link.kind, link.between) == ("xelink", ("host0/gpu1", "host0/gpu0"))


def _nccl(inner: str) -> str:
    return f'<system version="1">\n<cpu numaid="0">\n{inner}\n</cpu></system>'


def _gpu(inner: str) -> str:
    return _nccl(f'<pci busid="0000:01:00.0" class="0x030200"><gpu dev="0">{inner}</gpu></pci>')


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("nccl", "", "a-file.txt:1:1: not XML: no element found"),
        ("nccl", "<system>", "a-file.txt:1:9: not XML: no element found"),
        ("nccl", "<system></cpu>", "a-file.txt:1:11: not XML: mismatched tag"),
        ("nccl", "GPU0 GPU1", "a-file.txt:1:1: not XML: syntax error"),
        ("nccl", LSTOPO, "a-file.txt:3:1: <topology> is not NCCL's topology; `hwloc` is for"),
        ("hwloc", NVSWITCH, "a-file.txt:1:1: <system> is not hwloc's topology; `nccl` is for"),
        ("nccl", "<?xml version='1.0' encoding='utf-7'?><system/>", "a-file.txt:1:"),
        ("nccl", "<?xml version='1.0' encoding='nonsense'?><system/>", "a-file.txt:1:"),
        ("nccl", _nccl('<pci busid="x"/>'), 'a-file.txt:3:1: <pci> has busid="x"; expected a PCI'),
        ("nccl", _nccl('<pci busid="01:00.0" class="?"/>'), 'a-file.txt:3:1: <pci> has class="?"'),
        (
            "nccl",
            _nccl('<pci busid="01:00.0"/>\n<pci busid="0000:01:00.0"/>'),
            "a-file.txt:4:1: a second <pci> with busid 0000:01:00.0; the first is in line 3",
        ),
        (
            "nccl",
            _gpu('<nvlink target="x" count="99999999999999999999"/>'),
            "a-file.txt:3:57: <nvlink> has count=",
        ),
        ("nccl", _gpu('<nvlink target="0000:01:00.0" count="1"/>'), "a-file.txt:3:57: a link from"),
        ("hwloc", HWLOC_GPUS.replace('"0000:00:02.0"', '"no"'), "a-file.txt:12:3: <object> has"),
        ("hwloc", HWLOC_GPUS.replace("0000:00:02.0", "0000:00:01.0"), "a-file.txt:12:3: a second"),
        ("hwloc", HWLOC_GPUS.replace('"0380 [', '"zz ['), "a-file.txt:12:3: 0000:00:02.0 has"),
        ("hwloc", HWLOC_GPUS.replace("31 41", "31"), "a-file.txt:17:1: 'XeLinkBandwidth' has 1"),
        ("hwloc", HWLOC_GPUS.replace("0 100000", "0 -5"), "a-file.txt:17:1: 'XeLinkBandwidth'"),
        (
            "hwloc",
            HWLOC_GPUS.replace('nbobjs="2"', 'nbobjs="2e9"'),
            "a-file.txt:17:1: <distances2>",
        ),
    ],
)
def test_what_is_wrong_and_where(form: str, text: str, message: str) -> None:
    assert refusal(form, text).startswith(message)


LAUGHS = '<!DOCTYPE s [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><system>&b;</system>'
EXTERNAL = '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><system>&a;</system>'
UNDECLARED = '<!DOCTYPE s SYSTEM "nowhere.dtd"><system a="1">&b;</system>'


@pytest.mark.parametrize("form", ["nccl", "hwloc"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "declarations of its own"),
        (EXTERNAL, "declarations of its own"),
        (UNDECLARED, "the entity 'b', which nothing declares"),
        ("<system>" * 100_000, "elements nest more than 64 deep"),
    ],
)
def test_hostile_documents_are_refused(form: str, text: str, message: str) -> None:
    assert message in refusal(form, text)


@pytest.mark.parametrize("form", ["nccl", "hwloc"])
def test_huge_documents_need_little_memory_and_time(form: str) -> None:
    tag = "system" if form == "nccl" else "topology"
    text = f"<{tag}>{'<pci/>' * 4_000_000}</{tag}>".encode()
    tracemalloc.start()
    start_s = time.process_time()  # what others do on the host is not counted
    assert f"more than {markup.MOST_ELEMENTS} elements" in refusal(form, text)
    assert time.process_time() - start_s < 15
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def test_words_from_the_file_cannot_leave_their_comment() -> None:
    evil = "&#10;rack: evil {{ range(9) }} {% if %} &#x9b;31m"
    text = _nccl(f'<pci busid="01:00.0" class="0x020000"><nic><net name="{evil}"/></nic></pci>')
    result = imported("nccl", text)
    assert result.topology.rack == "a-file"
    assert "{{ range" not in result.text
    assert "\x9b" not in result.text
    assert "evil" in result.text


@pytest.mark.parametrize(
    "above", ['type="Machine"', 'type="Bridge" bridge_type="0-1" bridge_pci="0000:[00-ff]"']
)
def test_hwloc_without_bridges_gives_each_bus_a_root_port(above: str) -> None:
    text = (
        f"<topology><object {above}>"
        '<object type="PCIDev" pci_busid="0000:3b:00.0" pci_type="0200 [15b3:1017] [0:0] 00"/>'
        '<object type="PCIDev" pci_busid="0000:3b:00.1" pci_type="0200 [15b3:1017] [0:0] 00"/>'
        '<object type="PCIDev" pci_busid="0000:00:02.0" pci_type="0300 [8086:3e98] [0:0] 00"/>'
        "</object></topology>"
    )
    result = imported("hwloc", text)
    assert shape_of(result.topology, acs=False) == (("gpu",), ("root_port", "", ("nic",)))
    assert any("1 root port above" in note for note in result.notes.unknown)


def test_nccl_without_pci_is_an_empty_rack_and_says_so() -> None:
    result = imported("nccl", "<system/>")
    assert shape_of(result.topology) == ()
    assert any("the file has none" in note for note in result.notes.unknown)
