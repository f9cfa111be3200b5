# SPDX-License-Identifier: Apache-2.0
"""A machine's paths as tables: what was observed or predicted, pair by pair.

Whoever fills them has walked the PCI tree (the agent from sysfs, the host from a rack's plan and
its prediction of the kernel's rule); nothing is concluded here.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_agent.p2p.errors import UnknownKindError
from guest_agent.p2p.interconnect import FABRIC_KINDS, PRIVATE_KINDS, Facts, Kind, NoWay, Placement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping
    from typing import Any

    from guest_agent.p2p.interconnect import Offer

NOT_ON_PCIE = NoWay("no PCIe path between the two is known")


@dataclass(frozen=True)
class Link:
    """A private link and its two ends, each a device and the port that an offer names.

    :raises UnknownKindError: of a type that is no private link.
    """

    kind: Kind
    name: str
    ends: tuple[tuple[str, str], tuple[str, str]]
    width_lanes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in PRIVATE_KINDS:
            words = ", ".join(kind.value for kind in PRIVATE_KINDS)
            raise UnknownKindError(f"link {self.name}: {self.kind.value} is none of {words}")


@dataclass(frozen=True)
class Fabric:
    """A scale-up fabric, the devices on it, and the facts of a path between any two of them."""

    name: str
    devices: frozenset[str]
    facts: Facts


class TableTopology:
    """A :class:`Topology` from tables.

    :param pcie: (exporter, importer) → the path of the importer's DMA to the exporter's memory.
    :param system: device → its path to RAM.
    :param places: device → what devices have in common whose rows and columns in ``pcie`` are
        equal, such as the bridge above them; without it each is looked at on its own.
    """

    def __init__(
        self,
        pcie: Mapping[tuple[str, str], Facts | NoWay],
        system: Mapping[str, Facts],
        links: Iterable[Link] = (),
        fabrics: Iterable[Fabric] = (),
        places: Mapping[str, Hashable] | None = None,
    ) -> None:
        self._pcie = pcie
        self._system = system
        self.links = tuple(links)
        self._links = {(link.kind, *end): link for link in self.links for end in link.ends}
        self._fabrics = tuple(fabrics)
        self._places = places or {}

    def meeting(self, offer: Offer) -> Hashable:
        """See :meth:`Topology.meeting`."""
        if offer.kind in PRIVATE_KINDS:
            link = self._links.get((offer.kind, offer.device, offer.port))
            return link.name if link is not None else None
        if offer.kind in FABRIC_KINDS:
            fabric = self._fabric_of(offer.device)
            return fabric.name if fabric is not None else None
        return "PCIe" if offer.device in self._system else None

    def place(self, offer: Offer) -> Hashable:
        """See :meth:`Topology.place`."""
        return self._places.get(offer.device, offer.device)

    def facts(self, exporter: Offer, importer: Offer, placement: Placement) -> Facts | NoWay:
        """See :meth:`Topology.facts`."""
        if exporter.kind in PRIVATE_KINDS:
            if (exporter.device, exporter.port) == (importer.device, importer.port):
                return NoWay("both are the same end of the link")
            link = self._links[exporter.kind, exporter.device, exporter.port]
            return Facts(hops=1, width_lanes=link.width_lanes)
        if exporter.kind in FABRIC_KINDS:
            fabric = self._fabric_of(exporter.device)
            return fabric.facts if fabric is not None else NoWay("not on the fabric")
        if placement is Placement.SYSTEM:
            return self._system[importer.device]
        if exporter.device == importer.device:
            return Facts()
        return self._pcie.get((exporter.device, importer.device), NOT_ON_PCIE)

    def _fabric_of(self, device: str) -> Fabric | None:
        return next((each for each in self._fabrics if device in each.devices), None)


def topology_from(tables: Mapping[str, Any], fabrics: Iterable[Fabric] = ()) -> TableTopology:
    """A topology from plain data.

    ``pcie``: a list of ``{exporter, importer}`` with either ``no_way`` (why) or facts; ``system``:
    device → facts; ``links``: a list of ``{kind, name, ends, width}``. Facts are ``hops``,
    ``redirects``, ``host_bridge``, ``iommu``, ``width``, ``distance``; see :class:`Facts`.

    :raises UnknownKindError: a link of a type that is none.
    """
    pcie: dict[tuple[str, str], Facts | NoWay] = {
        (each["exporter"], each["importer"]): (
            NoWay(each["no_way"]) if each.get("no_way") else _facts(each)
        )
        for each in tables["pcie"]
    }
    system = {device: _facts(each) for device, each in tables["system"].items()}
    return TableTopology(pcie, system, [_link(each) for each in tables["links"]], fabrics)


def _facts(each: Mapping[str, Any]) -> Facts:
    return Facts(
        each["hops"],
        tuple(each["redirects"]),
        each["host_bridge"],
        each["iommu"],
        each["width"],
        distance=each.get("distance", 0),
    )


def _link(each: Mapping[str, Any]) -> Link:
    one, other = each["ends"]
    return Link(Kind.parse(each["kind"]), each["name"], (tuple(one), tuple(other)), each["width"])
