# SPDX-License-Identifier: Apache-2.0
"""The kernel's IOVA API: allocate, link, sync, unlink, destroy, with its exact rules.

As drivers/iommu/dma-iommu.c of Linux 7.x (``dma_iova_try_alloc`` and the rest; since 6.16). What
the kernel returns as an errno is an :class:`IovaError` with that errno. What the kernel leaves to
its caller, with a WARN_ON at best (links outside the allocation, holes when it is destroyed), is a
:class:`RuleError`, and nothing has been done.

All of it may be called in any context, in reclaim and under notifier locks too: page tables are
allocated with GFP_ATOMIC. The fabric's twin is :mod:`guest_agent.p2p.ual`.
"""

from __future__ import annotations

import errno
from typing import Protocol

from guest_agent.p2p import rules
from guest_agent.p2p.addresses import DmaAddress
from guest_agent.p2p.errors import IovaError, RuleError
from guest_agent.p2p.links import Link, Links

_RESERVED_SIZE_BIT = 1 << 63  # DMA_IOVA_USE_SWIOTLB


class IovaBackend(Protocol):
    """One device's IOMMU address space: VFIO, or a table in a test."""

    @property
    def granule_bytes(self) -> int:
        """The IOMMU's smallest page."""
        ...

    @property
    def translates(self) -> bool:
        """False: no dma-iommu, as with passthrough."""
        ...

    @property
    def untrusted(self) -> bool:
        """Whether unaligned buffers must be bounced (a device on an external port)."""
        ...

    def reserve(self, size_bytes: int, limit: int) -> int | None:
        """A free range of that many bytes, all at or below ``limit``; None: there is none."""
        ...

    def release(self, iova: int, size_bytes: int) -> None:
        """Give a range back."""
        ...

    def map(self, iova: int, physical: int, size_bytes: int, *, writable: bool) -> None:
        """Make a translation, visible to the device when this returns. :raises OSError: failed."""
        ...

    def unmap(self, iova: int, size_bytes: int) -> int:
        """Undo translations, and have the IOMMU forget them; returns the bytes undone."""
        ...


class IovaState:
    """``struct dma_iova_state``: the addresses of one mapping of one device."""

    def __init__(self, backend: IovaBackend, device: str, mask_bits: int = 64) -> None:
        self._backend = backend
        self._device = device
        self._limit = (1 << mask_bits) - 1
        self._base = 0  # granule-aligned
        self._pad = 0  # of the first byte, behind the base
        self._links = Links()
        self.size_bytes = 0

    @property
    def in_use(self) -> bool:
        """``dma_use_iova``: whether addresses are allocated."""
        return self.size_bytes != 0

    @property
    def address(self) -> DmaAddress:
        """The first byte's address. :raises IovaError: EINVAL: nothing is allocated."""
        self._check_in_use("address")
        return DmaAddress(self._base + self._pad, self._device)

    def try_alloc(self, physical: int, size_bytes: int) -> bool:
        """``dma_iova_try_alloc``: allocate; False if the ordinary DMA API is to be used.

        That is so without dma-iommu, for no bytes, for a size with the top bit set, and when there
        is no room below the device's mask.

        :param physical: only its offset within a granule counts.
        :raises RuleError: addresses are allocated already, and would be lost.
        """
        if self.in_use:
            raise RuleError(rules.IOVA_FREE, f"a second allocation for {self._device}")
        if not self._backend.translates or size_bytes <= 0 or size_bytes & _RESERVED_SIZE_BIT:
            return False
        pad = physical % self._backend.granule_bytes
        base = self._backend.reserve(self._aligned(size_bytes + pad), self._limit)
        if base is None:
            return False
        self._base, self._pad, self.size_bytes = base, pad, size_bytes
        return True

    def link(
        self,
        physical: int,
        offset: int,
        size_bytes: int,
        *,
        writable: bool = True,
        mmio: bool = True,
    ) -> None:
        """``dma_iova_link``: let ``offset`` lead to ``physical``. Not visible before :meth:`sync`.

        :param mmio: a peer's BAR (DMA_ATTR_MMIO), which cannot be bounced.
        :raises IovaError: EIO: an unaligned ``physical`` with an ``offset`` above 0. EPERM: an
            untrusted device and unaligned MMIO. EINVAL: the address or size is not aligned as the
            IOMMU needs it. EADDRINUSE: something is linked there.
        :raises RuleError: outside what was allocated.
        """
        self._check_in_use("link")
        granule = self._backend.granule_bytes
        pad = physical % granule
        if pad and offset > 0:
            raise IovaError(
                f"link at offset {offset:#x} to {physical:#x}: only the first may be unaligned",
                errno.EIO,
            )
        if self._backend.untrusted and mmio and (pad or size_bytes % granule):
            raise IovaError(f"{self._device} is untrusted: unaligned MMIO", errno.EPERM)
        start = self._pad + offset - pad
        whole = self._aligned(size_bytes + pad)
        if size_bytes <= 0 or start % granule:
            raise IovaError(
                f"link of {size_bytes:#x} bytes at {offset:#x}: unaligned", errno.EINVAL
            )
        if start < 0 or start + whole > self._aligned(self._pad + self.size_bytes):
            raise RuleError(
                rules.IOVA_WITHIN,
                f"link of {size_bytes:#x} bytes at {offset:#x} of {self.size_bytes:#x}",
            )
        if self._links.overlapping(start, whole):
            raise IovaError(f"something is linked at {offset:#x} already", errno.EADDRINUSE)
        self._links.add(Link(start, physical - pad, whole, writable))

    def sync(self, offset: int, size_bytes: int) -> None:
        """``dma_iova_sync``: what is linked in the range is visible to the device.

        :raises IovaError: the IOMMU did not take a link (its errno); that one and those behind it
            are not visible.
        """
        self._check_in_use("sync")
        for link in self._links.overlapping(self._pad + offset, size_bytes):
            if link.visible:
                continue
            where = self._base + link.offset
            try:
                self._backend.map(where, link.physical, link.size_bytes, writable=link.writable)
            except OSError as error:
                raise IovaError(f"sync at {where:#x}: {error}", error.errno) from error
            self._links.show(link)

    def unlink(self, offset: int, size_bytes: int) -> None:
        """``dma_iova_unlink``: undo links; the addresses stay allocated.

        :raises RuleError: not exactly whole links without a hole.
        """
        self._check_in_use("unlink")
        start, whole = self._range(offset, size_bytes)
        if not self._links.are_exactly(start, whole):
            raise RuleError(rules.IOVA_LINKED, f"unlink of {size_bytes:#x} bytes at {offset:#x}")
        self._undo(start, whole)

    def free(self) -> None:
        """``dma_iova_free``: give the addresses back. :raises RuleError: links are left."""
        self._check_in_use("free")
        if len(self._links):
            raise RuleError(
                rules.IOVA_FREE, f"free of {self.address} with {len(self._links)} links"
            )
        self._backend.release(self._base, self._aligned(self._pad + self.size_bytes))
        self.size_bytes = 0

    def destroy(self, mapped_bytes: int) -> None:
        """``dma_iova_destroy``: undo the links of the first ``mapped_bytes``, and free all.

        :raises RuleError: there is a hole in them, or a link behind them.
        """
        self._check_in_use("destroy")
        if mapped_bytes:
            start, whole = self._range(0, mapped_bytes)
            behind = [link for link in self._links if link.end > start + whole]
            if behind or not self._links.are_exactly(start, whole):
                raise RuleError(
                    rules.IOVA_DESTROY, f"destroy of {mapped_bytes:#x} bytes at {self.address}"
                )
            self._undo(start, whole)
        self.free()

    # --- within

    def _range(self, offset: int, size_bytes: int) -> tuple[int, int]:
        """The whole granules of a range, from the base on."""
        first = self._pad + offset
        pad = first % self._backend.granule_bytes
        return first - pad, self._aligned(size_bytes + pad)

    def _undo(self, start: int, whole: int) -> None:
        for link in self._links.overlapping(start, whole):
            if link.visible:
                self._backend.unmap(self._base + link.offset, link.size_bytes)
            self._links.remove(link)

    def _aligned(self, size_bytes: int) -> int:
        granule = self._backend.granule_bytes
        return -(-size_bytes // granule) * granule

    def _check_in_use(self, call: str) -> None:
        if not self.in_use:
            raise IovaError(f"{call}: {self._device} has no addresses allocated", errno.EINVAL)
