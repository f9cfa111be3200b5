# SPDX-License-Identifier: Apache-2.0
"""hwloc's XML, as ``lstopo --of xml`` writes it (versions 1 to 3).

Elements and attributes: hwloc 2.12 ``hwloc/topology-xml.c``. hwloc says of a bridge which buses are
behind it, but not what kind of port it is, nor anything of ACS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from testbed.topology.importers import kinds, markup
from testbed.topology.importers.bridges import Function, PortType, TreeMaker
from testbed.topology.importers.machine import (
    Address,
    Kind,
    Machine,
    Notes,
    Part,
    Wire,
    counted,
    parse_address,
)
from testbed.topology.importers.markup import Element
from testbed.topology.importers.source import plain
from testbed.topology.oracle import FIRST_ZEN_FAMILY
from testbed.topology.units import KIB, MAX_SIZE_BYTES

_TYPE = re.compile(r"([0-9a-f]{4})\s+\[([0-9a-f]{4}):([0-9a-f]{4})\]", re.IGNORECASE)
_BUSES = re.compile(r"[0-9a-f]{4,8}:\[([0-9a-f]{2})-[0-9a-f]{2}\]", re.IGNORECASE)
_KIB = re.compile(r"([0-9]{1,15}) ?(?:KiB|kB)?")
_MEMORY_INFOS = (
    "CUDAGlobalMemorySize",
    "OpenCLGlobalMemorySize",
    "LevelZeroHBMSize",
    "RSMIVRAMSize",
)
_BANDWIDTHS = {"NVLinkBandwidth": "nvlink", "XGMIBandwidth": "xgmi", "XeLinkBandwidth": "xelink"}
# One NVLink's bandwidth in MB/s, from the second generation on, and of the first.
_NVLINK_MBPS, _NVLINK1_MBPS = 25_000, 20_000
_MOST_WIDTH = 64
_MOST_MATRIX = 1024


def read(name: str, content: bytes) -> Machine:
    """The machine in a file's bytes; InputError with the place of the first fault."""
    root = markup.parse(name, content)
    if root.tag != "topology":
        other = "; `nccl` is for NCCL's XML" if root.tag == "system" else ""
        root.fail(f"<{plain(root.tag)}> is not hwloc's topology{other}", "<topology version=...>")
    return _Reader(name).machine(root)


@dataclass
class _Reader:
    name: str
    notes: Notes = field(default_factory=Notes)
    addresses: dict[Address, int] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # gp_index of an OSDev → its PCI address
    packages: int = 0
    zen_packages: int = 0
    loose: list[Element] = field(default_factory=list)  # PCI devices without a bridge above

    def machine(self, root: Element) -> Machine:
        """Everything in a ``<topology>``."""
        maker = TreeMaker(self.name, self.notes)
        roots: list[Part] = []
        host_bridges = 0
        for bridge in self._host_bridges(root):
            host_bridges += 1
            roots += maker.root_bus(self._on_root_bus(bridge))
        for (_, bus), functions in self._without_bridges().items():
            roots += maker.root_bus(functions, is_lost=bus != 0)
        maker.say()
        if host_bridges > 1:
            self.notes.changed.append(f"{host_bridges} host bridges: all stands on one root bus")
        if not self.addresses:
            self.notes.unknown.append(
                "any PCI device: the file has none (`lstopo --whole-io --of xml` writes them)"
            )
        self._say_architecture(root)
        gpus = {d.origin for d in (d for r in roots for d in r.devices()) if d.kind is Kind.GPU}
        return Machine(
            source="hwloc XML",
            roots=tuple(sorted(roots, key=lambda part: part.rank)),
            notes=self.notes,
            wires=tuple(self._wires(root, gpus)),
            peers_through_host=True if 0 < self.packages == self.zen_packages else None,
        )

    def _host_bridges(self, element: Element) -> Iterator[Element]:
        """The objects that have all PCI below them."""
        for child in element.each("object"):
            kind = child.get("type")
            if kind == "Bridge":
                yield child
            elif kind == "PCIDev":
                self.loose.append(child)
            else:
                if kind in ("Package", "Socket"):
                    self.packages += 1
                    self.zen_packages += _is_zen(child)
                yield from self._host_bridges(child)

    def _on_root_bus(self, bridge: Element) -> list[Function]:
        """What is on the bus of a host bridge; devices that cannot be there are put aside."""
        if bridge.get("pci_busid"):
            return [self._function(bridge)]  # the file starts with a bridge from PCI to PCI
        match = _BUSES.match(bridge.get("bridge_pci"))
        found: list[Function] = []
        for child in _pci_objects(bridge):
            address = parse_address(child.get("pci_busid"))
            is_here = match is None or address is None or address.bus == int(match[1], 16)
            if is_here or child.get("type") == "Bridge":
                found.append(self._function(child))
            else:
                self.loose.append(child)
        return found

    def _without_bridges(self) -> dict[tuple[int, int], list[Function]]:
        """The devices whose bridges the file has not, by domain and bus."""
        buses: dict[tuple[int, int], list[Function]] = {}
        for function in map(self._function, self.loose):
            address = function.address
            buses.setdefault((address.domain, address.bus), []).append(function)
        return buses

    def _function(self, element: Element) -> Function:
        address = self._address(element)
        match = _TYPE.match(element.get("pci_type"))
        if match is None:
            text = plain(element.get("pci_type"))
            element.fail(f'{address} has pci_type="{text}"', '"CLASS [VENDOR:DEVICE] ..."')
        code, vendor, device = (int(digits, 16) for digits in match.groups())
        infos = _infos(element)
        words = [infos.get("PCIVendor", ""), infos.get("PCIDevice", "")]
        words.append(f"[{vendor:04x}:{device:04x}]")
        is_bridge = element.get("type") == "Bridge"
        below = tuple(map(self._function, _pci_objects(element))) if is_bridge else ()
        memory_bytes = 0
        for os_device in (e for e in element.each("object") if e.get("type") == "OSDev"):
            self.owners[os_device.get("gp_index")] = str(address)
            words.append(os_device.get("name"))
            memory_bytes = max(memory_bytes, _memory_bytes(_infos(os_device)))
        return Function(
            address=address,
            line=element.line,
            kind=kinds.of_class(code, vendor, device),
            port=PortType.UNKNOWN if is_bridge else None,
            what=plain(" ".join(filter(None, words)), 90),
            vendor=vendor,
            memory_bytes=memory_bytes,
            below=below,
        )

    def _address(self, element: Element) -> Address:
        text = element.get("pci_busid")
        address = parse_address(text)
        if address is None:
            element.fail(
                f'<object> has pci_busid="{plain(text)}"', "a PCI address such as 0000:3b:00.0"
            )
        if address in self.addresses:
            first = self.addresses[address]
            element.fail(f"a second object at {address}; the first is in line {first}")
        self.addresses[address] = element.line
        return address

    def _say_architecture(self, root: Element) -> None:
        infos = _infos(root)
        for element in root.each("object"):
            infos = {**_infos(element), **infos}
        architecture = infos.get("Architecture", "")
        if architecture not in ("", "x86_64"):
            self.notes.changed.append(
                f"architecture {plain(architecture, 20)}: the rack's machine is x86-64"
            )

    def _wires(self, root: Element, gpus: set[str]) -> Iterator[Wire]:
        for matrix in _with_objects(root, "distances2", "distances2hetero", "distances"):
            kind = _BANDWIDTHS.get(matrix.get("name"))
            if kind is not None:
                yield from self._matrix(matrix, kind, gpus)

    def _matrix(self, matrix: Element, kind: str, gpus: set[str]) -> Iterator[Wire]:
        """The pairs of GPUs in a matrix of bandwidths in MB/s."""
        size = matrix.number("nbobjs", 1, _MOST_MATRIX)
        names = [w for e in matrix.each("indexes") for w in e.text.split()]
        words = [w for e in matrix.each("u64values") for w in e.text.split()]
        if len(names) != size or len(words) != size * size:
            matrix.fail(
                f"'{plain(matrix.get('name'))}' has {len(names)} objects and {len(words)} values",
                f"{size} and {size * size}",
            )
        if not all(word.isascii() and word.isdigit() and len(word) <= 12 for word in words):
            matrix.fail(f"'{plain(matrix.get('name'))}' has values that are no numbers", "MB/s")
        values = [int(word) for word in words]
        ends = [self.owners.get(name.rpartition(":")[2], "") for name in names]
        found: dict[tuple[str, str], int] = {}
        others = 0
        for row in range(size):
            for column in range(row + 1, size):
                speed = max(values[row * size + column], values[column * size + row])
                pair = (ends[row], ends[column])
                if speed and pair[0] != pair[1] and gpus.issuperset(pair):
                    found[pair] = speed
                elif speed and pair[0] != pair[1]:
                    others += 1
        if others:
            self.notes.folded.append(f"{counted(others, f'{kind} link')} to what is no GPU here")
        yield from _wires_of(kind, found)


def _wires_of(kind: str, speeds: dict[tuple[str, str], int]) -> Iterator[Wire]:
    """Links of a width that the bandwidth tells, where one link's bandwidth is known."""
    unit = 0
    if kind == "nvlink":
        fits_later = all(speed % _NVLINK_MBPS == 0 for speed in speeds.values())
        unit = _NVLINK_MBPS if fits_later else _NVLINK1_MBPS
    for pair, speed in speeds.items():
        width = max(1, min(_MOST_WIDTH, speed // unit)) if unit else 0
        yield Wire(kind, pair, width)


def _pci_objects(element: Element) -> Iterator[Element]:
    return (e for e in element.each("object") if e.get("type") in ("Bridge", "PCIDev"))


def _with_objects(root: Element, *tags: str) -> Iterator[Element]:
    """Elements of these tags, below the topology itself or, in version 1, below its machine."""
    yield from root.each(*tags)
    for element in root.each("object"):
        yield from element.each(*tags)


def _infos(element: Element) -> dict[str, str]:
    return {info.get("name"): info.get("value") for info in element.each("info")}


def _memory_bytes(infos: dict[str, str]) -> int:
    matches = (_KIB.fullmatch(infos.get(name, "")) for name in _MEMORY_INFOS)
    return max((min(int(m[1]) * KIB, MAX_SIZE_BYTES) for m in matches if m), default=0)


def _is_zen(package: Element) -> bool:
    infos = _infos(package)
    family = infos.get("CPUFamilyNumber", "")
    is_number = family.isascii() and family.isdigit() and len(family) <= 4
    vendor = infos.get("CPUVendor", "")
    return (
        vendor in ("AuthenticAMD", "HygonGenuine")
        and is_number
        and (int(family) >= FIRST_ZEN_FAMILY)
    )
