# SPDX-License-Identifier: Apache-2.0
"""What a verdict rests on: typed, frozen, and written into the record as they are.

Two kinds of witness look at everything that can be looked at twice. Bytes in video memory are read
by the *guest* (through the device's BAR) and by the *host* (through the shared memory behind it).
Faults are recorded by the *guest* kernel (``/dev/kmsg``) and by the *machine* (QEMU's own trace of
its vIOMMU). The second kind matters: ``dmar_fault()`` in Linux (drivers/iommu/intel/dmar.c) limits
what it prints to ten messages in five seconds, three of them for every fault, so the kernel log
alone neither shows every fault nor proves that there was none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Witness(StrEnum):
    """Who saw it."""

    GUEST = "guest"
    HOST = "host"
    MACHINE = "machine"


class Access(StrEnum):
    """The direction of a DMA, as the device sees it; UNKNOWN where a record does not tell."""

    READ = "read"
    WRITE = "write"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class BytesChecked:
    """A range that was read at its destination; ``place`` is ``gpu1.vram+0x1000``."""

    place: str
    size_bytes: int
    witness: Witness
    sha256: str
    expected_sha256: str
    kind: Literal["bytes"] = "bytes"

    @property
    def equal(self) -> bool:
        """The bytes are the expected ones."""
        return self.sha256 == self.expected_sha256

    def __str__(self) -> str:
        verb = "holds" if self.equal else "does not hold"
        return f"{self.place} ({self.size_bytes} bytes) {verb} the expected bytes, {self.witness}"


@dataclass(frozen=True)
class FaultSeen:
    """One translation fault: who asked, for which bus address, and the IOMMU's reason code.

    ``address`` is rounded down to its page by the guest's record, exact in the machine's.
    Reason codes: Intel VT-d specification 5.0, appendix "Fault Reason Encodings"; virtio 1.2,
    5.13.6.10.
    """

    requester: str
    address: int
    access: Access
    reason: int
    witness: Witness
    reason_text: str = ""
    pasid: int | None = None
    kind: Literal["fault"] = "fault"

    def __str__(self) -> str:
        return (
            f"{self.requester} {self.access} {self.address:#x} fault {self.reason:#04x}"
            f" ({self.witness})"
        )


@dataclass(frozen=True)
class NoFaultSeen:
    """Nobody recorded a fault while it was watched for, and who watched."""

    witnesses: tuple[Witness, ...]
    kind: Literal["no-fault"] = "no-fault"

    def __str__(self) -> str:
        return "no fault, seen by " + " and ".join(self.witnesses)


@dataclass(frozen=True)
class MappingUsed:
    """One IOMMU mapping; ``source`` is ``gpu1.vram+0x0`` or the name of guest memory."""

    iova: int
    size_bytes: int
    source: str
    read: bool
    write: bool
    kind: Literal["mapping"] = "mapping"

    def __str__(self) -> str:
        rights = ("r" if self.read else "-") + ("w" if self.write else "-")
        return f"IOVA {self.iova:#x} → {self.source} ({self.size_bytes} bytes, {rights})"


@dataclass(frozen=True)
class Counter:
    """A number with its unit (``faults``, ``bytes``, ``ns``)."""

    name: str
    value: int
    unit: str = ""
    kind: Literal["counter"] = "counter"

    def __str__(self) -> str:
        return f"{self.name}: {self.value} {self.unit}".rstrip()


@dataclass(frozen=True)
class Note:
    """A sentence for the reader."""

    text: str
    kind: Literal["note"] = "note"

    def __str__(self) -> str:
        return self.text


Evidence = BytesChecked | FaultSeen | NoFaultSeen | MappingUsed | Counter | Note
