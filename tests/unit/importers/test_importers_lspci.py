# SPDX-License-Identifier: Apache-2.0
"""lspci's text: real output of our own racks, and of random ones as lspci would print them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from testbed.topology import load
from testbed.topology.importers.convert import Options
from testbed.topology.importers.fold import Choice
from testbed.topology.importers.machine import Kind
from testbed.topology.model import Topology
from tests.unit.importers import lspci_text
from tests.unit.importers.shapes import (
    imported,
    names_of,
    only_plan,
    refusal,
    shape_of,
    vrams,
)
from tests.unit.topology.random_topologies import random_topology

DATA = Path(__file__).parents[2] / "data" / "import"
NESTED = load.load(DATA / "nested-switches.yaml", {})
REAL = (DATA / "nested-switches.lspci-nnvvv-xxx.txt").read_text()
TREE = (DATA / "nested-switches.lspci-tv.txt").read_text()
WORKSTATION = (DATA / "workstation.lspci-vvv.txt").read_text()
HEX_LINES = re.compile(r"^[0-9a-f]{2}: .*\n", re.MULTILINE)
MANY = Choice(most=1000)


@pytest.mark.parametrize(
    "text",
    [
        REAL,
        HEX_LINES.sub("", REAL),
        "\n".join(line for line in REAL.split("\n") if not line.startswith("\t")),
        REAL.replace("\t", "        "),
        "\n".join(f"> {line}" for line in REAL.split("\n")),
        REAL.replace("\n", "\r\n"),
        f"$ lspci -tv\n{TREE}\n$ lspci -nnvvv -xxx\n{REAL}",
    ],
    ids=["as-printed", "no-hex", "hex-only", "spaces", "quoted", "crlf", "after-a-tree"],
)
def test_our_own_rack_comes_back(text: str) -> None:
    without_acs = "\t" not in text and "ACSCtl" not in text
    topology = imported("lspci", text).topology
    assert shape_of(topology, acs=not without_acs) == shape_of(NESTED, acs=not without_acs)
    assert names_of(topology) == {"gpu0", "gpu1", "gpu2", "gpu3", "nic0"}


def test_our_own_rack_comes_back_from_the_tree() -> None:
    result = imported("lspci", TREE)
    assert shape_of(result.topology, acs=False) == shape_of(NESTED, acs=False)
    assert any("guessed from their names" in note for note in result.notes.unknown)


def test_without_bus_numbers_nothing_is_claimed_of_switches() -> None:
    result = imported("lspci", (DATA / "nested-switches.lspci.txt").read_text())
    assert {e[0] for e in shape_of(result.topology)} == {"root_port"}
    assert any("no bus numbers" in note for note in result.notes.unknown)


def test_acs_that_is_listed_but_not_shown_is_unknown() -> None:
    result = imported("lspci", (DATA / "nested-switches.lspci-v.txt").read_text())
    notes = "\n".join(result.notes.unknown)
    assert "ACS of 1 root port" in notes
    assert "ACS of 1 switch" in notes
    assert shape_of(result.topology, acs=False) == shape_of(NESTED, acs=False)


def _of_one_node(seed: int) -> Topology:
    data = random_topology(seed)
    data["nodes"] = dict(list(data["nodes"].items())[:1])
    data.pop("links", None)
    return load.load_text(json.dumps(data), "random", {})


@pytest.mark.parametrize("seed", range(16))
def test_a_random_rack_comes_back(seed: int) -> None:
    topology = _of_one_node(seed)
    plan = only_plan(topology)
    expected, without_acs = shape_of(topology), shape_of(topology, acs=False)
    many = Options(MANY)
    assert shape_of(imported("lspci", lspci_text.verbose(plan), many).topology) == expected
    assert shape_of(imported("lspci", lspci_text.hex_dump(plan), many).topology) == expected
    for text in (
        lspci_text.hex_dump(plan, 256),
        lspci_text.verbose(plan, is_root=False),
        lspci_text.tree(plan),
    ):
        assert shape_of(imported("lspci", text, many).topology, acs=False) == without_acs


def test_without_root_acs_is_unknown_and_settable() -> None:
    text = lspci_text.verbose(only_plan(NESTED), is_root=False)
    result = imported("lspci", text, Options(settings={"switch_acs": "redirect"}))
    assert any("not run as root" in note for note in result.notes.unknown)
    assert any("ACS of 3 switches" in note for note in result.notes.unknown)
    (node,) = result.topology.nodes.values()
    assert {getattr(e, "acs", "") for e in node.entries() if e.kind == "switch"} == {"redirect"}
    changed = load.load_text(result.text, "again", {"switch_acs": "none"})
    (node,) = changed.nodes.values()
    assert {getattr(e, "acs", "") for e in node.entries() if e.kind == "switch"} == {"none"}


def test_a_workstation_pasted_with_its_prompt() -> None:
    result = imported("lspci", WORKSTATION)
    assert shape_of(result.topology) == (
        ("nic",),
        ("root_port", "redirect", ("switch", "none", ("gpu",), ("gpu",))),
        ("root_port", "none", ("nic",)),
        ("root_port", "none", ("nvme",)),
    )
    assert result.origins == {
        "gpu0": "0000:1a:00.0",
        "gpu1": "0000:1b:00.0",
        "nic0": "0000:00:1f.6",
        "nic1": "0000:3b:00.0",
        "nvme0": "0000:5e:00.0",
    }
    assert "64 GiB" in "\n".join(result.notes.changed)
    assert any("1 root port or switch is turned off" in note for note in result.notes.changed)
    assert "4 root buses: all stands on one" in result.notes.changed
    # The second port and the virtual function, the GPU's audio, and 00:1f.4 beside the NIC.
    assert any(note.startswith("4 functions") for note in result.notes.folded)


def test_sizes_as_found_are_kept_while_they_fit() -> None:
    result = imported("lspci", WORKSTATION, Options(vram_bytes=None))
    assert vrams(result.topology) == {64 << 30}


def test_sizes_that_do_not_fit_are_halved_and_it_is_said() -> None:
    text = WORKSTATION.replace("[size=64G]", "[size=4T]")
    result = imported("lspci", text, Options(vram_bytes=None))
    assert vrams(result.topology) == {128 << 30}
    assert any("memory divided by 32" in note for note in result.notes.changed)


def test_names_stay_when_less_is_kept() -> None:
    result = imported("lspci", WORKSTATION, Options(Choice(around=("1b:00.0",))))
    assert result.origins == {"gpu0": "0000:1a:00.0", "gpu1": "0000:1b:00.0"}
    result = imported("lspci", WORKSTATION, Options(Choice(keep=(Kind.NIC,), around=("nic1",))))
    assert result.origins == {"nic1": "0000:3b:00.0"}


def test_a_place_that_is_not_there_is_refused_with_the_nearest() -> None:
    text = refusal("lspci", WORKSTATION, Options(Choice(around=("1c:00.0", "gpu7"))))
    assert "--around gpu7: the file has no such device; did you mean 'gpu1'?" in text
    assert "--as 99:00.0" in refusal(
        "lspci", WORKSTATION, Options(Choice(kinds={"99:00.0": Kind.GPU}))
    )


def test_what_a_device_is_can_be_said() -> None:
    choice = Choice(kinds={"0000:5e:00.0": Kind.GPU})
    assert imported("lspci", WORKSTATION, Options(choice)).origins["gpu2"] == "0000:5e:00.0"


def test_intel_host_bridges_on_linux_list_let_peers_through() -> None:
    text = lspci_text.verbose(only_plan(NESTED)).replace("8086:29c0", "8086:2020")
    (node,) = imported("lspci", text).topology.nodes.values()
    assert node.machine.cpu == "EPYC"
    (node,) = imported("lspci", text.replace("8086:2020", "8086:29c0")).topology.nodes.values()
    assert node.machine.cpu == "max"


def test_a_switch_whose_port_is_not_in_the_file_gets_one() -> None:
    text = "".join(f"{b}\n\n" for b in WORKSTATION.split("\n\n") if not b.startswith("17:"))
    result = imported("lspci", text)
    assert ("root_port", "redirect", ("switch", "none", ("gpu",), ("gpu",))) in shape_of(
        result.topology
    )
    assert any("root port above" in note for note in result.notes.unknown)


def test_a_conventional_bus_becomes_a_switch_without_acs() -> None:
    text = """\
00:00.0 Host bridge: Intel Corporation Device 1234
00:1e.0 PCI bridge: Intel Corporation 82801 PCI Bridge
\tBus: primary=00, secondary=05, subordinate=05, sec-latency=32
\tCapabilities: [50] Express (v1) PCI-Express to PCI/PCI-X Bridge, MSI 00
05:01.0 Ethernet controller [0200]: A [8086:100e]
05:02.0 Ethernet controller [0200]: B [8086:100e]
"""
    result = imported("lspci", text)
    assert shape_of(result.topology) == (
        ("root_port", "none", ("switch", "none", ("nic",), ("nic",))),
    )
    assert any("conventional PCI bus" in note for note in result.notes.changed)


def test_ports_of_one_switch_that_do_not_agree_are_named() -> None:
    text = WORKSTATION.replace(
        "ACSCtl: SrcValid- TransBlk- ReqRedir-", "ACSCtl: SrcValid- TransBlk- ReqRedir+", 1
    )
    result = imported("lspci", text)
    assert any("some ports of the switch 0000:18:00.0" in note for note in result.notes.changed)
    assert not any("turned off" in note for note in result.notes.changed)
    assert "switch" in str(shape_of(result.topology))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a-file.txt:1:1: no line is about a PCI function; expected the output of `lspci"),
        ("hello\n", "a-file.txt:1:1: no line is about"),
        ("00:00.0 X\n00:00.0 Y\n", "a-file.txt:2:1: 0000:00:00.0 stands here twice"),
        ("00:3f.0 X: Y\n", "a-file.txt:1:1: '00:3f.0' is no PCI address"),
        ("00:01.0 PCI bridge: X\n00: 01 02\n", "a-file.txt:2:1: a damaged line"),
        ("00:01.0 PCI bridge: X\n10:" + " 00" * 16, "a-file.txt:2:1: configuration space at 10"),
        ("00:01.0 PCI bridge: X\n00:" + " 00" * 16, "a-file.txt:2:1: 16 bytes of configuration"),
        ("00:00.0 X: \x07", "a-file.txt:1:12: the control character U+0007"),
        (b"00:00.0 X: \xff", "a-file.txt:1:12: byte 0xff is not UTF-8"),
        (
            "02:00.0 PCI bridge: X\n\tBus: primary=02, secondary=01, subordinate=01\n",
            "a-file.txt:1:1: 0000:02:00.0 leads to bus 01, which cannot be behind it",
        ),
        (
            "".join(
                f"00:0{slot}.0 PCI bridge: X\n\tBus: primary=00, secondary=05, subordinate=05\n"
                for slot in (1, 2)
            ),
            "a-file.txt:3:1: 0000:00:02.0 leads to bus 05, and so does 0000:00:01.0",
        ),
        ("-[0000:00]-+-00.0\n   +-01.0\n", "a-file.txt:2:4: a branch of the tree that starts"),
        ("-[0000:00]-+-00.0\n           +-00.0\n", "a-file.txt:2:14: 0000:00:00.0 stands here"),
        ("-[0000:00]-+-zz\n", "a-file.txt:1:14: no device and no bus"),
    ],
)
def test_what_is_wrong_and_where(text: str | bytes, message: str) -> None:
    assert refusal("lspci", text).startswith(message)


def test_bridges_without_end_are_refused() -> None:
    blocks = [
        f"{bus:02x}:00.0 PCI bridge: X\n\tBus: primary={bus:02x}, secondary={bus + 1:02x}, "
        f"subordinate=ff\n"
        for bus in range(200)
    ]
    assert "bridges in a row" in refusal("lspci", "".join(blocks))


def test_a_machine_of_two_thousand_functions_is_folded_to_what_fits() -> None:
    blocks = ["00:00.0 Host bridge [0600]: AMD [1022:14a4]\n"]
    bus = 1
    for port in range(120):
        address = f"0000:00:{1 + port // 8:02x}.{port % 8}"
        blocks.append(
            f"{address} PCI bridge [0604]: AMD [1022:14ab]\n"
            f"\tBus: primary=00, secondary={bus:02x}, subordinate={bus + 1:02x}\n"
            "\tCapabilities: [58] Express (v2) Root Port (Slot-), MSI 00\n"
        )
        code = ("0302", "0200", "0108")[port % 3]
        blocks += [
            f"{bus:02x}:{number // 8:02x}.{number % 8} X [{code}]: V [10de:{port:04x}]\n"
            "\tRegion 0: Memory at 38000000000 (64-bit, prefetchable) [size=128G]\n"
            for number in range(16)
        ]
        bus += 2
    start = time.monotonic()
    result = imported("lspci", "".join(blocks), Options(MANY, vram_bytes=None))
    assert time.monotonic() - start < 10
    assert len(result.origins) == 120
    assert any("made smaller to fit" in note for note in result.notes.changed)
    assert vrams(result.topology) < {128 << 30, 64 << 30, 32 << 30, 16 << 30, 8 << 30, 4 << 30}
    (node,) = result.topology.nodes.values()
    assert node.machine.cpu == "EPYC"


def test_what_has_no_room_goes_by_importance() -> None:
    blocks = ["00:00.0 Host bridge [0600]: AMD [1022:14a4]\n"]
    for domain in range(3):
        for port in range(100):
            blocks.append(
                f"{domain:04x}:00:{1 + port // 8:02x}.{port % 8} PCI bridge [0604]: AMD\n"
                f"\tBus: primary=00, secondary={port + 1:02x}, subordinate={port + 1:02x}\n"
            )
            code = "0302" if domain == 2 else "0108"
            blocks.append(f"{domain:04x}:{port + 1:02x}:00.0 X [{code}]: V [10de:0001]\n")
    result = imported("lspci", "".join(blocks), Options(MANY))
    assert {f"gpu{n}" for n in range(100)} <= set(result.origins)
    assert 100 < len(result.origins) < 256
    assert any("for which there is no room" in note for note in result.notes.folded)


def test_the_less_important_devices_beyond_a_number_are_folded() -> None:
    result = imported("lspci", WORKSTATION, Options(Choice(most=3)))
    assert set(result.origins) == {"gpu0", "gpu1", "nic0"}
    assert "1 NIC beyond 3 devices (--most), first 0000:3b:00.0" in result.notes.folded
    assert "1 NVMe disk beyond 3 devices (--most), first 0000:5e:00.0" in result.notes.folded
    result = imported("lspci", WORKSTATION, Options(Choice(most=1, around=("5e:00.0",))))
    assert set(result.origins) == {"nvme0"}
