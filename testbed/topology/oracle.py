# SPDX-License-Identifier: Apache-2.0
"""What the guest's kernel must make of a rack, predicted from its placement.

IOMMU groups follow Linux 7.2 ``drivers/iommu/iommu.c`` (``pci_device_group``) and
``drivers/pci/pci.c`` (``pci_acs_enabled``, ``pci_acs_path_enabled``); the path of peer-to-peer DMA
follows ``drivers/pci/p2pdma.c`` (``calc_map_type_and_dist``), and what switches do by themselves
PCI Express Base Specification 6.0, 6.12.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from testbed.topology.model import Node
from testbed.topology.plan import Function, NodePlan, Role

# q35's own functions, which are no part of a plan: the host bridge and the ICH9's ISA bridge.
CHIPSET_BDFS = ("0000:00:00.0", "0000:00:1f.0")


def iommu_groups(plan: NodePlan, node: Node) -> tuple[frozenset[str], ...]:
    """The groups that sysfs will show, each a set of ``0000:BB:SS.F``, ordered by their first.

    Empty if there is no IOMMU or the kernel is told not to use it.
    """
    if node.iommu.mode == "off":
        return ()
    walk = _Walk.over(plan)
    groups: dict[str, set[str]] = {}
    for function in plan.functions:
        if function.role is not Role.IOMMU:
            groups.setdefault(walk.group_of(function), set()).add(function.bdf)
    members = [*groups.values(), *({bdf} for bdf in CHIPSET_BDFS)]
    return tuple(sorted((frozenset(group) for group in members), key=min))


@dataclass(frozen=True)
class _Walk:
    """The kernel's walk from a device towards the root."""

    bridges: Mapping[str, Function]  # by qemu_id
    slots: Mapping[tuple[int, int], list[Function]]  # by bus and slot

    @classmethod
    def over(cls, plan: NodePlan) -> _Walk:
        slots: dict[tuple[int, int], list[Function]] = {}
        for function in plan.functions:
            slots.setdefault((function.bus, function.slot), []).append(function)
        return cls({f.qemu_id: f for f in plan.functions if f.secondary_bus}, slots)

    def group_of(self, function: Function) -> str:
        """The name of a function's group: the ``qemu_id`` of the one that founds it."""
        bridge = self.bridges.get(function.parent)
        if bridge and not self._is_isolated_up_to_root(bridge):
            return self.group_of(bridge)
        if self._is_isolated(function):
            return function.qemu_id
        # Functions of one slot may reach one another inside the device.
        partners = self.slots[function.bus, function.slot]
        return min(
            (f for f in partners if not self._is_isolated(f)), key=lambda f: f.number
        ).qemu_id

    def _is_isolated_up_to_root(self, bridge: Function) -> bool:
        """``pci_acs_path_enabled``: every step from here to the root keeps peers apart."""
        above = self.bridges.get(bridge.parent)
        return self._is_isolated(bridge) and (above is None or self._is_isolated_up_to_root(above))

    def _is_isolated(self, function: Function) -> bool:
        """``pci_acs_enabled``: a port needs ACS, which the kernel then turns on; a device that is
        the only function of its slot has no peer to be kept apart from."""
        if function.kind == "igb":
            return True  # drivers/pci/quirks.c: the 82576 has no ACS and is known to need none
        if function.role in (Role.ROOT_PORT, Role.SWITCH_DOWNSTREAM):
            return function.acs
        return not function.multifunction


class MapType(StrEnum):
    """How one device's DMA reaches another's memory (``enum pci_p2pdma_map_type``)."""

    BUS = "bus"  # by bus address, inside the switch
    HOST_BRIDGE = "host-bridge"  # up through the root complex, translated if an IOMMU is in use
    NONE = "none"  # not allowed


@dataclass(frozen=True)
class Cpu:
    """What ``/proc/cpuinfo`` says: vendor_id, such as ``AuthenticAMD``, and cpu family."""

    vendor: str
    family: int


@dataclass(frozen=True)
class P2pDecision:
    """The kernel's decision for a pair, how far apart they are, and which ports redirect."""

    map_type: MapType
    distance: int
    redirects: tuple[str, ...]


Q35_HOST_BRIDGE = (0x8086, 0x29C0)
FIRST_ZEN_FAMILY = 0x17

# Host bridges known to pass peer traffic between root ports (p2pdma.c, pci_p2pdma_whitelist).
# A rack's node has one host bridge, so that those good for one bridge only need no list of theirs.
_GOOD_INTEL_BRIDGES = frozenset(
    (
        *(0x3C00, 0x3C01, 0x2F00, 0x2F01, 0x2030, 0x2031, 0x2032, 0x2033, 0x2020, 0x09A2, 0x0B25),
        *(0x0CFE, 0x11FB, 0x1212, 0x1216, 0x4940, 0x4942, 0x4944, 0x4946, 0x4948),
    )
)
_INTEL, _GOOGLE = 0x8086, 0x1AE0


def redirecting_ports(plan: NodePlan, node: Node) -> frozenset[str]:
    """The addresses of the ports that redirect once the kernel is up.

    Linux turns redirection on in every port that has ACS, if an IOMMU is in use (``pci_enable_acs``
    after ``pci_request_acs``). AMD's need only be there: ``detect_ivrs`` asks for it before anyone
    looks at ``amd_iommu=off``. What a running guest says of its ports counts for more than this.
    """
    if node.iommu.mode == "off" and node.iommu.kind != "amd":
        return frozenset()
    return frozenset(f.bdf for f in plan.functions if f.acs)


def p2p_decision(
    plan: NodePlan,
    provider: Function,
    client: Function,
    *,
    cpu: Cpu,
    redirecting: Collection[str],
    host_bridge: tuple[int, int] = Q35_HOST_BRIDGE,
) -> P2pDecision:
    """How ``client`` may reach memory of ``provider``.

    ``host_bridge`` is the (vendor, device) of the root bus's first device; ``redirecting`` the
    addresses of the ports with any of ACS P2P request redirect, completion redirect or egress
    control turned on.
    """
    bridges = {f.qemu_id: f for f in plan.functions if f.secondary_bus}
    up = list(_path_to_root(bridges, provider))
    down = list(_path_to_root(bridges, client))
    common = next((f for f in up if f in down), None)
    if common is None:
        # The kernel has then walked both ways to their ends.
        return P2pDecision(through_host(cpu, host_bridge), len(up) + len(down), ())
    steps_up, steps_down = up.index(common), down.index(common)
    on_the_way = [*up[: steps_up + 1], *down[:steps_down]]
    redirects = tuple(f.name for f in on_the_way if f.bdf in redirecting)
    map_type = through_host(cpu, host_bridge) if redirects else MapType.BUS
    return P2pDecision(map_type, steps_up + steps_down, redirects)


def _path_to_root(bridges: Mapping[str, Function], function: Function) -> Iterator[Function]:
    step: Function | None = function
    while step is not None:
        yield step
        step = bridges.get(step.parent)


def through_host(cpu: Cpu, host_bridge: tuple[int, int]) -> MapType:
    """Whether peers reach one another up through the root complex (``host_bridge_whitelist``)."""
    vendor, device = host_bridge
    is_zen = cpu.vendor == "AuthenticAMD" and cpu.family >= FIRST_ZEN_FAMILY
    is_good = vendor == _GOOGLE or (vendor == _INTEL and device in _GOOD_INTEL_BRIDGES)
    return MapType.HOST_BRIDGE if is_zen or is_good else MapType.NONE


class Route(StrEnum):
    """Where a request by a peer's bus address goes, as the hardware does it."""

    SWITCH = "switch"  # straight to the peer, inside the switch that both are below
    REDIRECTED = "redirected"  # up to the root complex, though they have a switch in common
    ROOT = "root"  # up to the root complex: there is no other way


def ports_above(plan: NodePlan, function: Function) -> list[Function]:
    """The bridges between a function and the root bus, nearest first."""
    bridges = {f.qemu_id: f for f in plan.functions if f.secondary_bus}
    return list(_path_to_root(bridges, function))[1:]


def ingress_port(plan: NodePlan, requester: Function, peer: Function) -> Function | None:
    """The port through which a request comes into the switch above both; None: there is none.

    It alone decides. A port further down has sent the request up already, and how the way down is
    set plays no part, though Linux asks for all of them (``calc_map_type_and_dist``).
    """
    above_peer = ports_above(plan, peer)
    for below, port in pairwise(ports_above(plan, requester)):
        if port in above_peer:
            return below
    return None


def hardware_route(
    plan: NodePlan, requester: Function, peer: Function, redirecting: Collection[str]
) -> Route:
    """Who decides about a request of ``requester`` by the bus address of ``peer``.

    ``redirecting``: as for :func:`p2p_decision`.
    """
    port = ingress_port(plan, requester, peer)
    if port is None:
        return Route.ROOT
    return Route.REDIRECTED if port.bdf in redirecting else Route.SWITCH
