# SPDX-License-Identifier: Apache-2.0
"""The GPU model: video memory, a copy engine with a command ring, an MMU and private links.

In a topology it is function 1 of a slot whose function 0 is the video memory (`ivshmem-plain` over
shared memory). The memory is not a BAR of this function, although QEMU would map it into the guest:
QEMU 11.1 has no descriptor to give to other devices for such a BAR (hw/vfio/region.c makes it with
`memory_region_init_ram_device_ptr`), so peers would reach it by messages only: 30 ms for each MiB
instead of 0.3 ms. Through ivshmem every peer, model or not, moves data at the speed of memcpy.

Registers, commands and formats: :mod:`testbed.models.registers` and `docs/gpu-model.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

from testbed.models import registers as hw
from testbed.models.access import LocalSpace, Space
from testbed.models.config import Identity
from testbed.models.device import Machine
from testbed.models.engine_device import LOW, EngineDevice
from testbed.models.gpu_commands import GpuCommands
from testbed.models.gpu_mmu import VirtualSpace
from testbed.models.link import ExportWindow, LinkEnd, LinkPort
from testbed.models.memory import SharedMemory
from testbed.models.registers import Aperture, Command, Export, Gpu, Link
from testbed.models.witness import Event

_LINKS_END = hw.LINK_BASE + hw.LINK_STRIDE * hw.MAX_LINKS
_MMU = (Gpu.MMU_CONTROL, Gpu.MMU_ROOT_LOW, Gpu.MMU_ROOT_HIGH)
_INVALIDATE = (Gpu.INVALIDATE_LOW, Gpu.INVALIDATE_HIGH)


class GpuModel(EngineDevice[Command]):
    """Function 1 of a GPU. ``memory`` is its video memory; one :class:`LinkEnd` a link."""

    identity = Identity(hw.VENDOR_ID, hw.GPU_DEVICE_ID, hw.GPU_CLASS)
    identity_word = hw.GPU_IDENTITY

    def __init__(
        self,
        name: str,
        memory: SharedMemory,
        links: Sequence[LinkEnd] = (),
        *,
        msi: bool = False,
    ) -> None:
        if len(links) > hw.MAX_LINKS:
            raise ValueError(f"{name}: more than {hw.MAX_LINKS} links")
        self.memory = memory
        self.local = LocalSpace(memory)
        super().__init__(name, hw.COMMAND, self.local, msi=msi)
        self.virtual = VirtualSpace(
            memory,
            self.witness,
            self.faults,
            aperture=self._physical,
            command=lambda: self.ring.head,
        )
        self.commands = GpuCommands(
            self.mover, self.virtual, space=self.space, interrupt=self.interrupt
        )
        self.links = tuple(
            LinkPort(end, memory, on_change=self._link_changed, on_refused=self._link_refused)
            for end in links
        )
        features = sum(hw.Feature) - (0 if links else hw.Feature.LINK)
        self.readers |= {
            Gpu.FEATURES: lambda: features,
            Gpu.LINKS: lambda: len(self.links),
            Gpu.VRAM_SIZE_LOW: lambda: memory.size_bytes,
            Gpu.VRAM_SIZE_HIGH: lambda: memory.size_bytes >> 32,
        }
        self.writers |= {
            Gpu.INVALIDATE: self._invalidate,
            **self.storing(_INVALIDATE),
            **self.storing(_MMU, self._set_mmu),
        }

    async def execute(self, command: Command) -> bool:
        """See :class:`testbed.models.gpu_commands.GpuCommands`."""
        return await self.commands.execute(command)

    def space(self, aperture: int) -> Space | None:
        """See :class:`testbed.models.registers.Aperture`."""
        return self.virtual if aperture == Aperture.VIRTUAL else self._physical(aperture)

    def reset(self) -> None:
        """As after power-on, video memory and the links' cabling excepted."""
        super().reset()
        for port in self.links:
            port.reset()

    def reset_engine(self) -> None:
        """Also forgets translations."""
        super().reset_engine()
        self.virtual.reset()
        self.forget((*_MMU, *_INVALIDATE))

    def plug(self, machine: Machine) -> None:
        """The links' ends have power from now on."""
        super().plug(machine)
        for port in self.links:
            port.power(on=True)

    def unplug(self) -> None:
        """The links go down."""
        super().unplug()
        for port in self.links:
            port.power(on=False)

    async def open(self) -> None:
        """Meet the other ends of the links."""
        for port in self.links:
            port.open()

    def close(self) -> None:
        """Hang up."""
        for port in self.links:
            port.close()

    def link_to(self, peer: str) -> LinkPort:
        """The link to that GPU; KeyError if there is none."""
        for port in self.links:
            if port.end.peer == peer:
                return port
        raise KeyError(peer)

    def read_word(self, offset: int) -> int:
        """Adds the registers of the links."""
        if hw.LINK_BASE <= offset < _LINKS_END:
            return self._read_link(*divmod(offset - hw.LINK_BASE, hw.LINK_STRIDE))
        return super().read_word(offset)

    def write_word(self, offset: int, value: int) -> None:
        """Adds the registers of the links."""
        if hw.LINK_BASE <= offset < _LINKS_END:
            self._write_link(*divmod(offset - hw.LINK_BASE, hw.LINK_STRIDE), value)
        else:
            super().write_word(offset, value)

    def _physical(self, aperture: int) -> Space | None:
        kind, number = aperture & 0xF, aperture >> hw.APERTURE_LINK_SHIFT
        if kind == Aperture.LINK:
            return self.links[number] if number < len(self.links) else None
        if number:
            return None
        if kind == Aperture.VRAM:
            return self.local
        return self.bus if kind in (Aperture.SYSTEM, Aperture.PEER) else None

    def _set_mmu(self) -> None:
        self.virtual.control = self.stored(Gpu.MMU_CONTROL)
        self.virtual.root = self.stored_pair(Gpu.MMU_ROOT_LOW)

    def _invalidate(self, value: int) -> None:
        if value == 1:
            self.virtual.invalidate(self.stored_pair(Gpu.INVALIDATE_LOW))
        elif value == 2:
            self.virtual.invalidate(None)

    def _link_changed(self) -> None:
        self.interrupt(hw.InterruptCause.LINK)

    def _link_refused(self, peer: str, address: int, write: bool) -> None:
        what = f"{'write' if write else 'read'} by {peer} is not exported"
        self.witness.event(Event.ACCESS_ERROR, address=address, detail=what)

    def _read_link(self, number: int, offset: int) -> int:
        if number >= len(self.links):
            return 0
        port = self.links[number]
        values: dict[int, int] = {
            Link.STATE: port.state,
            Link.CONTROL: int(port.enabled),
            Link.SYNC: int(port.synchronizing),
            Link.PEER_SIZE_LOW: port.peer_size_bytes & LOW,
            Link.PEER_SIZE_HIGH: port.peer_size_bytes >> 32,
            Link.WIDTH: port.width,
        }
        stored = self.stored(hw.LINK_BASE + number * hw.LINK_STRIDE + offset)
        return values.get(offset, stored)

    def _write_link(self, number: int, offset: int, value: int) -> None:
        if number >= len(self.links):
            return
        port = self.links[number]
        base = hw.LINK_BASE + number * hw.LINK_STRIDE
        if offset == Link.CONTROL:
            port.enable(on=bool(value & 1))
        elif offset == Link.SYNC and value:
            port.export(self._export(base))
        elif offset == Link.EXPORT_MODE or Link.EXPORT_BASE_LOW <= offset <= Link.EXPORT_SIZE_HIGH:
            self.store(base + offset, value)

    def _export(self, base: int) -> ExportWindow:
        try:
            mode = Export.of(self.stored(base + Link.EXPORT_MODE))
        except ValueError:
            mode = Export.CLOSED
        start = self.stored_pair(base + Link.EXPORT_BASE_LOW)
        size = 0 if mode is Export.CLOSED else self.stored_pair(base + Link.EXPORT_SIZE_LOW)
        if mode is Export.PHYSICAL:
            size = max(0, min(size, self.memory.size_bytes - start))
        return ExportWindow(mode, start, size)
