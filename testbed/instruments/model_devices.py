# SPDX-License-Identifier: Apache-2.0
"""GPU and NIC models of a bench with everything they can do, through the agent's ``gpu.*`` and
``nic.*`` methods: page tables, page faults, links, memory regions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.instruments.bench import Bench
from testbed.instruments.memory import Memory
from testbed.instruments.paths import DeviceWitness
from testbed.topology.plan import Role

DRIVER_BYTES = 4 << 20  # of the end of the video memory: fault buffer and page tables
Place = Mapping[str, Any]
Command = Mapping[str, Any]


def place(space: str, address: int, link: int | None = None) -> dict[str, Any]:
    """A place in a command: ``vram``, ``system``, ``peer``, ``virtual``, or over ``link``."""
    number = {} if link is None else {"link": link}
    return {"space": space, "address": address, **number}


def copy(source: Place, target: Place, size_bytes: int) -> dict[str, Any]:
    """A command that copies."""
    return {"op": "copy", "source": source, "target": target, "size_bytes": size_bytes}


class _Device:
    """What both kinds have."""

    area = ""

    def __init__(self, bench: Bench, device: str) -> None:
        node = bench.node
        function = next(f for f in node.plan.of_device(device) if f.role is Role.ENGINE)
        engine = bench.engine(function)
        witness = DeviceWitness.of(node, function)
        assert witness is not None, f"{device} is no model"
        self.bench = bench
        self.name = device
        self.engine = engine
        self.witness = witness

    def call(self, method: str, **params: Any) -> Any:
        """One of the agent's methods of this area, without its prefix."""
        return self.bench.node.agent.call(
            f"{self.area}.{method}", engine=self.engine.number, **params
        )

    def model(self, method: str, **params: Any) -> Any:
        """Ask the device's model, on the host."""
        return self.bench.node.models.call(method, device=self.name, **params)


class ModelGpu(_Device):
    """A GPU opened with ``gpu.open``; the end of its video memory is its driver's."""

    area = "gpu"

    def __init__(self, bench: Bench, device: str, *, replayable: bool = True) -> None:
        super().__init__(bench, device)
        self.vram: Memory = bench.vram(bench.node.plan.function(f"{device}.vram"))
        video = {
            **self.vram.target,
            "offset": self.vram.size_bytes - DRIVER_BYTES,
            "size_bytes": DRIVER_BYTES,
        }
        self.links: int = self.call("open", video=video, replayable=replayable)["links"]

    def map(self, virtual: int, size_bytes: int, backing: Place, **more: Any) -> None:
        """Make pages; ``more``: ``page_bytes``, ``writable``, ``replace``, ``space``."""
        pages = {"virtual": virtual, "size_bytes": size_bytes, "backing": backing, **more}
        self.call("map", pages=[pages])

    def submit(self, *commands: Command, **more: Any) -> dict[str, Any]:
        """Run commands; answers as ``gpu.submit``."""
        answer: dict[str, Any] = self.call("submit", commands=list(commands), **more)
        return answer

    def begin(self, *commands: Command, by: str = "poll") -> int:
        """Start commands; answers the batch to wait for."""
        return int(self.submit(*commands, by=by, wait=False)["batch"])


class ModelNic(_Device):
    """A NIC opened with ``nic.open``."""

    area = "nic"

    def __init__(self, bench: Bench, device: str) -> None:
        super().__init__(bench, device)
        self.address: int = self.call("open")["address"]
