# SPDX-License-Identifier: Apache-2.0
"""The agent: its methods, and everything it holds on behalf of the host.

Sizes are in bytes, addresses are integers, functions are named ``0000:05:00.0``. The parameters'
annotations are what calls are checked against (:mod:`guest_agent.rpc`).
"""

from __future__ import annotations

from guest_agent import rpc
from guest_agent.kernel_methods import KernelMethods, registry
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from guest_agent.hw.device import Device
    from guest_agent.hw.engine import Engine
    from guest_agent.hw.memory import Buffers
    from guest_agent.hw.raw import RawContainer
    from guest_agent.hw.region import Region
    from guest_agent.hw.vfio import VfioContainer, VfioDevice
    from guest_agent.observe.kmsg import KernelLog
    from guest_agent.p2p_device.room import Room

# ruff: noqa: PLC0415  modules are loaded by the first method that needs them: each costs 10 ms or
# more on an emulated CPU, and a rack whose suite never copies need not load a driver.

MAX_TIMEOUT_S = 300.0


def check_timeout(timeout_s: float, name: str = "timeout_s") -> None:
    """:raises ParameterError: longer than a call may take."""
    if timeout_s > MAX_TIMEOUT_S:
        raise ParameterError(f"{name}: at most {MAX_TIMEOUT_S:.0f}, not {timeout_s}")


def _check_access(access: str) -> None:
    if access not in ("read", "write"):
        raise ParameterError(f"access: {access!r} is neither read nor write")


registry.area("gpu", "guest_agent.gpu_methods")
registry.area("nic", "guest_agent.nic_methods")
registry.area("iommu", "guest_agent.iommu_methods")
registry.area("nvme", "guest_agent.storage_methods")
registry.area("p2pmem", "guest_agent.storage_methods")
registry.area("acs", "guest_agent.storage_methods")
registry.area("loss", "guest_agent.loss_methods")
registry.area("dmabuf", "guest_agent.dmabuf_methods")
registry.area("hmm", "guest_agent.hmm_methods")
registry.area("protocol", "guest_agent.protocol_methods")
registry.area("driver", "guest_agent.driver_methods")
registry.area("fabric", "guest_agent.fabric_methods")


class Agent(KernelMethods):
    """State of one channel: buffers, containers, engines by number, and the kernel log's reader."""

    def __init__(self) -> None:
        super().__init__()
        self._containers: dict[int, VfioContainer | RawContainer] = {}
        self.engines: dict[int, Engine] = {}
        self.room: Room | None = None  # of the methods protocol.*
        self._next = 1
        self._buffers_made: Buffers | None = None
        self._log_made: KernelLog | None = None

    def serve(self, read_fd: int, write_fd: int) -> None:
        """Answer calls until ``read_fd`` ends."""
        rpc.serve(registry, self, read_fd, write_fd)

    def read_log(self) -> None:
        """Read what the kernel has said so far; a call then has only what is new to read."""
        self._log.mark()

    def release(self) -> list[str]:
        """Give everything back, whatever fails on the way; returns what failed."""
        problems: list[str] = []

        def attempt(action: Callable[[], object]) -> None:
            try:
                action()
            except Exception as error:  # the rest must still be given back
                problems.append(f"{type(error).__name__}: {error}")

        for engine in self.engines.values():
            attempt(engine.close)
        for container in self._containers.values():
            attempt(container.close)
        if self._buffers_made is not None:
            attempt(self._buffers_made.close)
        attempt(self.release_kernel)  # after the buffers: they may be of a provider's memory
        if self._log_made is not None:
            attempt(self._log_made.close)
        self.engines.clear()
        self.room = None  # what it held has been given back with containers and buffers
        self._containers.clear()
        self._buffers_made = self._log_made = None
        return problems

    @property
    def buffers(self) -> Buffers:
        """Memory that was allocated by name."""
        if self._buffers_made is None:
            from guest_agent.hw.memory import Buffers

            self._buffers_made = Buffers()
        return self._buffers_made

    @property
    def _log(self) -> KernelLog:
        if self._log_made is None:
            from guest_agent.observe.kmsg import KernelLog

            self._log_made = KernelLog()
        return self._log_made

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _device(self, name: str, bdf: str) -> Device:
        for container in self._containers.values():
            if bdf in container.devices:
                return container.devices[bdf]
        raise ParameterError(f"{name}: {bdf!r} is not open")

    def held(self) -> set[str]:
        """Addresses of the functions that are open."""
        return {bdf for container in self._containers.values() for bdf in container.devices}

    def engine(self, number: int) -> Engine:
        """The engine of that number. :raises ParameterError: there is none."""
        if number not in self.engines:
            raise ParameterError(f"engine: there is no {number}")
        return self.engines[number]

    def vfio(self, number: int) -> VfioContainer:
        """A VFIO container. :raises ParameterError: there is none of that number."""
        from guest_agent.hw.vfio import VfioContainer

        container = self._containers.get(number)
        if not isinstance(container, VfioContainer):
            raise ParameterError(f"container: {number} is no VFIO container")
        return container

    def vfio_device(self, number: int, bdf: str) -> VfioDevice:
        """A function of a VFIO container. :raises ParameterError: there is none."""
        from guest_agent.hw.vfio import VfioDevice

        device = self.vfio(number).devices.get(bdf)
        if not isinstance(device, VfioDevice):
            raise ParameterError(f"device: {bdf!r} is not in container {number}")
        return device

    def region(self, name: str, target: Mapping[str, Any]) -> Region:
        """The memory that a call names as ``{"ram": name}`` or ``{"bar": bdf, "index": 2}``.

        It may name an ``offset`` beside. :raises ParameterError: there is no such memory.
        """
        if "ram" in target:
            rpc.check_parts(name, target, {"ram": "str"}, {"offset": "int"})
            return self.buffers.get(target["ram"])
        rpc.check_parts(name, target, {"bar": "str", "index": "int"}, {"offset": "int"})
        return self._device(f"{name}.bar", target["bar"]).region(target["index"])

    def _opened(self, container: VfioContainer | RawContainer) -> dict[str, Any]:
        number = self._number()
        self._containers[number] = container
        return {
            "container": number,
            "devices": {bdf: device.describe() for bdf, device in container.devices.items()},
            **container.info(),
        }

    # ---- observation

    @registry.method("system.info")
    def _system_info(self) -> dict[str, Any]:
        from guest_agent.observe import system

        return system.info()

    @registry.method("pci.tree")
    def _pci_tree(self, *, only: list[str] | None = None) -> dict[str, Any]:
        """Of all functions, or of those whose addresses are given."""
        from guest_agent.observe import pci

        return {"devices": pci.tree(only=only)}

    @registry.method("pci.bars")
    def _pci_bars(self) -> dict[str, Any]:
        """As ``pci.tree``, of each function no more than ``bdf`` and ``bars``: no function is asked
        for anything."""
        from guest_agent.observe import pci

        return {"devices": pci.places()}

    @registry.method("kmsg.mark")
    def _kmsg_mark(self) -> dict[str, int]:
        return {"sequence": self._log.mark()}

    @registry.method("kmsg.since")
    def _kmsg_since(self, *, sequence: int) -> dict[str, Any]:
        records, lost = self._log.since(sequence)
        return {"records": records, "lost": lost}

    @registry.method("faults.mark")
    def _faults_mark(self, *, reports: int = 1) -> dict[str, Any]:
        import time

        from guest_agent.observe import dmar

        if not 1 <= reports <= dmar.MAX_REPORTS:
            raise ParameterError(f"reports: 1 to {dmar.MAX_REPORTS}, not {reports}")
        records, _ = self._log.since(0, dmar.WORDS)
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        wait_s = dmar.wait_for_reports(records, now_us, reports)
        time.sleep(wait_s)
        return {"sequence": self._log.mark(), "waited_s": wait_s}

    @registry.method("faults.since")
    def _faults_since(
        self, *, sequence: int, wanted: int = 0, wait_s: float = 0.0
    ) -> dict[str, Any]:
        """What was reported from ``sequence`` on; ``wanted`` reports are waited for."""
        import time

        from guest_agent.observe import dmar

        check_timeout(wait_s, "wait_s")
        deadline_s = time.monotonic() + wait_s
        while True:
            records, lost = self._log.since(sequence, dmar.WORDS)
            found = dmar.collect(records)
            left_s = deadline_s - time.monotonic()
            if len(found["records"]) >= wanted or left_s <= 0 or self._is_silent():
                return {**found, "lost_lines": lost}
            self._log.wait(left_s)

    def _is_silent(self) -> bool:
        """The kernel has printed so many faults that it prints none for a while."""
        import time

        from guest_agent.observe import dmar

        records, _ = self._log.since(0, dmar.WORDS)
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return dmar.wait_for_reports(records, now_us, 1) > 0

    # ---- devices and their address spaces

    @registry.method("vfio.open")
    def _vfio_open(self, *, devices: list[str]) -> dict[str, Any]:
        from guest_agent.hw.vfio import VfioContainer

        return self._opened(VfioContainer(devices, self.held()))

    @registry.method("raw.open")
    def _raw_open(self, *, devices: list[str]) -> dict[str, Any]:
        from guest_agent.hw.raw import RawContainer

        return self._opened(RawContainer(devices, self.held()))

    @registry.method("vfio.map")
    def _vfio_map(
        self,
        *,
        container: int,
        iova: int,
        size_bytes: int,
        source: dict[str, Any],
        read: bool = True,
        write: bool = True,
        page_bytes: int = 0,
    ) -> dict[str, Any]:
        self.vfio(container).map(
            self.region("source", source),
            source.get("offset", 0),
            iova,
            size_bytes,
            read=read,
            write=write,
            page_bytes=page_bytes,
        )
        return {}

    @registry.method("vfio.unmap")
    def _vfio_unmap(self, *, container: int, iova: int, size_bytes: int) -> dict[str, int]:
        return {"unmapped_bytes": self.vfio(container).unmap(iova, size_bytes)}

    @registry.method("vfio.unmap_ranges")
    def _vfio_unmap_ranges(self, *, container: int, ranges: list[dict[str, Any]]) -> dict[str, int]:
        """Several at once: ``iova`` and ``size_bytes`` of each."""
        vfio = self.vfio(container)
        done = [vfio.unmap(each["iova"], each["size_bytes"]) for each in ranges]
        return {"unmapped_bytes": sum(done)}

    @registry.method("vfio.close")
    @registry.method("raw.close")
    def _close(self, *, container: int) -> dict[str, list[str]]:
        if container not in self._containers:
            raise ParameterError(f"container: there is no {container}")
        devices = set(self._containers[container].devices.values())
        for each in [n for n, engine in self.engines.items() if engine.device in devices]:
            self.engines.pop(each).close()
        return {"restored": self._containers.pop(container).close()}

    @registry.method("irq.arm")
    def _irq_arm(self, *, device: str, kind: str, vector: int = 0) -> dict[str, Any]:
        self._device("device", device).arm(kind, vector)
        return {}

    @registry.method("irq.wait")
    def _irq_wait(self, *, device: str, timeout_s: float, vector: int = 0) -> dict[str, int]:
        check_timeout(timeout_s)
        return {"count": self._device("device", device).wait(vector, timeout_s)}

    # ---- memory

    @registry.method("memory.alloc")
    def _memory_alloc(self, *, name: str, size_bytes: int) -> dict[str, int | None]:
        return {"physical": self.buffers.alloc(name, size_bytes)}

    @registry.method("memory.free")
    def _memory_free(self, *, name: str) -> dict[str, Any]:
        self.buffers.free(name)
        return {}

    @registry.method("memory.fill")
    def _memory_fill(
        self, *, target: dict[str, Any], size_bytes: int, seed: int, offset: int = 0
    ) -> dict[str, Any]:
        from guest_agent.hw import memory

        memory.fill(self.region("target", target), offset, size_bytes, seed)
        return {}

    @registry.method("memory.checksum")
    def _memory_checksum(
        self, *, target: dict[str, Any], size_bytes: int, offset: int = 0
    ) -> dict[str, Any]:
        from guest_agent.hw import memory

        return memory.checksum(self.region("target", target), offset, size_bytes)

    @registry.method("memory.read")
    def _memory_read(
        self, *, target: dict[str, Any], size_bytes: int, offset: int = 0
    ) -> dict[str, str]:
        from guest_agent.hw import memory

        if size_bytes > memory.MAX_READ_BYTES:
            raise ParameterError(f"size_bytes: at most {memory.MAX_READ_BYTES} at once")
        return {"hex": self.region("target", target).read(offset, size_bytes).hex()}

    @registry.method("memory.write")
    def _memory_write(
        self,
        *,
        target: dict[str, Any],
        hex: str,  # noqa: A002  the protocol's word
        offset: int = 0,
    ) -> dict[str, Any]:
        try:
            data = bytes.fromhex(hex)
        except ValueError:
            raise ParameterError("hex: not pairs of hexadecimal digits") from None
        self.region("target", target).write(offset, data)
        return {}

    # ---- engines

    @registry.method("engine.open")
    def _engine_open(
        self, *, device: str, kind: str, scratch: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        from guest_agent.hw.drivers import engine_class
        from guest_agent.hw.engine import Scratch

        driver = engine_class(kind)
        function = self._device("device", device)
        if any(engine.device is function for engine in self.engines.values()):
            raise ParameterError(f"device: {device} has an engine already")
        memory = None
        if scratch is not None:
            rpc.check_parts(
                "scratch",
                scratch,
                {"iova": "int", "target": "dict[str, Any]", "size_bytes": "int"},
                {"offset": "int"},
            )
            region = self.region("scratch.target", scratch["target"])
            memory = Scratch(
                region, scratch.get("offset", 0), scratch["size_bytes"], scratch["iova"]
            )
        driver.probe(function)
        engine = driver(function, memory)
        engine.open()
        number = self._number()
        self.engines[number] = engine
        return {
            "engine": number,
            "granule_bytes": engine.granule_bytes,
            "max_copy_bytes": engine.max_copy_bytes,
            "can": list(engine.can),
        }

    @registry.method("engine.copy")
    def _engine_copy(
        self,
        *,
        engine: int,
        source_iova: int,
        target_iova: int,
        size_bytes: int,
        timeout_s: float = 10.0,
    ) -> dict[str, Any]:
        check_timeout(timeout_s)
        return self.engine(engine).copy(source_iova, target_iova, size_bytes, timeout_s)

    @registry.method("engine.write32")
    def _engine_write32(
        self, *, engine: int, iova: int, value: int, timeout_s: float = 10.0
    ) -> dict[str, Any]:
        check_timeout(timeout_s)
        return self.engine(engine).write32(iova, value, timeout_s)

    @registry.method("engine.storm")
    def _engine_storm(
        self,
        *,
        engine: int,
        iova: int,
        count: int,
        access: str = "read",
        timeout_s: float = 10.0,
    ) -> dict[str, Any]:
        check_timeout(timeout_s)
        _check_access(access)
        return self.engine(engine).storm(iova, count, access, timeout_s)

    @registry.method("engine.burst")
    def _engine_burst(
        self, *, engines: list[int], iova: int, access: str = "read", timeout_s: float = 10.0
    ) -> dict[str, Any]:
        from guest_agent.hw.engine import burst

        check_timeout(timeout_s)
        _check_access(access)
        return burst([self.engine(each) for each in engines], iova, access, timeout_s)

    @registry.method("engine.close")
    def _engine_close(self, *, engine: int) -> dict[str, Any]:
        self.engine(engine).close()
        del self.engines[engine]
        return {}
