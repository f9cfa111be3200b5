# SPDX-License-Identifier: Apache-2.0
"""What the module ``p2p_router`` has installed: requests that pass below the IOMMU."""

from __future__ import annotations

from guest_agent import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REPORT = "/proc/p2p_router"


def state(path: str = REPORT) -> dict[str, Any]:
    """Initiators, windows and pairs as the module shows them.

    ``initiators`` maps each function that a driver uses to whether an IOMMU translates for it; a
    ``window`` is a range of bus addresses in a group's domain, with the ``error`` (errno) that kept
    it from being installed or 0; a ``pair`` is an initiator, and a BAR of a peer that it reaches.
    Raises FileNotFoundError: the module is not loaded.
    """
    initiators: dict[str, bool] = {}
    windows: list[dict[str, int]] = []
    pairs: list[dict[str, Any]] = []
    for line in sysfs.read(path).splitlines():
        kind, *words = line.split()
        if kind == "initiator":
            initiators[words[0]] = words[1] == "translated=1"
            continue
        fields = dict(word.split("=", 1) for word in words)
        numbers = {
            name: int(value, 0)
            for name, value in fields.items()
            if name not in ("initiator", "peer")
        }
        if kind == "window":
            windows.append(numbers)
        else:
            pairs.append({**fields, **numbers})
    return {"initiators": initiators, "windows": windows, "pairs": pairs}


def rescan(path: str = REPORT) -> None:
    """Have ACS settings and BARs read again; nothing announces their changes."""
    sysfs.write(path, "rescan")
