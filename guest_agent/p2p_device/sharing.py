# SPDX-License-Identifier: Apache-2.0
"""Steps of importers with page faults, and of pages that several devices mirror."""

from __future__ import annotations

from guest_agent.p2p.errors import GoneError
from guest_agent.p2p.hmm import Mirror, Page
from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p.odp import OnDemand
from guest_agent.p2p.resv import Usage
from guest_agent.p2p_device import room as rooms
from guest_agent.p2p_device.steps import shown, step, where
from guest_agent.pattern import pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from guest_agent.p2p.interconnect import Offer
    from guest_agent.p2p_device.room import Room


# --- on demand


@step
def on_demand(
    room: Room,
    buffer: str,
    importer: str,
    offers: list[Any],
    keep_alive_ms: int = 0,
    max_faults: int = 100,
) -> dict[str, Any]:
    """An importer that maps when it faults."""
    made = OnDemand(
        room.buffer(buffer),
        importer,
        tuple(rooms.offers_of("offers", offers)),
        keep_alive_ms * 1_000_000,
        max_faults,
    )
    room.on_demand[importer] = made
    room.attachments[importer] = made.attachment
    return {"mapped": made.is_mapped}


@step
def transfer(
    room: Room,
    importer: str,
    size_bytes: int,
    seed: int | None = None,
    piece_bytes: int = 4096,
    sample: int = 4096,
) -> dict[str, Any]:
    """A whole transfer with whatever faults it takes. What was read is compared with nothing:
    ``head`` is its first ``sample`` bytes in hexadecimal.
    """
    found = room.importer_on_demand(importer)
    before = found.counters.faults
    head = b""
    if seed is not None:
        found.write(0, pattern(seed, 0, size_bytes), piece_bytes)
    else:
        head = found.read(0, size_bytes, piece_bytes)[:sample]
    live = found.attachment.live
    return {
        "faults": found.counters.faults - before,
        "head": head.hex(),
        "address": shown(live.address) if live is not None else None,
        "path": found.attachment.path.kind.value,
    }


@step
def fault(room: Room, importer: str) -> dict[str, Any]:
    """Serve one page fault and do not transfer yet."""
    found = room.importer_on_demand(importer)
    found.fault()
    resv = found.attachment.buffer.resv
    return {
        "mapped": found.is_mapped,
        "blocks_access": len(resv.fences(Usage.READ)),
        "blocks_moves": len(resv.fences(Usage.BOOKKEEP)),
    }


@step
def is_mapped(room: Room, importer: str) -> dict[str, Any]:
    """Whether it can use the buffer without a fault."""
    return {"mapped": room.importer_on_demand(importer).is_mapped}


@step
def churn(
    room: Room, buffer: str, importer: str, moves: int, piece_bytes: int, seed: int
) -> dict[str, Any]:
    """The exporter moves the buffer to and fro whenever nothing forbids it, while the importer
    reads it piece by piece, each in its turn, until ``moves`` moves were made.

    Turn and turn about, so that no clock decides who is first: after each single step of the
    importer the exporter gets the chance to move. ``wrong`` counts pieces that were not ``seed``.
    """
    found, target = room.importer_on_demand(importer), room.buffer(buffer)
    core = room.core
    start_ns = core.clock.now_ns()
    first, faults_before = target.moves, found.counters.faults
    pieces = wrong = turns = 0
    expected = pattern(seed, 0, target.size_bytes)
    steps = found.steps(0, target.size_bytes, piece_bytes)
    at = 0
    copy = None
    limit_ns = start_ns + 60_000_000_000
    while target.moves - first < moves and core.clock.now_ns() < limit_ns:
        turns += 1
        core.graph.pump()
        if copy is None or copy.is_signalled():
            other = Placement.SYSTEM if target.placement is Placement.DEVICE else Placement.DEVICE
            with room.lock(room.exporter, target):
                copy = target.move(room.exporter, other)
        piece = next(steps, None)
        if piece is None:
            steps = found.steps(0, target.size_bytes, piece_bytes)
            at = 0
        elif piece:
            pieces += 1
            wrong += piece != expected[at : at + len(piece)]
            at += len(piece)
    room.settle()
    return {
        "turns": turns,
        "pieces": pieces,
        "wrong": wrong,
        "moves": target.moves - first,
        "faults": found.counters.faults - faults_before,
        "transfers": found.counters.transfers,
        "elapsed_ns": core.clock.now_ns() - start_ns,
    }


# --- the graph of operations


@step
def cycle(room: Room) -> dict[str, Any]:
    """Two operations, each of which is to wait for the other; the second wish is refused."""
    graph, clock = room.core.graph, room.core.clock
    begun: list[str] = []
    gate = room.fence("gate")

    def work(name: str) -> Any:
        return lambda: begun.append(name)

    one = graph.add("one", work("one"), [gate])
    two = graph.add("two", work("two"), [one.fence])
    try:
        graph.wait_for(one, two.fence)
    except OSError as error:
        return {
            "refused": {"type": type(error).__name__, "errno": error.errno, "message": str(error)},
            "begun": begun,
        }
    try:
        one.fence.wait(clock, clock.now_ns() + 1_000_000_000)
    finally:  # what waits for itself would be waited for until its deadline
        for operation in (one, two):
            graph.fail(operation.fence, GoneError("it waits for itself"))
    return {"begun": begun}


# --- pages that several devices mirror


@step
def join(room: Room, devices: list[str]) -> list[list[str]]:
    """Join owner groups in this order; answers the groups."""
    for device in devices:
        room.owners.join(device)
    return [list(group) for group in room.owners.groups()]


@step
def page(
    room: Room, name: str, device: str, size_bytes: int, seed: int, offers: dict[str, list[Any]]
) -> dict[str, Any]:
    """A page in a device's private memory, filled with a pattern; ``offers`` of every device."""
    backing = room.backend.allocate(device, Placement.DEVICE, size_bytes)
    room.backend.region(backing).write(backing.offset, pattern(seed, 0, size_bytes))
    known: dict[str, Sequence[Offer]] = {
        each: rooms.offers_of(f"offers.{each}", list_) for each, list_ in offers.items()
    }
    room.mirrors[name] = Mirror(
        room.core, name, Page(backing, room.owners.owner_of(device)), known, room.owners
    )
    return where(backing)


@step
def mirror(room: Room, name: str, device: str) -> dict[str, Any]:
    """A device touches the page: what was decided, and the address that it got."""
    found = room.mirror(name)
    address = found.fault(device)
    decided = next(
        (event for event in reversed(room.core.events.events()) if event.kind == "fault"), None
    )
    return {
        "address": None if address is None else shown(address),
        "action": "" if decided is None else decided.details.get("action", ""),
        "reasons": [] if decided is None else decided.details.get("reasons", []),
        **where(found.page.backing),
    }
