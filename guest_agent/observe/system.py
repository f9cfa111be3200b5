# SPDX-License-Identifier: Apache-2.0
"""The machine as a whole."""

from __future__ import annotations

import os

from guest_agent import sysfs
from guest_agent.observe import iommu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def info(root: str = sysfs.ROOT, proc: str = "/proc") -> dict[str, Any]:
    """Kernel, processor, memory and IOMMU of this machine."""
    names = os.uname()
    memory = _field(sysfs.read(f"{proc}/meminfo"), "MemTotal")
    return {
        "kernel": names.release,
        "machine": names.machine,
        "cmdline": sysfs.read(f"{proc}/cmdline"),
        "cpu_vendor": _field(sysfs.read(f"{proc}/cpuinfo"), "vendor_id"),
        "cpu_family": int(_field(sysfs.read(f"{proc}/cpuinfo"), "cpu family") or 0),
        "uptime_s": float(sysfs.read(f"{proc}/uptime").split()[0]),
        "memory_bytes": int(memory.split()[0]) << 10,
        "iommu": iommu.summary(root),
    }
