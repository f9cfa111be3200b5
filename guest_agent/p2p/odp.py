# SPDX-License-Identifier: Apache-2.0
"""An importer that maps on demand: fault, wait for KERNEL fences, map, go on, and fault again.

As RDMA's on-demand paging of dma-bufs (drivers/infiniband/hw/mlx5/odp.c,
drivers/infiniband/core/umem_dmabuf.c). The 2020-10 discussion fears that a GPU which constantly
moves buffers starves such an importer, and proposes a fence, installed by the fault handler, that
keeps the buffer in place for long enough for one transfer: :class:`KeepAlive`. It says too that
the importer had better put off zapping its page table until then, which is what happens here.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_agent.p2p.attachment import Importer
from guest_agent.p2p.errors import P2PError
from guest_agent.p2p.fence import FenceContext, KeepAlive
from guest_agent.p2p.resv import Usage, locked
from guest_agent.p2p.rules import Task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.attachment import Attachment, Mapping
    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.interconnect import Offer


class FaultBudgetError(P2PError):
    """A transfer faulted more often than it may; says how often."""


@dataclass
class Counters:
    """What an importer went through."""

    transfers: int = 0
    faults: int = 0
    refaults: int = 0  # more than the first of a transfer


class OnDemand:
    """A device with page faults, importing one buffer.

    :param keep_alive_ns: how long a fault may keep the buffer in place; 0: not at all.
    :param max_faults: how often one transfer may fault before it gives up.
    """

    def __init__(
        self,
        buffer: Buffer,
        name: str,
        offers: tuple[Offer, ...],
        keep_alive_ns: int = 0,
        max_faults: int = 1000,
    ) -> None:
        self.counters = Counters()
        self.task = Task(name)
        self._buffer = buffer
        self._keep_alive_ns = keep_alive_ns
        self._max_faults = max_faults
        self._line = FenceContext(f"{name} page faults")
        self._mapping: Mapping | None = None
        self._doomed = False  # invalidated, but usable until the keep-alive fence signals
        self._alive: KeepAlive | None = None
        importer = Importer(name, offers, invalidate=self._invalidate)
        self.attachment = buffer.attach(self.task, importer)

    def _invalidate(self, task: Task, _: Attachment) -> None:
        if self._mapping is None:
            return
        alive = self._alive
        if alive is None or alive.is_signalled():
            self._zap(task)
        else:
            self._doomed = True
            alive.when_signalled(lambda _: self._buffer.core.graph.defer(self._let_go))

    def _zap(self, task: Task) -> None:
        mapping, self._mapping = self._mapping, None
        self._doomed = False
        if mapping is not None and not mapping.closed:
            self._buffer.core.backend.invalidate(mapping.live.path, mapping.live.address)
            self.attachment.unmap(task, mapping)

    def _let_go(self) -> None:
        """The keep-alive fence is over: zap what was put off, as soon as the lock is free."""
        if not self._doomed:
            return
        if self._buffer.resv.holder is not None:
            self._buffer.core.graph.defer(self._let_go)
            return
        with locked(self.task, self._buffer.resv):
            self._zap(self.task)

    def _entry(self) -> Address | None:
        """What the device's page table has for the buffer, if it may still use it."""
        if self._mapping is None or self._mapping.closed:
            return None
        if not self._doomed:
            return self._mapping.address
        if self._alive is None or self._alive.is_signalled():
            return None
        return self._mapping.address_under(self._alive)

    @property
    def is_mapped(self) -> bool:
        """Whether the device can use the buffer without a fault."""
        return self._entry() is not None

    def fault(self) -> None:
        """Serve one page fault: wait until memory management is through, map, keep it in place.

        :raises RevokedError: the memory was taken away.
        :raises FenceTimeoutError: memory management does not get through.
        """
        buffer, core = self._buffer, self._buffer.core
        self.counters.faults += 1
        with (
            core.events.span("fault", str(self.attachment)) as span,
            locked(self.task, buffer.resv),
        ):
            buffer.check_usable()
            if self._entry() is None:
                self._zap(self.task)
            buffer.resv.wait(core.clock, Usage.KERNEL)
            if self._mapping is None:
                self._mapping = self.attachment.map(self.task)
            if self._keep_alive_ns:
                now_ns = core.clock.now_ns()
                until_ns = now_ns + self._keep_alive_ns
                alive = KeepAlive(self._line, "transfer after a fault", core.clock, until_ns)
                self._alive = alive
                buffer.add_fence(self.task, self.attachment, alive, Usage.BOOKKEEP)
                alive.when_signalled(lambda fence: self._told(fence, span.number, now_ns))

    def _told(self, fence: Fence, cause: int, since_ns: int) -> None:
        core = self._buffer.core
        failed, took_ns = str(fence.error or ""), core.clock.now_ns() - since_ns
        core.events.note("fence", str(fence), cause, failed=failed, took_ns=took_ns)

    def steps(self, offset: int, data: bytes | int, piece_bytes: int) -> Iterator[bytes]:
        """Transfer in pieces; yields after each fault (b"") and piece, when others may act.

        :param data: bytes to write, or how many to read; pieces that were read are yielded.
        :raises FaultBudgetError: it faulted too often.
        """
        size = data if isinstance(data, int) else len(data)
        done = faults = 0
        while done < size:
            entry = self._entry()
            if entry is None:
                if faults == self._max_faults:
                    raise FaultBudgetError(f"{self.attachment}: {faults} faults in one transfer")
                self.fault()
                faults += 1
                yield b""
                continue
            piece = min(piece_bytes, size - done)
            part = self._access(entry, offset + done, data, done, piece)
            done += piece
            if done == size:
                self.counters.transfers += 1
                self.counters.refaults += max(faults - 1, 0)
                self.end_keep_alive()
            yield part

    def _access(self, entry: Address, at: int, data: bytes | int, done: int, piece: int) -> bytes:
        backend = self._buffer.core.backend
        if isinstance(data, int):
            return backend.read(entry, at, piece)
        part = data[done : done + piece]
        backend.write(entry, at, part)
        return part

    def end_keep_alive(self) -> None:
        """The transfer is through: the buffer may move."""
        if self._alive is not None:
            self._alive.release()
            self._alive = None

    def read(self, offset: int, size_bytes: int, piece_bytes: int = 4096) -> bytes:
        """A whole read, with whatever faults it takes."""
        return b"".join(self.steps(offset, size_bytes, piece_bytes))

    def write(self, offset: int, data: bytes, piece_bytes: int = 4096) -> None:
        """A whole write, with whatever faults it takes."""
        for _ in self.steps(offset, data, piece_bytes):
            pass
