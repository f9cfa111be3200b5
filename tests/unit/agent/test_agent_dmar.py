# SPDX-License-Identifier: Apache-2.0
"""Fault lines as kernels print them, and what is made of them."""

from __future__ import annotations

from typing import Any

import pytest

from guest_agent.observe.dmar import MAX_REPORTS, collect, parse_line, wait_for_reports

STATUS = "DMAR: DRHD: handling fault status reg 2"
FAULT = (
    "DMAR: [DMA Read NO_PASID] Request device [0000:05:00.0] fault addr 0xf4000000"
    " [fault reason 0x06] PTE Read access is not set"
)


def _fault(requester: str, address: int | None, access: str, reason: int, text: str) -> Any:
    return {
        "requester": requester,
        "address": address,
        "access": access,
        "reason": reason,
        "reason_text": text,
        "pasid": None,
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(
            FAULT,
            _fault("0000:05:00.0", 0xF4000000, "read", 6, "PTE Read access is not set"),
            id="7.2",
        ),
        pytest.param(
            "DMAR: [DMA Write NO_PASID] Request device [3f:1f.7] fault addr 0x1000"
            " [fault reason 0x05] PTE Write access is not set",
            _fault("0000:3f:1f.7", 0x1000, "write", 5, "PTE Write access is not set"),
            id="no segment",
        ),
        pytest.param(
            "DMAR: [DMA Write PASID 0x5] Request device [0000:03:00.1] fault addr 0x300000000"
            " [fault reason 0x85] SM: No write permission for Write/AtomicOp request",
            _fault(
                "0000:03:00.1",
                0x300000000,
                "write",
                0x85,
                "SM: No write permission for Write/AtomicOp request",
            )
            | {"pasid": 5},
            id="scalable mode",
        ),
        pytest.param(
            "DMAR: [DMA Read] Request device [05:00.0] PASID ffffffff fault addr 12340000"
            " [fault reason 06] PTE Read access is not set",
            _fault("0000:05:00.0", 0x12340000, "read", 6, "PTE Read access is not set"),
            id="5.10",
        ),
        pytest.param(
            "DMAR: [DMA Read] Request device [05:00.0] PASID 1f fault addr 1000"
            " [fault reason 113] SM: Present bit in first-level paging entry is clear",
            _fault(
                "0000:05:00.0",
                0x1000,
                "read",
                113,
                "SM: Present bit in first-level paging entry is clear",
            )
            | {"pasid": 0x1F},
            id="5.10 with a PASID and a decimal reason",
        ),
        pytest.param(
            "vfio-pci 0000:04:00.0: AMD-Vi: Event logged"
            " [IO_PAGE_FAULT domain=0x0010 address=0x64a7f000 flags=0x0020]",
            _fault("0000:04:00.0", 0x64A7F000, "write", 0x20, "not present"),
            id="AMD",
        ),
        pytest.param(
            "AMD-Vi: Event logged"
            " [IO_PAGE_FAULT device=0000:0a:00.1 domain=0x001d address=0x637c000 flags=0x0010]",
            _fault("0000:0a:00.1", 0x637C000, "read", 0x10, "permission"),
            id="AMD without a driver",
        ),
        pytest.param(
            "virtio_iommu virtio0: page fault from EP 769 at 0xf8000000 []",
            _fault("0000:03:00.1", 0xF8000000, "unknown", 2, "page"),
            id="virtio as QEMU reports it",
        ),
        pytest.param(
            "virtio_iommu virtio0: page fault from EP 769 at 0xf8000000 [W]",
            _fault("0000:03:00.1", 0xF8000000, "write", 2, "page"),
            id="virtio with the access",
        ),
        pytest.param(
            "virtio_iommu virtio0: domain fault from EP 40",
            _fault("0000:00:05.0", None, "unknown", 1, "domain"),
            id="virtio without an address",
        ),
    ],
)
def test_parses_a_fault(line: str, expected: Any) -> None:
    assert parse_line(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        STATUS,
        "DMAR: IOMMU enabled",
        "DMAR: [INTR-REMAP] Request device [00:02.0] fault index 0x4 [fault reason 0x25] Blocked",
        "vfio-pci 0000:03:00.1: resetting",
        "",
    ],
)
def test_other_lines_are_no_faults(line: str) -> None:
    assert parse_line(line) is None


def _records(*lines: str, start_us: int = 0, step_us: int = 10) -> list[dict[str, Any]]:
    return [
        {"text": line, "sequence": 100 + n, "time_us": start_us + n * step_us}
        for n, line in enumerate(lines)
    ]


def test_collects_faults_with_their_place_in_the_log() -> None:
    found = collect(_records("hello", STATUS, FAULT, "bye"))
    assert [(f["sequence"], f["time_us"]) for f in found["records"]] == [(102, 20)]
    assert found["raw"] == [STATUS, FAULT]
    assert (found["suppressed"], found["overflow"]) == (0, False)


def test_counts_every_sign_of_missing_faults() -> None:
    found = collect(
        _records(
            "dmar_fault: 17 callbacks suppressed",
            "amd_iommu_report_page_fault: 3 callbacks suppressed",
            "viommu_fault_handler: 40 callbacks suppressed",
            "net_ratelimit: 5 callbacks suppressed",
            "DMAR: DRHD: handling fault status reg 3",
        )
    )
    assert (found["suppressed"], found["overflow"], len(found["raw"])) == (60, True, 4)


def test_amd_event_log_overflow() -> None:
    assert collect(_records("AMD-Vi: IOMMU Event log overflow"))["overflow"]


SECOND_US = 1_000_000


def _pairs(count: int) -> list[dict[str, Any]]:
    return _records(*[STATUS, FAULT] * count, start_us=100 * SECOND_US)


@pytest.mark.parametrize(
    ("faults_before", "reports", "waits"),
    [(0, 3, False), (1, 2, False), (1, 3, True), (2, 1, False), (2, 2, True), (3, 1, True)],
)
def test_waits_only_if_the_kernel_would_not_print(
    faults_before: int, reports: int, waits: bool
) -> None:
    """Three tokens a fault, ten in five seconds."""
    wait_s = wait_for_reports(_pairs(faults_before), 101 * SECOND_US, reports)
    assert wait_s == pytest.approx(4.3 if waits else 0.0)


def test_does_not_wait_when_the_five_seconds_are_over() -> None:
    assert wait_for_reports(_pairs(3), 106 * SECOND_US, MAX_REPORTS) == 0.0


def test_counts_from_the_first_report_of_each_five_seconds() -> None:
    later = _records(STATUS, FAULT, start_us=106 * SECOND_US)
    assert wait_for_reports([*_pairs(3), *later], 107 * SECOND_US, 2) == 0.0


def test_one_report_of_virtio_may_have_used_up_all() -> None:
    record = _records("virtio_iommu virtio0: page fault from EP 769 at 0x1000 []")
    assert wait_for_reports(record, 1 * SECOND_US, 1) > 4
