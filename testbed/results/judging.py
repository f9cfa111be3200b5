# SPDX-License-Identifier: Apache-2.0
"""From observations to "it holds" or "it does not", with the reason and the evidence. Pure.

The guest observes and never judges; a device's completion status is no evidence that bytes arrived.
Bytes are judged where they should have landed, by two witnesses that share no code; faults by the
requester, the page, the direction and the reason code, all four.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from testbed.results.evidence import (
    Access,
    BytesChecked,
    Counter,
    Evidence,
    FaultSeen,
    NoFaultSeen,
    Witness,
)

PAGE_BYTES = 4096

# Bytes that a device read and wrote, by path: ``iommu`` (through a mapping), ``message`` (asked of
# QEMU), ``peer`` (below a common switch), ``link``, ``network``, ``local``.
Moved = Mapping[str, tuple[int, int]]
_TRANSLATED = ("iommu", "message")
_SAMPLES = 8  # of a storm's records, kept as evidence


@dataclass(frozen=True)
class Judgement:
    """Whether a claim holds, one line that says why, and what that rests on."""

    holds: bool
    reason: str
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class FaultWindow:
    """All faults recorded between two moments.

    ``machine_watched``  QEMU's trace was on, so that ``records`` is complete.
    ``suppressed``       messages that the guest kernel's rate limit swallowed, as far as it says.
    ``overflow``         the fault recording registers overflowed (VT-d: FSTS.PFO).
    ``lost_lines``       kernel log lines overwritten before they were read.
    """

    records: tuple[FaultSeen, ...] = ()
    machine_watched: bool = False
    suppressed: int = 0
    overflow: bool = False
    lost_lines: int = 0

    def by(self, witness: Witness) -> tuple[FaultSeen, ...]:
        """The records of one witness."""
        return tuple(record for record in self.records if record.witness is witness)

    @property
    def count(self) -> int:
        """Faults that happened: the machine's count where it watched, else the guest's."""
        return len(self.by(Witness.MACHINE if self.machine_watched else Witness.GUEST))

    @property
    def unrecorded(self) -> int:
        """Faults that happened and are not in the guest's log (0 if nobody else watched)."""
        return max(0, self.count - len(self.by(Witness.GUEST)))


def judge_path(device: str, moved: Moved, path: str, size_bytes: int) -> Judgement:
    """Did the device write ``size_bytes`` by ``path``, and nothing by a path that bypasses it?

    ``iommu`` stands for all that the IOMMU translates. What the device reads beside (commands, the
    source) and its fences may go that way always.
    """
    evidence = tuple(
        Counter(f"{device} {verb} by path '{name}'", count, "bytes")
        for name, counts in moved.items()
        for verb, count in zip(("read", "wrote"), counts, strict=True)
        if count
    )
    wanted = _TRANSLATED if path == "iommu" else (path,)
    written = sum(moved[name][1] for name in wanted if name in moved)
    if written < size_bytes:
        reason = f"{device} wrote {written} of {size_bytes} bytes by path '{path}'"
        return Judgement(False, reason, evidence)
    allowed = {*wanted, *_TRANSLATED, "local"}
    past = sorted(name for name, counts in moved.items() if any(counts) and name not in allowed)
    if past:
        return Judgement(False, f"{device} also moved bytes by path '{past[0]}'", evidence)
    return Judgement(True, f"{device} wrote {size_bytes} bytes by path '{path}'", evidence)


def judge_bytes(
    place: str, size_bytes: int, expected_sha256: str, *, guest: str, host: str | None
) -> Judgement:
    """Do both witnesses read the expected bytes at ``place``?

    ``guest`` and ``host`` are the SHA-256 that each saw; ``host`` is None where the host has no
    view of its own (guest memory that is not shared).
    """
    seen = [BytesChecked(place, size_bytes, Witness.GUEST, guest, expected_sha256)]
    if host is not None:
        seen.append(BytesChecked(place, size_bytes, Witness.HOST, host, expected_sha256))
    evidence = tuple(seen)
    if host is not None and guest != host:
        return Judgement(
            False, f"guest and host read different bytes at {place} ({size_bytes} bytes)", evidence
        )
    if guest != expected_sha256:
        return Judgement(False, f"{place} does not hold the expected {size_bytes} bytes", evidence)
    return Judgement(True, f"{place} holds the expected {size_bytes} bytes", evidence)


def judge_fault(
    window: FaultWindow,
    *,
    requester: str,
    address: int,
    access: Access,
    reasons: Collection[int],
    size_bytes: int = 1,
) -> Judgement:
    """Was there a fault of ``requester`` in ``[address, address + size)``, and no other fault?

    One witness is enough, because the guest's log is rate limited; no witness may contradict.
    """
    first_page = address & -PAGE_BYTES
    wanted = f"fault of {requester}, {access} {address:#x}, reason " + " or ".join(
        f"{reason:#04x}" for reason in sorted(reasons)
    )
    strangers = []
    for record in window.records:
        inside = first_page <= record.address < address + size_bytes
        if not (
            inside
            and record.requester == requester
            and record.access in (access, Access.UNKNOWN)
            and record.reason in reasons
        ):
            strangers.append(record)
    if not window.records:
        return Judgement(False, f"expected a {wanted}: there was none", (_nothing(window),))
    if strangers:
        return Judgement(False, f"expected a {wanted}: saw {strangers[0]}", window.records)
    witnesses = sorted({record.witness for record in window.records})
    return Judgement(True, f"{wanted}; seen by {' and '.join(witnesses)}", window.records)


def judge_storm(
    window: FaultWindow,
    *,
    requester: str,
    address: int,
    access: Access,
    reasons: Collection[int],
    count: int,
) -> Judgement:
    """Were there ``count`` faults, one a page, more than were recorded, and is the loss known?

    Known means counted, where the machine watched; else at least announced by the guest (an
    overflow of the recording registers, or messages suppressed).
    """
    judgement = judge_fault(
        window,
        requester=requester,
        address=address,
        access=access,
        reasons=reasons,
        size_bytes=count * PAGE_BYTES,
    )
    guest = len(window.by(Witness.GUEST))
    evidence = (
        *judgement.evidence[:_SAMPLES],
        Counter("faults provoked", count, "faults"),
        Counter("faults seen by the machine", len(window.by(Witness.MACHINE)), "faults"),
        Counter("faults recorded by the guest", guest, "faults"),
        Counter("faults lost to the guest", window.unrecorded, "faults"),
        Counter("messages suppressed, as the guest says", window.suppressed, "messages"),
        Counter("recording registers overflowed", int(window.overflow)),
    )
    if not judgement.holds:
        return Judgement(False, judgement.reason, evidence)
    if window.machine_watched and window.count != count:
        return Judgement(
            False, f"{count} faults were provoked, and the machine saw {window.count}", evidence
        )
    if guest >= count:
        return Judgement(False, f"no storm: all {count} faults were recorded", evidence)
    if not (window.unrecorded or window.suppressed or window.overflow):
        return Judgement(False, f"{count - guest} faults were lost, and nobody says so", evidence)
    return Judgement(True, f"{count - guest} of {count} faults were lost and counted", evidence)


def judge_no_fault(window: FaultWindow) -> Judgement:
    """Was there no fault at all? Only a complete log can show that.

    Without the machine's trace, a guest log that was rate limited or overwritten shows nothing.
    """
    if window.records:
        return Judgement(False, f"unexpected fault: {window.records[0]}", window.records)
    if not window.machine_watched and (window.suppressed or window.overflow or window.lost_lines):
        return Judgement(False, "the fault log has gaps: no fault cannot be shown from it")
    return Judgement(True, "no fault", (_nothing(window),))


def all_of(*judgements: Judgement) -> Judgement:
    """Holds if all hold; the reason is the first that does not, or the last of all."""
    evidence = tuple(item for judgement in judgements for item in judgement.evidence)
    for judgement in judgements:
        if not judgement.holds:
            return Judgement(False, judgement.reason, evidence)
    return Judgement(True, judgements[-1].reason if judgements else "", evidence)


def _nothing(window: FaultWindow) -> NoFaultSeen:
    watching = (Witness.GUEST, Witness.MACHINE) if window.machine_watched else (Witness.GUEST,)
    return NoFaultSeen(watching)
