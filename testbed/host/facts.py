# SPDX-License-Identifier: Apache-2.0
"""This machine in a few words, for records."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def host_facts() -> dict[str, Any]:
    """System, Python, processors and memory of this machine; ``memory_bytes`` in bytes."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs can still get without swapping (proc_meminfo(5), MemAvailable)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _processor() -> str:
    """As /proc/cpuinfo calls it, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "")
