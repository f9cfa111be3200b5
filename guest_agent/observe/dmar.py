# SPDX-License-Identifier: Apache-2.0
"""What IOMMU drivers print about faults, as values.

Formats: Intel, drivers/iommu/intel/dmar.c ``dmar_fault_do_one``; AMD, drivers/iommu/amd/iommu.c
``amd_iommu_report_page_fault``; virtio, drivers/iommu/virtio-iommu.c ``viommu_fault_handler``.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

_BDF = r"(?:([0-9a-f]{4}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])"

# DMAR: [DMA Write NO_PASID] Request device [05:00.0] fault addr 0x1000 [fault reason 0x05] text
_INTEL = re.compile(
    r"\[DMA (Read|Write)(?: NO_PASID| PASID (?:0x)?([0-9a-f]+))?\] Request device \["
    + _BDF
    + r"\](?: PASID ([0-9a-f]+))? fault addr (?:0x)?([0-9a-f]+)"
    + r" \[fault reason (0x)?([0-9a-f]+)\] ?(.*)"
)
# vfio-pci 0000:04:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x01 address=0x10 flags=0x20]
# AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:04:00.0 domain=0x01 address=0x10 flags=0x20]
_AMD = re.compile(
    r"(?:"
    + _BDF
    + r": )?AMD-Vi: Event logged \[IO_PAGE_FAULT (?:device="
    + _BDF
    + r" )?(?:pasid=0x([0-9a-f]+) )?domain=0x[0-9a-f]+ address=0x([0-9a-f]+) flags=0x([0-9a-f]+)\]"
)
# virtio_iommu virtio0: page fault from EP 1280 at 0x1000 [R]
_VIRTIO = re.compile(r"(\w+) fault from EP (\d+)(?: at 0x([0-9a-f]+) \[(R?)(W?)X?\])?")
_SUPPRESSED = re.compile(r"(?:dmar_fault|amd_iommu_\w+|viommu_\w+): (\d+) callbacks suppressed")
_STATUS = re.compile(r"DRHD: handling fault status reg (?:0x)?([0-9a-f]+)")
_AMD_OVERFLOW = re.compile(r"AMD-Vi: .*[Ee]vent log overflow")

_STATUS_OVERFLOW = (
    0x1  # VT-d 11.4.9.1 FSTS.PFO: a fault came while every recording register was full
)
_AMD_WRITE = 0x20  # AMD IOMMU 2.5.3 IO_PAGE_FAULT, RW
# What every line has that is of interest here, for choosing records before they are parsed.
WORDS = (b"DMAR:", b"AMD-Vi:", b"fault from EP", b"callbacks suppressed")

# include/linux/ratelimit_types.h: so many reports in so long, counted from the first.
RATE_BURST = 10
_RATE_INTERVAL_US = 5_000_000
_RATE_MARGIN_US = 300_000  # the log's clock and ours differ a little
MAX_REPORTS = 3

_AMD_PRESENT = 0x10  # PR: the page was present, so it was its permissions
_VIRTIO_REASONS = {"unknown": 0, "domain": 1, "page": 2}  # virtio 1.2, 5.13.6.10


def _bdf(domain: str | None, bus: str, slot: str, function: str) -> str:
    return f"{domain or '0000'}:{bus}:{slot}.{function}"


def parse_line(text: str) -> dict[str, Any] | None:
    """One fault, or None if the line is not about one.

    ``address`` is None where the driver does not print one. ``reason`` is the hardware's code: for
    Intel the fault reason, for AMD the event's flags, for virtio its reason. ``access`` is
    ``unknown`` where the device does not say (QEMU's virtio-iommu).
    """
    if found := _INTEL.search(text):
        access, pasid, domain, bus, slot, function, old_pasid, address, is_hex, reason, words = (
            found.groups()
        )
        pasid_text = pasid or old_pasid
        # Until Linux 5.16 the reason was decimal and an absent PASID printed as ffffffff.
        known = pasid_text not in (None, "ffffffff")
        return {
            "requester": _bdf(domain, bus, slot, function),
            "address": int(address, 16),
            "access": access.lower(),
            "reason": int(reason, 16 if is_hex else 10),
            "reason_text": words,
            "pasid": int(pasid_text, 16) if known else None,
        }
    if found := _AMD.search(text):
        before, after = found.groups()[:4], found.groups()[4:8]
        pasid, address, flags_text = found.groups()[8:]
        flags = int(flags_text, 16)
        return {
            "requester": _bdf(*(after if after[1] else before)) if after[1] or before[1] else "",
            "address": int(address, 16),
            "access": "write" if flags & _AMD_WRITE else "read",
            "reason": flags,
            "reason_text": "permission" if flags & _AMD_PRESENT else "not present",
            "pasid": int(pasid, 16) if pasid else None,
        }
    if found := _VIRTIO.search(text):
        reason, endpoint_text, address, reads, writes = found.groups()
        endpoint = int(endpoint_text)
        return {
            "requester": f"{endpoint >> 16:04x}:{endpoint >> 8 & 0xFF:02x}"
            f":{endpoint >> 3 & 0x1F:02x}.{endpoint & 7}",
            "address": int(address, 16) if address else None,
            "access": "write" if writes else "read" if reads else "unknown",
            "reason": _VIRTIO_REASONS.get(reason, 0),
            "reason_text": reason,
            "pasid": None,
        }
    return None


def collect(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The faults among kernel log records, and every sign that some are missing.

    ``suppressed``  how many reports the kernel says that it left out. It says so only when it
                    reports again, at least 5 s after the burst began.
    ``overflow``    the hardware had a fault and no free register to record it in.
    ``raw``         the lines that any of this was taken from.
    """
    faults: list[dict[str, Any]] = []
    raw: list[str] = []
    suppressed = 0
    overflow = False
    for record in records:
        text = record["text"]
        if fault := parse_line(text):
            faults.append({**fault, "sequence": record["sequence"], "time_us": record["time_us"]})
        elif found := _SUPPRESSED.search(text):
            suppressed += int(found[1])
        elif found := _STATUS.search(text):
            overflow = overflow or bool(int(found[1], 16) & _STATUS_OVERFLOW)
        elif _AMD_OVERFLOW.search(text):
            overflow = True
        else:
            continue
        raw.append(text)
    return {"records": faults, "suppressed": suppressed, "overflow": overflow, "raw": raw}


def wait_for_reports(records: Iterable[Mapping[str, Any]], now_us: int, reports: int) -> float:
    """Seconds until the kernel will print the next ``reports`` faults, one after the other.

    Its drivers print 10 times in 5 s at most and then fall silent. Intel's spends 3 on each
    interrupt with one fault: for the status, for the fault, and for finding that no more follow.
    QEMU's virtio-iommu reports one DMA many times over, so that one may use up everything.

    :param records: the kernel log so far, or those of its records that hold one of ``WORDS``.
    :param now_us: the time on the log's clock.
    :param reports: 1 to ``MAX_REPORTS``.
    """
    begin_us = -2 * _RATE_INTERVAL_US
    spent = 0
    needed = 3 * reports
    for record in records:
        text = record["text"]
        is_status = _STATUS.search(text) is not None
        if not is_status and parse_line(text) is None:
            continue
        if record["time_us"] > begin_us + _RATE_INTERVAL_US:
            begin_us = record["time_us"]
            spent = 0
        spent += 2 if is_status else 1
        needed = 3 * reports if "DMAR" in text else RATE_BURST
    ready_us = begin_us + _RATE_INTERVAL_US + _RATE_MARGIN_US
    if spent + needed <= RATE_BURST or now_us >= ready_us:
        return 0.0
    return (ready_us - now_us) / 1e6
