# SPDX-License-Identifier: Apache-2.0
"""IOMMU groups, their domain types and the units behind them (Documentation/ABI/…iommu_groups)."""

from __future__ import annotations

from guest_agent import sysfs
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The default domain's type, in the words of the topology's `mode`.
_MODES = {"identity": "passthrough", "DMA": "strict", "DMA-FQ": "lazy"}
TYPES = ("identity", "DMA", "DMA-FQ", "auto")


def groups(root: str = sysfs.ROOT) -> list[dict[str, Any]]:
    """Every group, by number: ``{id, type, devices}``; the type is "" where the kernel hides it."""
    folder = f"{root}/kernel/iommu_groups"
    return [
        {
            "id": number,
            "type": sysfs.read_or(f"{folder}/{number}/type", ""),
            "devices": sysfs.names(f"{folder}/{number}/devices"),
        }
        for number in sorted(map(int, sysfs.names(folder)))
    ]


def set_type(group: int, new: str, root: str = sysfs.ROOT) -> dict[str, str]:
    """Change the default domain of a group.

    :raises ParameterError: no such group or type.
    :raises OSError: the kernel refuses; EBUSY while a device of the group has a driver.
    """
    file = f"{root}/kernel/iommu_groups/{group}/type"
    if new not in TYPES:
        raise ParameterError(f"type: {new!r} is none of {', '.join(TYPES)}")
    old = sysfs.read_or(file, "")
    if not old:
        raise ParameterError(f"group: there is no IOMMU group {group}")
    sysfs.write(file, new)
    return {"old": old, "new": sysfs.read(file)}


def summary(root: str = sysfs.ROOT) -> dict[str, Any]:
    """Whether there is an IOMMU, whose, and in which mode it translates.

    ``mode`` is ``off`` without an IOMMU, ``mixed`` when the groups differ. Intel units come with
    their capability registers (VT-d 11.4.2 and 11.4.3).
    """
    unit_names = sysfs.names(f"{root}/class/iommu")
    units = []
    for name in unit_names:
        folder = f"{root}/class/iommu/{name}/intel-iommu"
        cap, ecap = sysfs.read_or(f"{folder}/cap", ""), sysfs.read_or(f"{folder}/ecap", "")
        units.append({"name": name, "cap": int(cap or "0", 16), "ecap": int(ecap or "0", 16)})
    modes = {_MODES.get(group["type"], group["type"]) for group in groups(root)}
    mode = "off" if not unit_names else modes.pop() if len(modes) == 1 else "mixed"
    return {
        "present": bool(unit_names),
        "kind": _kind(unit_names[0]) if unit_names else "none",
        "mode": mode,
        "units": units,
    }


def _kind(unit: str) -> str:
    if unit.startswith("dmar"):
        return "intel"
    return "amd" if unit.startswith("ivhd") else "virtio"
