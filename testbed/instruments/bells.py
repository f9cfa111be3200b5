# SPDX-License-Identifier: Apache-2.0
"""A rack's bells as tests use them: opened by VFIO, their interrupts counted, rung by the CPU.

Registers: QEMU docs/specs/ivshmem-spec.rst. Each interrupt is counted twice: by who waits for it
(VFIO's eventfd), and by the guest's kernel (``/proc/interrupts``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from testbed.instruments.bench import Bench
from testbed.instruments.interface import RackNode
from testbed.instruments.mutations import Mutation
from testbed.machine.command import BELL_VECTORS
from testbed.topology.plan import Function

REGISTERS = 0
IV_POSITION = 8
DOORBELL = 12
VECTORS = range(BELL_VECTORS)


@dataclass(frozen=True)
class Rings:
    """Interrupts of a bell since they were last counted, by vector."""

    waited_for: tuple[int, ...]
    by_kernel: tuple[int, ...]


class Bell:
    """One bell, open; ``number`` is what others ring it by."""

    def __init__(self, node: RackNode, function: Function, number: int, mutation: Mutation) -> None:
        self.node = node
        self.name = f"{node.name}/{function.device}"
        self.number = number
        self._bdf = function.bdf
        self._mutation = mutation
        self._bench = Bench.open(node, [function])
        self._registers = self._bench.bar(function, REGISTERS)
        for vector in VECTORS:
            node.agent.call("irq.arm", device=self._bdf, kind="msix", vector=vector)
        self._kernel = self._kernels_count()

    def position(self) -> int:
        """The number that the device itself says it has."""
        answer = self._registers.read_guest(IV_POSITION, 4)
        return int.from_bytes(answer, "little", signed=True)

    def ring(self, number: int, vector: int) -> None:
        """Interrupt another bell, by its number."""
        if self._mutation is Mutation.FABRIC_WRONG_BELL:
            vector = (vector + 1) % BELL_VECTORS
        word = (number << 16 | vector).to_bytes(4, "little").hex()
        self.node.agent.call(
            "memory.write", target=self._registers.target, hex=word, offset=DOORBELL
        )

    def rings(self, vector: int | None = None, timeout_s: float = 0.0) -> Rings:
        """How often it was rung since this was last asked; ``vector`` is waited for."""
        counts = [
            self.node.agent.call(
                "irq.wait",
                device=self._bdf,
                vector=each,
                timeout_s=timeout_s if each == vector else 0.0,
            )["count"]
            for each in sorted(VECTORS, key=lambda each: each != vector)
        ]
        if vector is not None:
            counts.insert(vector, counts.pop(0))
        now = self._kernels_count()
        new = tuple(after - before for after, before in zip(now, self._kernel, strict=True))
        self._kernel = now
        return Rings(tuple(counts), new)

    def _kernels_count(self) -> tuple[int, ...]:
        table = self.node.link.run("cat /proc/interrupts").stdout.decode()
        counts = dict.fromkeys(VECTORS, 0)
        for line in table.splitlines():
            found = re.search(rf"vfio-msix\[(\d+)\]\({re.escape(self._bdf)}\)", line)
            if found:
                cells = line.partition(":")[2].split()
                counts[int(found[1])] = sum(int(cell) for cell in cells if cell.isdecimal())
        return tuple(counts.values())

    def close(self) -> None:
        """Give it back."""
        self._bench.close()
