# SPDX-License-Identifier: Apache-2.0
"""The PCI tree of a running machine, in QEMU's words: bus numbers, windows, BARs, ACS controls.

Nothing of it comes from the topology, for the guest changes all of it at run time. ``query-pci``
(qapi/pci.json) tells the tree: a BAR's address there is where QEMU decodes it at this moment, so
that a function whose memory decoding is off has none. What it does not tell (a bridge's command
register, its ACS control) is read from configuration space through the ECAM window with `xp`; only
bridges are read so, which are QEMU's own: no device model is asked anything, and none can be waited
for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, NamedTuple

# The config writes that change a tree, and the ejection by ACPI, which needs none; both are logged
# before they take effect, by a thread that holds QEMU's lock until they have (hw/pci/pci_host.c,
# hw/acpi/pcihp.c).
CHANGE_EVENTS: Final = ("pci_cfg_write", "acpi_pci_eject_slot")

BRIDGE_CLASS: Final = 0x0604
HOST_BRIDGE_PATH: Final = "/machine/q35"
ECAM_PROPERTY: Final = "MCFG"  # its base as the MCH's PCIEXBAR register says (hw/pci-host/q35.c)
CHUNK_BYTES: Final = 512  # of configuration space, read at once
CONFIG_BYTES: Final = 4096

# linux/pci_regs.h
COMMAND: Final = 0x04
COMMAND_MEMORY: Final = 0x2
CAPABILITIES: Final = 0x34
CAPABILITY_EXPRESS: Final = 0x10
LINK_CAPABILITIES: Final = 0x0C
EXTENDED_CAPABILITIES: Final = 0x100
EXTENDED_ACS: Final = 0x000D
ACS_CONTROL: Final = 0x04  # the upper half; the lower is the capability register
ACS_EGRESS_VECTOR: Final = 0x08
MAX_CAPABILITIES: Final = 48


class TreeUnreadable(Exception):
    """QEMU's answers do not fit together."""


class Port(StrEnum):
    """What a bridge is, by where it stands (PCIe Base 6.0, 1.3).

    Not by its capability: QEMU's `pcie-root-port` below an `x3130-upstream` does a downstream
    port's work and calls itself a root port.
    """

    ROOT = "root"
    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"


class Acs(NamedTuple):
    """A port's ACS control register (linux/pci_regs.h, PCI_ACS_CTRL), and its egress vector."""

    request_redirect: bool
    completion_redirect: bool
    upstream_forwarding: bool
    egress_control: bool
    egress_vector: int = 0

    @classmethod
    def of(cls, control: int, egress_vector: int = 0) -> Acs:
        """From the register's value."""
        redirect, completion, forwarding, egress = (
            bool(control & bit) for bit in (0x04, 0x08, 0x10, 0x20)
        )
        return cls(redirect, completion, forwarding, egress, egress_vector)


class Range(NamedTuple):
    """Bus addresses from ``start`` to ``end`` (exclusive)."""

    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """How many."""
        return self.end - self.start

    def common(self, other: Range) -> Range | None:
        """What both hold."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end) if start < end else None


@dataclass(frozen=True)
class Bar:
    """A memory BAR, where it is decoded at this moment."""

    index: int
    range: Range


class Bridge(NamedTuple):
    """A function's other side: what it forwards downwards.

    ``windows`` is empty while its memory space is disabled. ``number`` is its port's, to which the
    egress vectors of its neighbours refer.
    """

    port: Port
    secondary: int
    subordinate: int
    windows: tuple[Range, ...]
    number: int = 0
    acs: Acs | None = None  # it has no such capability


class TreeFunction(NamedTuple):
    """One function: QEMU's name for it, its address, the address of the bridge above, or ""."""

    qemu_id: str
    bdf: str
    parent: str
    bars: tuple[Bar, ...] = ()
    bridge: Bridge | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.qemu_id or self.bdf


@dataclass(frozen=True)
class PciTree:
    """All functions, parents before children."""

    functions: tuple[TreeFunction, ...]

    @cached_property
    def _by_bdf(self) -> Mapping[str, TreeFunction]:
        return {function.bdf: function for function in self.functions}

    @cached_property
    def _below(self) -> Mapping[str, list[TreeFunction]]:
        below: dict[str, list[TreeFunction]] = {}
        for function in self.functions:
            below.setdefault(function.parent, []).append(function)
        return below

    def find(self, qemu_id: str) -> TreeFunction | None:
        """The function that QEMU knows by that identifier."""
        return next((f for f in self.functions if f.qemu_id == qemu_id), None)

    def parent(self, function: TreeFunction) -> TreeFunction | None:
        """The bridge above; None on the root bus."""
        return self._by_bdf.get(function.parent)

    def below(self, bridge: TreeFunction) -> tuple[TreeFunction, ...]:
        """What stands on a bridge's secondary bus."""
        return tuple(self._below.get(bridge.bdf, ()))


Execute = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


async def read_tree(execute: Execute) -> PciTree:
    """The tree as it is now.

    :param execute: carries out one QMP command; its errors pass through.
    :raises TreeUnreadable: an answer is no such answer, or the ECAM window shows other devices.
    """
    where = {"path": HOST_BRIDGE_PATH, "property": ECAM_PROPERTY}
    buses, ecam = await asyncio.gather(execute("query-pci", {}), execute("qom-get", where))
    try:
        found = [entry for bus in buses for entry in _walk(bus["devices"], "", None)]
        bridges = [(entry, port) for entry, _, port in found if port is not None]
        read = await asyncio.gather(
            *(_read_bridge(execute, ecam, entry, port) for entry, port in bridges)
        )
        by_bdf = {_bdf(entry): bridge for (entry, _), bridge in zip(bridges, read, strict=True)}
        return PciTree(
            tuple(
                TreeFunction(
                    entry["qdev_id"],
                    _bdf(entry),
                    parent,
                    tuple(_bars(entry)),
                    by_bdf.get(_bdf(entry)) if port else None,
                )
                for entry, parent, port in found
            )
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise TreeUnreadable(f"{type(error).__name__}: {error}") from error


def _walk(
    devices: list[Any], parent: str, above: Port | None
) -> Iterator[tuple[Any, str, Port | None]]:
    """Each entry of query-pci with its parent's address and, for a bridge, what port it is."""
    for entry in devices:
        if entry["class_info"]["class"] != BRIDGE_CLASS or "pci_bridge" not in entry:
            yield entry, parent, None
            continue
        if above is None:
            port = Port.ROOT
        else:
            port = Port.DOWNSTREAM if above is Port.UPSTREAM else Port.UPSTREAM
        yield entry, parent, port
        yield from _walk(entry["pci_bridge"].get("devices", []), _bdf(entry), port)


def _bdf(entry: Mapping[str, Any]) -> str:
    return f"0000:{entry['bus']:02x}:{entry['slot']:02x}.{entry['function']:x}"


def _bars(entry: Mapping[str, Any]) -> Iterator[Bar]:
    for region in entry["regions"]:
        start, size = region["address"], region["size"]
        # One that is not decoded stands at -1. Those above 5 are the expansion ROM.
        if region["type"] == "memory" and 0 <= start < (1 << 64) - size and region["bar"] < 6:
            yield Bar(region["bar"], Range(start, start + size))


async def _read_bridge(execute: Execute, ecam: int, entry: Mapping[str, Any], port: Port) -> Bridge:
    config = _Config(
        execute, ecam + (entry["bus"] << 20 | entry["slot"] << 15 | entry["function"] << 12)
    )
    identity = entry["id"]["device"] << 16 | entry["id"]["vendor"]
    if await config.word(0) != identity:
        raise TreeUnreadable(f"{_bdf(entry)} is not in the ECAM window at {ecam:#x}")
    bus = entry["pci_bridge"]["bus"]
    windows = [
        Range(bus[name]["base"], bus[name]["limit"] + 1)
        for name in ("memory_range", "prefetchable_range")
        if bus[name]["base"] <= bus[name]["limit"]
    ]
    if not await config.word(COMMAND) & COMMAND_MEMORY:
        windows = []
    express = await config.capability(CAPABILITY_EXPRESS)
    number = await config.word(express + LINK_CAPABILITIES) >> 24 if express else 0
    return Bridge(
        port, bus["secondary"], bus["subordinate"], tuple(windows), number, await _read_acs(config)
    )


async def _read_acs(config: _Config) -> Acs | None:
    at = await config.extended_capability(EXTENDED_ACS)
    if not at:
        return None
    both = await config.word(at + ACS_CONTROL)
    vector = 0
    if both & 0x20:  # it can control egress: 0 stands for 256 ports
        ports = both >> 8 & 0xFF or 256
        for word in range(-(-ports // 32)):
            vector |= await config.word(at + ACS_EGRESS_VECTOR + 4 * word) << 32 * word
    return Acs.of(both >> 16, vector)


class _Config:
    """One function's configuration space, read in chunks when first asked for."""

    def __init__(self, execute: Execute, base: int) -> None:
        self._execute = execute
        self._base = base
        self._chunks: dict[int, list[int]] = {}

    async def word(self, offset: int) -> int:
        """The 32 bits there. TreeUnreadable if QEMU shows no such thing."""
        if not 0 <= offset < CONFIG_BYTES:
            raise TreeUnreadable(f"a capability at {offset:#x}")
        chunk = offset // CHUNK_BYTES
        if chunk not in self._chunks:
            line = f"xp /{CHUNK_BYTES // 4}wx {self._base + chunk * CHUNK_BYTES:#x}"
            text = await self._execute("human-monitor-command", {"command-line": line})
            self._chunks[chunk] = parse_words(text)
        return self._chunks[chunk][offset % CHUNK_BYTES // 4]

    async def capability(self, number: int) -> int:
        """The offset of a capability, or 0."""
        at = await self.word(CAPABILITIES) & 0xFC
        for _ in range(MAX_CAPABILITIES):
            if not at:
                break
            word = await self.word(at)
            if word & 0xFF == number:
                return at
            at = word >> 8 & 0xFC
        return 0

    async def extended_capability(self, number: int) -> int:
        """Likewise, beyond the first 256 bytes."""
        at = EXTENDED_CAPABILITIES
        for _ in range(MAX_CAPABILITIES):
            word = await self.word(at)
            if word & 0xFFFF == number:
                return at
            at = word >> 20 & 0xFFC
            if at < EXTENDED_CAPABILITIES:
                break
        return 0


def parse_words(text: str) -> list[int]:
    """What `xp /Nwx` printed: ``00000000b0010000: 0x000c1b36 0x00100507 …``, line by line."""
    return [int(word, 16) for line in text.splitlines() for word in line.partition(":")[2].split()]
