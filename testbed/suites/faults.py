# SPDX-License-Identifier: Apache-2.0
"""Watching for translation faults, with two witnesses: the guest's kernel log and QEMU's trace.

The guest's log alone will not do (see :mod:`testbed.results.evidence`). QEMU's trace event
``vtd_dmar_fault`` (hw/i386/trace-events) is written for every fault before any of VT-d's recording
rules, so it is complete; it is switched on over QMP and goes to QEMU's log.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Self

from testbed.errors import QmpError
from testbed.machine.command import QEMU_LOG
from testbed.results.evidence import Access, FaultSeen, Witness
from testbed.results.judging import PAGE_BYTES, FaultWindow
from testbed.suites.interface import RackNode

TRACE_EVENT = "vtd_dmar_fault"
_TRACE_LINE = re.compile(
    r"vtd_dmar_fault sid (0x[0-9a-f]+) fault (\d+) addr (0x[0-9a-f]+) write ([01])"
)

# The fault's interrupt and the log line come a moment after the DMA.
_SETTLE_S = 0.05
_POLL_S = 0.01


def watch_machine(node: RackNode) -> bool:
    """Switch QEMU's trace of faults on; False if this QEMU has none."""
    try:
        node.qmp("trace-event-set-state", name=TRACE_EVENT, enable=True)
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
        deadline = time.monotonic() + _SETTLE_S
        while True:
            answer = self._node.agent.call("faults.since", sequence=self._sequence)
            seen = len(answer["records"])
            enough = seen >= len(machine) if self._machine_watched else seen > 0
            if enough or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        guest = tuple(
            FaultSeen(
                requester=_full_bdf(record["requester"]),
                address=record["address"],
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
    last: tuple[str, int, str, str] | None = None
    for source, reason, address, write in _TRACE_LINE.findall(text):
        this = (source, int(address, 16) // PAGE_BYTES, write, reason)
        if this != last:
            sid = int(source, 16)
            records.append(
                FaultSeen(
                    requester=f"0000:{sid >> 8:02x}:{(sid >> 3) & 0x1F:02x}.{sid & 7:x}",
                    address=int(address, 16),
                    access=Access.WRITE if write == "1" else Access.READ,
                    reason=int(reason),
                    witness=Witness.MACHINE,
                )
            )
        last = this
    return tuple(records)


def _full_bdf(bdf: str) -> str:
    return bdf if bdf.count(":") == 2 else f"0000:{bdf}"
