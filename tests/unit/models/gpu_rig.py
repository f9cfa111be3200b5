# SPDX-License-Identifier: Apache-2.0
"""A GPU model under the agent's GPU methods, for tests."""

from __future__ import annotations

from typing import Any

from testbed.models.gpu import GpuModel
from testbed.models.link import LinkEnd
from testbed.models.memory import SharedMemory
from tests.unit.models.agent_rig import MIB, VIDEO, VIDEO_BYTES, VRAM, Rig

HUGE = 2 * MIB
V = 0x7000_0000_0000


class Gpu(Rig):
    """A GPU opened with ``gpu.open``."""

    def __init__(
        self, name: str = "gpu0", links: tuple[LinkEnd, ...] = (), *, replayable: bool = True
    ) -> None:
        self.vram = SharedMemory.create(16 * MIB, name=f"{name}.vram")
        self.model = GpuModel(name, self.vram, links)
        super().__init__(self.model, "model", self.vram)
        video = {"bar": VRAM, "index": 2, "offset": VIDEO, "size_bytes": VIDEO_BYTES}
        opened = self.on("gpu.open", video=video, replayable=replayable)
        assert opened == {"links": len(links), "video_bytes": 16 * MIB}

    def map(self, virtual: int, size: int, address: int, where: str = "vram", **more: Any) -> None:
        place: dict[str, Any] = {"space": where, "address": address}
        if where == "link":
            place["link"] = 0
        self.on(
            "gpu.map",
            pages=[{"virtual": virtual, "size_bytes": size, "backing": place, **more}],
        )

    def run(self, *commands: dict[str, Any], **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.on("gpu.submit", commands=list(commands), **more)
        return answer

    def do(self, *commands: dict[str, Any], **more: Any) -> None:
        answer = self.run(*commands, **more)
        assert answer["completed"], answer

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.vram.view[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.vram.view[offset : offset + len(data)] = data


def at(space: str, address: int, **more: int) -> dict[str, Any]:
    return {"space": space, "address": address, **more}


def virtual(address: int) -> dict[str, Any]:
    return at("virtual", address)


def copy(source: dict[str, Any], target: dict[str, Any], size: int, **more: Any) -> dict[str, Any]:
    return {"op": "copy", "source": source, "target": target, "size_bytes": size, **more}


def fill(target: dict[str, Any], value: int, size: int = 8) -> dict[str, Any]:
    return {"op": "fill", "target": target, "value": value, "size_bytes": size}


def signal(target: dict[str, Any], value: int) -> dict[str, Any]:
    return {"op": "signal", "target": target, "value": value}


def page_at(address: int) -> dict[str, Any]:
    return {"virtual": address, "size_bytes": 4096, "backing": at("vram", 0)}


# --- page tables and batches
