# SPDX-License-Identifier: Apache-2.0
"""Importers, their attachments to buffers, and the mappings that they are given.

As ``struct dma_buf_attachment`` and ``struct dma_buf_attach_ops`` of Linux 7.2: an importer without
operations is static, and what it maps is pinned for as long; one that can be told to give its
mappings back (``invalidate_mappings``) is revocable.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from guest_agent.p2p import rules
from guest_agent.p2p.errors import (
    FutureError,
    ReachError,
    RuleError,
    StaleError,
    UnsupportedError,
)
from guest_agent.p2p.interconnect import Placement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.interconnect import Offer, Path
    from guest_agent.p2p.rules import Task
    from guest_agent.p2p.storage import Storage

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Importer:
    """A driver that imports buffers.

    ``offers``      the paths that its device has, one for each port or function.
    ``dynamic``     it has operations (``dma_buf_dynamic_attach``).
    ``invalidate``  called, with the reservation lock held by the task given, when what it has
                    mapped goes away. It adds fences for what it cannot stop, and unmaps soon.
    """

    name: str
    offers: tuple[Offer, ...]
    dynamic: bool = True
    invalidate: Callable[[Task, Attachment], None] | None = None

    @property
    def is_revocable(self) -> bool:
        """``dma_buf_attach_revocable``: it gives mappings back within bounded time."""
        return self.dynamic and self.invalidate is not None

    @property
    def does_peer_to_peer(self) -> bool:
        """Whether it reaches device memory at all (``allow_peer2peer``)."""
        return any(Placement.DEVICE in offer.placements for offer in self.offers)


class Live:
    """What the device has: one address for one backing, shared by an attachment's mappings.

    The address stays reserved when nothing is mapped, so that it is the same next time.
    """

    def __init__(self, storage: Storage, path: Path, address: Address) -> None:
        self.storage = storage
        self.path = path
        self.address = address
        self.writable = False
        self.count = 0  # of mappings; 0: nothing is mapped
        self.invalidated_ns: int | None = None


class Mapping:
    """An importer's mapping: an address, and from when to when it may be used.

    While fences of memory management are pending it is a *future* mapping (the 2020-10 discussion
    asks for exactly this mark): page tables may be built from :attr:`planned`, but only
    :attr:`address` may be handed to a device that will use it now.
    """

    def __init__(self, attachment: Attachment, live: Live, ready: Sequence[Fence]) -> None:
        self.number = next(_numbers)
        self.attachment = attachment
        self.live = live
        self.closed = False
        self._ready = list(ready)

    def __str__(self) -> str:
        return f"mapping {self.number} of {self.attachment}"

    @property
    def is_future(self) -> bool:
        """Whether the bytes are still on their way."""
        self._ready = [fence for fence in self._ready if not fence.is_signalled() or fence.error]
        return any(not fence.is_signalled() for fence in self._ready)

    @property
    def planned(self) -> Address:
        """The address, for use after the fences. :raises StaleError: it is not valid any more."""
        self.check()
        return self.live.address

    @property
    def address(self) -> Address:
        """The address, for use now.

        :raises StaleError: it was unmapped or invalidated.
        :raises FutureError: a fence is still pending; names it and the rule.
        :raises FenceFailedError: the bytes did not arrive.
        """
        self.check()
        for fence in self._ready:
            if not fence.is_signalled():
                raise FutureError(
                    f"{self} is used before {fence}: {rules.KERNEL_FIRST.text}"
                    f" ({rules.KERNEL_FIRST.source})"
                )
            fence.check()
        return self.live.address

    def address_under(self, fence: Fence) -> Address:
        """The address, of a mapping that was invalidated while ``fence`` was in the reservation.

        Whoever takes memory away waits for BOOKKEEP fences, so that until this one signals the
        memory is still there (``dma_buf_invalidate_mappings``).

        :raises StaleError: it was unmapped, or the fence has signalled.
        """
        if self.closed or fence.is_signalled():
            raise StaleError(f"{self} is used after {fence} had signalled")
        return self.live.address

    @property
    def ready(self) -> list[Fence]:
        """The fences that must have ended well before it may be used."""
        return list(self._ready)

    def check(self) -> None:
        """:raises StaleError: it was unmapped or invalidated."""
        if self.closed:
            raise StaleError(f"{self} is used after it was unmapped")
        if self.live.invalidated_ns is not None:
            raise StaleError(f"{self} is used after it was invalidated: map again")


class Attachment:
    """One importer of one buffer: one interconnect and one stable address until it moves."""

    def __init__(self, buffer: Buffer, importer: Importer, path: Path) -> None:
        self.buffer = buffer
        self.importer = importer
        self.path = path
        self.pins = 0
        self.live: Live | None = None
        self.stale: list[Live] = []
        self.mappings: dict[int, Mapping] = {}
        self.fences: list[Fence] = []  # that this importer owes

    def __str__(self) -> str:
        return f"{self.importer.name} on {self.buffer.name}"

    @property
    def is_pinned_by_mapping(self) -> bool:
        """It cannot be told that the memory moves, so that it does not while it is mapped."""
        return not self.importer.is_revocable and self.live is not None and self.live.count > 0

    def pin(self, task: Task) -> None:
        """Keep the buffer where it is. The lock is held.

        :raises RuleError: without the lock, or by a static importer.
        :raises RevokedError: the memory was taken away.
        """
        self.buffer.check_locked(task, "pin")
        self._only_dynamic(task)
        self.buffer.check_usable()
        self.pins += 1

    def unpin(self, task: Task) -> None:
        """Undo one :meth:`pin`. The lock is held. :raises StaleError: it is not pinned."""
        self.buffer.check_locked(task, "unpin")
        if self.pins == 0:
            raise StaleError(f"{self} is not pinned")
        self.pins -= 1

    def _only_dynamic(self, task: Task) -> None:
        if not self.importer.dynamic:
            raise RuleError(rules.PIN_DYNAMIC, f"pin by {task.name} for {self}")

    def map(self, task: Task, *, writable: bool = True) -> Mapping:
        """Make the memory usable. The lock is held; the address may be a future one.

        :raises RuleError: without the lock.
        :raises RevokedError: the memory was taken away.
        :raises ReachError: the importer's device cannot reach it, whatever it said.
        """
        return self.buffer.map(task, self, writable)

    def map_or_fall_back(self, task: Task, *, writable: bool = True) -> Mapping:
        """As :meth:`map`; if the device cannot use the path after all, over the next one.

        The 2025-09 discussion: try to map the interconnect, and if that fails map the attachment
        as a scatter list. Here whatever is left of both lists is tried, in the policy's order.

        :raises NoPathError: nothing is left to where the bytes are.
        """
        failed: list[Path] = []
        while True:
            try:
                return self.map(task, writable=writable)
            except ReachError:
                failed.append(self.path)
                self.buffer.renegotiate(task, self, failed)

    def unmap(self, task: Task, mapping: Mapping) -> None:
        """Give a mapping back. The lock is held.

        :raises RuleError: without the lock.
        :raises StaleError: it was unmapped before, or is not this attachment's.
        """
        self.buffer.unmap(task, self, mapping)

    def submit(
        self,
        task: Task,
        mapping: Mapping,
        name: str,
        begin: Callable[[Address], Fence | None],
        *,
        write: bool,
    ) -> Fence:
        """Queue an access; it begins when nothing is in its way. The lock is held.

        :param begin: starts it on the device, and returns the device's fence, or None if done.
        :raises StaleError: the mapping is no longer valid.
        :raises UnsupportedError: a write through a mapping that is read-only.
        """
        if write and not mapping.live.writable:
            raise UnsupportedError(f"{mapping} is read-only")
        return self.buffer.submit(task, self, mapping, name, begin, write)
