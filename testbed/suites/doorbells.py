# SPDX-License-Identifier: Apache-2.0
"""Ringing a doorbell: four bytes written by one device into another's register page.

The page is edu's first one (QEMU docs/specs/edu.rst): writing register 0x60 sets bits of the
interrupt status in 0x24 and raises the interrupt; writing 0x64 clears them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from testbed.results.evidence import Access, Counter, Evidence, Note
from testbed.results.judging import Judgement, judge_fault
from testbed.suites.bench import Bench, Engine
from testbed.suites.memory import Memory
from testbed.topology.plan import Function

RING_OFFSET = 0x60
_STATUS_OFFSET = 0x24
_ACKNOWLEDGE_OFFSET = 0x64
_WAIT_S = 2.0


@dataclass(frozen=True)
class DoorbellPage:
    """One GPU's doorbell, watched from the guest, through its interrupt, and from the host."""

    bench: Bench
    function: Function
    registers: Memory

    @classmethod
    def of(cls, bench: Bench, function: Function) -> DoorbellPage:
        """Arm the interrupt, and clear what an earlier ring left."""
        page = cls(bench, function, bench.registers(function))
        bench.node.agent.call("irq.arm", device=function.bdf, kind="msi", vector=0)
        page.acknowledge()
        return page

    def acknowledge(self) -> None:
        """Clear the status."""
        self.bench.node.agent.call(
            "memory.write",
            target=self.registers.target,
            offset=_ACKNOWLEDGE_OFFSET,
            hex="ffffffff",
        )

    def judge_rung(self, value: int) -> Judgement:
        """Was it rung with ``value``: is it in the status, for guest and host, and an interrupt?"""
        guest = self._status()
        host = self._status_by_host()
        answer = self.bench.node.agent.call(
            "irq.wait", device=self.function.bdf, vector=0, timeout_s=_WAIT_S
        )
        evidence: list[Evidence] = [
            Counter("doorbell status, guest", guest),
            Counter("interrupts", answer["count"]),
        ]
        if host is None:
            evidence.append(Note("the host has no view of the register: QEMU would not read it"))
        else:
            evidence.append(Counter("doorbell status, host", host))
        name = self.function.name
        if guest != value or host not in (None, value):
            return Judgement(False, f"{name} was not rung with {value:#x}", tuple(evidence))
        if answer["count"] < 1:
            return Judgement(False, f"{name} was rung, but no interrupt came", tuple(evidence))
        return Judgement(True, f"{name} was rung and its interrupt came", tuple(evidence))

    def ring_refused(self, engine: Engine, address: int, reasons: frozenset[int]) -> Judgement:
        """Write four bytes to ``address``, and judge that the IOMMU refused them."""
        with self.bench.watch() as watch:
            engine.write32(address, 1)
        return judge_fault(
            watch.window,
            requester=engine.requester,
            address=address,
            access=Access.WRITE,
            reasons=reasons,
        )

    def judge_silent(self) -> Judgement:
        """Was it not rung?"""
        guest = self._status()
        evidence = (Counter("doorbell status, guest", guest),)
        if guest:
            return Judgement(False, f"{self.function.name} was rung ({guest:#x})", evidence)
        return Judgement(True, f"{self.function.name} was not rung", evidence)

    def _status(self) -> int:
        return int.from_bytes(self.registers.read_guest(_STATUS_OFFSET, 4), "little")

    def _status_by_host(self) -> int | None:
        """The register as QEMU's monitor reads it at its bus address; None if it will not."""
        address = (self.registers.bus_address or 0) + _STATUS_OFFSET
        said = self.bench.node.qmp(
            "human-monitor-command", **{"command-line": f"xp /1wx {address:#x}"}
        )
        found = re.search(r":\s*0x([0-9a-f]{8})", str(said))
        return int(found[1], 16) if found else None
