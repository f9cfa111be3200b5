# SPDX-License-Identifier: Apache-2.0
"""A step that does the same again and again, and says what this process and its devices hold."""

from __future__ import annotations

import os

from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p.resv import locked
from guest_agent.p2p.rules import Task
from guest_agent.p2p_device import room as rooms
from guest_agent.p2p_device.steps import step
from guest_agent.pattern import pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.p2p_device.room import Room

_LOOK_BYTES = 4096


@step
def cycles(
    room: Room,
    exporter: str,
    importer: str,
    count: int,
    size_bytes: int,
    offers: dict[str, list[Any]],
) -> dict[str, int]:
    """Export, attach, map, move, map again, unmap, detach and release, ``count`` times.

    ``offers``: of the two, by name. Through each mapping the importer's device reads; ``wrong``
    counts reads that were not what the CPU had written. Every other cycle moves the bytes.
    """
    lists = {name: rooms.offers_of(f"offers.{name}", each) for name, each in offers.items()}
    task, wrong = Task(importer), 0
    for number in range(count):
        wrong += _cycle(room, task, exporter, importer, number, size_bytes, lists)
    return {"cycles": count, "wrong": wrong}


def _cycle(
    room: Room,
    task: Task,
    exporter: str,
    importer: str,
    number: int,
    size_bytes: int,
    lists: dict[str, list[Any]],
) -> int:
    core, wrong = room.core, 0
    expected = pattern(number & 0xFF, 0, _LOOK_BYTES)
    buffer = core.export("soak", exporter, size_bytes, lists[exporter])
    room.backend.region(buffer.storage.backing).write(buffer.storage.backing.offset, expected)
    attachment = buffer.attach(task, room.importer(importer, lists[importer], {}))
    for placement in (None, Placement.SYSTEM) if number % 2 else (None,):
        if placement is not None:
            with room.lock(room.exporter, buffer):
                copied = buffer.move(room.exporter, placement)
            copied.wait(core.clock)
        with locked(task, buffer.resv):
            mapping = attachment.map(task)
        wrong += room.backend.read(mapping.address, 0, _LOOK_BYTES) != expected
        if placement is not None or number % 2 == 0:
            with locked(task, buffer.resv):
                attachment.unmap(task, mapping)
    buffer.detach(task, attachment)
    buffer.release(room.exporter)
    core.graph.pump()
    return wrong


@step
def held(room: Room) -> dict[str, int]:
    """What is in use now: this process's memory and descriptors, ranges of video memory, RAM
    buffers, addresses, and how many more mappings the kernel lets the devices have, in all.

    ``objects``: how many of Python's are alive after a collection.
    """
    import gc  # noqa: PLC0415  seldom

    gc.collect()
    left = [member.container.info()["mappings_left"] for member in room.backend.members.values()]
    return {
        **room.backend.held(),
        "mappings_left": sum(each or 0 for each in left),
        "rss_kib": _rss_kib(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "queued": len(room.core.graph),
        "buffers": len(room.core.buffers),
    }


def _rss_kib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
