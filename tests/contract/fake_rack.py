# SPDX-License-Identifier: Apache-2.0
"""A rack without machines: memory, an IOMMU and copy engines, as the agent would answer for them.

Small, and honest about what suites rest on: an access is translated page by page or refused and
recorded; a device claims completion whatever happened; the guest's log is rate limited, QEMU's
trace is not; the host sees video memory through a mapping of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

from guest_agent.pattern import pattern
from testbed.errors import AgentError, HostError, LinkLost, TestbedError
from testbed.instruments.interface import Channel, CommandResult, Link
from testbed.machine.command import QEMU_LOG
from testbed.topology import load, oracle
from testbed.topology.model import Topology
from testbed.topology.placement import place
from testbed.topology.plan import Function, NodePlan, RackPlan, Role

PAGE = 4096
GUEST_LOG_LIMIT = 6  # faults that the guest's log holds before the kernel stops printing
Buffer = mmap | bytearray

ROOT = Path(__file__).parents[2]


def quad_gpu(**settings: str) -> Topology:
    """The shipped topology with two small GPUs, unless told otherwise."""
    wanted = {"gpus": "2", "vram": "1M", "engine": "igb", **settings}
    return load.load(ROOT / "topologies" / "quad-gpu.yaml", wanted)


@dataclass
class Page:
    """Where a page of a bus address leads."""

    buffer: Buffer
    offset: int
    read: bool = True
    write: bool = True


class FakeAgent:
    """Answers calls; ``dies_on`` names a method at which the link is lost for good."""

    def __init__(self, node: FakeNode, dies_on: str = "") -> None:
        self._node = node
        self.dies_on = dies_on

    def call(self, method: str, timeout_s: float = 30.0, /, **params: Any) -> Any:
        node = self._node
        if not node.alive or method == self.dies_on:
            node.alive = False
            raise LinkLost("the channel closed", node=node.name, console_tail="Kernel panic")
        handler = getattr(node, "do_" + method.replace(".", "_"), None)
        if handler is None:
            raise AgentError(f"no method {method}", remote_type="UnknownMethodError")
        return handler(**params)


class NoModels:
    """A fake's engines are none."""

    def call(self, method: str, **_: Any) -> Any:
        raise HostError(f"no models: {method}")


class NoLink:
    """Nobody answers."""

    def open_channel(self, command: str, *, timeout_s: float = 20.0) -> Channel:
        raise LinkLost(f"no shell for {command}", node="fake")

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        raise LinkLost(f"no shell for {command}", node="fake")


@dataclass
class FakeNode:
    """One machine."""

    plan: NodePlan
    topology: Topology
    log_dir: Path
    dies_on: str = ""
    has_iommu: bool = True
    alive: bool = True
    registers: dict[str, int] = field(default_factory=dict)  # doorbell status, by address
    interrupts: dict[str, int] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)  # devices, the last time that any were

    def __post_init__(self) -> None:
        self.name = self.plan.name
        self.folder = self.log_dir
        self.agent = FakeAgent(self, self.dies_on)
        self.models = NoModels()
        self.link: Link = NoLink()
        self.iommu = self.topology.nodes[self.name].iommu
        self.log_dir.mkdir(parents=True, exist_ok=True)
        (self.log_dir / QEMU_LOG).touch()
        self._fds = {
            f.name: os.memfd_create(f.name) for f in self.plan.functions if f.role is Role.VRAM
        }
        self._bars: dict[tuple[str, int], tuple[int, Buffer]] = {}  # bus address, contents
        self._ram: dict[str, tuple[int, bytearray]] = {}  # physical address, contents
        self._tables: dict[int, Page] = {}
        self._open: str = ""  # "", "vfio" or "raw"
        self._engines: dict[int, Function] = {}
        self._faults: list[dict[str, Any]] = []
        self._types: dict[int, str] = {}
        address = 0xE000_0000
        for function in self.plan.functions:
            for index, size_bytes in _bars_of(function):
                self._bars[function.bdf, index] = (address, self._memory(function, size_bytes))
                address += max(size_bytes, 1 << 20)

    def _memory(self, function: Function, size_bytes: int) -> Buffer:
        if function.role is not Role.VRAM:
            return bytearray(size_bytes)
        os.ftruncate(self._fds[function.name], size_bytes)
        return mmap(self._fds[function.name], size_bytes)

    # The host's side

    def blame(self, error: LinkLost) -> TestbedError:
        return error

    def host_memory(self, function: str) -> mmap:
        return mmap(self._fds[function], 0)

    def qmp(self, command: str, **arguments: Any) -> Any:
        if command == "human-monitor-command":
            address = int(arguments["command-line"].split()[-1], 16)
            bdf = next(b for (b, _), (start, _) in self._bars.items() if start == address - 0x24)
            return f"{address:016x}: 0x{self.registers.get(bdf, 0):08x}\r\n"
        return {}

    def console_tail(self, lines: int = 40) -> str:
        return "Kernel panic"

    def end(self) -> None:
        self.alive = False
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    # What the devices do

    def _resolve(self, device: Function, address: int, access: str) -> tuple[Buffer, int] | None:
        """Where an access leads, or None after recording its fault."""
        if self._open == "vfio":
            page = self._tables.get(address // PAGE)
            if page is not None and getattr(page, access):
                return page.buffer, page.offset + address % PAGE
            self._record(device, address, access, mapped=page is not None)
            return None
        for start, buffer in (*self._bars.values(), *self._ram.values()):
            if start <= address < start + len(buffer):
                return buffer, address - start
        raise AssertionError(f"a raw access to {address:#x}, which is nowhere")

    def _record(self, device: Function, address: int, access: str, *, mapped: bool) -> None:
        if self.iommu.scalable:
            reason = 0x80 if address >> 47 else 0x85 if mapped else 0x71
        else:
            reason = 4 if address >> self.iommu.aw_bits else 5 if access == "write" else 6
        sid = device.bus << 8 | device.slot << 3 | device.number
        with (self.log_dir / QEMU_LOG).open("a") as log:
            for piece in range(2):  # QEMU refuses an access in pieces
                log.write(
                    f"vtd_dmar_fault sid {sid:#x} fault {reason} addr {address + 4 * piece:#x}"
                    f" write {int(access == 'write')}\n"
                )
        self._faults.append(
            {
                "requester": device.bdf,
                "address": address & -PAGE,
                "access": access,
                "reason": reason,
            }
        )

    def _move(self, device: Function, source: int, target: int, size_bytes: int) -> None:
        for done, size in _pieces(source, target, size_bytes):
            data = bytes(size)
            if found := self._resolve(device, source + done, "read"):
                buffer, offset = found
                data = bytes(buffer[offset : offset + size])
            if found := self._resolve(device, target + done, "write"):
                buffer, offset = found
                buffer[offset : offset + size] = data

    # The agent's methods

    def do_system_info(self) -> dict[str, Any]:
        return {"kernel": "7.2", "iommu": {"present": self.has_iommu}}

    def do_pci_tree(self) -> dict[str, Any]:
        return {
            "devices": [
                {
                    "bdf": f.bdf,
                    "bars": [
                        {
                            "index": index,
                            "address": self._bars[f.bdf, index][0],
                            "size_bytes": size_bytes,
                            "kind": "mem",
                        }
                        for index, size_bytes in _bars_of(f)
                    ],
                }
                for f in self.plan.functions
            ]
        }

    do_pci_bars = do_pci_tree

    def do_iommu_groups(self) -> list[dict[str, Any]]:
        groups = oracle.iommu_groups(self.plan, self.topology.nodes[self.name])
        return [
            {"id": i, "type": self._types.get(i, "DMA"), "devices": sorted(g)}
            for i, g in enumerate(groups)
        ]

    def do_iommu_set_type(self, group: int, type: str) -> dict[str, str]:  # noqa: A002
        assert not self._open, "the kernel refuses while a device has a driver"
        old, self._types[group] = self._types.get(group, "DMA"), type
        return {"old": old, "new": type}

    def do_kmsg_mark(self) -> dict[str, int]:
        return {"sequence": len(self._faults)}

    def do_faults_since(self, sequence: int, **_: Any) -> dict[str, Any]:
        new = self._faults[sequence:GUEST_LOG_LIMIT]
        return {"records": new, "suppressed": 0, "overflow": False, "lost_lines": 0}

    def do_vfio_open(self, devices: list[str]) -> dict[str, Any]:
        assert not self._open
        self._open, self.opened = "vfio", devices
        return {"container": 1}

    def do_raw_open(self, devices: list[str]) -> dict[str, Any]:
        assert not self._open
        self._open, self.opened = "raw", devices
        return {"container": 1}

    def do_vfio_close(self, container: int) -> dict[str, Any]:
        self._open = ""
        self._tables.clear()
        self._engines.clear()
        return {"restored": []}

    def do_vfio_map(
        self,
        container: int,
        iova: int,
        size_bytes: int,
        source: dict[str, Any],
        read: bool,
        write: bool,
        page_bytes: int,
    ) -> dict[str, Any]:
        buffer, offset = self._buffer(source), source.get("offset", 0)
        for done in range(0, size_bytes, PAGE):
            number = (iova + done) // PAGE
            if number in self._tables:
                raise AgentError("occupied", remote_type="FileExistsError", errno=17)
            self._tables[number] = Page(buffer, offset + done, read, write)
        return {}

    def do_vfio_unmap(self, container: int, iova: int, size_bytes: int) -> dict[str, int]:
        for number in range(iova // PAGE, (iova + size_bytes) // PAGE):
            self._tables.pop(number)
        return {"unmapped_bytes": size_bytes}

    def do_vfio_unmap_ranges(self, container: int, ranges: list[dict[str, int]]) -> None:
        for each in ranges:
            self.do_vfio_unmap(container, **each)

    def do_memory_alloc(self, name: str, size_bytes: int) -> dict[str, int]:
        self._ram[name] = (0x100_0000 * (len(self._ram) + 1), bytearray(size_bytes))
        return {"physical": self._ram[name][0]}

    def do_memory_free(self, name: str) -> None:
        del self._ram[name]

    def do_memory_fill(
        self, target: dict[str, Any], offset: int, size_bytes: int, seed: int
    ) -> None:
        self._buffer(target)[offset : offset + size_bytes] = pattern(seed, 0, size_bytes)

    def do_memory_checksum(
        self, target: dict[str, Any], offset: int, size_bytes: int
    ) -> dict[str, str]:
        return {"sha256": sha256(self._buffer(target)[offset : offset + size_bytes]).hexdigest()}

    def do_memory_read(
        self, target: dict[str, Any], offset: int, size_bytes: int
    ) -> dict[str, str]:
        if offset == 0x24 and target.get("bar"):
            return {"hex": self.registers.get(target["bar"], 0).to_bytes(4, "little").hex()}
        return {"hex": bytes(self._buffer(target)[offset : offset + size_bytes]).hex()}

    def do_memory_write(self, target: dict[str, Any], offset: int, hex: str) -> None:  # noqa: A002
        if offset == 0x64:
            self.registers[target["bar"]] = 0

    def do_engine_open(self, device: str, kind: str, scratch: dict[str, Any]) -> dict[str, Any]:
        assert device in self.opened
        function = next(f for f in self.plan.functions if f.bdf == device)
        self._engines[len(self._engines)] = function
        return {"engine": len(self._engines) - 1}

    def do_engine_copy(
        self, engine: int, source_iova: int, target_iova: int, size_bytes: int, timeout_s: float
    ) -> dict[str, Any]:
        self._move(self._engines[engine], source_iova, target_iova, size_bytes)
        return {"completed": True, "copied_bytes": size_bytes, "elapsed_ns": 1}

    def do_engine_write32(self, engine: int, iova: int, value: int) -> dict[str, Any]:
        if found := self._resolve(self._engines[engine], iova, "write"):
            buffer, offset = found
            bdf = next(b for (b, _), (_, contents) in self._bars.items() if contents is buffer)
            if offset == 0x60:
                self.registers[bdf] = self.registers.get(bdf, 0) | value
                self.interrupts[bdf] = self.interrupts.get(bdf, 0) + 1
        return {"completed": True, "copied_bytes": 4, "elapsed_ns": 1}

    def do_engine_storm(self, engine: int, iova: int, count: int, access: str) -> dict[str, Any]:
        for page in range(count):
            self._resolve(self._engines[engine], iova + page * PAGE, access)
        return {"completed": True, "copied_bytes": 0, "elapsed_ns": 1}

    def do_irq_arm(self, device: str, kind: str, vector: int) -> None:
        self.interrupts[device] = 0

    def do_irq_wait(self, device: str, vector: int, timeout_s: float) -> dict[str, int]:
        return {"count": self.interrupts.pop(device, 0)}

    def _buffer(self, target: Mapping[str, Any]) -> Buffer:
        if "ram" in target:
            return self._ram[target["ram"]][1]
        assert target["bar"] in self.opened
        return self._bars[target["bar"], target["index"]][1]


class FakeRack:
    """A running rack of such nodes."""

    def __init__(self, topology: Topology, run_dir: Path, **knobs: Any) -> None:
        self.topology = topology
        self.name = topology.rack
        self.plan: RackPlan = place(topology)
        self.run_dir = run_dir
        self.versions: Mapping[str, Any] = {"qemu": "fake"}
        self.closed = False
        self.disks = True
        self.nodes = {
            name: FakeNode(plan, topology, run_dir / name, **knobs)
            for name, plan in self.plan.nodes.items()
        }

    def close(self) -> None:
        self.closed = True
        for node in self.nodes.values():
            node.end()


class FakeSource:
    """Starts such racks; ``knobs`` of the n-th rack are the n-th of the list, then none."""

    restartable = True

    def __init__(self, topology: Topology, run_dir: Path, *knobs: dict[str, Any]) -> None:
        self.topology = topology
        self.plan = place(topology)
        self.racks: list[FakeRack] = []
        self._run_dir = run_dir
        self._knobs: Iterator[dict[str, Any]] = iter(knobs)

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> FakeRack:
        knobs = {} if topology is not self.topology else next(self._knobs, {})
        if "fails" in knobs:
            raise knobs["fails"]
        rack = FakeRack(topology, self._run_dir / label, **knobs)
        rack.disks = disks
        self.racks.append(rack)
        return rack


def _bars_of(function: Function) -> list[tuple[int, int]]:
    if function.role is Role.VRAM:
        return [(2, function.vram_size_bytes)]
    return [(0, 1 << 20)] if function.kind in ("edu", "igb") else []


def _pieces(source: int, target: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(done, size) such that no piece crosses a page at either end."""
    done = 0
    while done < size_bytes:
        room = PAGE - max((source + done) % PAGE, (target + done) % PAGE)
        size = min(room, size_bytes - done)
        yield done, size
        done += size
