# SPDX-License-Identifier: Apache-2.0
"""Who reaches whose memory, pair by pair: predicted, decided by a kernel, measured. Pure.

What Linux makes of a pair, and what the hardware does, is :mod:`testbed.topology.oracle`'s. A cell
holds all that is known of one pair in one direction; where its parts contradict one another it
says so, and nothing is decided by guesswork: what was not asked is :class:`Unknown`, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from testbed.topology.machine import Iommu
from testbed.topology.oracle import (
    FIRST_ZEN_FAMILY,
    Q35_HOST_BRIDGE,
    Cpu,
    MapType,
    Route,
    hardware_route,
    p2p_decision,
    redirecting_ports,
)
from testbed.topology.peers import Near, Peer, link_word, nearness, peers
from testbed.topology.plan import Function, NodePlan, RackPlan


class MapKind(StrEnum):
    """What a driver's DMA mapping of a peer's memory is, in the kernel's hands."""

    BUS = "bus"  # the peer's bus address: no IOMMU sees it
    IOVA = "iova"  # an address that the IOMMU translates
    PHYSICAL = "phys"  # through the host bridge, with nothing that translates
    NONE = "none"  # refused


class Way(StrEnum):
    """How bytes are sent to a peer when it is tried."""

    RAW = "raw"  # to its raw bus address, which no IOMMU mapping has
    IOVA = "iova"  # to an IOVA that is mapped to it
    DISK = "disk"  # a disk's direct I/O: the kernel chooses the address


class Arrival(StrEnum):
    """Where bytes went."""

    PEER = "peer"  # to the peer, below the root complex: no IOMMU saw them
    IOMMU = "iommu"  # to the peer, translated
    ROOT = "root"  # to the peer through the root complex, which translates nothing
    ARRIVED = "arrived"  # to the peer; this device keeps no count of its paths
    REFUSED = "refused"  # nowhere: a fault, or the kernel's EINVAL
    ABSENT = "absent"  # not there, and this machine has no witness of refusals
    LOST = "lost"  # not there, and nobody refused them

    @property
    def is_there(self) -> bool:
        """The peer has the bytes."""
        return self not in (Arrival.REFUSED, Arrival.ABSENT, Arrival.LOST)

    def fits(self, expected: Arrival) -> bool:
        """Whether it is what was expected, as far as the one who saw it can tell."""
        if self is Arrival.ABSENT:
            return expected is Arrival.REFUSED
        return self is expected or (self is Arrival.ARRIVED and expected.is_there)


@dataclass(frozen=True)
class Unknown:
    """A value that is not to be had, and why."""

    why: str

    def __str__(self) -> str:
        return "-"


@dataclass(frozen=True)
class Decision:
    """What Linux makes of a pair; ``distance`` is None where it sees no way."""

    kind: MapKind
    distance: int | None

    def __str__(self) -> str:
        return self.kind if self.distance is None else f"{self.kind} {self.distance}"


Moves = Mapping[Way, Arrival]


@dataclass(frozen=True)
class Measured:
    """Where bytes went, each way that was tried."""

    moves: Moves

    @property
    def best(self) -> Arrival:
        """The shortest way by which they arrived; how they did not, if they did not."""
        arrived = [each for each in self.moves.values() if each.is_there]
        return (arrived or [*self.moves.values()])[0]

    def __str__(self) -> str:
        return str(self.best)


@dataclass(frozen=True)
class Platform:
    """What of a machine decides beside its tree.

    ``redirecting``: the addresses of ports that redirect. ``cpu`` None: whatever the host has.
    """

    cpu: Cpu | None
    host_bridge: tuple[int, int]
    redirecting: frozenset[str]


@dataclass(frozen=True)
class Prediction:
    """What must be so, from the topology.

    ``word``      what users know: a link's if there is one, else PCIe's.
    ``decision``  Linux's.
    ``moves``     where bytes go, each way that can be tried.
    ``redirects`` the ports that Linux finds in the way of a bus address.
    """

    word: str
    near: Near
    decision: Decision
    route: Route | None = None
    redirects: tuple[str, ...] = ()
    moves: Moves = field(default_factory=dict)

    @property
    def linux_is_stricter(self) -> bool:
        """Linux asks for all ports on the way, hardware only for the one of entry."""
        return bool(self.redirects) and self.route is Route.SWITCH


@dataclass(frozen=True)
class Cell:
    """``requester`` does DMA to ``target``.

    ``now`` is the prediction with the ports as the machine has them set; without a machine, or if
    they are set as planned, the same as ``predicted``.
    """

    requester: Peer
    target: Peer
    predicted: Prediction
    now: Prediction
    kernel: Decision | Unknown
    measured: Measured | Unknown

    @property
    def kernel_disagreements(self) -> tuple[str, ...]:
        """Where the kernel does not do what was predicted."""
        return tuple(self._unless_now(_of_kernel))

    @property
    def measured_disagreements(self) -> tuple[str, ...]:
        """Where bytes did not go as was predicted, or as the kernel's decision needs them to."""
        found = list(self._unless_now(_of_bytes))
        if isinstance(self.kernel, Decision) and isinstance(self.measured, Measured):
            raw = self.measured.moves.get(Way.RAW)
            is_bus = self.kernel.kind is MapKind.BUS
            if self.requester.routes and raw and is_bus and not raw.fits(Arrival.PEER):
                found.append(f"the kernel gives out its bus address, where bytes are {raw}")
        return tuple(found)

    @property
    def disagreements(self) -> tuple[str, ...]:
        """What contradicts what; empty if nothing does."""
        return self.kernel_disagreements + self.measured_disagreements

    def _unless_now(self, find: Callable[[Cell, Prediction], Iterator[str]]) -> Iterator[str]:
        now = list(find(self, self.now))
        for text in find(self, self.predicted):
            yield text if now else f"{text}; with its ports as they are set now that is right"

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences that must be so."""
        if not self.predicted.linux_is_stricter:
            return ()
        ports = ", ".join(self.predicted.redirects)
        text = f"Linux gives out no bus address, as {ports} on the way redirects"
        return (f"{text}; hardware asks only the port of entry, and routes it",)


def _of_kernel(cell: Cell, predicted: Prediction) -> Iterator[str]:
    if isinstance(cell.kernel, Decision) and cell.kernel != predicted.decision:
        yield f"predicted {predicted.decision}, the kernel says {cell.kernel}"


def _of_bytes(cell: Cell, predicted: Prediction) -> Iterator[str]:
    if isinstance(cell.measured, Measured):
        for way, seen in cell.measured.moves.items():
            expected = predicted.moves.get(way)
            if expected is not None and not seen.fits(expected):
                yield f"{_WAY_TEXTS[way]}: predicted {expected}, measured {seen}"


_WAY_TEXTS = {
    Way.RAW: "by raw bus address",
    Way.IOVA: "by IOVA",
    Way.DISK: "by direct I/O",
}


# --- prediction


def planned_platform(plan: RackPlan, node: str) -> Platform:
    """The machine as its topology describes it."""
    spec = plan.topology.nodes[node]
    return Platform(
        cpu_of(spec.machine.cpu), Q35_HOST_BRIDGE, redirecting_ports(plan.nodes[node], spec)
    )


def cpu_of(name: str) -> Cpu | None:
    """As far as it matters to Linux's rule: QEMU's EPYC models are AMD's of family 0x17 and later
    (target/i386/cpu.c). None for ``host``, which is whatever the host has."""
    if name.partition(",")[0] == "host":
        return None
    return Cpu("AuthenticAMD", FIRST_ZEN_FAMILY) if name.startswith("EPYC") else Cpu("", 0)


def predict(plan: RackPlan, requester: Peer, target: Peer, platform: Platform) -> Prediction:
    """What must be so for a pair; ``platform`` is the requester's machine."""
    links = link_word(plan.topology, requester, target)
    if requester.node != target.node:
        near = Near.SYSTEM  # no PCIe between machines
        return Prediction(links or near, near, Decision(MapKind.NONE, None))
    node, iommu = plan.nodes[requester.node], plan.topology.nodes[requester.node].iommu
    near = nearness(node, requester.client, target.client)
    memory = target.provider or target.client
    decision, redirects = decide(node, memory, requester.client, platform, iommu)
    route = hardware_route(node, requester.client, memory, platform.redirecting)
    moves = dict(_moves(requester, target, iommu, route, decision.kind))
    return Prediction(links or near, near, decision, route, redirects, moves)


def decide(
    node: NodePlan, provider: Function, client: Function, platform: Platform, iommu: Iommu
) -> tuple[Decision, tuple[str, ...]]:
    """What Linux must make of a pair, and which ports it then finds in the way."""
    said = p2p_decision(
        node,
        provider,
        client,
        # Linux trusts nothing that it does not know.
        cpu=platform.cpu or Cpu("", 0),
        redirecting=platform.redirecting,
        host_bridge=platform.host_bridge,
    )
    kind = _kind_of(said.map_type, iommu)
    return Decision(kind, None if kind is MapKind.NONE else said.distance), said.redirects


def _kind_of(map_type: MapType, iommu: Iommu) -> MapKind:
    """What a driver gets: through the host bridge, the IOMMU translates if the kernel uses it."""
    if map_type is MapType.NONE:
        return MapKind.NONE
    if map_type is MapType.BUS:
        return MapKind.BUS
    return MapKind.PHYSICAL if iommu.mode in ("off", "passthrough") else MapKind.IOVA


def has_containers(iommu: Iommu) -> bool:
    """Whether VFIO gives a device an address space of its own."""
    return iommu.mode != "off"


def _moves(
    requester: Peer, target: Peer, iommu: Iommu, route: Route, kind: MapKind
) -> Iterator[tuple[Way, Arrival]]:
    """Engines are told to copy into video memory; disks into any peer-to-peer memory."""
    if requester.copies and target.kind == "gpu":
        switched = route is Route.SWITCH and requester.routes
        up = Arrival.REFUSED if has_containers(iommu) else Arrival.ROOT
        yield Way.RAW, Arrival.PEER if switched else up
        if has_containers(iommu):
            yield Way.IOVA, Arrival.IOMMU
    elif requester.kind == "nvme" and target.provider:
        yield Way.DISK, _DISK_ARRIVALS[kind]


_DISK_ARRIVALS = {
    MapKind.BUS: Arrival.PEER,
    MapKind.IOVA: Arrival.IOMMU,
    MapKind.PHYSICAL: Arrival.ROOT,
    MapKind.NONE: Arrival.REFUSED,
}


# --- the matrix

Pair = tuple[str, str]  # names of requester and target


@dataclass(frozen=True)
class Matrix:
    """All pairs of a rack, in order of rows and columns; the diagonal has no cells.

    ``has_kernel``, ``has_measured``: whether a machine was asked at all.
    ``notes``: what the prediction had to assume.
    """

    peers: tuple[Peer, ...]
    cells: Mapping[Pair, Cell]
    has_kernel: bool = False
    has_measured: bool = False
    notes: tuple[str, ...] = ()

    @property
    def disagreements(self) -> tuple[str, ...]:
        """All cells', each with its pair."""
        return tuple(
            f"{one} → {other}: {text}"
            for (one, other), cell in self.cells.items()
            for text in cell.disagreements
        )


@dataclass(frozen=True)
class Findings:
    """What a running rack told: platforms by node, and by pair what its kernel said and what was
    measured."""

    platforms: Mapping[str, Platform]
    kernel: Mapping[Pair, Decision | Unknown] | None = None
    measured: Mapping[Pair, Measured | Unknown] | None = None


def matrix(plan: RackPlan, findings: Findings | None = None) -> Matrix:
    """The rack's matrix: predicted only, or with what a running rack told."""
    everyone = peers(plan)
    planned = {node: planned_platform(plan, node) for node in plan.nodes}
    nothing = Unknown("no machine was asked")
    kernel = findings.kernel if findings else None
    measured = findings.measured if findings else None
    cells: dict[Pair, Cell] = {}
    for requester in everyone:
        for target in everyone:
            if requester is target:
                continue
            pair = (requester.name, target.name)
            before = now = planned[requester.node]
            if findings is not None:
                now = findings.platforms[requester.node]
                before = Platform(now.cpu, now.host_bridge, before.redirecting)
            cells[pair] = Cell(
                requester,
                target,
                predict(plan, requester, target, before),
                predict(plan, requester, target, now),
                (kernel or {}).get(pair, nothing),
                (measured or {}).get(pair, nothing),
            )
    notes = tuple(
        f"{node}: `cpu: host` is taken for one that Linux does not trust with peer traffic"
        for node, platform in planned.items()
        if platform.cpu is None and findings is None
    )
    return Matrix(everyone, cells, kernel is not None, measured is not None, notes)


def changed_ports(plan: RackPlan, node: str, redirecting: frozenset[str]) -> tuple[str, ...]:
    """Ports whose ACS is not set as the plan has it, one line each."""
    planned = planned_platform(plan, node).redirecting
    return tuple(
        f"{port.name} at {port.bdf} "
        + (
            "redirects peers as planned, and does not now"
            if port.bdf in planned
            else "redirects peers now, which was not planned"
        )
        for port in plan.nodes[node].functions
        if port.secondary_bus and (port.bdf in planned) != (port.bdf in redirecting)
    )


def platform_for(plan: RackPlan, findings: Findings | None, node: str) -> Platform:
    """What a prediction for one machine rests on: its own facts, and ACS as it is set now."""
    return findings.platforms[node] if findings else planned_platform(plan, node)
