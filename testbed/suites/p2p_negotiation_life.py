# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-negotiation``, third part: what becomes of a buffer that is in use (LIFE).

Pinned, moved behind fences, revoked, taken away from an importer that does not let go: each ends in
bytes that a device moved, or in an access that its IOMMU or its link refused.
"""

from __future__ import annotations

import errno

import pytest

from testbed.errors import CapabilityMissing
from testbed.instruments.negotiation_board import BUFFERS_BYTES, NegotiationBoard, do
from testbed.instruments.observer import Observer
from testbed.results.evidence import Counter
from testbed.results.judging import judge_no_fault
from testbed.suites.negotiation_fixtures import has_node
from testbed.suites.negotiation_steps import (
    FRESH,
    MINE,
    SIZE,
    THEIRS,
    attach,
    deliver,
    ensure,
    export,
    refused_by_device,
)

pytest_plugins = ["testbed.suites.negotiation_fixtures"]
pytestmark = [pytest.mark.boots(when=has_node), pytest.mark.without_disks]

PAGE = 4096


@pytest.mark.requirement("LIFE-01")
@pytest.mark.parametrize("kind", ["static", "not-revocable", "no-p2p"])
def test_who_cannot_let_go_gets_no_device_memory(
    board: NegotiationBoard, observe: Observer, kind: str
) -> None:
    """EOPNOTSUPP from an exporter of device memory alone; a GPU's moves to system memory first."""
    exporter, importer = board.gpus[:2]
    how = {"static": {"dynamic": False}, "not-revocable": {"revocable": False}}.get(kind, {})
    kinds = ("system",) if kind == "no-p2p" else ("pcie", "system")
    refused = board.refused(
        export(board, "vfio", exporter, "pcie", "system", placements=["device"]),
        attach(board, "vfio", importer, *kinds, **how),
    )
    ensure(refused["errno"] == errno.EOPNOTSUPP, f"refused by {refused}")
    first, _, path, _, moved, _ = board.run(
        export(board, "gpu", exporter, "pcie", "system"),
        do("fill", buffer="gpu", seed=THEIRS),
        attach(board, "gpu", importer, *kinds, **how),
        do("settle"),
        do("state", buffer="gpu"),
        do("map", attachment=importer),
    )
    ensure(first["placement"] == "device" and moved["placement"] == "system", f"{first} → {moved}")
    observe.require(board.holds(moved, THEIRS, SIZE))
    deliver(board, observe, importer, path)
    observe.conclude(f"{kind}: EOPNOTSUPP, and system memory where there is some")


@pytest.mark.requirement("LIFE-03")
def test_a_revoke_tells_waits_and_takes_away(board: NegotiationBoard, observe: Observer) -> None:
    """Importers are told; their work is waited for; the device is refused; un-revoke and remap."""
    exporter, importer = board.gpus[:2]
    _, path, address, _, _ = board.run(
        export(board, "b", exporter, "pcie", "system"),
        attach(board, "b", importer, "pcie", "system"),
        do("map", attachment=importer),
        do("fill", buffer="b", seed=MINE),
        do("hold", device=importer),
    )
    deliver_later = (
        do("submit", attachment=importer, fence="slow", size_bytes=SIZE, seed=THEIRS),
        do("signalled", fence="slow"),
        do("release_soon", device=importer, delay_ms=50),
        do("revoke", buffer="b", why="reset"),
        do("signalled", fence="slow"),
        do("state", buffer="b"),
    )
    _, before, _, _, after, state = board.run(*deliver_later)
    ensure(not before["signalled"], "the importer's work was over before the revoke")
    ensure(after["signalled"] and not after["error"], f"the importer's work: {after}")
    ensure(state["mapped"] == {importer: 0} and state["revoked"] == "reset", f"then: {state}")
    observe.require(board.holds(state, THEIRS, SIZE))  # it was waited for
    refused_by_device(board, observe, importer, address)
    observe.require(board.holds(state, THEIRS, SIZE))
    again = board.refused(do("map", attachment=importer))
    ensure(again["errno"] == errno.ENODEV, f"map after the revoke: {again}")
    late = board.refused(attach(board, "b", importer, "pcie", name="late"))
    ensure(late["errno"] == errno.ENODEV, f"attach after the revoke: {late}")
    board.run(do("unrevoke", buffer="b"), do("map", attachment=importer))
    deliver(board, observe, importer, path, seed=FRESH)
    told = [e for e in board.events() if e["kind"] == "invalidate"]
    ensure(len(told) == 1, f"told {len(told)} times")
    observe.conclude("told, waited for, refused by the IOMMU; un-revoked and mapped again")


@pytest.mark.requirement("LIFE-05")
def test_who_never_unmaps_is_named_and_cut_off(board: NegotiationBoard, observe: Observer) -> None:
    """Two importers; one ignores the invalidation. After the deadline its device is refused; the
    error names it alone.
    """
    exporter, rude = board.gpus[:2]
    polite = (board.gpus[2:] or board.nics)[0]
    if polite in board.nics:
        offers = [{"kind": "pcie", "device": polite}]
    else:
        offers = board.gpu_offers(polite, "pcie", "system")
    _, _, _, _, address = board.run(
        export(board, "b", exporter, "pcie", "system"),
        do("attach", buffer="b", importer=polite, offers=offers),
        do("map", attachment=polite),
        attach(board, "b", rude, "pcie", "system", polite=False),
        do("map", attachment=rude),
    )
    refused = board.refused(do("revoke", buffer="b", why="memory decoding off"))
    ensure(refused["type"] == "OverdueError", f"revoke: {refused}")
    ensure(rude in refused["message"] and polite not in refused["message"], refused["message"])
    observe.note(refused["message"])
    refused_by_device(board, observe, rude, address)
    revokes = [e for e in board.events() if e["kind"] == "revoke"]
    waited_ns = revokes[-1]["duration_ns"]
    observe.add(Counter("revoke waited", waited_ns, "ns"))
    ensure(300_000_000 <= waited_ns < 3_000_000_000, f"the deadline is 0.3 s, not {waited_ns} ns")
    _, path, _ = board.run(
        do("unrevoke", buffer="b"),
        do("path", attachment=polite),
        do("map", attachment=polite),
    )
    deliver(board, observe, polite, path)
    observe.conclude(f"{rude} is named after 0.3 s and refused by its IOMMU; {polite} goes on")


@pytest.mark.requirement("LIFE-06")
def test_a_move_is_pipelined_behind_its_fence(board: NegotiationBoard, observe: Observer) -> None:
    """The copy is queued on an engine that is held: the new mapping is there, its address is not to
    be used, the read waits, and in the end has the bytes that moved.
    """
    exporter, importer = board.gpus[:2]
    _, _, _, _, _, move, mapped = board.run(
        export(board, "b", exporter, "pcie", "system"),
        attach(board, "b", importer, "pcie", "system"),
        do("map", attachment=importer),
        do("fill", buffer="b", seed=MINE),
        do("hold", device=exporter),
        do("move", buffer="b", to="system"),
        do("map", attachment=importer),
    )
    ensure(mapped["future"], "the mapping is said to be usable while the copy waits")
    early = board.attempt(do("read", attachment=importer, size_bytes=SIZE))[0]
    ensure("refused" in early, "the address was handed out before the copy's fence")
    ensure(early["refused"]["type"] == "FutureError", f"early: {early}")
    observe.note(early["refused"]["message"])
    with board.faults() as faults:
        _, queued, moved, _, _, done = board.run(
            do("submit", attachment=importer, size_bytes=SIZE, fence="read"),
            do("signalled", fence="read"),
            do("signalled", fence="move"),
            do("go_on", device=exporter),
            do("wait", fence="read"),
            do("signalled", fence="move"),
        )
    ensure(not queued["signalled"] and not moved["signalled"], f"too early: {queued}, {moved}")
    ensure(done["signalled"] and not done["error"], f"the move: {done}")
    observe.require(judge_no_fault(faults.window))
    (staged,) = board.run(do("staging", device=importer))
    observe.require(board.holds(staged, MINE, SIZE))
    observe.require(board.holds(move, MINE, SIZE))
    observe.conclude("mapped while the copy waited; read only after its fence, with its bytes")


@pytest.mark.requirement("LIFE-07")
def test_what_is_pinned_stays_and_what_is_not_moves(
    board: NegotiationBoard, observe: Observer
) -> None:
    """EBUSY with the importer's name; the mapping goes on working; a full memory says who pins."""
    exporter, importer = board.gpus[:2]
    _, path, mapped, pinned = board.run(
        export(board, "b", exporter, "pcie", "system"),
        attach(board, "b", importer, "pcie", "system"),
        do("map", attachment=importer),
        do("pin", attachment=importer),
    )
    ensure(pinned["pinned"] == [f"b ({SIZE} bytes) by {importer}"], f"pinned: {pinned}")
    moving = board.attempt(do("move", buffer="b", to="system"))[0]
    ensure("refused" in moving, f"a pinned buffer moved: {moving}")
    ensure(moving["refused"]["errno"] == errno.EBUSY, f"moving: {moving}")
    ensure(importer in moving["refused"]["message"], moving["refused"]["message"])
    deliver(board, observe, importer, path)
    full = board.refused(
        do(
            "export",
            buffer="all",
            device=exporter,
            size_bytes=BUFFERS_BYTES,
            offers=board.gpu_offers(exporter, "pcie"),
            placements=["device"],
        )
    )
    ensure(full["errno"] == errno.ENOSPC or full["errno"] == errno.ENOMEM, f"full: {full}")
    ensure(f"pinned there: b ({SIZE} bytes) by {importer}" in full["message"], full["message"])
    observe.note(full["message"])
    _, moved, _, again = board.run(
        do("pin", attachment=importer, on=False),
        do("move", buffer="b", to="system"),
        do("settle"),
        do("map", attachment=importer),
    )
    observe.require(board.holds(moved, MINE, SIZE))
    deliver(board, observe, importer, again["path"], seed=FRESH)
    del mapped
    observe.conclude("pinned: EBUSY and named; unpinned: moved with its bytes")


@pytest.mark.requirement("LIFE-10")
def test_a_list_of_buffers_moves_wholly_or_not_at_all(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Three buffers, room for two: none moves. Room for all: all move."""
    if len(board.gpus) < 2:
        raise CapabilityMissing("two GPU models")
    exporter, importer = board.gpus[:2]
    big = BUFFERS_BYTES * 9 // 32
    names = ["b0", "b1", "b2"]
    offers = board.gpu_offers(exporter, "pcie", "system")
    for seed, name in enumerate(names):
        board.run(
            do("export", buffer=name, device=exporter, size_bytes=big, offers=offers),
            do("fill", buffer=name, seed=seed),
            attach(board, name, importer, "pcie", "system", name=name),
        )
    board.run(
        do("move_all", buffers=names, to="system"),
        do("settle"),
        *(do("map", attachment=name) for name in names),
    )
    _, blocker = board.run(
        do("export", buffer="blocker", device=exporter, size_bytes=PAGE, offers=offers),
        do("state", buffer="blocker"),
    )
    ensure(blocker["placement"] == "device", f"{blocker}")
    board.run(
        do("export", buffer="full", device=exporter, size_bytes=big // 2, offers=offers,
           placements=["device"]),
    )  # fmt: skip
    refused = board.refused(do("move_all", buffers=names, to="device"))
    ensure(refused["type"] == "NoRoomError", f"{refused}")
    states = [board.run(do("state", buffer=name))[0] for name in names]
    ensure(
        all(s["placement"] == "system" and s["moves"] == 1 for s in states),
        f"half of them moved: {[s['placement'] for s in states]}",
    )
    for seed, name in enumerate(names):
        _, staged = board.run(
            do("path", attachment=name), do("read", attachment=name, size_bytes=SIZE)
        )
        observe.require(board.holds(staged, seed, SIZE))
    board.run(do("release", buffer="full"), do("release", buffer="blocker"))
    moved, _ = board.run(do("move_all", buffers=names, to="device"), do("settle"))
    for seed, where in enumerate(moved):
        ensure(where["placement"] == "device", f"{where}")
        observe.require(board.holds(where, seed, big))
    observe.conclude("one too many: nothing moved and all mappings go on; with room: all moved")
