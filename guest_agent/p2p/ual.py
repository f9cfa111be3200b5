# SPDX-License-Identifier: Apache-2.0
"""The fabric's twin of the IOVA API, as the 2026-01 discussion of UAL sketches it.

Two ways to address a peer's memory on a scale-up fabric. *Physical*, within one operating system,
like an IOMMU in passthrough: a page becomes a physical address that is unique across the fabric,
and the calls do nothing. *Virtual*, between operating systems, like a translating IOMMU: addresses
are allocated, linked and synced as in :mod:`guest_agent.p2p.iova`, and what is not linked faults.

One thing differs: allocating may need device memory for the fabric's page tables, which can mean
evicting buffers. So it is refused in reclaim, under a notifier lock and with a reservation held,
where ``dma_iova_try_alloc`` is allowed. Linking into what was allocated is allowed everywhere.
"""

from __future__ import annotations

import errno
from typing import Protocol

from guest_agent.p2p import rules
from guest_agent.p2p.addresses import FabricAddress
from guest_agent.p2p.errors import IovaError, RuleError
from guest_agent.p2p.iova import IovaState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.p2p.iova import IovaBackend
    from guest_agent.p2p.rules import Task


class FabricBackend(Protocol):
    """What the fabric is asked: where a peer's memory stands in it, and its translations."""

    @property
    def name(self) -> str:
        """Which fabric it is."""
        ...

    @property
    def spaces(self) -> IovaBackend:
        """The translations of one initiator, for virtual mode."""
        ...

    def physical_address(self, owner: str, physical: int) -> int:
        """The fabric physical address of a byte of ``owner``'s memory.

        :raises OSError: the owner is not on the fabric.
        """
        ...


class UalState:
    """The fabric addresses of one mapping, for one initiator.

    :param owner: the device whose memory is mapped.
    :param virtual: whether addresses are translated. Within one OS the default is that they are
        not.
    """

    def __init__(
        self, backend: FabricBackend, initiator: str, owner: str, *, virtual: bool = False
    ) -> None:
        self._backend = backend
        self._initiator = initiator
        self._owner = owner
        self._virtual = virtual
        self._space = IovaState(backend.spaces, initiator)
        self._physical: dict[int, int] = {}  # offset → fabric physical address
        self._allocated = False

    def try_alloc(self, task: Task, size_bytes: int) -> bool:
        """``ual_iova_alloc``: allocate addresses; True without allocating in physical mode.

        :raises RuleError: in reclaim, under a notifier lock, or with any reservation held. In
            physical mode too: a caller cannot know which mode a machine has.
        """
        task.must_not_be_in("reclaim", rules.UAL_RECLAIM, "ual_iova_alloc")
        task.must_not_be_in("notifier lock", rules.UAL_NOTIFIER, "ual_iova_alloc")
        if task.held:
            names = ", ".join(resv.name for resv in task.held.values())
            raise RuleError(
                rules.UAL_RESERVATION, f"ual_iova_alloc by {task.name}, which holds {names}"
            )
        self._allocated = not self._virtual or self._space.try_alloc(0, size_bytes)
        return self._allocated

    def link(self, physical: int, offset: int, size_bytes: int, *, writable: bool = True) -> None:
        """Let ``offset`` lead to the owner's memory at ``physical``; visible after :meth:`sync`.

        In physical mode it only remembers where that is. Errors as :meth:`IovaState.link`.
        """
        self._check()
        if self._virtual:
            self._space.link(physical, offset, size_bytes, writable=writable)
        else:
            self._physical[offset] = self._backend.physical_address(self._owner, physical)

    def sync(self, offset: int, size_bytes: int) -> None:
        """Make what was linked visible; does nothing in physical mode."""
        self._check()
        if self._virtual:
            self._space.sync(offset, size_bytes)

    def address(self, offset: int = 0) -> FabricAddress:
        """The address for the initiator.

        :raises IovaError: EINVAL: in physical mode, nothing was linked at that offset.
        """
        self._check()
        if self._virtual:
            value = self._space.address.value + offset
        elif offset in self._physical:
            value = self._physical[offset]
        else:
            raise IovaError(f"nothing of {self._owner} is linked at {offset:#x}", errno.EINVAL)
        return FabricAddress(value, self._initiator, self._backend.name, not self._virtual)

    def unlink(self, offset: int, size_bytes: int) -> None:
        """Undo links. :raises RuleError: not exactly what is linked."""
        self._check()
        if self._virtual:
            self._space.unlink(offset, size_bytes)
        elif self._physical.pop(offset, None) is None:
            raise RuleError(rules.IOVA_LINKED, f"unlink at {offset:#x}")

    def free(self) -> None:
        """Give the addresses back. :raises RuleError: links are left."""
        self._check()
        if self._virtual:
            self._space.free()
        elif self._physical:
            raise RuleError(rules.IOVA_FREE, f"free with {len(self._physical)} links")
        self._allocated = False

    def destroy(self, mapped_bytes: int) -> None:
        """Undo all links and free. :raises RuleError: in virtual mode, holes."""
        self._check()
        if self._virtual:
            self._space.destroy(mapped_bytes)
        self._physical.clear()
        self._allocated = False

    def _check(self) -> None:
        if not self._allocated:
            raise IovaError(f"{self._initiator} has allocated no fabric addresses", errno.EINVAL)
