# SPDX-License-Identifier: Apache-2.0
"""The core's :class:`Backend` on devices: what it decides ends in VFIO mappings, page tables of
links, and copies by engines.

Each device has an IOMMU address space of its own (a container), so that an address is right for one
requester and faults for every other. Over a link a GPU reaches what its peer's page tables for that
link have, and nothing else.
"""

from __future__ import annotations

import errno

from guest_agent.p2p.addresses import Address, DmaAddress, LinkAddress
from guest_agent.p2p.backend import Backing
from guest_agent.p2p.errors import NoRoomError
from guest_agent.p2p.interconnect import PRIVATE_KINDS, Kind, Placement
from guest_agent.p2p.report import Refusal
from guest_agent.p2p_device.ranges import PAGE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.hw.memory import Buffers
    from guest_agent.hw.region import Region
    from guest_agent.p2p.clock import Clock
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.interconnect import Path
    from guest_agent.p2p_device.members import Member

LINKED = (*PRIVATE_KINDS, Kind.VIRTUAL)
COPY_TIMEOUT_NS = 20_000_000_000
_BEYOND = 1 << 60  # an address that no IOMMU has


class DeviceBackend:
    """See the module.

    :param members: the devices by name.
    :param buffers: where RAM comes from.
    """

    def __init__(self, members: dict[str, Member], buffers: Buffers, clock: Clock) -> None:
        self.members = members
        self.refusals: dict[tuple[str, str], Refusal] = {}  # (type, device) → a driver's own word
        self.liars: set[str] = set()  # devices whose addresses are not what they say
        self.copies = 0
        self._buffers = buffers
        self._clock = clock
        self._number = 0
        self._own: dict[int, int] = {}  # RAM → where its device's engine has it

    def member(self, name: str) -> Member:
        """:raises OSError: ENODEV: no such device takes part."""
        if name not in self.members:
            known = ", ".join(self.members)
            raise OSError(errno.ENODEV, f"{name} takes no part; {known} do")
        return self.members[name]

    # --- memory

    def allocate(self, device: str, placement: Placement, size_bytes: int) -> Backing:
        """See :meth:`Backend.allocate`."""
        member = self.member(device)
        self._number += 1
        if placement is Placement.DEVICE:
            at = member.memory.take(size_bytes) if member.memory is not None else None
            if at is None:
                left = member.memory.left_bytes if member.memory is not None else 0
                raise NoRoomError(f"{size_bytes} bytes wanted in {device}, {left} left")
            return Backing(self._number, device, placement, at, size_bytes)
        backing = Backing(self._number, device, placement, 0, size_bytes)
        iova = member.iovas.take(size_bytes)
        if iova is None:
            raise NoRoomError(f"{device} has no address left for {size_bytes} bytes of RAM")
        name = ram_name(backing)
        try:
            self._buffers.alloc(name, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
        except OSError as error:
            member.iovas.give_back(iova)
            raise NoRoomError(f"{size_bytes} bytes of RAM wanted: {error}") from error
        self._map_dma(member, iova, backing, writable=True)
        self._own[backing.number] = iova
        return backing

    def free(self, backing: Backing) -> None:
        """See :meth:`Backend.free`."""
        member = self.member(backing.device)
        if backing.placement is Placement.DEVICE:
            assert member.memory is not None  # noqa: S101  it came from there
            member.memory.give_back(backing.offset)
            return
        iova = self._own.pop(backing.number)
        member.container.unmap(iova, _whole(backing))
        member.iovas.give_back(iova)
        self._buffers.free(ram_name(backing))

    def held(self) -> dict[str, int]:
        """How much is in use: ranges of video memory, RAM buffers, addresses."""
        memories = [each.memory for each in self.members.values() if each.memory is not None]
        return {
            "vram": sum(len(memory) for memory in memories),
            "ram": len(self._own),
            "iovas": sum(len(each.iovas) for each in self.members.values()),
        }

    def close(self) -> None:
        """Forget all RAM; mappings end with their containers."""
        for number, iova in list(self._own.items()):
            self._buffers.free(f"p2p-{number}")
            del self._own[number], iova

    # --- addresses

    def reach(self, path: Path) -> Refusal | None:
        """See :meth:`Backend.reach`: a link is asked whether it is up."""
        refusal = self.refusals.get((path.kind.value, path.importer.device))
        if refusal is not None:
            return refusal
        if path.kind not in PRIVATE_KINDS:
            return None
        for offer in (path.exporter, path.importer):
            member = self.member(offer.device)
            state = member.gpu.link(member.link(offer.port))["state"]
            if state != "up":
                return Refusal(errno.EOPNOTSUPP, f"link {offer.port} of {offer.device} is {state}")
        return None

    def reserve(self, backing: Backing, path: Path) -> Address:
        """See :meth:`Backend.reserve`."""
        user = path.importer.device
        if path.kind in LINKED:
            export = self.member(path.exporter.device).export(path.exporter.port)
            value = export.addresses.take(backing.size_bytes)
            if value is None:
                raise OSError(errno.ENOSPC, f"no link address left on {path.exporter.port}")
            return LinkAddress(value, user, path.importer.port)
        if user in self.liars:
            return DmaAddress(_BEYOND, user)
        iova = self.member(user).iovas.take(backing.size_bytes)
        if iova is None:
            raise OSError(errno.ENOSPC, f"{user} has no address left")
        return DmaAddress(iova, user)

    def release(self, path: Path, address: Address) -> None:
        """See :meth:`Backend.release`."""
        if isinstance(address, LinkAddress):
            export = self.member(path.exporter.device).export(path.exporter.port)
            export.addresses.give_back(address.value)
        elif address.value != _BEYOND:
            self.member(address.user).iovas.give_back(address.value)

    def map(self, backing: Backing, path: Path, address: Address, *, writable: bool) -> None:
        """See :meth:`Backend.map`."""
        if isinstance(address, LinkAddress):
            export = self.member(path.exporter.device).export(path.exporter.port)
            export.map(address.value, _whole(backing), backing.offset, writable=writable)
        else:
            self._map_dma(self.member(address.user), address.value, backing, writable=writable)

    def _map_dma(self, member: Member, iova: int, backing: Backing, *, writable: bool) -> None:
        member.container.map(
            self.region(backing),
            backing.offset,
            iova,
            _whole(backing),
            read=True,
            write=writable,
            page_bytes=0,
        )

    def unmap(self, backing: Backing, path: Path, address: Address) -> None:
        """See :meth:`Backend.unmap`."""
        if isinstance(address, LinkAddress):
            export = self.member(path.exporter.device).export(path.exporter.port)
            export.unmap(address.value, _whole(backing))
        else:
            self.member(address.user).container.unmap(address.value, _whole(backing))

    def invalidate(self, path: Path, address: Address) -> None:  # noqa: ARG002  it forgets all
        """See :meth:`Backend.invalidate`: a GPU forgets what its MMU knows."""
        member = self.member(path.importer.device)
        if member.vram is not None:
            member.gpu.invalidate(None)

    # --- devices at work

    def region(self, backing: Backing) -> Region:
        """The memory as the CPU sees it."""
        if backing.placement is Placement.SYSTEM:
            return self._buffers.get(ram_name(backing))
        vram = self.member(backing.device).vram
        assert vram is not None  # noqa: S101  it was allocated there
        return vram

    def _place(self, backing: Backing) -> dict[str, object]:
        """How its own device's engine names a memory."""
        if backing.placement is Placement.DEVICE:
            return {"space": "vram", "address": backing.offset}
        return {"space": "system", "address": self._own[backing.number]}

    def copy(self, source: Backing, target: Backing) -> Fence:
        """See :meth:`Backend.copy`: by the engine of the exporter."""
        self.copies += 1
        what = f"copy {source.placement.value} → {target.placement.value}"
        return self.member(source.device).begin(
            what,
            self._place(source),
            self._place(target),
            source.size_bytes,
            self._clock.now_ns() + COPY_TIMEOUT_NS,
        )

    def read(self, address: Address, offset: int, size_bytes: int) -> bytes:
        """See :meth:`Backend.read`: by the engine of the address's user."""
        member = self.member(address.user)
        member.access(address, offset, size_bytes, write=False)
        return member.staging.read(member.staging_offset, size_bytes)

    def write(self, address: Address, offset: int, data: bytes) -> None:
        """See :meth:`Backend.write`: by the engine of the address's user."""
        member = self.member(address.user)
        member.staging.write(member.staging_offset, data)
        member.access(address, offset, len(data), write=True)


def ram_name(backing: Backing) -> str:
    """Under which name a backing in RAM is among the agent's buffers."""
    return f"p2p-{backing.number}"


def _whole(backing: Backing) -> int:
    """Its size in whole pages."""
    return -(-backing.size_bytes // PAGE_BYTES) * PAGE_BYTES
