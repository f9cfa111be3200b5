# SPDX-License-Identifier: Apache-2.0
"""The NIC model: moves memory between registered regions, its own and those of other NICs.

RDMA without its verbs: one ring of work requests, memory regions with keys and rights, pinned or
on demand. Work requests name regions; loopback is a request to oneself. Registers and formats:
:mod:`testbed.models.registers` and `docs/nic-model.md`.
"""

from __future__ import annotations

from pathlib import Path as FilePath

from testbed.models import registers as hw
from testbed.models.access import Mover, Space
from testbed.models.config import Identity
from testbed.models.engine_device import EngineDevice
from testbed.models.nic_regions import MAX_REGIONS, Regions, RegionSpace
from testbed.models.nic_wire import RemoteAccess, RemoteSpace, WirePort
from testbed.models.registers import Aperture, Nic, NicOpcode, WorkRequest

_REGION = (
    Nic.REGION_INDEX,
    Nic.REGION_FLAGS,
    Nic.REGION_BASE_LOW,
    Nic.REGION_BASE_HIGH,
    Nic.REGION_SIZE_LOW,
    Nic.REGION_SIZE_HIGH,
    Nic.REGION_IOVA_LOW,
    Nic.REGION_IOVA_HIGH,
)


class NicModel(EngineDevice[WorkRequest]):
    """A NIC with ``address`` on the network whose ``socket`` is its end, and its peers' ends."""

    identity = Identity(hw.VENDOR_ID, hw.NIC_DEVICE_ID, hw.NIC_CLASS)
    identity_word = hw.NIC_IDENTITY

    def __init__(
        self,
        name: str,
        *,
        address: int = 0,
        socket: FilePath | None = None,
        peers: dict[int, FilePath] | None = None,
        msi: bool = False,
    ) -> None:
        super().__init__(name, hw.WORK_REQUEST, None, msi=msi)
        self.address = address
        self.wire = WirePort(address, socket, peers or {}) if socket is not None else None
        self.regions = Regions(self.witness)
        self._served = Mover(self.witness, self.rules)  # what peers want
        self._key = 0
        self.readers |= {
            Nic.ADDRESS: lambda: address,
            Nic.REGIONS: lambda: MAX_REGIONS,
            Nic.REGION_KEY: lambda: self._key,
        }
        self.writers |= {
            Nic.REGION_COMMIT: self._commit,
            Nic.REGION_INVALIDATE: self.regions.invalidate,
            **self.storing(_REGION),
        }

    def space(self, aperture: int) -> Space | None:
        """The ring and the fences of a NIC are in system memory."""
        return self.bus if aperture == Aperture.SYSTEM else None

    async def execute(self, command: WorkRequest) -> bool:
        """Carry out one work request."""
        if command.opcode == NicOpcode.NOP:
            return True
        remote = self._remote(command)
        if remote is None or command.opcode not in (NicOpcode.WRITE, NicOpcode.READ):
            return False
        local = self._region(command.local_key, self.mover, remote=False)
        ends: tuple[Space, int, Space, int] = (
            local,
            command.local_address,
            remote,
            command.remote_address,
        )
        if command.opcode == NicOpcode.READ:
            ends = (remote, command.remote_address, local, command.local_address)
        await self.mover.copy(*ends, command.size_bytes)
        return True

    async def serve(self, wanted: RemoteAccess) -> bytes:
        """Carry out what a peer wants; AccessError refuses it."""
        space = self._region(wanted.key, self._served, remote=True)
        if wanted.data is None:
            return await self._served.read(space, wanted.address, wanted.size_bytes)
        await self._served.write(space, wanted.address, wanted.data)
        await self._served.flush()
        return b""

    def reset_engine(self) -> None:
        """Also forgets the regions."""
        super().reset_engine()
        self.regions.clear()
        self._key = 0
        self.forget(_REGION)

    async def open(self) -> None:
        """Join the network."""
        if self.wire is not None:
            await self.wire.open(self.serve)

    def close(self) -> None:
        """Leave it."""
        if self.wire is not None:
            self.wire.close()

    def _region(self, key: int, mover: Mover, *, remote: bool) -> RegionSpace:
        return RegionSpace(self.regions, key, self.bus, mover, self.faults, remote=remote)

    def _remote(self, command: WorkRequest) -> Space | None:
        if command.peer == self.address:
            return self._region(command.remote_key, self.mover, remote=True)
        if self.wire is None or not self.wire.knows(command.peer):
            return None
        return RemoteSpace(self.wire, command.peer, command.remote_key)

    def _commit(self, _value: int) -> None:
        self._key = self.regions.commit(
            self.stored(Nic.REGION_INDEX),
            self.stored(Nic.REGION_FLAGS),
            self.stored_pair(Nic.REGION_BASE_LOW),
            self.stored_pair(Nic.REGION_SIZE_LOW),
            self.stored_pair(Nic.REGION_IOVA_LOW),
        )
