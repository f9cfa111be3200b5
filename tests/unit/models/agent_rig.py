# SPDX-License-Identifier: Apache-2.0
"""The agent itself, with models of GPUs and NICs as the functions that it has opened."""

from __future__ import annotations

import mmap
from typing import Any

from guest_agent.agent import Agent
from guest_agent.hw.device import Device as AgentDevice
from guest_agent.hw.region import Region
from guest_agent.kernel_methods import registry
from testbed.models.device import Device
from testbed.models.memory import SharedMemory
from testbed.models.testing import FakeQemu
from tests.unit.models.agent_side import Function, seen

MIB = 1 << 20
SCRATCH, RAM = 0x1_0000, 0x4000_0000
SCRATCH_BYTES, RAM_BYTES = 64 << 10, 8 * MIB
VIDEO = 12 * MIB  # where the part of video memory begins that the driver has for itself
VIDEO_BYTES = 2 * MIB
VRAM = "0000:05:00.0"
ENGINE = "0000:05:00.1"


class _Memory(AgentDevice):
    """Function 0 of a GPU: its video memory is BAR2."""

    def __init__(self, memory: SharedMemory) -> None:
        super().__init__(VRAM)
        self._regions[2] = seen(memory)


class _Container:
    def __init__(self, *devices: AgentDevice) -> None:
        self.devices = {device.bdf: device for device in devices}

    def close(self) -> list[str]:
        return []


class Rig:
    """One machine: a device, its memory, and an agent that has opened its engine as number 1."""

    def __init__(self, device: Device, kind: str, vram: SharedMemory | None = None) -> None:
        self.qemu = FakeQemu(device)
        self.function = Function(self.qemu)
        self.agent = Agent()
        self.ram = self.qemu.add_memory(RAM, RAM_BYTES)
        self._scratch = self.qemu.add_memory(SCRATCH, SCRATCH_BYTES)
        functions: list[AgentDevice] = [self.function]
        if vram is not None:
            functions.append(_Memory(vram))
        container: Any = _Container(*functions)
        self.agent._containers[9] = container
        for name, memory in (("scratch", self._scratch), ("ram", self.ram)):
            self.agent.buffers._regions[name] = Region(mmap.mmap(memory.fd, memory.size_bytes))
        scratch = {"iova": SCRATCH, "target": {"ram": "scratch"}, "size_bytes": SCRATCH_BYTES}
        assert self.call("engine.open", device=ENGINE, kind=kind, scratch=scratch)["engine"] == 1

    def call(self, method: str, **params: Any) -> Any:
        """As the host calls."""
        return registry.call(method, params, self.agent)

    def on(self, method: str, **params: Any) -> Any:
        """Likewise, of engine 1."""
        return self.call(method, engine=1, **params)

    def close(self) -> None:
        self.qemu.close()
