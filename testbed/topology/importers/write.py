# SPDX-License-Identifier: Apache-2.0
"""A folded machine as the text of a topology file, with its origins and its gaps in comments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from testbed.topology.importers.machine import DEVICES, Acs, Kind, Part, Wire
from testbed.topology.importers.source import plain
from testbed.topology.model import DEFAULT_ENGINE
from testbed.topology.placement import FIRST_FREE_SLOT, NETWORK_SLOT
from testbed.topology.units import MIB, format_size, power_of_two_at_least

NODE = "host0"
DEFAULT_VRAM_BYTES = 64 * MIB
_LEAST_VRAM_BYTES = MIB
# Each device in Python is a process; a rack with more devices than this has QEMU's instead.
MOST_MODELS = 32

# Slots of the root bus that are free; with more parts than these, eight ports share a slot.
_ROOT_SLOTS = range(FIRST_FREE_SLOT, NETWORK_SLOT)
_FUNCTIONS = 8

_ACS_WORDS = {Acs.REDIRECT: "redirect", Acs.OFF: "none", Acs.NONE: "none"}

Variable = tuple[str, str]  # the default, and a comment


@dataclass(frozen=True)
class Draft:
    """What is to be written.

    ``names``      the devices' names by origin.
    ``as_found``   GPUs have their own sizes of memory where these are known.
    ``vram_bytes`` the size for all others; all sizes are divided by two ``vram_shift`` times.
    ``cpu``        the machine's CPU model.
    """

    rack: str
    description: str
    roots: tuple[Part, ...]
    wires: tuple[Wire, ...]
    names: Mapping[str, str]
    cpu: str = "max"
    vram_bytes: int = DEFAULT_VRAM_BYTES
    as_found: bool = False
    vram_shift: int = 0

    def vram_of(self, gpu: Part) -> int:
        """The size of one GPU's memory here, in bytes; 0 if it has the common size."""
        if not self.as_found or not gpu.memory_bytes:
            return 0
        return self._scaled(power_of_two_at_least(gpu.memory_bytes))

    @property
    def common_vram_bytes(self) -> int:
        """The size for GPUs without one of their own."""
        return self._scaled(self.vram_bytes)

    def _scaled(self, size_bytes: int) -> int:
        return max(_LEAST_VRAM_BYTES, size_bytes >> self.vram_shift)

    def devices(self) -> Iterator[Part]:
        """Every device."""
        for root in self.roots:
            yield from root.devices()


def parts_of(roots: Sequence[Part], kind: Kind) -> Iterator[Part]:
    """All parts of one kind."""
    for part in roots:
        if part.kind is kind:
            yield part
        yield from parts_of(part.below, kind)


def variables(draft: Draft) -> dict[str, Variable]:
    """The file's settings: only those that it uses."""
    found: dict[str, Variable] = {
        "memory": ("1G", "the machine's memory"),
        "cpu": (draft.cpu, "EPYC: peers may meet in the host bridge; max: they may not"),
        "iommu_kind": ("intel", "intel, virtio, amd or none"),
        "iommu_mode": ("strict", "strict, lazy, passthrough or off"),
    }
    gpus = list(parts_of(draft.roots, Kind.GPU))
    if any(not draft.vram_of(gpu) for gpu in gpus):
        found["vram"] = (format_size(draft.common_vram_bytes), "each GPU's memory")
    nics = [part for part in draft.devices() if part.kind in (Kind.NIC, Kind.OTHER)]
    has_room = len(gpus) + len(nics) <= MOST_MODELS
    engine = DEFAULT_ENGINE if has_room else "edu"
    if gpus:
        found["engine"] = (engine, "the GPUs' copy engine: model, igb or edu")
    if nics:
        found["nic_engine"] = (engine, "the NICs' device: model, igb or edu")
    if any(port.acs is Acs.UNKNOWN for port in parts_of(draft.roots, Kind.ROOT_PORT)):
        found["root_port_acs"] = ("redirect", "not known from the file: redirect or none")
    if any(switch.acs is Acs.UNKNOWN for switch in parts_of(draft.roots, Kind.SWITCH)):
        found["switch_acs"] = ("none", "not known from the file: redirect or none")
    return found


def topology(draft: Draft, settings: Mapping[str, str], head: Sequence[str]) -> str:
    """The file's text; ``settings`` over the defaults, ``head`` as comments before everything."""
    lines = [f"# {line}".rstrip() for line in head]
    lines += ["", f"rack: {json.dumps(draft.rack)}"]
    lines += [f"description: {json.dumps(draft.description, ensure_ascii=False)}", "", "vars:"]
    for name, (default, comment) in variables(draft).items():
        lines.append(f"  {name}: {settings.get(name, default)}  # {comment}")
    lines += [
        "",
        "nodes:",
        f"  {NODE}:",
        "    machine: {cpu: {{ cpu }}, vcpus: 1, memory: {{ memory }}}",
        "    iommu: {kind: {{ iommu_kind }}, mode: {{ iommu_mode }}}",
        f"    pcie:{'' if draft.roots else ' []'}",
        *_Body(draft).roots(),
    ]
    wires = list(_wires(draft))
    if wires:
        lines += ["", "links:", *wires]
    return "\n".join(lines) + "\n"


def _wires(draft: Draft) -> Iterator[str]:
    for wire in draft.wires:
        ends = ", ".join(f"{NODE}/{draft.names[end]}" for end in wire.ends)
        width = f", width: {wire.width}" if wire.width else ""
        yield f"  - {{kind: {wire.kind}, between: [{ends}]{width}}}"


class _Body:
    """The lines below ``pcie:``."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._ports = 0
        self._switches = 0

    def roots(self) -> Iterator[str]:
        """All of them, with addresses if they need to share slots."""
        roots = self._draft.roots
        addresses: Iterator[str] = iter(())
        if len(roots) > len(_ROOT_SLOTS):
            addresses = _shared_addresses(roots)
        for root in roots:
            yield from self._part(root, 6, next(addresses, ""))

    def _part(self, part: Part, indent: int, address: str = "") -> Iterator[str]:
        name, fields = self._fields(part)
        if address:
            fields.insert(0, f'address: "{address}"')
        space = " " * indent
        comment = plain(f"{part.origin} {part.what}".strip(), 100)
        # A topology has no device of any other kind: a NIC is one that does DMA.
        kind = Kind.NIC if part.kind is Kind.OTHER else part.kind
        yield f"{space}- {kind}: {name}  # {comment}".rstrip(" #")
        yield from (f"{space}  {field}" for field in fields)
        if part.below:
            yield f"{space}  below:"
            for below in part.below:
                yield from self._part(below, indent + 4)

    def _fields(self, part: Part) -> tuple[str, list[str]]:
        if part.kind in DEVICES:
            return self._draft.names[part.origin], self._device_fields(part)
        if part.kind is Kind.ROOT_PORT:
            name, variable = f"rp{self._ports}", "root_port_acs"
            self._ports += 1
        else:
            name, variable = f"sw{self._switches}", "switch_acs"
            self._switches += 1
        acs = "{{ " + variable + " }}" if part.acs is Acs.UNKNOWN else _ACS_WORDS[part.acs]
        return name, [f"acs: {acs}"]

    def _device_fields(self, part: Part) -> list[str]:
        if part.kind is Kind.GPU:
            size_bytes = self._draft.vram_of(part)
            vram = format_size(size_bytes) if size_bytes else "{{ vram }}"
            return [f"vram: {vram}", "engine: {{ engine }}", "doorbell: true"]
        return [] if part.kind is Kind.NVME else ["engine: {{ nic_engine }}"]


def _shared_addresses(roots: Sequence[Part]) -> Iterator[str]:
    """Eight root ports to a slot, as large machines have them; a device has a slot of its own."""
    slot, number = FIRST_FREE_SLOT, 0
    for root in roots:
        is_port = root.kind is Kind.ROOT_PORT
        if number and (not is_port or number == _FUNCTIONS):
            slot, number = slot + 1, 0
        yield f"{min(slot, 0x1F):02x}.{number}"
        if is_port:
            number += 1
        else:
            slot += 1
