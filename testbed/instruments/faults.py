# SPDX-License-Identifier: Apache-2.0
"""Watching for translation faults, with two witnesses: the guest's kernel log and QEMU's trace.

The guest's log alone will not do (see :mod:`testbed.results.evidence`). QEMU's trace events
(``vtd_dmar_fault`` and ``amdvi_page_fault`` in hw/i386/trace-events, ``virtio_iommu_report_fault``
in hw/virtio/trace-events) are written for every fault before any of the IOMMU's recording rules, so
they are complete; they are switched on over QMP and go to QEMU's log. AMD's tells but the address.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Self

from testbed.errors import QmpError
from testbed.instruments.interface import RackNode
from testbed.machine.command import QEMU_LOG
from testbed.results.evidence import Access, FaultSeen, Witness
from testbed.results.judging import PAGE_BYTES, FaultWindow

TRACE_EVENTS = ("vtd_dmar_fault", "virtio_iommu_report_fault", "amdvi_page_fault")
_TRACE_LINE = re.compile(
    r"vtd_dmar_fault sid (?P<sid>0x[0-9a-f]+) fault (?P<fault>\d+) addr (?P<address>0x[0-9a-f]+)"
    r" write (?P<write>[01])"
    r"|virtio_iommu_report_fault FAULT reason=(?P<reason>\d+) flags=(?P<flags>\d+)"
    r" endpoint=(?P<endpoint>\d+) address =(?P<at>0x[0-9a-f]+)"
    r"|amdvi_page_fault error: page fault accessing guest physical address"
    r" (?P<physical>0x[0-9a-f]+)"
)
# virtio 1.2, 5.13.6.10: VIRTIO_IOMMU_FAULT_F_READ, VIRTIO_IOMMU_FAULT_F_WRITE
_FLAG_READ, _FLAG_WRITE = 1, 2

# The fault's interrupt and the log line come a moment after the DMA.
_SETTLE_S = 0.05


def watch_machine(node: RackNode) -> bool:
    """Switch QEMU's trace of faults on; False if this QEMU has none."""
    try:
        for event in TRACE_EVENTS:
            node.qmp("trace-event-set-state", name=event, enable=True)
    except QmpError:
        return False
    return True


class FaultWatch:
    """A span of time; :attr:`window` is what was recorded in it, once it is over.

    ::

        with FaultWatch(node, machine_watched=True) as watch:
            engine.copy(...)
        judge_no_fault(watch.window)
    """

    window: FaultWindow

    def __init__(self, node: RackNode, *, machine_watched: bool) -> None:
        self._node = node
        self._machine_watched = machine_watched
        self._sequence = 0
        self._log = node.log_dir / QEMU_LOG
        self._log_start = 0

    def __enter__(self) -> Self:
        self._sequence = self._node.agent.call("kmsg.mark")["sequence"]
        if self._machine_watched:
            self._log_start = self._log.stat().st_size
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.window = self._read()

    def _read(self) -> FaultWindow:
        machine = self._machine_records()
        wanted = len(machine) if self._machine_watched else 1
        answer = self._node.agent.call(
            "faults.since", sequence=self._sequence, wanted=wanted, wait_s=_SETTLE_S
        )
        guest = tuple(
            FaultSeen(
                requester=_full_bdf(record["requester"]),
                address=record["address"] or 0,
                access=Access(record["access"]),
                reason=record["reason"],
                witness=Witness.GUEST,
                reason_text=record.get("reason_text", ""),
                pasid=record.get("pasid"),
            )
            for record in answer["records"]
        )
        return FaultWindow(
            records=guest + machine,
            machine_watched=self._machine_watched,
            suppressed=answer["suppressed"],
            overflow=answer["overflow"],
            lost_lines=answer["lost_lines"],
        )

    def _machine_records(self) -> tuple[FaultSeen, ...]:
        if not self._machine_watched:
            return ()
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return parse_trace(log.read().decode(errors="replace"))


def parse_trace(text: str) -> tuple[FaultSeen, ...]:
    """The faults in QEMU's trace; the source ID is bus, slot and function in 16 bits.

    QEMU tries a refused access again for each 4 bytes of it, where hardware refuses a packet once:
    what follows on the same page with the same reason is one record.
    """
    records: list[FaultSeen] = []
    last: tuple[str, int, Access, int] | None = None
    for line in _TRACE_LINE.finditer(text):
        record = _record(line)
        page = record.address // PAGE_BYTES
        this = (record.requester, page, record.access, record.reason)
        if this != last:
            records.append(record)
        last = this
    return tuple(records)


def _record(line: re.Match[str]) -> FaultSeen:
    if line["physical"]:
        address = int(line["physical"], 16)
        return FaultSeen("", address, Access.UNKNOWN, 0, Witness.MACHINE)
    if line["endpoint"]:
        flags = int(line["flags"])
        access = Access.UNKNOWN
        if flags & _FLAG_WRITE:
            access = Access.WRITE
        elif flags & _FLAG_READ:
            access = Access.READ
        source, address, reason = int(line["endpoint"]), int(line["at"], 16), int(line["reason"])
    else:
        access = Access.WRITE if line["write"] == "1" else Access.READ
        source, address = int(line["sid"], 16), int(line["address"], 16)
        reason = int(line["fault"])
    requester = f"0000:{source >> 8:02x}:{source >> 3 & 0x1F:02x}.{source & 7:x}"
    return FaultSeen(requester, address, access, reason, Witness.MACHINE)


def _full_bdf(bdf: str) -> str:
    return bdf if bdf.count(":") == 2 else f"0000:{bdf}"
