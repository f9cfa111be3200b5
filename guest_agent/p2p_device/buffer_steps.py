# SPDX-License-Identifier: Apache-2.0
"""Steps of exporters and importers: export, attach, map, move, revoke."""

from __future__ import annotations

from guest_agent.p2p.rules import Task
from guest_agent.p2p_device import room as rooms
from guest_agent.p2p_device.steps import shown, step, where
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.p2p_device.room import Room


@step
def export(
    room: Room,
    buffer: str,
    device: str,
    size_bytes: int,
    offers: list[Any],
    placements: list[str] | None = None,
) -> dict[str, Any]:
    """Make a buffer; ``offers`` in the order of the exporter's priority."""
    if buffer in room.core.buffers:
        raise ParameterError(f"buffer: {buffer!r} is taken")
    made = room.core.export(
        buffer,
        device,
        size_bytes,
        rooms.offers_of("offers", offers),
        placements=rooms.placements_of("export", placements or ["device", "system"]),
    )
    return where(made.storage.backing)


@step
def attach(
    room: Room, buffer: str, importer: str, offers: list[Any], name: str = "", **how: bool
) -> dict[str, Any]:
    """Attach; the attachment is called ``name``, or as its importer."""
    of = room.buffer(buffer)
    driver = room.importer(importer, rooms.offers_of("offers", offers), how)
    made = of.attach(Task(importer), driver)
    room.attachments[name or importer] = made
    return _path(room, name or importer)


def _path(room: Room, name: str) -> dict[str, Any]:
    path = room.attachment(name).path
    return {
        "kind": path.kind.value,
        "device": path.importer.device,
        "port": path.importer.port,
        "placement": path.placement.value,
    }


@step
def path(room: Room, attachment: str) -> dict[str, Any]:
    """The interconnect of an attachment as it is now."""
    return _path(room, attachment)


@step
def detach(room: Room, attachment: str) -> dict[str, Any]:
    """Undo an attach."""
    found = room.attachment(attachment)
    found.buffer.detach(room.task(found), found)
    del room.attachments[attachment]
    return {}


@step
def map_(
    room: Room, attachment: str, writable: bool = True, fall_back: bool = False
) -> dict[str, Any]:
    """Map; ``future``: the bytes are still on their way."""
    found = room.attachment(attachment)
    task = room.task(found)
    with room.lock(task, found.buffer):
        way = found.map_or_fall_back if fall_back else found.map
        mapping = way(task, writable=writable)
    room.mappings[attachment] = mapping
    return {
        **shown(mapping.planned),
        "future": mapping.is_future,
        "path": _path(room, attachment),
    }


@step
def unmap(room: Room, attachment: str) -> dict[str, Any]:
    """Give the latest mapping back."""
    found, mapping = room.attachment(attachment), room.mapping(attachment)
    task = room.task(found)
    with room.lock(task, found.buffer):
        found.unmap(task, mapping)
    return {}


@step
def pin(room: Room, attachment: str, on: bool = True) -> dict[str, Any]:
    """Pin, or unpin."""
    found = room.attachment(attachment)
    task = room.task(found)
    with room.lock(task, found.buffer):
        (found.pin if on else found.unpin)(task)
    return {"pinned": room.core.pinned(found.buffer.device, found.buffer.placement)}


@step
def move(room: Room, buffer: str, to: str, fence: str = "move") -> dict[str, Any]:
    """Begin to move the bytes; the copy's fence is kept as ``fence``."""
    return move_all(room, [buffer], to, fence)[0]


@step
def move_all(room: Room, buffers: list[str], to: str, fence: str = "move") -> list[dict[str, Any]]:
    """Move several, all or none."""
    from guest_agent.p2p import moves  # noqa: PLC0415  so that a break of it is seen

    (placement,) = rooms.placements_of("move", [to])
    found = [room.buffer(each) for each in buffers]
    with room.lock(room.exporter, *found):
        fences = moves.move_all(room.exporter, [(each, placement) for each in found])
    for index, each in enumerate(fences):
        room.fences[fence if len(fences) == 1 else f"{fence}{index}"] = each
    return [{**where(each.storage.backing), "moves": each.moves} for each in found]


@step
def state(room: Room, buffer: str) -> dict[str, Any]:
    """Where a buffer is, who has it, and what pins it."""
    found = room.buffer(buffer)
    return {
        **where(found.storage.backing),
        "moves": found.moves,
        "revoked": found.revoked,
        "pinned_by": found.pinned_by(),
        "mapped": {each.importer.name: len(each.mappings) for each in found.attachments},
        "stale": [each.importer.name for each in found.attachments if each.stale],
        "fences": len(found.resv),
    }


@step
def revoke(room: Room, buffer: str, why: str) -> dict[str, Any]:
    """Take the memory away from all importers."""
    room.buffer(buffer).revoke(room.exporter, why)
    return {}


@step
def unrevoke(room: Room, buffer: str) -> dict[str, Any]:
    """Let importers have it again."""
    room.buffer(buffer).unrevoke(room.exporter)
    return {}


@step
def enforce(room: Room, buffer: str) -> dict[str, Any]:
    """Take overdue mappings away."""
    from guest_agent.p2p.revoke import enforce  # noqa: PLC0415  seldom

    found = room.buffer(buffer)
    with room.lock(room.exporter, found):
        enforce(found, room.exporter)
    return {}


@step
def release(room: Room, buffer: str) -> dict[str, Any]:
    """The exporter is through with it."""
    room.buffer(buffer).release(room.exporter)
    return {}


@step
def died(room: Room, attachment: str) -> dict[str, Any]:
    """The importer's process is gone."""
    found = room.attachment(attachment)
    del room.attachments[attachment]
    found.buffer.importer_died(room.exporter, found, "its process ended")
    return {}
