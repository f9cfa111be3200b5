# SPDX-License-Identifier: Apache-2.0
"""The one place where buffers, importers, devices and time meet."""

from __future__ import annotations

import errno

from guest_agent.p2p.buffer import Buffer
from guest_agent.p2p.events import Recorder
from guest_agent.p2p.graph import Graph
from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p.negotiation import negotiate, noted
from guest_agent.p2p.policies import BEST_QUALITY
from guest_agent.p2p.report import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from guest_agent.p2p.backend import Backend
    from guest_agent.p2p.clock import Clock
    from guest_agent.p2p.interconnect import Offer, Path, Topology
    from guest_agent.p2p.negotiation import Forwarder, Outcome
    from guest_agent.p2p.policies import Policy
    from guest_agent.p2p.resv import Reservation

DEFAULT_TIMEOUT_NS = 5_000_000_000


class Core:
    """What the kernel's dma-buf core is to its drivers.

    :param policy: how interconnects are chosen.
    :param forwarder: asks the host about virtual interconnects, if there is one.
    :param unmap_timeout_ns: how long an importer may keep a mapping that was invalidated.
    :param fence_timeout_ns: how long the work behind a fence may take.
    """

    def __init__(
        self,
        backend: Backend,
        topology: Topology,
        clock: Clock,
        *,
        policy: Policy = BEST_QUALITY,
        forwarder: Forwarder | None = None,
        events: Recorder | None = None,
        unmap_timeout_ns: int = DEFAULT_TIMEOUT_NS,
        fence_timeout_ns: int = DEFAULT_TIMEOUT_NS,
    ) -> None:
        self.backend = backend
        self.clock = clock
        self.events = events or Recorder(clock)
        self.graph = Graph(clock, self.events, fence_timeout_ns)
        self.policy = policy
        self.unmap_timeout_ns = unmap_timeout_ns
        self.fence_timeout_ns = fence_timeout_ns
        self.buffers: dict[str, Buffer] = {}
        self.topology = topology  # the next negotiation asks this one
        self.forwarder = forwarder

    def export(
        self,
        name: str,
        device: str,
        size_bytes: int,
        offers: Sequence[Offer],
        *,
        placements: tuple[Placement, ...] = tuple(Placement),
        resv: Reservation | None = None,
    ) -> Buffer:
        """Make a buffer. Its bytes are taken from the first placement that has room.

        :param offers: how it can be reached, in the order of the exporter's priority.
        :param placements: where its bytes may be; ``(Placement.DEVICE,)`` for an exporter that can
            only do peer-to-peer (VFIO), both for one like a GPU's driver.
        :param resv: shared with other buffers, or one of its own.
        :raises NoRoomError: none has room; names what is pinned there.
        """
        buffer = Buffer(self, name, device, size_bytes, offers, placements, resv)
        self.buffers[name] = buffer
        return buffer

    def negotiate(
        self,
        subject: str,
        exporter: Sequence[Offer],
        importer: Sequence[Offer],
        allowed: Collection[Placement],
        failed: Collection[Path] = (),
    ) -> Outcome:
        """:func:`negotiate` on this machine, as an event. Errors as there.

        :param failed: paths that were tried and do not work after all.
        """

        def check(path: Path) -> Refusal | None:
            if path in failed:
                return Refusal(errno.EOPNOTSUPP, "it was tried, and mapping failed")
            return self.backend.reach(path)

        def decide() -> Outcome:
            return negotiate(
                self.topology,
                exporter,
                importer,
                self.policy,
                allowed=allowed,
                check=check,
                forwarder=self.forwarder,
            )

        return noted(self.events, subject, decide)

    def pinned(self, device: str, placement: Placement) -> list[str]:
        """Who pins what in that memory: "buf0 (4096 bytes) by nic0"."""
        return [
            f"{buffer.name} ({buffer.size_bytes} bytes) by {', '.join(buffer.pinned_by())}"
            for buffer in self.buffers.values()
            if buffer.device == device and buffer.placement is placement and buffer.pinned_by()
        ]
