# SPDX-License-Identifier: Apache-2.0
"""A pair of peers made ready: what is copied from where to where, and what must stay untouched."""

from __future__ import annotations

from dataclasses import dataclass

from testbed.instruments.bench import Bench, Engine
from testbed.instruments.cases import Pair
from testbed.instruments.mapper import CHUNK_BYTES, Mapper
from testbed.instruments.memory import Memory
from testbed.results.evidence import Access
from testbed.results.judging import Judgement, judge_fault
from testbed.topology.oracle import Route

PROBE_BYTES = 64  # the smallest copy worth judging: one frame, hence one fault if refused
LOCAL_OFFSET = 0
LOCAL_BYTES = 64 << 10
PEER_OFFSET = 256 << 10  # not the local one: a mix-up of the two must not go unseen


@dataclass(frozen=True)
class Ground:
    """``engine`` copies between ``local`` (its own memory) and ``peer`` (another device's)."""

    bench: Bench
    engine: Engine
    local: Memory
    peer: Memory
    route: Route

    @classmethod
    def of(cls, bench: Bench, pair: Pair, *, local_bytes: int = LOCAL_BYTES) -> Ground:
        """Start the requester's engine and find both memories; nothing is mapped yet.

        A requester without video memory gets ``local_bytes`` of guest memory as its own.
        """
        peer = bench.vram(pair.peer)
        engine = bench.engine(pair.requester, scratch=peer)
        local = (
            bench.vram(pair.local)
            if pair.local is not None
            else bench.buffer(f"local-{pair.requester.qemu_id}", local_bytes)
        )
        return cls(bench, engine, local, peer, pair.route)

    @property
    def mapper(self) -> Mapper:
        """The bench's."""
        return self.bench.mapper

    def map_local(self) -> int:
        """Map the local bytes for the engine, and of video memory what is then one entry of the
        IOMMU's instead of sixteen; returns their IOVA.
        """
        is_large = self.local.is_bar and self.local.size_bytes >= CHUNK_BYTES
        size = CHUNK_BYTES if is_large else LOCAL_BYTES
        return self.mapper.map(self.local, LOCAL_OFFSET, size, own=True).iova

    def fill_local(self, seed: int, size_bytes: int) -> bytes:
        """Put a pattern into the local bytes."""
        return self.local.fill(LOCAL_OFFSET, size_bytes, seed)

    def fill_peer(self, seed: int, size_bytes: int) -> bytes:
        """Put a pattern into the peer's bytes."""
        return self.peer.fill(PEER_OFFSET, size_bytes, seed)

    def deliver_to_peer(
        self, source_iova: int, target_iova: int, expected: bytes, *, path: str | None = "iommu"
    ) -> Judgement:
        """Copy, and judge what the peer then holds at the usual place, and how it came there."""
        return self.bench.deliver(
            self.engine,
            source_iova,
            target_iova,
            into=self.peer,
            offset=PEER_OFFSET,
            expected=expected,
            path=path,
        )

    def deliver_to_local(
        self,
        source_iova: int,
        target_iova: int,
        expected: bytes,
        *,
        at: int = 0,
        path: str | None = "iommu",
    ) -> Judgement:
        """Copy, and judge what the requester's own memory then holds, ``at`` bytes from where it
        is mapped.
        """
        return self.bench.deliver(
            self.engine,
            source_iova,
            target_iova + at,
            into=self.local,
            offset=LOCAL_OFFSET + at,
            expected=expected,
            path=path,
        )

    def write_refused(self, source_iova: int, address: int, reasons: frozenset[int]) -> Judgement:
        """Copy a little to ``address``, and judge that the IOMMU refused the write."""
        return self._refused(source_iova, address, address, Access.WRITE, reasons)

    def read_refused(self, address: int, target_iova: int, reasons: frozenset[int]) -> Judgement:
        """Copy a little from ``address``, and judge that the IOMMU refused the read."""
        return self._refused(address, target_iova, address, Access.READ, reasons)

    def _refused(
        self, source: int, target: int, address: int, access: Access, reasons: frozenset[int]
    ) -> Judgement:
        with self.bench.watch() as watch:
            status = self.engine.copy(source, target, PROBE_BYTES)
        judgement = judge_fault(
            watch.window,
            requester=self.engine.requester,
            address=address,
            access=access,
            reasons=reasons,
            size_bytes=PROBE_BYTES,
        )
        return Judgement(judgement.holds, judgement.reason, judgement.evidence + status.evidence)
