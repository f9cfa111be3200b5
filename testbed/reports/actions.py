# SPDX-License-Identifier: Apache-2.0
"""Doing the steps of a report on a running rack: each becomes what it saw, none judges.

Everything goes through the benches and disks of the suites, so that reports do what suites do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing, TestbedError
from testbed.guest import modules
from testbed.instruments.bench import Bench, CopyStatus, Engine, dma_functions
from testbed.instruments.devices import find_device
from testbed.instruments.faults import FaultWatch, watch_machine
from testbed.instruments.interface import Rack, RackNode
from testbed.instruments.mapper import Mapping as Mapped
from testbed.instruments.memory import Memory, sha256
from testbed.instruments.paths import PathWatch
from testbed.instruments.storage import TRANSFER_BYTES, Disks, Provided
from testbed.reports import closed
from testbed.reports.guest import read_config, run_command, write_config
from testbed.reports.model import Report
from testbed.reports.places import PlaceFound, find_functions, find_place, values_of_devices
from testbed.reports.references import resolve
from testbed.reports.seen import Seen
from testbed.reports.steps import (
    Acs,
    Buffer,
    Call,
    Checksum,
    Close,
    Config,
    Copy,
    Exec,
    Fill,
    Inject,
    KernelLog,
    Map,
    Module,
    Open,
    P2pMem,
    Pattern,
    Step,
    Transfer,
    Unmap,
    Unplug,
    Wait,
    Write32,
)
from testbed.results.evidence import Note, Witness
from testbed.results.judging import PAGE_BYTES, Judgement
from testbed.topology.plan import Function, Role

DEFAULT_MAP_BYTES = 64 << 10
_POLL_S = 0.05
_ACS_REDIRECT = 0x04 | 0x08  # P2P request redirect, P2P completion redirect


class Stage:
    """One report's rack while its steps are done; ``seen`` is by the names of steps."""

    def __init__(self, rack: Rack, report: Report) -> None:
        self.rack = rack
        self.seen: dict[str, Seen] = {}
        self._devices = values_of_devices(rack.plan)
        self._benches: list[tuple[str, frozenset[str], Bench, bool]] = []
        self._buffers: dict[str, tuple[str, Memory]] = {}
        self._mapped: dict[str, tuple[Bench, Mapped]] = {}
        self._provided: dict[str, Provided] = {}
        self._disks: dict[str, Disks] = {}
        self._log_marks = {
            name: node.agent.call("kmsg.mark")["sequence"]
            for name, node in rack.nodes.items()
            if any(isinstance(step, KernelLog) for step in report.steps)
        }

    @property
    def scope(self) -> dict[str, Mapping[str, Any]]:
        """What references can ask for by now."""
        return {**self._devices, **{name: seen.values for name, seen in self.seen.items()}}

    def perform(self, step: Step) -> Seen:  # noqa: PLR0911, PLR0912  one line a verb
        """Do one step.

        :raises TestbedError: it failed, or the machine did.
        """
        match step:
            case Open():
                return self._open(step)
            case Close():
                return self._close(step)
            case Buffer():
                return self._buffer(step)
            case Map():
                return self._map(step)
            case Unmap():
                bench, mapped = self._mapped.pop(step.mapping)
                bench.mapper.unmap(mapped)
                return Seen()
            case Fill():
                return self._fill(step)
            case Pattern():
                data = pattern(step.seed, 0, step.size_bytes)
                return Seen({**_pattern_values(step), "hex": data.hex()})
            case Checksum():
                return self._checksum(step)
            case Copy() | Write32():
                return self._dma(step)
            case P2pMem():
                return self._p2pmem(step)
            case Transfer():
                return self._transfer(step)
            case Module():
                act = modules.unload if step.unload else modules.load
                act(self._real_node(step.node), step.module)
                return Seen()
            case Acs():
                return self._acs(step)
            case Config():
                return self._config(step)
            case Inject():
                find_device(self.rack.nodes, step.device).arm(step.rule, by="report")
                return Seen()
            case Unplug():
                return self._unplug(step)
            case Exec():
                command = resolve(step.command, self.scope)
                return Seen(run_command(self._real_node(step.node), command, step.timeout_s))
            case Wait():
                self._wait(step.seconds)
                return Seen()
            case KernelLog():
                return self._kernel_log(step)
            case Call():
                return self._call(step)
        raise TestbedError(f"no action for a step '{step.kind}'")

    # Devices and memory

    def _node(self, name: str) -> RackNode:
        return self.rack.nodes[name or next(iter(self.rack.nodes))]

    def _real_node(self, name: str) -> Any:
        node = self._node(name)
        if not hasattr(node, "link"):
            raise CapabilityMissing("this rack's nodes have no shell and no kernel")
        return node

    def _functions(self, word: str) -> tuple[str, list[Function]]:
        found = find_functions(self.rack.plan, word)
        return found[0][0], [function for _, function in found]

    def _open(self, step: Open) -> Seen:
        by_node: dict[str, list[Function]] = {}
        names: dict[str, set[str]] = {}
        for word in step.devices:
            node, functions = self._functions(word)
            by_node.setdefault(node, []).extend(dma_functions(functions) or functions)
            names.setdefault(node, set()).add(functions[0].device)
        for name, functions in by_node.items():
            iommu = self.rack.topology.nodes[name].iommu
            translates = iommu.kind != "none" and iommu.mode not in ("off", "passthrough")
            is_raw = step.domain == "kernel" and not translates
            if not is_raw and iommu.mode == "off":
                raise CapabilityMissing("IOMMU off: VFIO needs one (`domain: kernel` does not)")
            opener = Bench.open_raw if is_raw else Bench.open
            bench = opener(self._node(name), functions)
            self._benches.append((name, frozenset(names[name]), bench, is_raw))
        return Seen({"devices": len(step.devices)})

    def _close(self, step: Close) -> Seen:
        node, functions = self._functions(step.device)
        for each in list(self._benches):
            if each[0] == node and functions[0].device in each[1]:
                self._benches.remove(each)
                each[2].close()
        return Seen()

    def _bench(self, node: str, device: str) -> tuple[Bench, bool]:
        for name, devices, bench, raw in self._benches:
            if name == node and device in devices:
                return bench, raw
        raise TestbedError(f"'{device}' is not open")

    def _buffer(self, step: Buffer) -> Seen:
        node = self._node(step.node)
        answer = node.agent.call("memory.alloc", name=step.buffer, size_bytes=step.size_bytes)
        physical = answer["physical"]
        target = {"ram": step.buffer}
        memory = Memory(node, step.buffer, step.size_bytes, target, bus_address=physical)
        self._buffers[step.buffer] = (node.name, memory)
        return Seen({"bus_address": physical, "size": step.size_bytes})

    def _place(self, word: str) -> PlaceFound:
        nodes = {name: node for name, (node, _) in self._buffers.items()}
        return find_place(self.rack.plan, word, nodes, self._provided)

    def _is_closed(self, place: PlaceFound) -> bool:
        """A BAR of a device that was not opened: a driver of the kernel's may have it."""
        function = place.function
        return function is not None and not any(
            node == place.node and function.device in devices
            for node, devices, _, _ in self._benches
        )

    def _memory(self, place: PlaceFound) -> Memory:
        """A BAR or a buffer."""
        if place.function is None or place.bar is None:
            return self._buffers[place.name][1]
        bench, _ = self._bench(place.node, place.function.device)
        if place.function.role is Role.VRAM:
            return bench.vram(place.function)
        return bench.bar(place.function, place.bar)

    def _map(self, step: Map) -> Seen:
        place = self._place(step.memory)
        memory = self._memory(place)
        if step.into is not None:
            node, functions = self._functions(step.into)
            bench, is_raw = self._bench(node, functions[0].device)
        elif place.function is not None:
            bench, is_raw = self._bench(place.node, place.function.device)
        else:
            _, _, bench, is_raw = next(b for b in self._benches if b[0] == place.node)
        size_bytes = step.size_bytes or min(DEFAULT_MAP_BYTES, memory.size_bytes - step.offset)
        bus_address = None
        if memory.bus_address is not None:
            bus_address = memory.bus_address + step.offset
        values = {"bus_address": bus_address, "size": size_bytes}
        if step.raw or is_raw:
            if bus_address is None:
                raise CapabilityMissing(f"the physical address of {memory.name}")
            note = Note(f"{memory.place(step.offset)} handed out as {bus_address:#x}, not mapped")
            return Seen({**values, "dma_address": bus_address}, evidence=(note,))
        mapped = bench.mapper.map(memory, step.offset, size_bytes, read=step.read, write=step.write)
        if step.name:
            self._mapped[step.name] = (bench, mapped)
        return Seen({**values, "dma_address": mapped.iova}, evidence=(mapped.evidence,))

    def _disks_of(self, node: str) -> Disks:
        if node not in self._disks:
            self._disks[node] = Disks(self._node(node))
        return self._disks[node]

    def _fill(self, step: Fill) -> Seen:
        place = self._place(step.memory)
        if place.is_p2pmem:
            self._provided[place.name].fill(step.seed)
        elif place.is_disk and place.function is not None:
            self._disks_of(place.node).fill(place.function, step.seed)
        elif self._is_closed(place):
            data = pattern(step.seed, 0, step.size_bytes)
            closed.write(self._node(place.node), place, step.offset, data)
        else:
            self._memory(place).fill(step.offset, step.size_bytes, step.seed)
        return Seen(_pattern_values(step))

    def _checksum(self, step: Checksum) -> Seen:
        place = self._place(step.memory)
        name = f"{step.memory}+{step.offset:#x}"
        nothing = bytes(step.size_bytes)
        if place.is_p2pmem:
            provided = self._provided[place.name]
            read = provided.judge(nothing)
            name = f"{provided.provider.name}.cmb"
        elif place.is_disk and place.function is not None:
            read = self._disks_of(place.node).judge(place.function, nothing)
        elif self._is_closed(place):
            read = closed.judge(self._node(place.node), place, step.offset, nothing)
        else:
            read = self._memory(place).judge(step.offset, nothing)
        guest, host = _digests(read)
        values = {"guest": guest, "host": host or "", "size": step.size_bytes}
        return Seen(values, size_bytes=step.size_bytes, place=name, guest=guest, host=host)

    # DMA

    def _engine(self, word: str) -> tuple[Bench, Engine]:
        node, functions = self._functions(word)
        bench, is_raw = self._bench(node, functions[0].device)
        scratch = None
        if is_raw:
            # Rings where the device reaches them past any IOMMU: in its own memory, if it has one.
            plan = self.rack.plan.nodes[node]
            opened = next(devices for _, devices, each, _ in self._benches if each is bench)
            memories = [f for f in plan.by_role(Role.VRAM) if f.device in opened]
            memories.sort(key=lambda f: f.device != functions[0].device)
            scratch = bench.vram(memories[0]) if memories else None
        function = next(f for f in functions if f.role is Role.ENGINE)
        return bench, bench.engine(function, scratch=scratch)

    def _dma(self, step: Copy | Write32) -> Seen:
        bench, engine = self._engine(step.engine)
        target = resolve(step.target, self.scope)
        with bench.watch() as watch, PathWatch(engine.witness) as paths:
            if isinstance(step, Copy):
                source = resolve(step.source, self.scope)
                size_bytes = step.size_bytes
                status: CopyStatus = engine.copy(source, target, size_bytes)
            else:
                size_bytes = 4
                status = engine.write32(target, resolve(step.value, self.scope))
        values = {
            "completed": status.completed,
            "bytes": status.copied_bytes,
            "faults": watch.window.count,
        }
        return Seen(
            values,
            window=watch.window,
            moved=paths.moved() if engine.witness is not None else None,
            device=engine.function.device,
            size_bytes=size_bytes,
            evidence=status.evidence,
        )

    def _p2pmem(self, step: P2pMem) -> Seen:
        node, functions = self._functions(step.provider)
        provided = Provided.of(self._node(node), functions[0])
        self._provided[step.name or provided.name] = provided
        return Seen({"bus_address": provided.physical, "size": TRANSFER_BYTES})

    def _transfer(self, step: Transfer) -> Seen:
        node, functions = self._functions(step.client)
        provided = self._provided[step.memory]
        done = self._disks_of(node).transfer(functions[0], provided, write=step.write)
        claim = Note(f"the kernel says it moved {done.moved_bytes} bytes, errno {done.error or 0}")
        values = {
            "bytes": done.moved_bytes,
            "errno": done.error,
            "faults": done.faults.count,
            "lines": "\n".join(done.log),
        }
        return Seen(
            values,
            window=done.faults,
            size_bytes=TRANSFER_BYTES,
            lines=done.log,
            evidence=(claim,),
        )

    # The machine

    def _acs(self, step: Acs) -> Seen:
        node, functions = self._functions(step.port)
        ports = [function for function in functions if function.acs]
        control = _ACS_REDIRECT if step.redirect else 0
        agent = self._node(node).agent
        before = [agent.call("acs.set", device=f.bdf, control=control)["old"] for f in ports]
        return Seen({"ports": len(ports), "before": before[0]})

    def _config(self, step: Config) -> Seen:
        node, functions = self._functions(step.device)
        guest, bdf = self._real_node(node), functions[0].bdf
        if step.value is not None:
            write_config(guest, bdf, step.offset, step.width, resolve(step.value, self.scope))
        return Seen({"value": read_config(guest, bdf, step.offset, step.width)})

    def _unplug(self, step: Unplug) -> Seen:
        name, functions = self._functions(step.device)
        node = self._node(name)
        wanted = {function.qemu_id for function in functions}
        node.qmp("device_del", id=functions[0].qemu_id)
        deadline_s = time.monotonic() + step.timeout_s
        while True:
            present = {each["name"] for each in node.qmp("qom-list", path="/machine/peripheral")}
            if not wanted & present or time.monotonic() > deadline_s:
                return Seen({"gone": not wanted & present})
            time.sleep(_POLL_S)

    def _wait(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            for node in self.rack.nodes.values():
                if not node.alive:
                    node.agent.call("system.info")  # raises what became of it
            time.sleep(min(left_s, _POLL_S))

    def _kernel_log(self, step: KernelLog) -> Seen:
        node = self._node(step.node)
        records = node.agent.call("kmsg.since", sequence=self._log_marks[node.name])["records"]
        self._log_marks[node.name] = node.agent.call("kmsg.mark")["sequence"]
        lines = tuple(r["text"] for r in records if step.words in r["text"])
        return Seen({"count": len(lines), "lines": "\n".join(lines)}, lines=lines)

    def _call(self, step: Call) -> Seen:
        parameters = resolve(step.parameters, self.scope)
        node = self._node(step.node)
        if not step.watch:
            return Seen(dict(_flat(node.agent.call(step.method, step.timeout_s, **parameters))))
        with FaultWatch(node, machine_watched=watch_machine(node)) as watch:
            answer = node.agent.call(step.method, step.timeout_s, **parameters)
        values = {**dict(_flat(answer)), "faults": watch.window.count}
        return Seen(values, window=watch.window, size_bytes=PAGE_BYTES)


def _pattern_values(step: Fill | Pattern) -> dict[str, Any]:
    digest = sha256(pattern(step.seed, 0, step.size_bytes))
    return {"seed": step.seed, "size": step.size_bytes, "sha256": digest}


def _digests(read: Judgement) -> tuple[str, str | None]:
    """What the witnesses read, whatever was expected."""
    seen = {each.witness: each.sha256 for each in read.evidence if each.kind == "bytes"}
    return seen[Witness.GUEST], seen.get(Witness.HOST)


def _flat(answer: Any, prefix: str = "") -> Any:
    """``{"a": {"b": 1}}`` as ``a-b``: 1; a list's entries by their numbers, an answer as `answer`.

    Characters that names do not have (``0000:01:00.0``) become ``-`` too.
    """
    if isinstance(answer, Mapping):
        pairs = answer.items()
    elif isinstance(answer, list):
        pairs = dict(enumerate(answer)).items()
    else:
        yield prefix or "answer", answer
        return
    for key, value in pairs:
        word = "".join(c if c.isalnum() or c == "_" else "-" for c in str(key))
        yield from _flat(value, f"{prefix}-{word}" if prefix else word)
