# SPDX-License-Identifier: Apache-2.0
"""What can be done in a room, one step after the other; each answers with what was seen.

A step is ``{"do": "map", "attachment": "a"}``. One call runs a list of them, because a round trip
to an emulated machine costs as much as several steps. A step that is refused ends the list, and
its answer is ``{"refused": {"type", "errno", "message"}}``: an answer, not an error.
"""

from __future__ import annotations

from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p.rules import Task
from guest_agent.p2p_device import room as rooms
from guest_agent.p2p_device.backend import ram_name
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.backend import Backing
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p_device.room import Room

    Step = Callable[..., Any]
    Made = TypeVar("Made", bound=Step)

STEPS: dict[str, Step] = {}


def step(function: Made) -> Made:
    """A step of that name, without the ``_`` before or behind it."""
    STEPS[function.__name__.strip("_")] = function
    return function


def run(room: Room, wanted: list[dict[str, Any]]) -> list[Any]:
    """Run steps until one is refused. :raises ParameterError: a step is none, or lacks a part."""
    answers: list[Any] = []
    for index, each in enumerate(wanted):
        parts = dict(each)
        name = parts.pop("do", None)
        function = STEPS.get(name) if isinstance(name, str) else None
        if function is None:
            raise ParameterError(f"steps[{index}].do: {name!r} is none of {', '.join(STEPS)}")
        try:
            answers.append(function(room, **parts))
        except ParameterError as error:
            raise ParameterError(f"steps[{index}]: {error}") from None
        except OSError as error:
            refused = {"type": type(error).__name__, "errno": error.errno, "message": str(error)}
            answers.append({"refused": refused})
            break
        except TypeError as error:
            raise ParameterError(f"steps[{index}]: {error}") from error
    return answers


def where(backing: Backing) -> dict[str, Any]:
    """A backing for the host."""
    place = {"placement": backing.placement.value, "device": backing.device}
    if backing.placement is Placement.SYSTEM:
        return {**place, "ram": ram_name(backing), "offset": 0}
    return {**place, "offset": backing.offset}


def shown(address: Address) -> dict[str, Any]:
    """An address for the host."""
    port = {"port": address.port} if hasattr(address, "port") else {}
    return {"type": type(address).__name__, "value": address.value, "user": address.user, **port}


# --- buffers


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
    found = room.attachments.pop(attachment)
    found.buffer.importer_died(room.exporter, found, "its process ended")
    return {}


# --- bytes


@step
def fill(room: Room, buffer: str, seed: int) -> dict[str, Any]:
    """Write a pattern by the CPU."""
    found = room.buffer(buffer)
    backing = found.storage.backing
    room.backend.region(backing).write(backing.offset, pattern(seed, 0, backing.size_bytes))
    return where(backing)


@step
def write(
    room: Room, attachment: str, seed: int, size_bytes: int, offset: int = 0
) -> dict[str, Any]:
    """The importer's device writes a pattern through its mapping."""
    mapping = room.mapping(attachment)
    room.backend.write(mapping.address, offset, pattern(seed, 0, size_bytes))
    return where(mapping.attachment.buffer.storage.backing)


@step
def read(room: Room, attachment: str, size_bytes: int, offset: int = 0) -> dict[str, Any]:
    """The importer's device reads through its mapping, into its staging memory."""
    return _read(room, room.mapping(attachment).address, offset, size_bytes)


@step
def touch(
    room: Room,
    user: str,
    address: dict[str, Any],
    size_bytes: int,
    seed: int | None = None,
) -> dict[str, Any]:
    """A device uses an address by itself, whatever the core says: read, or (seed) write."""
    from guest_agent.p2p.addresses import DmaAddress, LinkAddress  # noqa: PLC0415  seldom

    port = address.get("port")
    used: Address = (
        DmaAddress(address["value"], user)
        if port is None
        else LinkAddress(address["value"], user, port)
    )
    if seed is None:
        return _read(room, used, 0, size_bytes)
    room.backend.write(used, 0, pattern(seed, 0, size_bytes))
    return {}


def _read(room: Room, address: Address, offset: int, size_bytes: int) -> dict[str, Any]:
    member = room.backend.member(address.user)
    member.access(address, offset, size_bytes, write=False)
    return staging(room, address.user)


@step
def staging(room: Room, device: str) -> dict[str, Any]:
    """Where what a device has read stands."""
    member = room.backend.member(device)
    if member.vram is not None:
        return {"placement": "device", "device": device, "offset": member.staging_offset}
    return {
        "placement": "system", "device": device, "ram": f"staging-{device}", "offset": 0,
    }  # fmt: skip


@step
def submit(
    room: Room, attachment: str, size_bytes: int, fence: str, seed: int | None = None
) -> dict[str, Any]:
    """Queue a read, or (seed) a write, by the importer's GPU, behind what it must wait for."""
    mapping, found = room.mapping(attachment), room.attachment(attachment)
    task = room.task(found)

    def begin(address: Address) -> Fence:
        member = room.backend.member(address.user)
        here = {"space": "vram", "address": member.staging_at}
        there = member.place(address, 0)
        if seed is not None:
            member.staging.write(member.staging_offset, pattern(seed, 0, size_bytes))
        source, target = (there, here) if seed is None else (here, there)
        due_ns = room.core.clock.now_ns() + rooms.FENCE_TIMEOUT_NS
        return member.begin(fence, source, target, size_bytes, due_ns)

    with room.lock(task, found.buffer):
        made = found.submit(task, mapping, fence, begin, write=seed is not None)
    room.fences[fence] = made
    return {"signalled": made.is_signalled()}


@step
def signalled(room: Room, fence: str) -> dict[str, Any]:
    """Whether a fence has signalled, without waiting."""
    found = room.fences[fence]
    done = found.is_signalled()
    return {"signalled": done, "error": str(found.error or "")}


@step
def wait(room: Room, fence: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """Wait for a fence."""
    clock = room.core.clock
    room.fences[fence].wait(clock, clock.now_ns() + int(timeout_s * 1e9))
    return {}


@step
def settle(room: Room) -> dict[str, Any]:
    """Let everything queued happen."""
    return {"left": room.settle()}


@step
def hold(room: Room, device: str) -> dict[str, Any]:
    """Make an engine wait."""
    room.backend.member(device).hold()
    return {}


@step
def release_soon(room: Room, device: str, delay_ms: int) -> dict[str, Any]:
    """Let it go on when so much time has passed and someone asks for one of its fences."""
    delay_ns = delay_ms * 1_000_000
    room.backend.member(device).go_on_at_ns = room.core.clock.now_ns() + delay_ns
    return {}


@step
def go_on(room: Room, device: str) -> dict[str, Any]:
    """Let it go on."""
    room.backend.member(device).go_on()
    return {}


# --- what goes wrong, and what others say


@step
def lie(room: Room, device: str, on: bool = True) -> dict[str, Any]:
    """A device's DMA addresses are not what its driver says: no IOMMU takes them."""
    (room.backend.liars.add if on else room.backend.liars.discard)(device)
    return {}


@step
def say(room: Room, kind: str, device: str, errno: int, why: str = "") -> dict[str, Any]:
    """What a driver says of paths of that type: an errno, or 0 for nothing."""
    from guest_agent.p2p.report import Refusal  # noqa: PLC0415  seldom

    if errno:
        room.backend.refusals[kind, device] = Refusal(errno, why or "the driver says so")
    else:
        room.backend.refusals.pop((kind, device), None)
    return {}


@step
def link(room: Room, device: str, port: str, up: bool) -> dict[str, Any]:
    """Take a GPU's end of a link down or up, and tell whoever used it."""
    from guest_agent.p2p.revoke import path_lost  # noqa: PLC0415  seldom

    member = room.backend.member(device)
    number = member.link(port)
    member.gpu.enable_link(number, on=up)
    # Up needs both ends: whoever takes up the second sees it.
    reached = member.gpu.wait_link(number, "up" if up else "down", 0 if up else 5.0, "poll")
    told: list[str] = []
    if not up:
        told = path_lost(
            room.core, room.exporter, lambda path: path.exporter.port == port, f"{port} went down"
        )
    return {"reached": reached, "told": told}


@step
def questions(room: Room) -> list[list[str]]:
    """What the host is asked about virtual interconnects."""
    return [] if room.forwarder is None else [list(each) for each in room.forwarder.questions]


@step
def answer(
    room: Room,
    question: list[str],
    links: dict[str, int] | None = None,
    errno: int = 0,
    why: str = "",
) -> dict[str, Any]:
    """The host's answer: the number of the real link by the port (``gpu0:v0``), or an errno."""
    from guest_agent.p2p.report import Refusal  # noqa: PLC0415  seldom

    if room.forwarder is None:
        raise ParameterError("question: nothing was forwarded")
    for end, number in (links or {}).items():
        device, _, port = end.partition(":")
        room.backend.member(device).links[port] = number
    one, other = question
    room.forwarder.questions.remove((one, other))
    room.forwarder.answers[one, other] = Refusal(errno, why) if errno else None
    return {}
