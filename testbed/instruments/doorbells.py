# SPDX-License-Identifier: Apache-2.0
"""Ringing a doorbell: four bytes written by one device into another's register page.

edu has its doorbell among its first registers (QEMU docs/specs/edu.rst): a write to 0x60 sets bits
of the status in 0x24 and raises the interrupt. The GPU model has a page of its own for it
(docs/gpu-model.md): DOORBELL_NOTIFY keeps what was written to it in NOTIFIED, and interrupts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from guest_agent.hw import model_registers as model
from testbed.instruments.bench import Bench, Engine
from testbed.instruments.memory import Memory
from testbed.results.evidence import Access, Counter, Evidence, Note
from testbed.results.judging import PAGE_BYTES, Judgement, judge_fault
from testbed.topology.plan import Function

_WAIT_S = 2.0
_DOORBELL_PAGE = model.DOORBELL_NOTIFY & -PAGE_BYTES


@dataclass(frozen=True)
class Layout:
    """Where a kind of device keeps it, in bytes from the start of BAR0.

    ``page`` is what a peer gets to see; ``ring``, within it, is written to ring; ``status`` holds
    what was written; writing ones to ``acknowledge`` makes the device ready for the next ring.
    ``enable``: a register, and the value that makes a ring interrupt.
    """

    page: int
    ring: int
    status: int
    acknowledge: int
    interrupt: str
    enable: tuple[int, int] | None = None


EDU = Layout(page=0, ring=0x60, status=0x24, acknowledge=0x64, interrupt="msi")
MODEL = Layout(
    page=_DOORBELL_PAGE,
    ring=model.DOORBELL_NOTIFY - _DOORBELL_PAGE,
    status=model.NOTIFIED,
    acknowledge=model.INTERRUPT_CAUSE,
    interrupt="msix",
    enable=(model.INTERRUPT_ENABLE, model.INTERRUPT_CAUSE_NOTIFY),
)


@dataclass(frozen=True)
class DoorbellPage:
    """One GPU's doorbell, watched from the guest, through its interrupt, and from the host."""

    bench: Bench
    function: Function
    registers: Memory
    layout: Layout

    @classmethod
    def of(cls, bench: Bench, function: Function) -> DoorbellPage:
        """Arm the interrupt, and clear what an earlier ring left."""
        layout = EDU if function.kind == "edu" else MODEL
        page = cls(bench, function, bench.registers(function), layout)
        bench.node.agent.call("irq.arm", device=function.bdf, kind=layout.interrupt, vector=0)
        if layout.enable is not None:
            page._write(*layout.enable)
        page.acknowledge()
        return page

    def acknowledge(self) -> None:
        """Be ready for the next ring."""
        self._write(self.layout.acknowledge, 0xFFFFFFFF)

    def status(self) -> int:
        """What was last rung with, as the guest sees it; 0 on an edu after `acknowledge`."""
        return int.from_bytes(self.registers.read_guest(self.layout.status, 4), "little")

    def judge_rung(self, value: int) -> Judgement:
        """Was it rung with ``value``: is it in the status, for guest and host, and an interrupt?"""
        guest = self.status()
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

    def judge_silent(self, before: int) -> Judgement:
        """Was it not rung since its status was ``before``?"""
        guest = self.status()
        evidence = (Counter("doorbell status, guest", guest),)
        if guest != before:
            return Judgement(False, f"{self.function.name} was rung ({guest:#x})", evidence)
        return Judgement(True, f"{self.function.name} was not rung", evidence)

    def _write(self, offset: int, value: int) -> None:
        self.bench.node.agent.call(
            "memory.write",
            target=self.registers.target,
            offset=offset,
            hex=value.to_bytes(4, "little").hex(),
        )

    def _status_by_host(self) -> int | None:
        """The register as QEMU's monitor reads it at its bus address; None if it will not."""
        address = (self.registers.bus_address or 0) + self.layout.status
        said = self.bench.node.qmp(
            "human-monitor-command", **{"command-line": f"xp /1wx {address:#x}"}
        )
        found = re.search(r":\s*0x([0-9a-f]{8})", str(said))
        return int(found[1], 16) if found else None
