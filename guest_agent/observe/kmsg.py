# SPDX-License-Identifier: Apache-2.0
"""The kernel log as structured records (Documentation/ABI/testing/dev-kmsg)."""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_RECORD_BYTES = 8192  # the kernel's CONSOLE_EXT_LOG_MAX, the longest record it hands out
_KEPT_RECORDS = 65536


class KernelLog:
    """Reads /dev/kmsg as it grows and keeps what it read, so that looking back is cheap.

    The kernel's own buffer is a ring; what was overwritten before it was read is counted as lost.
    """

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._path = path
        self._fd = -1
        self._records: list[tuple[int, bytes]] = []
        self._next = 0

    def mark(self) -> int:
        """The sequence number that the next record will have, at the earliest."""
        self._drain()
        return self._next

    def since(
        self, sequence: int, words: tuple[bytes, ...] = (b"",)
    ) -> tuple[list[dict[str, Any]], int]:
        """Every record from ``sequence`` on, and how many are missing among them.

        :param words: leave out records that hold none of these.
        """
        self._drain()
        found = [raw for number, raw in self._records if number >= sequence]
        lost = max(0, self._next - sequence) - len(found)
        return [parse(raw) for raw in found if any(word in raw for word in words)], lost

    def wait(self, timeout_s: float) -> None:
        """Return when there is a record that was not read yet, at the latest after that time."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def close(self) -> None:
        """Close the device."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _drain(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        while True:
            try:
                raw = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # overwritten before we came; the next read goes on after the gap
            if not raw:
                break
            number = int(raw.split(b",", 2)[1])
            self._records.append((number, raw))
            self._next = number + 1
        del self._records[:-_KEPT_RECORDS]


def parse(raw: bytes) -> dict[str, Any]:
    """One record: ``priority,sequence,time_us,flags[,…];text`` and lines of key=value after it.

    The text's own control characters arrive as ``\\x0a`` and are left so.
    """
    head, _, body = raw.decode(errors="replace").partition(";")
    fields = head.split(",")
    priority = int(fields[0])
    return {
        "sequence": int(fields[1]),
        "time_us": int(fields[2]),
        "level": priority & 7,
        "facility": priority >> 3,
        "text": body.split("\n", 1)[0],
    }
