# SPDX-License-Identifier: Apache-2.0
"""The contexts that calls are made in, and the rules that are checked.

A :class:`Task` stands for what the kernel calls ``current``: it holds reservation locks, and may be
in reclaim, under a notifier lock or in a section that a fence waits for. Every call whose rules
depend on that takes the task, so that a call from the wrong context is an error instead of a
deadlock that shows once a month.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from guest_agent.p2p.errors import RuleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_agent.p2p.resv import Reservation


@dataclass(frozen=True)
class Rule:
    """One rule: a name, what it demands, and where it is written."""

    name: str
    text: str
    source: str


_CONVENTION = "drivers/dma-buf/dma-buf.c, DOC: locking convention"
_RESV = "drivers/dma-buf/dma-resv.c"
_UAL = "RFC v3 drm/pagemap IOVA interface, discussion of 2026-01-29"
_IOVA = "drivers/iommu/dma-iommu.c"

LOCKED = Rule(
    "importer-holds-lock",
    "the buffer's reservation lock must be held",
    f"{_CONVENTION}, importers, 1",
)
UNLOCKED = Rule(
    "importer-holds-no-lock",
    "the buffer's reservation lock must not be held",
    f"{_CONVENTION}, importers, 2",
)
EXPORTER_LOCKED = Rule(
    "exporter-holds-lock",
    "the exporter must hold the reservation lock when it tells its importers",
    f"{_CONVENTION}, exporters, 3",
)
MAP_AFTERWARDS = Rule(
    "map-after-the-callback",
    "new mappings can be made when the invalidation callback has returned, not in it",
    "include/linux/dma-buf.h, dma_buf_attach_ops.invalidate_mappings",
)
WAIT_UNLOCKED = Rule(
    "wait-for-unmap-unlocked",
    "whoever waits for importers to unmap must not hold the lock that unmapping needs",
    "drivers/vfio/pci/vfio_pci_dmabuf.c, vfio_pci_dma_buf_move",
)
PIN_DYNAMIC = Rule(
    "only-dynamic-pins",
    "only dynamic importers pin; a static one is pinned for as long as it maps",
    "drivers/dma-buf/dma-buf.c, dma_buf_pin",
)
FENCE_LOCKED = Rule(
    "add-fence-locked",
    "fences are reserved and added with the reservation lock held",
    f"{_RESV}, dma_resv_add_fence",
)
RESERVED_FIRST = Rule(
    "reserve-before-add",
    "room for a fence must be reserved before the fence is published",
    f"{_RESV}, dma_resv_reserve_fences",
)
SIGNALLING = Rule(
    "nothing-blocks-signalling",
    "no reservation may be locked on the way to signalling a fence",
    "Documentation/driver-api/dma-buf.rst, DMA Fence Cross-Driver Contract",
)
ONE_CONTEXT = Rule(
    "one-acquire-context",
    "a task that holds a reservation may lock more only through the same acquire context",
    "Documentation/locking/ww-mutex-design.rst",
)
KERNEL_FIRST = Rule(
    "kernel-fences-first",
    "KERNEL fences must have signalled before the memory is accessed",
    "include/linux/dma-resv.h, DMA_RESV_USAGE_KERNEL",
)
UAL_RECLAIM = Rule(
    "ual-alloc-not-in-reclaim",
    "allocating fabric addresses may allocate device memory for page tables: not in reclaim",
    _UAL,
)
UAL_NOTIFIER = Rule(
    "ual-alloc-not-under-notifier",
    "allocating fabric addresses may allocate device memory: not under a notifier lock",
    _UAL,
)
UAL_RESERVATION = Rule(
    "ual-alloc-holds-no-reservation",
    "allocating fabric addresses may lock reservations of its own: none may be held",
    _UAL,
)
IOVA_WITHIN = Rule(
    "link-within-allocation",
    "a link must lie within the addresses that were allocated",
    f"{_IOVA}, dma_iova_link",
)
IOVA_LINKED = Rule(
    "unlink-what-is-linked",
    "exactly what is linked is unlinked",
    f"{_IOVA}, dma_iova_unlink",
)
IOVA_FREE = Rule(
    "free-after-unlink",
    "all links must be gone before the addresses are freed",
    f"{_IOVA}, dma_iova_free",
)
IOVA_DESTROY = Rule(
    "destroy-without-holes",
    "all of the first mapped_len bytes must be linked, and nothing else",
    f"{_IOVA}, dma_iova_destroy",
)

RULES = {
    rule.name: rule for rule in list(globals().values()) if isinstance(rule, Rule)
}  # by name, for reports


class Task:
    """A thread of control: what it holds and what it is in the middle of.

    :param name: names it in errors ("gpu0 mover").
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.held: dict[int, Reservation] = {}  # by identity
        self._contexts: list[str] = []

    @contextlib.contextmanager
    def _within(self, context: str) -> Iterator[Task]:
        self._contexts.append(context)
        try:
            yield self
        finally:
            self._contexts.remove(context)

    def reclaiming(self) -> contextlib.AbstractContextManager[Task]:
        """In memory reclaim (the kernel's PF_MEMALLOC, fs_reclaim)."""
        return self._within("reclaim")

    def notifier_lock(self) -> contextlib.AbstractContextManager[Task]:
        """Under the lock that an MMU interval notifier takes."""
        return self._within("notifier lock")

    def signalling(self) -> contextlib.AbstractContextManager[Task]:
        """On the way to signalling a fence (dma_fence_begin_signalling)."""
        return self._within("fence signalling")

    def is_in(self, context: str) -> bool:
        """Whether the task is in ``reclaim``, ``notifier lock`` or ``fence signalling``."""
        return context in self._contexts

    def holds(self, reservation: Reservation) -> bool:
        """Whether this task has locked it."""
        return id(reservation) in self.held

    def must_hold(self, reservation: Reservation, rule: Rule, call: str) -> None:
        """:raises RuleError: the reservation is not locked by this task."""
        if id(reservation) not in self.held:
            raise RuleError(rule, f"{call} by {self.name} without the lock of {reservation.name}")

    def must_not_hold(self, reservation: Reservation, rule: Rule, call: str) -> None:
        """:raises RuleError: the reservation is locked by this task."""
        if id(reservation) in self.held:
            raise RuleError(rule, f"{call} by {self.name} with the lock of {reservation.name} held")

    def must_not_be_in(self, context: str, rule: Rule, call: str) -> None:
        """:raises RuleError: the task is in that context."""
        if context in self._contexts:
            raise RuleError(rule, f"{call} by {self.name} in {context}")
