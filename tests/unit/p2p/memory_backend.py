# SPDX-License-Identifier: Apache-2.0
"""A machine of dictionaries that really keeps bytes: memories, IOMMUs, links, a fabric, engines.

A device reaches nothing but what is mapped for it at that very address, and a copy happens when
its time comes, so that what the core decides ends in bytes that arrived, or in a fault.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterable, Mapping

from guest_agent.p2p.addresses import Address, DmaAddress, FabricAddress, LinkAddress
from guest_agent.p2p.backend import Backing
from guest_agent.p2p.clock import ManualClock
from guest_agent.p2p.errors import FaultError, NoRoomError
from guest_agent.p2p.fence import Fence, FenceContext
from guest_agent.p2p.interconnect import (
    FABRIC_KINDS,
    PRIVATE_KINDS,
    Facts,
    Kind,
    NoWay,
    Offer,
    Path,
    Placement,
)
from guest_agent.p2p.report import Refusal
from guest_agent.p2p.topology import Link

PAGE = 4096
COPY_NS = 1000


def link(kind: Kind, name: str, a: str, b: str, width: int = 16) -> Link:
    """A link whose ports are called as the link itself."""
    return Link(kind, name, ((a, name), (b, name)), width)


class Tree:
    """A topology: each device's way to the root, links, fabrics.

    :param ways: device → its ports from the root down: ``("rp0", "sw0", "dp1")``.
    :param no_host_bridge: the root complex passes no peer-to-peer.
    """

    def __init__(
        self,
        ways: Mapping[str, tuple[str, ...]],
        links: Iterable[Link] = (),
        fabrics: dict[str, frozenset[str]] | None = None,
        redirecting: Iterable[str] = (),
        *,
        no_host_bridge: bool = False,
        iommu: bool = True,
    ) -> None:
        self.ways = ways
        self.links = tuple(links)
        self.fabrics = fabrics or {}
        self.redirecting = frozenset(redirecting)
        self.no_host_bridge = no_host_bridge
        self.iommu = iommu
        self.asked = 0
        self._by_end = {(one.kind, *end): one for one in self.links for end in one.ends}

    def meeting(self, offer: Offer) -> Hashable:
        if offer.kind in PRIVATE_KINDS:
            found = self._by_end.get((offer.kind, offer.device, offer.port))
            return found.name if found else None
        if offer.kind in FABRIC_KINDS:
            return next((n for n, who in self.fabrics.items() if offer.device in who), None)
        return "pcie" if offer.device in self.ways else None

    def place(self, offer: Offer) -> Hashable:
        # Devices below the same port differ in nothing but their own last step.
        way = self.ways.get(offer.device, ())
        return (way[:-1], len(way), way[-1] in self.redirecting if way else False)

    def facts(self, exporter: Offer, importer: Offer, placement: Placement) -> Facts | NoWay:
        self.asked += 1
        if exporter.kind in PRIVATE_KINDS:
            if exporter.device == importer.device:
                return NoWay("a link to itself")
            found = self._by_end[exporter.kind, exporter.device, exporter.port]
            return Facts(hops=1, width_lanes=found.width_lanes)
        if exporter.kind in FABRIC_KINDS:
            return Facts(hops=2, width_lanes=4, iommu=exporter.kind is Kind.UAL_VIRTUAL)
        if placement is Placement.SYSTEM:
            hops = len(self.ways[importer.device])
            return Facts(hops=hops, host_bridge=True, iommu=self.iommu, width_lanes=16)
        return self._pcie(exporter.device, importer.device)

    def _pcie(self, a: str, b: str) -> Facts | NoWay:
        if a == b:
            return Facts(width_lanes=16)
        up, down = self.ways[a], self.ways[b]
        common = 0
        while common < min(len(up), len(down)) and up[common] == down[common]:
            common += 1
        hops = len(up) + len(down) - 2 * common
        redirects = tuple(p for p in (*up[common:], *down[common:]) if p in self.redirecting)
        through_root = not common or bool(redirects)
        if through_root and self.no_host_bridge:
            return NoWay("the host bridge passes no peer-to-peer")
        return Facts(
            hops, redirects, through_root, through_root and self.iommu, 16, 0, distance=hops
        )


class MemoryBackend:
    """See the module. Memories are lazily filled; a free list hands out and takes back ranges."""

    def __init__(self, clock: ManualClock, vram_bytes: int = 1 << 24) -> None:
        self.clock = clock
        self.vram_bytes = vram_bytes
        self.broken: dict[str, str] = {}  # link or fabric → why it is down
        self.liars: set[str] = set()  # devices that cannot reach what they offer
        self.copy_error: Exception | None = None
        self.copy_ns = COPY_NS
        self.copies = 0
        self._bytes: dict[int, bytearray] = {}
        self._used: dict[tuple[str, Placement], int] = {}
        # (user, kind of address, port) → address → what is there
        self.tables: dict[tuple[str, str, str], dict[int, tuple[Backing, bool]]] = {}
        self.invalidated: list[Address] = []
        self._next_iova: dict[tuple[str, str, str], int] = {}
        self._free_iova: dict[tuple[str, str, str, int], list[int]] = {}
        self._reserved: dict[tuple[str, str, str, int], int] = {}
        self._number = 0
        self._context = FenceContext("copy engine")

    # --- memory

    def allocate(self, device: str, placement: Placement, size_bytes: int) -> Backing:
        key = (device if placement is Placement.DEVICE else "", placement)
        used = self._used.get(key, 0)
        if placement is Placement.DEVICE and used + size_bytes > self.vram_bytes:
            left = self.vram_bytes - used
            raise NoRoomError(f"{size_bytes} bytes wanted in {device}, {left} left")
        self._used[key] = used + size_bytes
        self._number += 1
        self._bytes[self._number] = bytearray(size_bytes)
        return Backing(self._number, device, placement, used, size_bytes)

    def free(self, backing: Backing) -> None:
        for table in self.tables.values():
            for there, _ in table.values():
                assert there.number != backing.number, "freed while mapped"
        key = (
            backing.device if backing.placement is Placement.DEVICE else "",
            backing.placement,
        )
        self._used[key] -= backing.size_bytes
        del self._bytes[backing.number]

    def held(self) -> int:
        """How many ranges of memory are in use."""
        return len(self._bytes)

    def mapped(self) -> int:
        """How many mappings there are."""
        return sum(len(table) for table in self.tables.values())

    def reserved(self) -> int:
        """How many addresses are reserved."""
        return len(self._reserved)

    # --- mappings

    def reach(self, path: Path) -> Refusal | None:
        down = self.broken.get(path.exporter.port) or self.broken.get(path.kind.value)
        return Refusal(errno.EOPNOTSUPP, down) if down else None

    def reserve(self, backing: Backing, path: Path) -> Address:
        user = path.importer.device
        if user in self.liars and backing.placement is Placement.DEVICE:
            raise FaultError(f"{user} does not decode addresses of {backing.device}")
        table = self._table_of(path)
        free = self._free_iova.setdefault((*table, backing.size_bytes), [])
        if free:
            value = free.pop()
        else:
            # Each address space begins elsewhere: an address of one is wrong in another.
            first = 0x1000_0000 + 0x100_0000 * (sum(map(ord, "".join(table))) % 997)
            value = self._next_iova.get(table, first)
            self._next_iova[table] = value + backing.size_bytes + PAGE
        self._reserved[*table, value] = backing.size_bytes
        if table[1] == "link":
            return LinkAddress(value, user, table[2])
        if table[1] == "fabric":
            return FabricAddress(value, user, table[2], path.kind is Kind.UAL_PHYSICAL)
        return DmaAddress(value, user)

    def release(self, path: Path, address: Address) -> None:
        table = self._table_of(path)
        assert address.value not in self.tables.get(table, {}), "released while mapped"
        size = self._reserved.pop((*table, address.value))
        self._free_iova[*table, size].append(address.value)

    def map(self, backing: Backing, path: Path, address: Address, *, writable: bool) -> None:
        table = self._table_of(path)
        assert (*table, address.value) in self._reserved, "mapped where nothing is reserved"
        entries = self.tables.setdefault(table, {})
        assert address.value not in entries, "mapped twice"
        entries[address.value] = (backing, writable)

    def _table_of(self, path: Path) -> tuple[str, str, str]:
        user = path.importer.device
        if path.kind in PRIVATE_KINDS or path.kind is Kind.VIRTUAL:
            return (user, "link", path.importer.port)
        if path.kind in FABRIC_KINDS:
            return (user, "fabric", "fabric0")
        return (user, "dma", "")

    def unmap(self, backing: Backing, path: Path, address: Address) -> None:
        del self.tables[self._table_of(path)][address.value]

    def invalidate(self, path: Path, address: Address) -> None:
        self.invalidated.append(address)

    # --- devices at work

    def copy(self, source: Backing, target: Backing) -> Fence:
        due = self.clock.now_ns() + self.copy_ns
        fence = Fence(self._context, f"copy {source.number} → {target.number}", due + 10**12)
        self.copies += 1

        def done() -> None:
            if self.copy_error is None:
                self._bytes[target.number][:] = self._bytes[source.number]
            fence.signal(self.copy_error)

        self.clock.at(due, done)
        return fence

    def _there(self, address: Address, offset: int, size: int, write: bool) -> bytearray:
        port = getattr(address, "port", "") or getattr(address, "fabric", "")
        sort = {DmaAddress: "dma", LinkAddress: "link", FabricAddress: "fabric"}[type(address)]
        found = self.tables.get((address.user, sort, port), {}).get(address.value)
        if found is None or offset + size > found[0].size_bytes or (write and not found[1]):
            raise FaultError(f"{address}: nothing there{' to write' if write else ''}")
        return self._bytes[found[0].number]

    def read(self, address: Address, offset: int, size_bytes: int) -> bytes:
        return bytes(self._there(address, offset, size_bytes, False)[offset : offset + size_bytes])

    def write(self, address: Address, offset: int, data: bytes) -> None:
        self._there(address, offset, len(data), True)[offset : offset + len(data)] = data
