# SPDX-License-Identifier: Apache-2.0
"""The VRAM of a device that was not opened, because a driver of the guest's kernel has it.

The guest's processor sees it through sysfs, page by page; the host as ever.
"""

from __future__ import annotations

from typing import Any

from testbed.instruments.interface import RackNode
from testbed.instruments.memory import sha256
from testbed.reports.places import PlaceFound
from testbed.results.judging import PAGE_BYTES, Judgement, judge_bytes


def write(node: RackNode, place: PlaceFound, offset: int, data: bytes) -> None:
    """Let the guest's processor write whole pages there."""
    for at in range(0, len(data), PAGE_BYTES):
        page = _page(place, offset + at)
        node.agent.call("dmabuf.poke", **page, hex=data[at : at + PAGE_BYTES].hex())


def judge(node: RackNode, place: PlaceFound, offset: int, expected: bytes) -> Judgement:
    """Do the guest's processor and the host read ``expected`` there?"""
    size_bytes = len(expected)
    name = place.function.name if place.function else place.name
    guest = b"".join(
        bytes.fromhex(node.agent.call("dmabuf.peek", **_page(place, offset + at))["hex"])
        for at in range(0, size_bytes, PAGE_BYTES)
    )
    with node.host_memory(name) as view:
        host = view[offset : offset + size_bytes]
    return judge_bytes(
        f"{name}+{offset:#x}",
        size_bytes,
        sha256(expected),
        guest=sha256(guest),
        host=sha256(host),
    )


def _page(place: PlaceFound, offset: int) -> dict[str, Any]:
    bdf = place.function.bdf if place.function else ""
    return {"device": bdf, "bar": place.bar, "offset": offset}
