# SPDX-License-Identifier: Apache-2.0
"""A device that takes part: its address space, its engine, its memory, its links."""

from __future__ import annotations

import errno
import time

from guest_agent.hw import gpu_commands
from guest_agent.hw.gpu import Gpu
from guest_agent.p2p.addresses import LinkAddress, on_link, on_pcie
from guest_agent.p2p.errors import FaultError
from guest_agent.p2p.fence import Fence, FenceContext
from guest_agent.p2p_device.ranges import PAGE_BYTES, Ranges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.hw.model import Ring
    from guest_agent.hw.region import Region
    from guest_agent.hw.vfio import VfioContainer
    from guest_agent.p2p.addresses import Address

STAGING_BYTES = 256 << 10
LINK_BYTES = 1 << 32
_DEVICE_TIMEOUT_S = 5.0


class Export:
    """What one end of a link lets its peer reach: pages of the GPU's memory, at link addresses."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        self._gpu = gpu
        self._number = number
        self._space = gpu.add_space()
        # Links of one GPU begin at different addresses: one of another link leads nowhere.
        self.addresses = Ranges(
            0x100_0000 * (number + 1), LINK_BYTES // 2, guard_bytes=PAGE_BYTES, rotate=True
        )
        self._publish()

    def _publish(self) -> None:
        if not self._gpu.export(
            self._number, "virtual", self._space, LINK_BYTES, _DEVICE_TIMEOUT_S
        ):
            raise OSError(errno.ETIMEDOUT, f"the peer of link {self._number} takes no note")

    def map(self, address: int, size_bytes: int, offset: int, *, writable: bool) -> None:
        """Let link addresses lead to video memory at ``offset``."""
        vram = gpu_commands.SPACES["vram"]
        self._gpu.space(self._space).map(address, size_bytes, offset, vram, writable=writable)

    def unmap(self, address: int, size_bytes: int) -> None:
        """From the return on the peer is refused there."""
        self._gpu.space(self._space).unmap(address, size_bytes)
        self._publish()
        self._gpu.invalidate(None)


class Member:
    """One device.

    :param iovas: addresses of its container that are free for peer-to-peer.
    :param vram: its video memory, and ``memory`` what of it buffers may use; None for a NIC.
    :param staging: memory into which it reads, and from which it writes: of its own video memory,
        or (NIC) RAM at ``staging_at`` as the device sees it.
    :param links: the number of each private link, by the port's name.
    """

    def __init__(
        self,
        name: str,
        container: VfioContainer,
        engine: Ring,
        iovas: Ranges,
        *,
        vram: Region | None,
        memory: Ranges | None,
        staging: Region,
        staging_offset: int,
        staging_at: int,
        links: dict[str, int],
    ) -> None:
        self.name = name
        self.container = container
        self.engine = engine
        self.iovas = iovas
        self.vram = vram
        self.memory = memory
        self.staging = staging
        self.staging_offset = staging_offset
        self.staging_at = staging_at
        self.links = links
        self.line = FenceContext(f"{name} engine")
        self._exports: dict[int, Export] = {}  # by link: two ports may stand for one
        self.go_on_at_ns = 0  # when to end what holds the engine; 0: not by itself
        self._held_until = 0

    @property
    def gpu(self) -> Gpu:
        """:raises OSError: ENODEV: it is a NIC."""
        if not isinstance(self.engine, Gpu):
            raise OSError(errno.ENODEV, f"{self.name} is no GPU")
        return self.engine

    def export(self, port: str) -> Export:
        """What it exports on a link. :raises OSError: ENODEV: it has none of that name."""
        number = self.link(port)
        if number not in self._exports:
            self._exports[number] = Export(self.gpu, number)
        return self._exports[number]

    def link(self, port: str) -> int:
        """The number of a link. :raises OSError: ENODEV: it has none of that name."""
        if port not in self.links:
            raise OSError(errno.ENODEV, f"{self.name} has no link {port}")
        return self.links[port]

    def place(self, address: Address, offset: int) -> dict[str, Any]:
        """How a command names an address that is this device's.

        :raises AddressError: it is another's.
        """
        if isinstance(address, LinkAddress):
            value = on_link(address, self.name, address.port) + offset
            return {"space": "link", "address": value, "link": self.link(address.port)}
        return {"space": "system", "address": on_pcie(address, self.name) + offset}

    # --- the engine at work

    def begin(
        self,
        what: str,
        source: dict[str, Any],
        target: dict[str, Any],
        size_bytes: int,
        deadline_ns: int,
    ) -> Fence:
        """Queue a copy on the GPU's engine; the fence asks the device."""
        command = {"op": "copy", "source": source, "target": target, "size_bytes": size_bytes}
        gpu = self.gpu
        batch = gpu.submit([gpu_commands.encode("copy", command)], "poll")

        def poll() -> bool:
            if self.go_on_at_ns and time.monotonic_ns() >= self.go_on_at_ns:
                self.go_on()
            answer = gpu.wait(batch, 0, "poll")
            if answer["ended"] and not answer["completed"]:
                raise FaultError(f"{self.name} was refused: {_cause(answer)}")
            return bool(answer["completed"])

        return Fence(self.line, what, deadline_ns, poll)

    def access(self, address: Address, offset: int, size_bytes: int, *, write: bool) -> None:
        """Move bytes between an address and the staging memory, and wait.

        :raises FaultError: the device was refused; says why.
        """
        if size_bytes > STAGING_BYTES:
            raise OSError(errno.EINVAL, f"at most {STAGING_BYTES} bytes at once")
        there = self.place(address, offset)
        if isinstance(self.engine, Gpu):
            here = {"space": "vram", "address": self.staging_at}
            source, target = (here, there) if write else (there, here)
            command = {"op": "copy", "source": source, "target": target, "size_bytes": size_bytes}
            batch = self.gpu.submit([gpu_commands.encode("copy", command)], "poll")
            answer = self.gpu.wait(batch, _DEVICE_TIMEOUT_S, "poll")
        else:
            ends = (self.staging_at, there["address"])
            begin, end = ends if write else ends[::-1]
            answer = self.engine.copy(begin, end, size_bytes, _DEVICE_TIMEOUT_S)
        if not answer["completed"]:
            raise FaultError(f"{self.name} was refused at {address}: {_cause(answer)}")

    def hold(self) -> None:
        """Make the engine wait, so that what is queued behind this stays queued."""
        self._held_until += 1
        at = self._semaphore()
        wait = {
            "op": "wait",
            "source": {"space": "vram", "address": at},
            "value": self._held_until,
        }
        self.gpu.submit([gpu_commands.encode("wait", wait)], "poll")

    def go_on(self) -> None:
        """End :meth:`hold`."""
        assert self.vram is not None  # noqa: S101  only GPUs hold
        self.go_on_at_ns = 0
        self.vram.write64(self._semaphore(), self._held_until)

    def _semaphore(self) -> int:
        return self.staging_offset + STAGING_BYTES


def _cause(answer: dict[str, Any]) -> str:
    status = answer["status"]
    where = f" at {status['address']:#x}" if "address" in status else ""
    return f"{status.get('cause', 'unknown')}{where}"
