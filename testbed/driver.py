# SPDX-License-Identifier: Apache-2.0
"""A driver for a device, in a test on the host; what it does happens in the guest.

::

    with Driver(rack.nodes["host0"], "card0") as card:
        buffer = card.buffer(4096)
        buffer.write(b"hello")
        card.arm(0)
        card.write64(0x00, buffer.iova)  # BAR0
        assert card.wait_interrupt(0)

Subclass it and give your card's operations names. Each access is one call of the agent, over SSH:
ten milliseconds in an emulated machine. The device is taken through VFIO (its kernel driver is
unbound, and gets it back), so that its DMA reaches buffers and nothing else; without an IOMMU
through sysfs, and then buffers stand at their physical addresses and there are no interrupts.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from testbed.errors import AgentError, CapabilityMissing, DeviceLost, InputError, TestbedError
from testbed.topology.plan import MODEL_KINDS

if TYPE_CHECKING:
    from testbed.instruments.faults import FaultWatch
    from testbed.instruments.interface import RackNode

PAGE_BYTES: Final = 4096
# Above the kernel's BARs and the interrupts, and within the 39 bits of the narrowest IOMMU.
FIRST_IOVA: Final = 1 << 38
CALL_MARGIN_S: Final = 10.0
POLL_S: Final = 0.01


class Buffer:
    """Memory of the guest that the device reaches at ``iova``, until :meth:`unmap`."""

    def __init__(self, driver: Driver, name: str, iova: int, size_bytes: int) -> None:
        self.iova = iova
        self.size_bytes = size_bytes
        self._driver = driver
        self._target = {"ram": name}

    def write(self, data: bytes, offset: int = 0) -> None:
        """Store bytes, as the guest's CPU."""
        self._driver.call("memory.write", target=self._target, offset=offset, hex=data.hex())

    def read(self, offset: int = 0, size_bytes: int | None = None) -> bytes:
        """Load bytes, likewise; all of them if no size is given. At most 1 MiB at once."""
        size = self.size_bytes - offset if size_bytes is None else size_bytes
        answer = self._driver.call(
            "memory.read", target=self._target, offset=offset, size_bytes=size
        )
        return bytes.fromhex(answer["hex"])

    def unmap(self) -> None:
        """Take it away from the device; the guest keeps it. A DMA to it faults from now on."""
        self._driver.unmap(self.iova, self.size_bytes)


class Driver:
    """One PCI function, taken for as long as this object is open; a context manager.

    :param node: the machine that it stands in.
    :param device: its name in the topology (``card0``), or that of one function (``gpu0.engine``).

    :raises InputError: the machine has no such device.
    :raises AgentError: it cannot be taken: something else holds it, or a device of its IOMMU group.
    """

    def __init__(self, node: RackNode, device: str) -> None:
        self.node = node
        functions = [f for f in node.plan.functions if device in (f.name, f.device)]
        if not functions:
            known = ", ".join(f.name for f in node.plan.functions if not f.secondary_bus)
            raise InputError(f"node '{node.name}' has no device '{device}'", hint=f"it has {known}")
        self.device = functions[0].device
        self.bdf = functions[0].bdf
        self._buffers = 0
        self._next_iova = FIRST_IOVA
        try:
            opened = self.call("vfio.open", devices=[self.bdf])
            self.translated = True
        except AgentError as error:
            if error.errno != errno.ENODEV:
                raise
            opened = self.call("raw.open", devices=[self.bdf])
            self.translated = False
        self._container: int | None = opened["container"]

    def call(self, method: str, timeout_s: float = 30.0, /, **params: Any) -> Any:
        """One call of the agent's: what the methods below are made of."""
        return self.node.agent.call(method, timeout_s, **params)

    # --- registers

    def read32(self, offset: int, *, bar: int = 0) -> int:
        """A 32-bit register, by one access."""
        return int.from_bytes(self.read(offset, 4, bar=bar), "little")

    def read64(self, offset: int, *, bar: int = 0) -> int:
        """A 64-bit register, by one access."""
        return int.from_bytes(self.read(offset, 8, bar=bar), "little")

    def write32(self, offset: int, value: int, *, bar: int = 0) -> None:
        """Write a 32-bit register, by one access."""
        self.write(offset, value.to_bytes(4, "little"), bar=bar)

    def write64(self, offset: int, value: int, *, bar: int = 0) -> None:
        """Write a 64-bit register, by one access."""
        self.write(offset, value.to_bytes(8, "little"), bar=bar)

    def read(self, offset: int, size_bytes: int, *, bar: int = 0) -> bytes:
        """Bytes of a BAR; 4 and 8 aligned ones by one access."""
        answer = self.call(
            "memory.read", target=self._bar(bar), offset=offset, size_bytes=size_bytes
        )
        return bytes.fromhex(answer["hex"])

    def write(self, offset: int, data: bytes, *, bar: int = 0) -> None:
        """Write bytes to a BAR, likewise."""
        self.call("memory.write", target=self._bar(bar), offset=offset, hex=data.hex())

    def poll32(
        self, offset: int, until: Callable[[int], bool], *, bar: int = 0, timeout_s: float = 10.0
    ) -> int:
        """Read a register until ``until`` is content; what it held last, if that never came."""
        deadline_s = time.monotonic() + timeout_s
        while not until(value := self.read32(offset, bar=bar)) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return value

    # --- memory

    def buffer(self, size_bytes: int, *, iova: int | None = None) -> Buffer:
        """Zeroed memory that the device may read and write.

        :param iova: where the device shall see it; the next free place if not given.
        :raises CapabilityMissing: without an IOMMU, if it cannot have one physical address.
        """
        size = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        self._buffers += 1
        name = f"{self.bdf}-{self._buffers}"
        physical = self.call("memory.alloc", name=name, size_bytes=size)["physical"]
        if not self.translated:
            if physical is None:
                raise CapabilityMissing(f"{size} contiguous bytes without an IOMMU")
            return Buffer(self, name, physical, size)
        if iova is None:
            iova, self._next_iova = self._next_iova, self._next_iova + size
        self.call(
            "vfio.map",
            container=self._container,
            iova=iova,
            size_bytes=size,
            source={"ram": name},
        )
        return Buffer(self, name, iova, size)

    def unmap(self, iova: int, size_bytes: int) -> None:
        """Undo mappings. :raises CapabilityMissing: without an IOMMU nothing can be."""
        if not self.translated:
            raise CapabilityMissing("an IOMMU, to take memory away from a device")
        self.call("vfio.unmap", container=self._container, iova=iova, size_bytes=size_bytes)

    # --- interrupts, faults, failures

    def arm(self, vector: int = 0, *, kind: str = "msix") -> None:
        """Count the interrupts of a vector; ``kind`` is ``msix``, ``msi`` or ``intx``."""
        self.call("irq.arm", device=self.bdf, kind=kind, vector=vector)

    def wait_interrupt(self, vector: int = 0, *, timeout_s: float = 10.0) -> int:
        """How often the vector fired since the last question; 0 if it did not in time."""
        answer = self.call(
            "irq.wait",
            timeout_s + CALL_MARGIN_S,
            device=self.bdf,
            vector=vector,
            timeout_s=timeout_s,
        )
        return int(answer["count"])

    def watch_faults(self) -> FaultWatch:
        """``with card.watch_faults() as watch: …``; then ``watch.window.records``.

        Each record names ``requester`` (compare :attr:`bdf`), ``address`` and ``access``, as the
        guest's kernel and QEMU's own trace saw it.
        """
        from testbed.instruments.faults import FaultWatch, watch_machine  # noqa: PLC0415  seldom used

        return FaultWatch(self.node, machine_watched=watch_machine(self.node))

    def check(self) -> None:
        """Return if the device's model is well.

        :raises DeviceLost: its process died or does not answer, or its code raised: the file, the
            line and what.
        """
        if gone := self._gone():
            raise DeviceLost(
                f"device '{self.device}': {gone}",
                node=self.node.name,
                hint=f"its words are in {self.node.log_dir / f'{self.node.name}.models.log'}",
            )
        if failure := self._model_state().get("failure"):
            raise DeviceLost(
                f"device '{self.device}': {failure['what']} at {failure['where']}",
                node=self.node.name,
            )

    # --- the end

    def close(self) -> None:
        """Give it back to whom it belonged; its buffers go. Safe to call twice.

        One whose model is gone stays as it is until the machine's end: the kernel would reset it,
        and wait a minute for it to come back (drivers/pci/pci.c, PCIE_RESET_READY_POLL_MS).
        """
        container, self._container = self._container, None
        if container is None or self._gone():
            return
        self.call("vfio.close" if self.translated else "raw.close", container=container)
        for number in range(1, self._buffers + 1):
            self.call("memory.free", name=f"{self.bdf}-{number}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(*((TestbedError,) if error is not None else ())):
            self.close()  # what went wrong first is what counts

    def _gone(self) -> str:
        """Why there is nothing behind it any more, or ""."""
        state = self._model_state()
        if state.get("lost") is not None:
            return f"its process is gone (status {state['lost']})"
        return "" if state.get("connected", True) else "its model does not answer"

    def _model_state(self) -> dict[str, Any]:
        """What the supervisor of the node's models knows of it; nothing of a device of QEMU's."""
        if all(f.kind not in MODEL_KINDS for f in self.node.plan.of_device(self.device)):
            return {}
        states: list[dict[str, Any]] = self.node.models.call("devices")
        return next((state for state in states if state["device"] == self.device), {})

    def _bar(self, index: int) -> dict[str, Any]:
        return {"bar": self.bdf, "index": index}
