# SPDX-License-Identifier: Apache-2.0
"""What a node's IOMMU promises: whether it translates, and with which reason it refuses. Pure.

Reason codes: Intel VT-d specification 5.0, "Fault Reason Encodings"; the kernel's words for them
are in drivers/iommu/intel/dmar.c. Legacy mode has second-stage tables; scalable mode, as the
testbed sets it up, first-stage ones. virtio 1.2, 5.13.6.10: whatever is refused in an attached
domain is a mapping fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.topology.machine import Iommu


@dataclass(frozen=True)
class Reasons:
    """Reason codes of one translation mode, by what was done."""

    unmapped_read: frozenset[int]
    unmapped_write: frozenset[int]
    forbidden_write: frozenset[int]
    beyond_width: frozenset[int]


LEGACY = Reasons(
    unmapped_read=frozenset({0x06}),
    unmapped_write=frozenset({0x05}),
    forbidden_write=frozenset({0x05}),
    beyond_width=frozenset({0x04}),
)
FIRST_STAGE = Reasons(
    unmapped_read=frozenset({0x71}),  # SFS.2: not present
    unmapped_write=frozenset({0x71}),
    forbidden_write=frozenset({0x85}),  # SGN.6: no write permission
    beyond_width=frozenset({0x80}),  # SGN.1: not canonical
)
_MAPPING_FAULT = frozenset({2})  # VIRTIO_IOMMU_FAULT_R_MAPPING
VIRTIO = Reasons(_MAPPING_FAULT, _MAPPING_FAULT, _MAPPING_FAULT, _MAPPING_FAULT)


def reasons_of(iommu: Iommu) -> Reasons:
    """The reasons with which this IOMMU refuses."""
    if iommu.kind == "virtio":
        return VIRTIO
    return FIRST_STAGE if iommu.scalable else LEGACY


def why_not_shown(iommu: Iommu) -> str:
    """Why nothing about translation can be shown with this IOMMU, or "" if it can."""
    if iommu.kind == "none" or iommu.mode == "off":
        return "IOMMU off: translation cannot be shown"
    if iommu.mode == "passthrough":
        return "IOMMU in passthrough mode: translation cannot be shown"
    if iommu.kind == "amd":
        # hw/i386/amd_iommu.c gives neither the requester nor the address to the guest.
        return "the fault records of an AMD IOMMU: QEMU's name 00:00.0 and address 0"
    return ""
