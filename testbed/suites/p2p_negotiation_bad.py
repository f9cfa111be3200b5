# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-negotiation``, last part: importers that do wrong (LIFE-12).

Each gets an error of its own that names it, and the importer beside it goes on. Who never unmaps is
LIFE-05.
"""

from __future__ import annotations

import errno

import pytest

from testbed.errors import CapabilityMissing
from testbed.instruments.negotiation_board import NegotiationBoard, do
from testbed.instruments.observer import Observer
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
)

pytest_plugins = ["testbed.suites.negotiation_fixtures"]
pytestmark = [pytest.mark.boots(when=has_node), pytest.mark.without_disks]


def beside(board: NegotiationBoard) -> tuple[str, str, str]:
    """``(exporter, bad, good)``, the good one attached to and mapping the exporter's buffer ``b``.

    Raises:
        CapabilityMissing: there is no third device.
    """
    others = board.gpus[2:] or board.nics
    if not others:
        raise CapabilityMissing("a third model device")
    exporter, bad = board.gpus[:2]
    board.run(
        export(board, "b", exporter, "pcie", "system"),
        attach(board, "b", others[0], "pcie", "system"),
        do("map", attachment=others[0]),
    )
    return exporter, bad, others[0]


def goes_on(board: NegotiationBoard, observe: Observer, importer: str, seed: int) -> None:
    """An importer's mapping works."""
    (path,) = board.run(do("path", attachment=importer))
    deliver(board, observe, importer, path, seed=seed)


@pytest.mark.requirement("LIFE-12")
def test_who_lies_about_its_reach_is_named(board: NegotiationBoard, observe: Observer) -> None:
    """It says that it reaches the memory; the IOMMU does not take its addresses."""
    _, bad, good = beside(board)
    refused = board.refused(
        attach(board, "b", bad, "pcie", "system"),
        do("lie", device=bad),
        do("map", attachment=bad),
    )
    ensure(refused["type"] == "ReachError" and bad in refused["message"], f"refused: {refused}")
    observe.note(refused["message"])
    goes_on(board, observe, good, MINE)
    _, mapped = board.run(do("lie", device=bad, on=False), do("map", attachment=bad))
    deliver(board, observe, bad, mapped["path"], seed=THEIRS)
    goes_on(board, observe, good, FRESH)
    observe.conclude(f"{refused['message']}; {good} went on, and so did {bad} once it was honest")


@pytest.mark.requirement("LIFE-12")
def test_who_unmaps_twice_is_named(board: NegotiationBoard, observe: Observer) -> None:
    """The second time is refused; what the others have mapped is not touched."""
    _, bad, good = beside(board)
    twice = do("unmap", attachment=bad)
    refused = board.refused(
        attach(board, "b", bad, "pcie", "system"), do("map", attachment=bad), twice, twice
    )
    ensure(refused["type"] == "StaleError", f"refused: {refused}")
    ensure(bad in refused["message"] and "twice" in refused["message"], refused["message"])
    goes_on(board, observe, good, MINE)
    path, _ = board.run(do("path", attachment=bad), do("map", attachment=bad))
    deliver(board, observe, bad, path, seed=THEIRS)
    observe.conclude(refused["message"])


@pytest.mark.requirement("LIFE-12")
def test_who_dies_with_a_fence_holds_nobody_up(board: NegotiationBoard, observe: Observer) -> None:
    """Its write is queued on its engine, and a move waits for it; it dies. The fence fails with its
    name, the move goes on with the bytes, what its engine does later is refused by its IOMMU.
    """
    _, bad, good = beside(board)
    *_, waiting = board.run(
        do("fill", buffer="b", seed=MINE),
        attach(board, "b", bad, "pcie", "system"),
        do("map", attachment=bad),
        do("hold", device=bad),
        do("submit", attachment=bad, fence="late", size_bytes=SIZE, seed=THEIRS),
        do("move", buffer="b", to="system"),
        do("signalled", fence="move"),
    )
    ensure(not waiting["signalled"], "the move did not wait for the write")
    _, fence, _, moved = board.run(
        do("died", attachment=bad),
        do("signalled", fence="late"),
        do("wait", fence="move", timeout_s=3.0),
        do("state", buffer="b"),
    )
    ensure(f"{bad} died" in fence["error"], f"its fence: {fence}")
    ensure(moved["placement"] == "system", f"moved: {moved}")
    observe.require(board.holds(moved, MINE, SIZE))
    board.run(do("map", attachment=good))
    goes_on(board, observe, good, FRESH)
    with board.faults() as faults:
        # Its engine goes on where it was, with an address that is its no longer; what is queued
        # behind that ends with it.
        board.run(
            do("go_on", device=bad),
            attach(board, "b", bad, "system"),
            do("map", attachment=bad),
        )
        board.attempt(do("read", attachment=bad, size_bytes=SIZE))
    requesters = {record.requester for record in faults.window.records}
    ensure(requesters == {board.requesters[bad]}, f"faults of {requesters}")
    observe.add(*faults.window.records[:1])
    observe.require(board.holds(moved, FRESH, SIZE))
    goes_on(board, observe, bad, THEIRS)  # another process on the same device
    observe.conclude(f"{fence['error']}; the move went on, its late write was refused")


@pytest.mark.requirement("LIFE-12")
def test_a_type_of_interconnect_that_is_none_is_named(
    board: NegotiationBoard, observe: Observer
) -> None:
    """A misspelt type is refused with the nearest one; nobody is disturbed."""
    _, bad, good = beside(board)
    refused = board.refused(
        do("attach", buffer="b", importer=bad, offers=[{"kind": "xgm", "device": bad}])
    )
    ensure(refused["type"] == "UnknownKindError", f"refused: {refused}")
    ensure(refused["errno"] == errno.EINVAL and "xgmi" in refused["message"], refused["message"])
    goes_on(board, observe, good, MINE)
    observe.conclude(refused["message"])
