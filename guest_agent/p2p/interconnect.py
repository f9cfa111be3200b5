# SPDX-License-Identifier: Apache-2.0
"""Types of interconnect, what each side offers on them, and the facts that make one path better.

The discussion of 2025-09 on dma-buf interconnects: exporter and importer both list what they can
do, and the core, which knows neither driver, finds the match. The RFC of 2026-02-17 calls the types
"mapping types".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from guest_agent.p2p.errors import UnknownKindError, unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable


class Kind(enum.Enum):
    """The types of interconnect."""

    PCIE = "pcie"  # dma_addr_t of one requester for the peer's BAR
    XGMI = "xgmi"
    NVLINK = "nvlink"
    XELINK = "xelink"
    UAL_PHYSICAL = "ual-physical"  # like passthrough: fabric physical addresses, within one OS
    UAL_VIRTUAL = "ual-virtual"  # like a translating IOMMU: between operating systems
    VIRTUAL = "virtual"  # of a VM: its far end is known to the host alone
    SCATTER_LIST = "scatter-list"  # what every importer understands
    SYSTEM = "system"  # the memory is moved to RAM, and dma_addr_t leads there

    @classmethod
    def parse(cls, word: str) -> Kind:
        """The type of that name. :raises UnknownKindError: names the nearest one that there is."""
        try:
            return cls(word)
        except ValueError:
            words = [kind.value for kind in cls]
            raise UnknownKindError(unknown(word, "type of interconnect", words)) from None


PRIVATE_KINDS = (Kind.XGMI, Kind.NVLINK, Kind.XELINK)
FABRIC_KINDS = (Kind.UAL_PHYSICAL, Kind.UAL_VIRTUAL)
DMA_KINDS = (Kind.PCIE, Kind.SCATTER_LIST, Kind.SYSTEM)  # those that end in a dma_addr_t


class Placement(enum.Enum):
    """Where a buffer's bytes are."""

    DEVICE = "device"  # the exporter's own memory (VRAM)
    SYSTEM = "system"  # RAM


@dataclass(frozen=True)
class Constraints:
    """What an offer demands or allows.

    ``address_bits``  importer: width of its DMA addresses.
    ``top_address``   exporter: the highest bus address of the memory, where nothing translates.
    ``accepts_p2p``   importer: takes a scatter list that leads to a peer's BAR.
    ``requires_p2p``  exporter: its scatter list leads to a BAR (RFC 2026-02: the importer must
                      accept that, and the distance must be ≥ 0).
    ``needs_cpu``     importer: reads or writes with the CPU (software RDMA).
    ``allows_cpu``    exporter: the CPU may.
    """

    address_bits: int = 64
    top_address: int = 0
    accepts_p2p: bool = True
    requires_p2p: bool = False
    needs_cpu: bool = False
    allows_cpu: bool = True


_NONE = Constraints()


@dataclass(frozen=True)
class Offer:
    """One entry of a list: "over this, from this device and port, with the bytes here".

    A device with several PCI functions on different paths makes one offer for each (multipath).

    ``placements``  exporter: where the bytes would be; importer: where it can reach them.
    """

    kind: Kind
    device: str
    port: str = ""
    placements: tuple[Placement, ...] = (Placement.DEVICE,)
    constraints: Constraints = _NONE
    # Offers are looked up a million times; the hash is made once.
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        parts = (self.kind, self.device, self.port, self.placements, self.constraints)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        port = f":{self.port}" if self.port else ""
        return f"{self.kind.value} {self.device}{port}"


# Nominal raw rate of one lane in one direction, where a topology does not say better: PCIe 4.0,
# xGMI at 25 GT/s, NVLink 3 at 50 GT/s, Xe Link at 53 GT/s, UALink 200G.
_LANE_MBPS = {
    Kind.XGMI: 3125,
    Kind.NVLINK: 6250,
    Kind.XELINK: 6625,
    Kind.UAL_PHYSICAL: 25000,
    Kind.UAL_VIRTUAL: 25000,
}
_PCIE_LANE_MBPS = 1969


@dataclass(frozen=True)
class Facts:
    """What is known of one path.

    ``hops``         bridges or links on the way.
    ``redirects``    ports with ACS redirect on the way: traffic goes up to the root complex.
    ``host_bridge``  through the root complex.
    ``iommu``        addresses are translated by an IOMMU on the way.
    ``width_lanes``  of the narrowest step; 0: not known.
    ``lane_mbps``    megabytes a second and lane; 0: nominal for the type.
    ``distance``     as ``pci_p2pdma_distance``; negative: no peer-to-peer over PCIe.
    """

    hops: int = 0
    redirects: tuple[str, ...] = ()
    host_bridge: bool = False
    iommu: bool = False
    width_lanes: int = 0
    lane_mbps: int = 0
    distance: int = 0


@dataclass(frozen=True)
class NoWay:
    """There is no path between two offers, and why."""

    reason: str


@dataclass(frozen=True, order=True)
class Quality:
    """How good a path is; less is better, the first difference decides.

    The order of the facts: bytes stay in device memory, no redirect, not through the root complex,
    no translation on the way, more bandwidth, fewer hops. The type's name plays no part.
    """

    leaves_device: bool
    redirects: int
    host_bridge: bool
    iommu: bool
    slowness: int  # minus megabytes a second
    hops: int


def quality(kind: Kind, placement: Placement, facts: Facts) -> Quality:
    """The quality of a path from its facts (the 2025-09 discussion: a "quality of path" metric)."""
    rate = facts.lane_mbps or _LANE_MBPS.get(kind, _PCIE_LANE_MBPS)
    return Quality(
        placement is not Placement.DEVICE,
        len(facts.redirects),
        facts.host_bridge,
        facts.iommu,
        -rate * facts.width_lanes,
        facts.hops,
    )


_WORSE = {
    "leaves_device": "the bytes have to leave device memory",
    "redirects": "more ACS redirects on the way ({0} against {1})",
    "host_bridge": "it goes through the root complex",
    "iommu": "it is translated by an IOMMU on the way",
    "slowness": "less bandwidth ({0} MB/s against {1})",
    "hops": "more hops ({0} against {1})",
}


def why_worse(loser: Quality, winner: Quality) -> str:
    """The first fact that makes ``loser`` the worse of the two; "" if it is not the worse."""
    for name, text in _WORSE.items():
        lost, won = getattr(loser, name), getattr(winner, name)
        if lost != won:
            return text.format(abs(lost), abs(won)) if lost > won else ""
    return ""


@dataclass(frozen=True)
class Path:
    """A match: one interconnect from one importer's port to one exporter's, and the placement."""

    exporter: Offer
    importer: Offer
    placement: Placement
    facts: Facts

    @property
    def kind(self) -> Kind:
        """The type of interconnect."""
        return self.exporter.kind

    @property
    def quality(self) -> Quality:
        """See :func:`quality`."""
        return quality(self.kind, self.placement, self.facts)

    def __str__(self) -> str:
        return f"{self.exporter} → {self.importer} ({self.placement.value})"


class Topology(Protocol):
    """What the core asks about the machine. All answers are values; equal asks, equal answers.

    For lists of thousands of offers the first two keep the work small: offers that cannot meet
    are never paired, and those in one place are looked at once. A thousand by a thousand devices
    on 64 bridges take 0.04 s; if each of them is a place of its own, a million answers, 18 s.
    """

    def meeting(self, offer: Offer) -> Hashable:
        """What both ends must have in common: a link's name, a fabric; None: not connected."""
        ...

    def place(self, offer: Offer) -> Hashable:
        """Offers of one place (and type) have the same facts towards any other device."""
        ...

    def facts(self, exporter: Offer, importer: Offer, placement: Placement) -> Facts | NoWay:
        """The path between two offers of one type that meet."""
        ...
