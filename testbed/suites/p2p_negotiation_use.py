# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-negotiation``, second part: an interconnect that was chosen, in use (NEG).

Its address until the buffer moves, two kinds on one buffer at once, a move that all or none follow,
and what is taken where the chosen one cannot be mapped any more.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest

from testbed.errors import CapabilityMissing
from testbed.instruments.negotiation_board import NegotiationBoard, do, require_three
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


@pytest.mark.requirement("NEG-03")
def test_one_interconnect_and_one_address_until_it_moves(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Map, unmap and map again: the same address, which in between leads nowhere."""
    exporter, importer = board.gpus[:2]
    _, path, first = board.run(
        export(board, "b", exporter, "pcie", "system"),
        attach(board, "b", importer, "pcie", "system"),
        do("map", attachment=importer),
    )
    deliver(board, observe, importer, path)
    for round_ in range(3):
        _, other, again = board.run(
            do("unmap", attachment=importer),
            # Someone else's mapping does not take the place.
            attach(board, "b", importer, "pcie", "system", name=f"other{round_}"),
            do("map", attachment=importer),
        )
        ensure(other["kind"] == path["kind"], f"now it is {other['kind']}")
        ensure(again["value"] == first["value"], f"{first['value']:#x}, then {again['value']:#x}")
        deliver(board, observe, importer, path, seed=FRESH + round_)
    moved, _, _, after = board.run(
        do("move", buffer="b", to="system"),
        do("settle"),
        do("path", attachment=importer),
        do("map", attachment=importer),
    )
    ensure(moved["placement"] == "system", "it did not move")
    ensure(after["value"] != first["value"], "a new place at the old address")
    refused = board.refused(do("touch", user=importer, address=first, size_bytes=4096))
    observe.note(refused["message"])
    deliver(board, observe, importer, after["path"], seed=THEIRS)
    observe.conclude("one address until it moved; then another, and the old one is refused")


@pytest.mark.requirement("NEG-05")
def test_a_link_and_pcie_on_one_buffer_at_once(board: NegotiationBoard, observe: Observer) -> None:
    """b is linked to a, c is not: both use a's buffer, in turn and again, neither disturbs the
    other.
    """
    a, b, c = require_three(board)
    offers = board.gpu_offers(a)
    paths: dict[str, Any] = {}
    board.run(do("export", buffer="b", device=a, size_bytes=SIZE, offers=offers))
    for device in (b, c):
        paths[device], _ = board.run(
            attach(board, "b", device, name=device), do("map", attachment=device)
        )
    kinds = {device: path["kind"] for device, path in paths.items()}
    ensure(kinds[b] != "pcie" and kinds[c] == "pcie", f"chosen: {kinds}")
    for round_, device in enumerate((b, c, b, c)):
        deliver(board, observe, device, paths[device], seed=MINE + round_)
    # What one wrote the other reads.
    _, staged = board.run(
        do("write", attachment=b, seed=FRESH, size_bytes=SIZE),
        do("read", attachment=c, size_bytes=SIZE),
    )
    observe.require(board.holds(staged, FRESH, SIZE))
    _, where, _ = board.run(
        do("unmap", attachment=b),
        do("write", attachment=c, seed=THEIRS, size_bytes=SIZE),
        do("state", buffer="b"),
    )
    observe.require(board.holds(where, THEIRS, SIZE))
    observe.conclude(f"{b} by {kinds[b]} and {c} by pcie, on one buffer")


@pytest.mark.requirement("NEG-06")
def test_a_move_leaves_no_active_importer_behind(
    board: NegotiationBoard, observe: Observer
) -> None:
    """An importer that reaches only RAM moves the buffer for all; or, if one of the others does
    not reach RAM, it is refused and nothing moves.
    """
    exporter, importer = board.gpus[:2]
    device_only, system_only = ["pcie"], ["system"]
    _, path, before = board.run(
        export(board, "b", exporter, "pcie", "system"),
        attach(board, "b", importer, *device_only),
        do("map", attachment=importer),
    )
    late = {
        "importer": "late",
        "offers": board.gpu_offers(importer, *system_only),
        "name": "late",
    }
    answers = board.attempt(do("attach", buffer="b", **late))
    (state,) = board.run(do("state", buffer="b"))
    ensure("refused" in answers[-1], f"it was let in, and the bytes are in {state['placement']}")
    ensure(answers[-1]["refused"]["errno"] == errno.EINVAL, f"refused by {answers[-1]}")
    ensure(state["placement"] == "device" and state["moves"] == 0, f"it moved: {state}")
    moving = board.refused(do("move", buffer="b", to="system"))
    ensure(moving["errno"] == errno.EOPNOTSUPP, f"the exporter's own move: {moving}")
    deliver(board, observe, importer, path)
    # The same with one that reaches both: now it moves, for all.
    board.run(do("fill", buffer="b", seed=FRESH), do("unmap", attachment=importer))
    _, both, _ = board.run(
        do("detach", attachment=importer),
        attach(board, "b", importer, "pcie", "system"),
        do("map", attachment=importer),
    )
    ensure(both["placement"] == "device", f"before: {both}")
    theirs, _, state, _, ours = board.run(
        do("attach", buffer="b", **late),
        do("settle"),
        do("state", buffer="b"),
        do("map", attachment="late"),
        do("map", attachment=importer),
    )
    ensure(state["placement"] == "system", f"after: {state}")
    observe.require(board.holds(state, FRESH, SIZE))
    deliver(board, observe, "late", theirs, seed=MINE)
    deliver(board, observe, importer, ours["path"], seed=THEIRS)
    del before
    observe.conclude("refused while one could not follow; moved for all when all could")


@pytest.mark.requirement("NEG-07")
def test_from_the_link_to_pcie_to_system_memory(board: NegotiationBoard, observe: Observer) -> None:
    """The link is taken down; then VFIO refuses the importer's address; bytes move at each step."""
    if not board.links:
        raise CapabilityMissing("two GPU models with a private link")
    (exporter, port), (importer, _) = board.links[0]["ends"]
    _, _, mapped = board.run(
        export(board, "b", exporter), attach(board, "b", importer), do("map", attachment=importer)
    )
    ensure(mapped["path"]["kind"] == board.links[0]["kind"], f"first: {mapped['path']}")
    deliver(board, observe, importer, mapped["path"], seed=1)
    down, mapped = board.run(
        do("link", device=exporter, port=port, up=False),
        do("map", attachment=importer, fall_back=True),
    )
    ensure(down["reached"], "the link did not go down")
    ensure(mapped["path"]["kind"] == "pcie", f"without the link: {mapped['path']}")
    deliver(board, observe, importer, mapped["path"], seed=2)
    board.run(do("unmap", attachment=importer))
    refused = board.refused(
        do("detach", attachment=importer),
        attach(board, "b", importer),
        do("lie", device=importer),
        do("map", attachment=importer, fall_back=True),
    )
    observe.note(f"PCIe was refused: {refused['message']}")
    _, moved, _, mapped = board.run(
        do("lie", device=importer, on=False),
        do("move", buffer="b", to="system"),
        do("settle"),
        do("map", attachment=importer),
    )
    observe.require(board.holds(moved, 2, SIZE))
    ensure(mapped["path"]["kind"] == "system", f"last: {mapped['path']}")
    deliver(board, observe, importer, mapped["path"], seed=3)
    observe.conclude("link, PCIe, system memory: each moved its bytes")


@pytest.mark.requirement("NEG-09")
def test_what_cannot_be_mapped_becomes_a_scatter_list(
    board: NegotiationBoard, observe: Observer
) -> None:
    """The link's mapping fails when it is made; the legacy pair's scatter list is mapped."""
    if not board.links:
        raise CapabilityMissing("two GPU models with a private link")
    (exporter, port), (importer, _) = board.links[0]["ends"]
    _, path = board.run(
        export(board, "b", exporter, "link", "scatter-list"),
        attach(board, "b", importer, "link", "scatter-list"),
    )
    ensure(path["kind"] == board.links[0]["kind"], f"attached by {path}")
    _, mapped = board.run(
        do("link", device=exporter, port=port, up=False),
        do("map", attachment=importer, fall_back=True),
    )
    ensure(mapped["path"]["kind"] == "scatter-list", f"mapped by {mapped['path']}")
    deliver(board, observe, importer, mapped["path"])
    observe.conclude("map_interconnect failed; the scatter list carried the bytes")
