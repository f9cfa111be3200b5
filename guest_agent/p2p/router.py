# SPDX-License-Identifier: Apache-2.0
"""What the module ``p2p_router`` has installed: requests that pass below the IOMMU."""

from __future__ import annotations

from guest_agent import sysfs
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.hw.vfio import VfioContainer

REPORT = "/proc/p2p_router"
PAGE_BYTES = 4096


def state(path: str = REPORT) -> dict[str, Any]:
    """Initiators, windows and pairs as the module shows them.

    ``initiators`` maps each function that a driver uses to whether an IOMMU translates for it; a
    ``window`` is a range of bus addresses in a group's domain, with the ``error`` (errno) that kept
    it from being installed or 0; a ``pair`` is an initiator, and a BAR of a peer that it reaches;
    ``outside`` are the pairs of initiators that VFIO owns, which :func:`route` installs.
    Raises FileNotFoundError: the module is not loaded.
    """
    initiators: dict[str, bool] = {}
    lists: dict[str, list[dict[str, Any]]] = {"window": [], "pair": [], "outside": []}
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
        lists[kind].append({**fields, **numbers})
    return {
        "initiators": initiators,
        "windows": lists["window"],
        "pairs": lists["pair"],
        "outside": lists["outside"],
    }


def rescan(path: str = REPORT) -> None:
    """Have ACS settings and BARs read again; nothing announces their changes."""
    sysfs.write(path, "rescan")


def route(container: VfioContainer, path: str = REPORT) -> dict[str, Any]:
    """Map, in a VFIO container, what its functions reach below the IOMMU, at the bus addresses.

    :returns: ``windows``: the BARs that were mapped; ``left_out``: those that cannot be, as another
        driver has the peer, the BAR is no whole page, or VFIO does not let it be mapped;
        ``widened``: functions of the container that a window opens though no switch would route
        them there, because a container is one address space: give them one of their own.
    Raises OSError(EEXIST): something else is mapped there; nothing stays mapped then.
    """
    members = container.devices
    reached: dict[tuple[str, int], set[str]] = {}
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    for pair in state(path)["outside"]:
        if pair["initiator"] in members:
            bar = pair["peer"], pair["bar"]
            reached.setdefault(bar, set()).add(pair["initiator"])
            sizes[bar] = pair["start"], pair["size"]
    windows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    widened: set[str] = set()
    try:
        for (peer, index), initiators in reached.items():
            start, size = sizes[peer, index]
            window: dict[str, Any] = {"peer": peer, "bar": index, "iova": start, "size_bytes": size}
            try:
                if peer not in members:
                    raise ParameterError("VFIO does not own it")
                if (start | size) % PAGE_BYTES:
                    raise ParameterError("not whole pages")
                region = members[peer].region(index)
            except ParameterError as error:
                left_out.append({**window, "why": str(error)})
                continue
            container.map(region, 0, start, size, read=True, write=True, page_bytes=0)
            windows.append(window)
            widened |= set(members) - initiators - {peer}
    except OSError:
        for window in windows:
            container.unmap(window["iova"], window["size_bytes"])
        raise
    return {"windows": windows, "left_out": left_out, "widened": sorted(widened)}
