# SPDX-License-Identifier: Apache-2.0
"""The fault buffer of a model, as its driver reads it: a ring of records in memory.

A record that is not there yet has a time of 0, so that looking for one costs no register access.
Format: docs/gpu-model.md.
"""

from __future__ import annotations

import struct

from guest_agent.hw import model_registers as hw

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.hw.region import Region

BUFFER_BYTES = 4096
ENTRIES = BUFFER_BYTES // hw.FAULT_RECORD_BYTES
_CAUSES = {
    value: name.removeprefix("FAULT_CAUSE_").lower()
    for name, value in vars(hw).items()
    if name.startswith("FAULT_CAUSE_")
}


class FaultBuffer:
    """:data:`BUFFER_BYTES` of ``region`` from ``offset`` on."""

    def __init__(self, region: Region, offset: int) -> None:
        region.check(offset, BUFFER_BYTES)
        self._region = region
        self._offset = offset
        self._time = 0
        self.next = 0
        self.clear()

    def clear(self) -> None:
        """Empty, as after a reset of the engine."""
        self._region.write(self._offset, bytes(BUFFER_BYTES))
        self._point_to(0)

    def has_record(self) -> bool:
        """Whether there is one to take."""
        return self._region.words64[self._time] != 0

    def take(self) -> int:
        """Take the next record, which is there; answers its address only."""
        words = self._region.words64
        address = words[self._time - hw.FAULT_RECORD_TIME_NS_AT // 8]
        words[self._time] = 0
        self._point_to((self.next + 1) % ENTRIES)
        return address

    def take_all(self) -> list[dict[str, Any]]:
        """Take every record that is there, oldest first."""
        found = []
        while self.has_record():
            place = self._offset + self.next * hw.FAULT_RECORD_BYTES
            record = self._region.read(place, hw.FAULT_RECORD_BYTES)
            address, command, write, cause, _, time_ns, _ = struct.unpack(
                hw.FAULT_RECORD_FORM, record
            )
            self.take()
            found.append(
                {
                    "address": address,
                    "command": command,
                    "write": bool(write),
                    "cause": _CAUSES.get(cause, str(cause)),
                    "time_ns": time_ns,
                }
            )
        return found

    def _point_to(self, index: int) -> None:
        self.next = index
        place = self._offset + index * hw.FAULT_RECORD_BYTES + hw.FAULT_RECORD_TIME_NS_AT
        self._time = place >> 3
