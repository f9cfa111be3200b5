# SPDX-License-Identifier: Apache-2.0
"""What the core asks of devices. Behind it are VFIO and engines, or memory and a dictionary.

Everything that the core decides ends in one of these calls, so that it ends in bytes that a device
moved or was refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.interconnect import Path, Placement
    from guest_agent.p2p.report import Refusal


@dataclass(frozen=True)
class Backing:
    """A range of memory of one device, or of RAM.

    ``device``  whose memory, or for whom the RAM was taken.
    ``offset``  where it begins, in that memory.
    """

    number: int
    device: str
    placement: Placement
    offset: int
    size_bytes: int


class Backend(Protocol):
    """Devices and memory."""

    def allocate(self, device: str, placement: Placement, size_bytes: int) -> Backing:
        """Take memory. :raises NoRoomError: there is not enough."""
        ...

    def free(self, backing: Backing) -> None:
        """Give it back. Nothing maps it any more."""
        ...

    def reach(self, path: Path) -> Refusal | None:
        """Whether the path is usable now (a link is up, a window plugged in); None: it is."""
        ...

    def reserve(self, backing: Backing, path: Path) -> Address:
        """The address at which the importer of ``path`` will have the memory, for its device alone.

        Nobody else gets it until it is released, mapped or not.

        :raises OSError: there is none, or the device cannot use it.
        """
        ...

    def release(self, path: Path, address: Address) -> None:
        """Give a reserved address back. Nothing is mapped there any more."""
        ...

    def map(self, backing: Backing, path: Path, address: Address, *, writable: bool) -> None:
        """Let the device use the memory at the address that was reserved.

        :raises OSError: it cannot; nothing is mapped.
        """
        ...

    def unmap(self, backing: Backing, path: Path, address: Address) -> None:
        """Undo :meth:`map`: from the return on, the address faults."""
        ...

    def invalidate(self, path: Path, address: Address) -> None:
        """Make the importer's device forget translations that it keeps itself."""
        ...

    def copy(self, source: Backing, target: Backing) -> Fence:
        """Begin to copy all bytes, with an engine; the fence says when they are there."""
        ...

    def read(self, address: Address, offset: int, size_bytes: int) -> bytes:
        """The bytes as the address's user reads them by DMA.

        :raises FaultError: nothing is mapped there for it.
        """
        ...

    def write(self, address: Address, offset: int, data: bytes) -> None:
        """DMA writes of the address's user. :raises FaultError: not mapped, or read-only."""
        ...
