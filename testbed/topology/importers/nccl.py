# SPDX-License-Identifier: Apache-2.0
"""NCCL's and RCCL's topology XML, as NCCL_TOPO_DUMP_FILE writes it and NCCL_TOPO_FILE reads it.

Elements and attributes: NCCL 2.27 ``src/graph/xml.cc`` and ``topo.h``. NCCL leaves out root ports
and draws a switch's upstream and downstream ports as one ``<pci>``, so that below a ``<cpu>`` stand
switches and devices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from testbed.topology.importers import kinds, markup
from testbed.topology.importers.machine import (
    Acs,
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

_CLASS_BRIDGE = "0x0604"
_CLASS_NVSWITCH = "0x0680"
_LINK_KINDS = {"nvlink": "nvlink", "xgmi": "xgmi"}
MOST_LINKS = 64
_AMD_NAMES = ("AuthenticAMD", "HygonGenuine", "AMD")


def read(name: str, content: bytes) -> Machine:
    """The machine in a file's bytes; InputError with the place of the first fault."""
    root = markup.parse(name, content)
    if root.tag != "system":
        other = "; `hwloc` is for lstopo's XML" if root.tag == "topology" else ""
        root.fail(f"<{plain(root.tag)}> is not NCCL's topology{other}", "<system version=...>")
    return _Reader(name).machine(root)


@dataclass
class _Reader:
    name: str
    notes: Notes = field(default_factory=Notes)
    seen: dict[Address, int] = field(default_factory=dict)
    gpus: dict[str, Element] = field(default_factory=dict)
    without_class: list[str] = field(default_factory=list)
    ports_made_up: int = 0

    def machine(self, root: Element) -> Machine:
        """Everything in a ``<system>``."""
        cpus = self._first_host(list(root.each("cpu")))
        parts: list[Part] = []
        for cpu in cpus:
            parts += [self._root(self._pci(pci)) for pci in cpu.each("pci")]
        if not self.seen:
            self.notes.unknown.append("any PCI device: the file has none below a <cpu>")
        if len(cpus) > 1:
            self.notes.changed.append(f"{len(cpus)} NUMA nodes: all stands on one root bus")
        if self.ports_made_up:
            self.notes.unknown.append(
                f"root ports, which NCCL does not write: {self.ports_made_up} made up"
            )
        if self.without_class:
            first = ", ".join(self.without_class[:3])
            dots = " ..." if len(self.without_class) > 3 else ""
            self.notes.unknown.append(
                f"the kind of {counted(len(self.without_class), 'device')} without a class "
                f"({first}{dots}): GPUs, if not said otherwise (--as {self.without_class[-1]}=nic)"
            )
        return Machine(
            source="NCCL topology XML",
            roots=tuple(parts),
            notes=self.notes,
            wires=self._wires(),
            peers_through_host=_peers_through_host(cpus),
        )

    def _first_host(self, cpus: list[Element]) -> list[Element]:
        """A file that NCCL fused from several hosts has the first one's processors first."""
        hosts = list(dict.fromkeys(cpu.get("host_hash") for cpu in cpus))
        if len(hosts) > 1:
            self.notes.folded.append(f"{counted(len(hosts) - 1, 'other host')} of {len(hosts)}")
        return [cpu for cpu in cpus if cpu.get("host_hash") == hosts[0]]

    def _root(self, part: Part) -> Part:
        """What stands below a ``<cpu>``: on bus 0 itself, or on a root port that is not shown."""
        address = parse_address(part.origin)
        if part.kind is not Kind.SWITCH and address is not None and address.bus == 0:
            return part
        self.ports_made_up += 1
        return Part(Kind.ROOT_PORT, f"above {part.origin}", part.rank, below=(part,))

    def _pci(self, pci: Element) -> Part:
        """A ``<pci>``: a switch if it has others in it or says so."""
        address = self._address(pci)
        origin = str(address)
        rank = (address.domain, address.bus, address.slot, address.number)
        inner = list(pci.each("pci"))
        code = pci.get("class").lower()
        if inner or code.startswith(_CLASS_BRIDGE):
            below = tuple(self._pci(each) for each in inner)
            return Part(Kind.SWITCH, origin, rank, _ids(pci), Acs.UNKNOWN, below=below)
        gpu = next(pci.each("gpu"), None)
        words = _ids(pci)
        if gpu is not None:
            self.gpus[origin] = gpu
            words = f"{words}, device {plain(gpu.get('dev'), 8)}".lstrip(", ")
        nets = [net.get("name") for nic in pci.each("nic") for net in nic.each("net")]
        if nets:
            words = f"{words}, {plain(' '.join(nets))}".lstrip(", ")
        return Part(self._kind(pci, code, origin), origin, rank, words)

    def _address(self, pci: Element) -> Address:
        text = pci.get("busid")
        address = parse_address(text)
        if address is None:
            pci.fail(f'<pci> has busid="{plain(text)}"', "a PCI address such as 0000:3b:00.0")
        if address in self.seen:
            first = self.seen[address]
            pci.fail(f"a second <pci> with busid {address}; the first is in line {first}")
        self.seen[address] = pci.line
        return address

    def _kind(self, pci: Element, code: str, origin: str) -> Kind:
        if origin in self.gpus:
            return Kind.GPU
        if any(pci.each("nic")):
            return Kind.NIC
        if not code:
            self.without_class.append(origin)
            return Kind.GPU
        digits = code.removeprefix("0x")
        if len(digits) != 6 or not all(c in "0123456789abcdef" for c in digits):
            pci.fail(f'<pci> has class="{plain(code)}"', "a PCI class such as 0x030200")
        return kinds.of_class(int(digits[:4], 16), _hex(pci, "vendor"), _hex(pci, "device"))

    def _wires(self) -> tuple[Wire, ...]:
        direct: dict[tuple[str, str, str], int] = {}
        fabric: dict[str, int] = {}
        others = 0
        for origin, gpu in self.gpus.items():
            for link in gpu.each("nvlink", "xgmi", "c2c"):
                if link.tag == "c2c":
                    others += 1
                    continue
                count = link.number("count", 1, MOST_LINKS)
                target = parse_address(link.get("target"))
                if target is not None and str(target) in self.gpus:
                    first, second = sorted((origin, str(target)))
                    if first == second:
                        link.fail(f"a link from {origin} to itself")
                    key = (_LINK_KINDS[link.tag], first, second)
                    direct[key] = max(count, direct.get(key, 0))
                # In a virtual machine NCCL cannot see the NVSwitches, and writes no address.
                elif target is None or link.get("tclass").lower().startswith(_CLASS_NVSWITCH):
                    fabric[origin] = fabric.get(origin, 0) + count
                else:
                    others += 1
        if others:
            self.notes.folded.append(f"{counted(others, 'link')} to something other than a GPU")
        wires = [Wire(kind, (a, b), width) for (kind, a, b), width in direct.items()]
        if len(fabric) > 1:
            self.notes.changed.append(
                f"{counted(len(fabric), 'GPU')} reach one another through NVSwitches: each pair "
                "has a link of its own, as wide as the narrower of the two's connection"
            )
            wires += [
                Wire("nvlink", (a, b), min(MOST_LINKS, fabric[a], fabric[b]))
                for a, b in itertools.combinations(sorted(fabric), 2)
            ]
        return tuple(wires)


def _ids(pci: Element) -> str:
    vendor, device = (pci.get(name).removeprefix("0x") for name in ("vendor", "device"))
    return plain(f"{vendor}:{device}", 20) if vendor and vendor != "ffff" else ""


def _hex(pci: Element, name: str) -> int:
    """An identifier of 16 bits, or 0."""
    digits = pci.get(name).removeprefix("0x")
    is_number = 0 < len(digits) <= 4 and all(c in "0123456789abcdefABCDEF" for c in digits)
    return int(digits, 16) if is_number else 0


def _peers_through_host(cpus: list[Element]) -> bool | None:
    """True for AMD's Zen; Intel's host bridge decides, and the file does not name it."""
    answers = [_is_zen(cpu) for cpu in cpus]
    return True if answers and all(answers) else None


def _is_zen(cpu: Element) -> bool:
    family = cpu.get("familyid")
    if cpu.get("vendor") not in _AMD_NAMES or not family.isascii() or not family.isdigit():
        return False
    if len(family) > 4:
        return False
    # NCCL's number has CPUID's extended family above the basic one, not added to it.
    basic, extended = int(family) & 0xF, int(family) >> 4
    return basic + extended >= FIRST_ZEN_FAMILY
