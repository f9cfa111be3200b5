# SPDX-License-Identifier: Apache-2.0
"""Copy engines behind one small interface: probe, open, copy, write32, storm, close.

What every engine guarantees
----------------------------
* Addresses are bus addresses, as the device puts them on the bus: IOVAs where an IOMMU translates.
* ``copy`` moves exactly ``size_bytes`` and touches no other byte of the target.
* ``copy`` returns when the device says that it is done, or after ``timeout_s``. ``completed`` is
  *the device's own claim*. Writes on PCIe are posted: a device is not told when the IOMMU refuses
  one, and QEMU's devices are not told of refused reads either. Whether the bytes arrived, only the
  destination and the fault records can say.
* Bytes left over from an earlier call are never written to a target: an engine that stages data in
  a buffer of its own overwrites that buffer first, if it was given scratch memory.
* After a copy that did not complete the device was reset and is usable again; interrupts that were
  armed still are.
* An armed interrupt (:meth:`Device.arm`, vector 0) fires when a copy is done, at least once.
* Nothing blocks longer than ``timeout_s`` and the time of one reset (1 s).
"""

from __future__ import annotations

import time

from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from guest_agent.hw.device import Device
    from guest_agent.hw.region import Region

PAGE_BYTES = 4096


class Scratch:
    """Memory that an engine may use for its rings and staging.

    :param region: where the CPU sees it, ``size_bytes`` from ``offset`` on.
    :param iova: where the device sees it; contiguous there.
    """

    def __init__(self, region: Region, offset: int, size_bytes: int, iova: int) -> None:
        region.check(offset, size_bytes)
        if offset % PAGE_BYTES or iova % PAGE_BYTES:
            raise ParameterError("scratch: offset and iova must be multiples of 4096")
        self.region = region
        self.offset = offset
        self.size_bytes = size_bytes
        self.iova = iova


class Engine:
    """One device's driver; see the module's docstring for what is guaranteed."""

    kind: ClassVar[str] = ""
    identity: ClassVar[tuple[int, int]] = (0, 0)  # vendor and device identifier
    granule_bytes: ClassVar[int] = 1  # sizes of copies are multiples of it
    max_copy_bytes: ClassVar[int] = 0
    can: ClassVar[tuple[str, ...]] = ()

    def __init__(self, device: Device, scratch: Scratch | None) -> None:
        self.device = device
        self.scratch = scratch

    @classmethod
    def probe(cls, device: Device) -> None:
        """:raises ParameterError: the device is of another kind."""
        found = device.identity()
        if found != cls.identity:
            raise ParameterError(
                f"device: {device.bdf} is {found[0]:04x}:{found[1]:04x}, no {cls.kind}"
            )

    def open(self) -> None:
        """Make the device ready. :raises TimeoutError: it does not become ready."""
        raise NotImplementedError

    def copy(
        self, source_iova: int, target_iova: int, size_bytes: int, timeout_s: float
    ) -> dict[str, Any]:
        """``{completed, copied_bytes, elapsed_ns, chunks, status}``; see the module's guarantees.

        ``status`` is the engine's own detail, for the record.
        """
        raise NotImplementedError

    def write32(self, iova: int, value: int, timeout_s: float) -> dict[str, Any]:
        """One DMA write of 4 bytes, which rings a doorbell. Answers as :meth:`copy`.

        :raises ParameterError: the address is no multiple of 4, or there is no scratch memory.
        """
        raise NotImplementedError

    def storm(self, iova: int, count: int, access: str, timeout_s: float) -> dict[str, Any]:
        """``count`` DMAs of this access (``read`` or ``write``), one a page from ``iova`` on.

        For addresses that are not mapped: provokes as many faults as fast as the device can.
        Answers as :meth:`copy`, with ``chunks`` the number of DMAs.
        """
        raise NotImplementedError

    def start(self, iova: int, access: str) -> None:
        """Begin one DMA of 4 bytes and do not wait. Only engines that can ``burst`` have it."""
        raise NotImplementedError

    def settled(self, watch: Stopwatch) -> bool:
        """Wait until no DMA is under way; False when the time is over first."""
        raise NotImplementedError

    def close(self) -> None:
        """Quieten the device: no DMA after this returns."""
        raise NotImplementedError

    @staticmethod
    def answer(
        watch: Stopwatch, completed: bool, copied: int, chunks: int, status: dict[str, Any]
    ) -> dict[str, Any]:
        """As :meth:`copy` answers."""
        return {
            "completed": completed,
            "copied_bytes": copied,
            "elapsed_ns": watch.elapsed_ns(),
            "chunks": chunks,
            "status": status,
        }

    def check_copy(self, size_bytes: int) -> None:
        """:raises ParameterError: not a size that one copy can have."""
        if not 0 < size_bytes <= self.max_copy_bytes or size_bytes % self.granule_bytes:
            raise ParameterError(
                f"size_bytes: {self.kind} copies 1 to {self.max_copy_bytes} bytes, not {size_bytes}"
            )


def check_doorbell(iova: int, value: int) -> None:
    """:raises ParameterError: not an aligned address, or not a 32-bit value."""
    if iova % 4:
        raise ParameterError(f"iova: {iova:#x} is no multiple of 4")
    if value >> 32:
        raise ParameterError(f"value: {value:#x} has more than 32 bits")


class Stopwatch:
    """Monotonic time since it was made, and a deadline."""

    def __init__(self, timeout_s: float) -> None:
        self._start = time.monotonic_ns()
        self._deadline = self._start + int(timeout_s * 1e9)

    def elapsed_ns(self) -> int:
        """Nanoseconds since the start."""
        return time.monotonic_ns() - self._start

    def left_s(self) -> float:
        """Seconds until the deadline; 0 when it is over."""
        return max(0.0, (self._deadline - time.monotonic_ns()) / 1e9)

    def expired(self) -> bool:
        """Whether the time is over."""
        return time.monotonic_ns() >= self._deadline


def burst(engines: list[Engine], iova: int, access: str, timeout_s: float) -> dict[str, Any]:
    """One DMA of 4 bytes by each engine, all under way at once; ``{completed, elapsed_ns}``.

    For an address that is not mapped: more requesters fault at one time than the IOMMU has
    registers to record them in (QEMU's intel-iommu has one).
    """
    for engine in engines:
        if "burst" not in engine.can:
            raise ParameterError(f"engines: {engine.kind} starts no DMA without finishing it")
    watch = Stopwatch(timeout_s)
    for engine in engines:
        engine.start(iova, access)
    completed = all(engine.settled(watch) for engine in engines)
    return {"completed": completed, "elapsed_ns": watch.elapsed_ns()}
