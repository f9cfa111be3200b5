# SPDX-License-Identifier: Apache-2.0
"""Steps of devices: what they read and write, what holds them up, what goes wrong with them."""

from __future__ import annotations

from guest_agent.p2p_device import room as rooms
from guest_agent.p2p_device.steps import step, where
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p_device.room import Room


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
    found = room.fence(fence)
    done = found.is_signalled()
    return {"signalled": done, "error": str(found.error or "")}


@step
def wait(room: Room, fence: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """Wait for a fence."""
    clock = room.core.clock
    room.fence(fence).wait(clock, clock.now_ns() + int(timeout_s * 1e9))
    return {}


@step
def chapter(room: Room, title: str) -> dict[str, Any]:
    """What follows belongs to that test."""
    return {"number": room.core.events.chapter("test", title)}


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
