# SPDX-License-Identifier: Apache-2.0
"""Machines, offers and importers that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from guest_agent.p2p.attachment import Attachment, Importer, Mapping
from guest_agent.p2p.buffer import Buffer
from guest_agent.p2p.clock import ManualClock
from guest_agent.p2p.core import Core
from guest_agent.p2p.events import Recorder
from guest_agent.p2p.interconnect import PRIVATE_KINDS, Constraints, Kind, Offer, Placement
from guest_agent.p2p.negotiation import Forwarder
from guest_agent.p2p.policies import BEST_QUALITY, Policy
from guest_agent.p2p.resv import locked
from guest_agent.p2p.rules import Task
from tests.unit.p2p.memory_backend import MemoryBackend, Tree, link

DEVICE, SYSTEM = Placement.DEVICE, Placement.SYSTEM
BOTH = (DEVICE, SYSTEM)


def offer(
    kind: Kind,
    device: str,
    port: str = "",
    placements: Sequence[Placement] = (),
    constraints: Constraints | None = None,
) -> Offer:
    """An offer with the placements that its type is usually for."""
    if not placements:
        placements = (SYSTEM,) if kind is Kind.SYSTEM else (DEVICE,)
    return Offer(kind, device, port, tuple(placements), constraints or Constraints())


def gpu_offers(device: str, links: Iterable[tuple[Kind, str]] = ()) -> tuple[Offer, ...]:
    """A GPU: its links, PCIe, and RAM."""
    return (
        *(offer(kind, device, name) for kind, name in links),
        offer(Kind.PCIE, device),
        offer(Kind.SYSTEM, device),
    )


# gpu0 and gpu1 below one switch and linked, gpu2 below the other and linked to nothing; a NIC on
# both switches (two functions), a disk on a root port of its own.
WAYS = {
    "gpu0": ("rp0", "sw0", "dp0"),
    "gpu1": ("rp0", "sw0", "dp1"),
    "gpu2": ("rp1", "sw1", "dp2"),
    "nic0.0": ("rp0", "sw0", "dp3"),
    "nic0.1": ("rp1", "sw1", "dp4"),
    "disk": ("rp2",),
}


def tree(*, no_host_bridge: bool = False, redirecting: Iterable[str] = ()) -> Tree:
    """The machine above."""
    links = [link(Kind.XGMI, "x01", "gpu0", "gpu1")]
    return Tree(
        dict(WAYS),
        links,
        {"fabric0": frozenset(("gpu0", "gpu2"))},
        redirecting,
        no_host_bridge=no_host_bridge,
    )


class Machine:
    """A core on the memory backend, and importers that behave as they are told."""

    def __init__(
        self,
        topology: Tree | None = None,
        *,
        policy: Policy = BEST_QUALITY,
        forwarder: Forwarder | None = None,
        vram_bytes: int = 1 << 24,
        keep_events: int = 10_000,
    ) -> None:
        self.clock = ManualClock()
        self.backend = MemoryBackend(self.clock, vram_bytes)
        self.topology = topology or tree()
        self.core = Core(
            self.backend,
            self.topology,
            self.clock,
            policy=policy,
            forwarder=forwarder,
            events=Recorder(self.clock, keep_events),
        )
        self.exporter = Task("gpu0 driver")
        self.told: list[str] = []

    def export(
        self,
        name: str = "buf0",
        size_bytes: int = 8192,
        placements: tuple[Placement, ...] = BOTH,
        offers: Sequence[Offer] | None = None,
    ) -> Buffer:
        if offers is None:
            offers = gpu_offers("gpu0", [(Kind.XGMI, "x01")])
        return self.core.export(name, "gpu0", size_bytes, offers, placements=placements)

    def importer(
        self,
        name: str,
        offers: Sequence[Offer] | None = None,
        *,
        revocable: bool = True,
        dynamic: bool = True,
        polite: bool = True,
        during: Callable[[Task, Attachment], None] | None = None,
    ) -> Importer:
        """``polite``: unmaps when it is told to; ``during``: does something else then."""

        def invalidate(task: Task, attachment: Attachment) -> None:
            self.told.append(name)
            if during is not None:
                during(task, attachment)
            elif polite:
                for mapping in list(attachment.mappings.values()):
                    attachment.unmap(task, mapping)

        if offers is None:
            links = [(Kind.XGMI, "x01")] if name == "gpu1" else []
            offers = gpu_offers(name, links)
        return Importer(name, tuple(offers), dynamic, invalidate if revocable else None)

    def attach(self, buffer: Buffer, name: str, **how: object) -> Attachment:
        return buffer.attach(Task(name), self.importer(name, **how))  # type: ignore[arg-type]

    def map(self, attachment: Attachment, *, writable: bool = True) -> Mapping:
        task = Task(attachment.importer.name)
        with locked(task, attachment.buffer.resv):
            return attachment.map(task, writable=writable)

    def unmap(self, attachment: Attachment, mapping: Mapping) -> None:
        task = Task(attachment.importer.name)
        with locked(task, attachment.buffer.resv):
            attachment.unmap(task, mapping)

    def move(self, buffer: Buffer, placement: Placement) -> None:
        with locked(self.exporter, buffer.resv):
            buffer.move(self.exporter, placement)

    def settle(self) -> None:
        """Let everything that is queued happen."""
        for _ in range(100):
            self.core.graph.pump()
            if not len(self.core.graph):
                return
            self.clock.pause(self.clock.now_ns() + 1_000_000)

    def write(self, mapping: Mapping, offset: int, data: bytes) -> None:
        self.backend.write(mapping.address, offset, data)

    def read(self, mapping: Mapping, offset: int, size: int) -> bytes:
        return self.backend.read(mapping.address, offset, size)


__all__ = ["BOTH", "DEVICE", "PRIVATE_KINDS", "SYSTEM", "Machine", "gpu_offers", "offer", "tree"]
