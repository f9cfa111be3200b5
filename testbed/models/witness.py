# SPDX-License-Identifier: Apache-2.0
"""The independent witness: what a device did, counted and traced where it really happens.

A verdict that bytes arrived needs more than the bytes: *by which path*. Every access of a model
passes here with the path it took. Counters never lose anything; the trace keeps the latest
:data:`TRACE_ENTRIES`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from enum import StrEnum
from typing import Final, NamedTuple

TRACE_ENTRIES: Final = 4096


class Path(StrEnum):
    """How an access reached its target."""

    IOMMU = "iommu"  # through a mapping that the guest's IOMMU made: bytes moved here
    MESSAGE = "message"  # asked of QEMU, whose IOMMU judged it: bytes moved there
    PEER = "peer"  # routed to a peer below a common bridge: the IOMMU never saw it
    LINK = "link"  # over a private link
    NETWORK = "network"  # through another NIC
    LOCAL = "local"  # the device's own memory


class Event(StrEnum):
    """What is counted besides accesses."""

    ACCESS_ERROR = "access_errors"
    PAGE_FAULT = "page_faults"
    REPLAY = "replays"
    INVALIDATION = "invalidations"
    INTERRUPT = "interrupts"
    INTERRUPT_LOST = "interrupts_lost"
    DOORBELL = "doorbells"
    DOORBELL_LOST = "doorbells_lost"
    COMMAND = "commands"
    MAP = "dma_maps"
    UNMAP = "dma_unmaps"
    RESET = "resets"
    INJECTED = "injected"
    ROUTES_READ = "routes_read"  # how the switches above route was found out anew
    ROUTES_UNKNOWN = "routes_unknown"  # it could not be: an access that went up for that reason
    PEER_UNREACHABLE = "peers_unreachable"  # routed to what only QEMU reaches, and sent up
    MODEL_ERROR = "model_errors"  # an exception in the model's own code


class Entry(NamedTuple):
    """One line of the trace. ``what`` is ``read``, ``write`` or an :class:`Event`; an access has a
    path, the address on it, its size and its target (a memory's name, ``ram``, a link)."""

    sequence: int
    time_us: int
    what: str
    path: str
    address: int
    size_bytes: int
    target: str
    outcome: str


class Witness:
    """Counters and trace of one device."""

    def __init__(self) -> None:
        self._bytes: Counter[tuple[Path, str]] = Counter()
        self._accesses: Counter[tuple[Path, str]] = Counter()
        self._events: Counter[Event] = Counter()
        self._trace: deque[Entry] = deque(maxlen=TRACE_ENTRIES)
        self._sequence = 0

    def access(
        self,
        path: Path,
        address: int,
        size_bytes: int,
        target: str,
        *,
        write: bool,
        outcome: str = "ok",
    ) -> None:
        """Note one access; only one that is ``ok`` counts for its path."""
        what = "write" if write else "read"
        if outcome == "ok":
            self._bytes[path, what] += size_bytes
            self._accesses[path, what] += 1
        else:
            self._events[Event.ACCESS_ERROR] += 1
        self._note(what, outcome, path=path, address=address, size_bytes=size_bytes, target=target)

    def event(self, event: Event, *, address: int = 0, detail: str = "") -> None:
        """Note something that happened."""
        self._events[event] += 1
        self._note(event, detail, address=address)

    def count(self, event: Event) -> int:
        """How often it happened."""
        return self._events[event]

    def bytes_by(self, path: Path, *, write: bool) -> int:
        """Bytes that the device read or wrote by this path."""
        return self._bytes[path, "write" if write else "read"]

    def counters(self) -> dict[str, dict[str, int]]:
        """All counters: one entry a path, and one for the events; for JSON."""
        report: dict[str, dict[str, int]] = {
            path.value: {
                "reads": self._accesses[path, "read"],
                "read_bytes": self._bytes[path, "read"],
                "writes": self._accesses[path, "write"],
                "written_bytes": self._bytes[path, "write"],
            }
            for path in Path
        }
        report["events"] = {event.value: self._events[event] for event in Event}
        return report

    def trace(self, *, after: int = 0) -> list[dict[str, int | str]]:
        """The entries with a sequence number above ``after``, oldest first; for JSON."""
        return [dict(e._asdict()) for e in self._trace if e.sequence > after]

    def reset(self) -> None:
        """Forget counters and trace; sequence numbers go on."""
        self._bytes.clear()
        self._accesses.clear()
        self._events.clear()
        self._trace.clear()

    def _note(
        self,
        what: str,
        outcome: str,
        *,
        path: str = "",
        address: int = 0,
        size_bytes: int = 0,
        target: str = "",
    ) -> None:
        self._sequence += 1
        now = time.monotonic_ns() // 1000
        self._trace.append(
            Entry(self._sequence, now, what, path, address, size_bytes, target, outcome)
        )
