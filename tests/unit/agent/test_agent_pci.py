# SPDX-License-Identifier: Apache-2.0
"""The PCI tree and the IOMMU groups, read from a small /sys."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from guest_agent.observe import iommu, pci
from guest_agent.rpc import ParameterError
from tests.unit.agent.fake_sysfs import FakeSysfs, config_space

ROOT_PORT, UPSTREAM, ENDPOINT = 4, 5, 0
RESOURCE = """\
0x00000000fe700000 0x00000000fe71ffff 0x0000000000040200
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000008000000000 0x0000008003ffffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x000000000000d000 0x000000000000d01f 0x0000000000040101
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x00000000fe800000 0x00000000fe83ffff 0x0000000000046200
"""


def _express(kind: int) -> tuple[int, bytes]:
    return 0x10, struct.pack("<H", 2 | kind << 4)


def _acs(control: int) -> tuple[int, bytes]:
    return 0x0D, struct.pack("<HH", 0x5F, control)


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path)


def test_describes_ports_and_what_is_below_them(sysfs: FakeSysfs) -> None:
    port = config_space(
        vendor=0x1B36,
        device=0xC,
        bridge=(0, 1, 5),
        capabilities=(_express(ROOT_PORT), (0x11, b"")),
        extended=((0x01, bytes(8)), _acs(0x1D)),
    )
    sysfs.function("0000:00:04.0", port, group=2)
    sysfs.function("0000:00:04.0/0000:01:00.0", config_space(), resource=RESOURCE, group=6)
    sysfs.bind("0000:00:04.0", "pcieport")
    above, below = pci.tree(str(sysfs.root))
    assert above["bdf"] == "0000:00:04.0"
    assert (above["header"], above["pcie_type"], above["parent"]) == ("bridge", "root_port", "")
    assert (above["secondary_bus"], above["subordinate_bus"]) == (1, 5)
    assert above["capabilities"] == ["express", "msix"]
    assert above["extended"] == ["aer", "acs"]
    offset = 0x100 + 12  # after the other one, of eight bytes and a header
    assert above["acs"] == {
        "offset": offset,
        "capability": 0x5F,
        "control": 0x1D,
        "redirect": True,
    }
    assert (above["driver"], above["iommu_group"]) == ("pcieport", 2)
    assert (below["vendor"], below["device"], below["class"]) == (0x1234, 0x11E8, 0x00FF00)
    assert (below["header"], below["parent"], below["driver"]) == ("endpoint", "0000:00:04.0", "")
    assert (below["acs"], below["iommu_group"]) == (None, 6)


def test_base_address_registers() -> None:
    assert pci.bars(RESOURCE) == [
        _bar(0, 0xFE700000, 0x20000, "mem", is_64bit=False, prefetchable=False),
        _bar(2, 0x8000000000, 64 << 20, "mem", is_64bit=True, prefetchable=True),
        _bar(4, 0xD000, 0x20, "io", is_64bit=False, prefetchable=False),
    ]


def _bar(
    index: int, address: int, size: int, kind: str, *, is_64bit: bool, prefetchable: bool
) -> dict[str, object]:
    return {
        "index": index,
        "address": address,
        "size_bytes": size,
        "kind": kind,
        "is_64bit": is_64bit,
        "prefetchable": prefetchable,
    }


@pytest.mark.parametrize(
    ("control", "redirect"),
    [(0x00, False), (0x11, False), (0x04, True), (0x08, True), (0x20, True)],
)
def test_acs_redirect_is_any_of_three_bits(sysfs: FakeSysfs, control: int, redirect: bool) -> None:
    sysfs.function("0000:00:04.0", config_space(bridge=(0, 1, 1), extended=(_acs(control),)))
    assert pci.device("0000:00:04.0", str(sysfs.root))["acs"]["redirect"] is redirect


@pytest.mark.parametrize(
    ("kind", "name"), [(0, "endpoint"), (1, "endpoint"), (6, "downstream"), (9, "rc_endpoint")]
)
def test_express_types(sysfs: FakeSysfs, kind: int, name: str) -> None:
    sysfs.function("0000:00:04.0", config_space(capabilities=(_express(kind),)))
    assert pci.device("0000:00:04.0", str(sysfs.root))["pcie_type"] == name


def test_unknown_capabilities_keep_their_number(sysfs: FakeSysfs) -> None:
    config = config_space(capabilities=((0x15, b""),), extended=((0x7E, bytes(4)),))
    sysfs.function("0000:00:04.0", config)
    found = pci.device("0000:00:04.0", str(sysfs.root))
    assert (found["capabilities"], found["extended"]) == (["0x15"], ["0x7e"])


def test_a_loop_of_capabilities_ends() -> None:
    config = bytearray(config_space(capabilities=((0x05, b""), (0x10, bytes(2)))))
    config[0x45] = 0x40
    assert [identifier for identifier, _ in pci.capabilities(bytes(config))] == [0x05, 0x10]
    struct.pack_into("<I", config, 0x100, 0x0001 | 0x100 << 20)
    assert list(pci.extended_capabilities(bytes(config))) == [(1, 0x100)]


def test_conventional_functions_have_no_extended_capabilities() -> None:
    assert list(pci.extended_capabilities(config_space(size=256))) == []


def test_groups_in_order_of_their_number(sysfs: FakeSysfs) -> None:
    for number, bdf in ((10, "0000:00:05.0"), (9, "0000:00:04.0"), (9, "0000:00:04.1")):
        sysfs.function(bdf, config_space(), group=number)
    assert iommu.groups(str(sysfs.root)) == [
        {"id": 9, "type": "DMA", "devices": ["0000:00:04.0", "0000:00:04.1"]},
        {"id": 10, "type": "DMA", "devices": ["0000:00:05.0"]},
    ]


def test_a_groups_type_is_changed(sysfs: FakeSysfs) -> None:
    sysfs.function("0000:00:04.0", config_space(), group=3)
    assert iommu.set_type(3, "identity", str(sysfs.root)) == {"old": "DMA", "new": "identity"}


@pytest.mark.parametrize(("group", "new"), [(4, "DMA"), (3, "off"), (3, "../type")])
def test_a_wrong_group_or_type_is_refused(sysfs: FakeSysfs, group: int, new: str) -> None:
    sysfs.function("0000:00:04.0", config_space(), group=3)
    with pytest.raises(ParameterError):
        iommu.set_type(group, new, str(sysfs.root))


def test_no_iommu_is_off(sysfs: FakeSysfs) -> None:
    assert iommu.summary(str(sysfs.root)) == {
        "present": False,
        "kind": "none",
        "mode": "off",
        "units": [],
    }


@pytest.mark.parametrize(
    ("unit", "types", "kind", "mode"),
    [
        ("dmar0", ["DMA", "DMA"], "intel", "strict"),
        ("dmar0", ["DMA-FQ"], "intel", "lazy"),
        ("ivhd0", ["identity"], "amd", "passthrough"),
        ("0000:00:1e.0", ["DMA", "identity"], "virtio", "mixed"),
    ],
)
def test_the_mode_is_what_the_groups_have(
    sysfs: FakeSysfs, unit: str, types: list[str], kind: str, mode: str
) -> None:
    registers = sysfs.root / "class/iommu" / unit / "intel-iommu"
    registers.mkdir(parents=True)
    (registers / "cap").write_text("d2008c40660462\n")
    for number, each in enumerate(types):
        sysfs.function(f"0000:00:{number:02x}.0", config_space(), group=number)
        (sysfs.groups / str(number) / "type").write_text(each + "\n")
    found = iommu.summary(str(sysfs.root))
    assert (found["present"], found["kind"], found["mode"]) == (True, kind, mode)
    assert found["units"] == [{"name": unit, "cap": 0xD2008C40660462, "ecap": 0}]


def test_places_are_known_without_asking_a_function(sysfs: FakeSysfs) -> None:
    sysfs.function("0000:00:04.0", config_space(vendor=0x1B36, device=0xC, bridge=(0, 1, 5)))
    sysfs.function("0000:01:00.0", config_space(), resource=RESOURCE)
    (there,) = (each for each in pci.tree(str(sysfs.root)) if each["bars"])
    for config in sysfs.root.glob("bus/pci/devices/*/config"):
        config.unlink()
    assert pci.places(str(sysfs.root)) == [{"bdf": "0000:01:00.0", "bars": there["bars"]}]
