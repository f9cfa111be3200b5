# SPDX-License-Identifier: Apache-2.0
"""Memory that devices read and write, seen by the guest and, if it is video memory, by the host."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from guest_agent.pattern import pattern
from testbed.instruments.interface import RackNode
from testbed.results.judging import Judgement, judge_bytes
from testbed.topology.plan import Function

VRAM_BAR = 2  # ivshmem-plain: BAR2 is the shared memory (QEMU docs/specs/ivshmem-spec.rst)
_WITNESS_FILE = "witness.bin"
PROVIDED_BYTES = 2 << 20  # of it, made peer-to-peer memory: p2pdma wants sections of 2 MiB


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def by_machine(node: RackNode, physical: int, size_bytes: int) -> bytes:
    """What QEMU itself reads at an address of the machine, without the guest's help."""
    place = {"val": physical, "size": size_bytes}
    node.qmp("pmemsave", **place, filename=_WITNESS_FILE)
    file = node.folder / _WITNESS_FILE
    try:
        return file.read_bytes()
    finally:
        file.unlink()


def judge_video_page(
    node: RackNode, video: Function, offset: int, expected: bytes, guest: bytes
) -> Judgement:
    """Did the guest's CPU read ``expected`` in a page of a video memory, and does the host?

    :param guest: what the guest's CPU read there.
    """
    with node.host_memory(video.name) as view:
        host = view[offset : offset + len(expected)]
    return judge_bytes(
        f"{video.name}+{offset:#x}",
        len(expected),
        sha256(expected),
        guest=sha256(guest),
        host=sha256(host),
    )


@dataclass(frozen=True)
class Memory:
    """A BAR, or a buffer of guest memory.

    ``target``       how the agent names it.
    ``bus_address``  where it is without an IOMMU; None if that is not known.
    ``host_view``    the name under which the host sees it too (``gpu0.vram``), or "".
    """

    node: RackNode = field(repr=False)
    name: str
    size_bytes: int
    target: dict[str, Any]
    bus_address: int | None = None
    host_view: str = ""

    @property
    def is_bar(self) -> bool:
        """It is a device's, not the guest's own memory."""
        return "bar" in self.target

    def source(self, offset: int) -> dict[str, Any]:
        """How ``vfio.map`` names what is at ``offset``; guest memory is mapped from its start."""
        return {**self.target, "offset": offset} if self.is_bar else self.target

    def place(self, offset: int) -> str:
        """For people: ``gpu1.vram+0x1000``."""
        return f"{self.name}+{offset:#x}"

    def fill(self, offset: int, size_bytes: int, seed: int) -> bytes:
        """Let the guest write the pattern of ``seed`` there, and return it."""
        self.node.agent.call(
            "memory.fill", target=self.target, offset=offset, size_bytes=size_bytes, seed=seed
        )
        return pattern(seed, 0, size_bytes)

    def read_guest(self, offset: int, size_bytes: int) -> bytes:
        """What the guest reads there (at most 1 MiB)."""
        answer = self.node.agent.call(
            "memory.read", target=self.target, offset=offset, size_bytes=size_bytes
        )
        return bytes.fromhex(answer["hex"])

    def read(self, offset: int, size_bytes: int) -> bytes:
        """What is there now, by the host where it can see it, else by the guest."""
        if self.host_view:
            return self._host_read(offset, size_bytes)
        return self.read_guest(offset, size_bytes)

    def judge(self, offset: int, expected: bytes) -> Judgement:
        """Do all who can see it read ``expected`` at ``offset``?"""
        size_bytes = len(expected)
        guest = self.node.agent.call(
            "memory.checksum", target=self.target, offset=offset, size_bytes=size_bytes
        )
        host = None
        if self.host_view:
            host = sha256(self._host_read(offset, size_bytes))
        return judge_bytes(
            self.place(offset), size_bytes, sha256(expected), guest=guest["sha256"], host=host
        )

    def _host_read(self, offset: int, size_bytes: int) -> bytes:
        with self.node.host_memory(self.host_view) as view:
            return view[offset : offset + size_bytes]
