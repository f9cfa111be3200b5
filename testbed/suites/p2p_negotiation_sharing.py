# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-negotiation``, fourth part: pages that devices mirror (HMM), importers with page
faults and the graph of operations (FLT), and which paths there are (TOPO-14).
"""

from __future__ import annotations

import errno
from typing import Any

import pytest

from guest_agent.pattern import pattern
from testbed.instruments.negotiation_board import NegotiationBoard, do, require_three
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
    ensure,
    export,
    refused_by_device,
)

pytest_plugins = ["testbed.suites.negotiation_fixtures"]
pytestmark = [pytest.mark.boots(when=has_node), pytest.mark.without_disks]

PAGE = 4096


def use(
    board: NegotiationBoard,
    observe: Observer,
    device: str,
    seen: dict[str, Any],
    seed: int,
    size: int,
) -> None:
    """The device reads the page at the address that it was given, by the way that was decided."""
    way = "link" if "port" in seen["address"] else "iommu"
    with board.faults() as faults, board.watch(device) as watch:
        answers = board.attempt(do("touch", user=device, address=seen["address"], size_bytes=size))
    ensure("refused" not in answers[0], f"{device} at {seen['address']}: {answers[0]}")
    observe.require(judge_no_fault(faults.window))
    observe.require(board.holds(answers[0], seed, size))
    moved = watch.moved()
    names = ("iommu", "message") if way == "iommu" else (way,)
    count = sum(moved[name][0] for name in names if name in moved)
    observe.add(Counter(f"{device} read by path '{way}'", count, "bytes"))
    ensure(count >= size, f"{device} read {count} of {size} bytes by path '{way}': {moved}")


def make_page(board: NegotiationBoard, device: str, *without: str) -> Any:
    """The step that makes a page in a device's private memory."""
    offers = {
        each: board.gpu_offers(each, *(k for k in ("link", "pcie", "system") if k not in without))
        for each in board.gpus
    }
    return do("page", name="p", device=device, size_bytes=PAGE, seed=MINE, offers=offers)


@pytest.mark.requirement("HMM-01")
def test_between_linked_devices_a_page_stays_in_place(
    board: NegotiationBoard, observe: Observer
) -> None:
    """1a: of one owner group, used over the link where it is."""
    a, b, c = require_three(board)
    _, at, seen = board.run(
        do("join", devices=[a, b, c]), make_page(board, a), do("mirror", name="p", device=b)
    )
    ensure(seen["action"].startswith("1a"), f"decided: {seen}")
    ensure(seen["placement"] == "device" and seen["offset"] == at["offset"], f"moved: {seen}")
    use(board, observe, b, seen, MINE, PAGE)
    observe.conclude("left in place; read over the link")


@pytest.mark.requirement("HMM-02")
def test_with_pcie_alone_a_page_stays_in_place(board: NegotiationBoard, observe: Observer) -> None:
    """1b: no link in common, used over PCIe at an address of the device's own."""
    a, b, c = require_three(board)
    _, at, seen = board.run(
        do("join", devices=[a, b, c]), make_page(board, a), do("mirror", name="p", device=c)
    )
    ensure(seen["action"].startswith("1b"), f"decided: {seen}")
    ensure(seen["placement"] == "device" and seen["offset"] == at["offset"], f"moved: {seen}")
    use(board, observe, c, seen, MINE, PAGE)
    observe.conclude(f"left in place; read over PCIe; {'; '.join(seen['reasons'])}")


@pytest.mark.requirement("HMM-03")
def test_without_a_path_a_page_migrates(board: NegotiationBoard, observe: Observer) -> None:
    """No link, no PCIe: system memory, then mapped; who had it in place is cut off, and returns."""
    a, b, c = require_three(board)
    pages = make_page(board, a)
    pages["offers"][c] = board.gpu_offers(c, "system")
    _, _, first, seen = board.run(
        do("join", devices=[a, b, c]),
        pages,
        do("mirror", name="p", device=b),
        do("mirror", name="p", device=c),
    )
    ensure(seen["action"].startswith("migrate"), f"decided: {seen}")
    ensure(seen["placement"] == "system", f"it is in {seen['placement']}")
    observe.require(board.holds(seen, MINE, PAGE))
    use(board, observe, c, seen, MINE, PAGE)
    refused_by_device(board, observe, b, first["address"])
    (again,) = board.run(do("mirror", name="p", device=b))
    use(board, observe, b, again, MINE, PAGE)
    observe.conclude(f"migrated: {'; '.join(seen['reasons'])}; the old address is refused")


@pytest.mark.requirement("HMM-05")
def test_owner_groups_depend_on_the_order_of_joining(
    board: NegotiationBoard, observe: Observer
) -> None:
    """a-b and b-c linked, not a-c: {a, b}, {c}; so b's page is used in place by a over the link,
    and by c, though it is linked to b, over PCIe.
    """
    a, b, c = require_three(board, chain=True)
    groups, _, over_link, over_pcie = board.run(
        do("join", devices=[a, b, c]),
        make_page(board, b),
        do("mirror", name="p", device=a),
        do("mirror", name="p", device=c),
    )
    ensure(groups == [[a, b], [c]], f"groups: {groups}")
    ensure(over_link["action"].startswith("1a"), f"{a}: {over_link}")
    ensure(over_pcie["action"].startswith("1b"), f"{c}: {over_pcie}")
    use(board, observe, a, over_link, MINE, PAGE)
    use(board, observe, c, over_pcie, MINE, PAGE)
    observe.conclude(f"{{{a}, {b}}}, {{{c}}}: the link within the group, PCIe across")


@pytest.mark.requirement("HMM-06")
def test_each_importer_has_an_address_of_its_own(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Two importers, one page, two dma addresses: each reads by its own, and the other's faults."""
    a, b, c = require_three(board)
    _, ours, theirs = board.run(
        make_page(board, a, "link"),
        do("mirror", name="p", device=b),
        do("mirror", name="p", device=c),
    )
    one, other = ours["address"], theirs["address"]
    ensure(one["value"] != other["value"], f"both at {one['value']:#x}")
    use(board, observe, b, ours, MINE, PAGE)
    use(board, observe, c, theirs, MINE, PAGE)
    refused_by_device(board, observe, b, other)
    refused_by_device(board, observe, c, one)
    observe.conclude(f"{one['value']:#x} for {b}, {other['value']:#x} for {c}; exchanged: faults")


@pytest.mark.requirement("TOPO-14")
def test_paths_are_offered_exactly_where_links_are(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Over links alone: a-b and b-c agree and move bytes, a-c have nothing in common."""
    a, b, c = require_three(board, chain=True)
    linked = {frozenset((a, b)), frozenset((b, c))}
    seed = MINE
    for exporter in (a, b, c):
        for importer in (a, b, c):
            if exporter == importer:
                continue
            name = f"{exporter}-{importer}"
            steps = (
                export(board, name, exporter, "link"),
                attach(board, name, importer, "link", name=name),
            )
            if frozenset((exporter, importer)) not in linked:
                refused = board.refused(*steps)
                ensure(refused["errno"] == errno.EINVAL, f"{name}: {refused}")
                continue
            seed += 1
            *_, where = board.run(
                *steps,
                do("map", attachment=name),
                do("write", attachment=name, seed=seed, size_bytes=SIZE),
            )
            observe.require(board.holds(where, seed, SIZE))
    observe.conclude(f"links {a}-{b} and {b}-{c} moved bytes both ways; {a}-{c}: EINVAL")


# --- page faults


def make_on_demand(board: NegotiationBoard, keep_alive_ms: int) -> tuple[str, list[Any]]:
    """A buffer of the pattern FRESH, and an importer that maps when it faults."""
    exporter, importer = board.gpus[:2]
    return importer, [
        export(board, "b", exporter, "pcie", "system"),
        do("fill", buffer="b", seed=FRESH),
        do(
            "on_demand",
            buffer="b",
            importer=importer,
            offers=board.gpu_offers(importer, "pcie", "system"),
            keep_alive_ms=keep_alive_ms,
        ),
    ]


@pytest.mark.requirement("FLT-01")
def test_fault_map_go_on_and_fault_again_after_a_move(
    board: NegotiationBoard, observe: Observer
) -> None:
    """The second fault comes while the copy waits: it is served only after the KERNEL fence."""
    exporter = board.gpus[0]
    importer, steps = make_on_demand(board, 0)
    expected = pattern(FRESH, 0, PAGE).hex()
    with board.faults() as faults:
        *_, first, _, _, unmapped, held, _, again = board.run(
            *steps,
            do("transfer", importer=importer, size_bytes=SIZE),
            do("hold", device=exporter),
            do("move", buffer="b", to="system"),
            do("is_mapped", importer=importer),
            do("signalled", fence="move"),
            do("release_soon", device=exporter, delay_ms=50),
            do("transfer", importer=importer, size_bytes=SIZE),
        )
    observe.require(judge_no_fault(faults.window))
    ensure(first["faults"] == 1 and first["head"] == expected, f"first: {first['faults']} faults")
    ensure(not unmapped["mapped"], "it is still mapped after the move")
    ensure(not held["signalled"], "the copy did not wait")
    ensure(again["faults"] == 1, f"after the move: {again['faults']} faults")
    ensure(again["head"] == expected, "read before the copy's fence: other bytes")
    (state,) = board.run(do("state", buffer="b"))
    observe.require(board.holds(state, FRESH, SIZE))
    refused_by_device(board, observe, importer, first["address"])
    observe.conclude("one fault each; the second waited for the copy; the old address is refused")


@pytest.mark.requirement("FLT-02")
def test_a_keep_alive_fence_bounds_refaults_and_nothing_else(
    board: NegotiationBoard, observe: Observer
) -> None:
    """It blocks nobody's access, holds back a move for one transfer, and ends by itself."""
    importer, steps = make_on_demand(board, 2000)
    *_, fault, _, waiting, done, after, _, moved = board.run(
        *steps,
        do("fault", importer=importer),
        do("move", buffer="b", to="system"),
        do("signalled", fence="move"),
        do("transfer", importer=importer, size_bytes=SIZE),
        do("wait", fence="move"),
        do("settle"),
        do("state", buffer="b"),
    )
    ensure(fault["blocks_moves"] == 1, f"no keep-alive fence: {fault}")
    ensure(fault["blocks_access"] == 0, f"it blocks access: {fault}")
    ensure(not waiting["signalled"], "the move did not wait for the transfer")
    ensure(done["faults"] == 0, f"the transfer refaulted: {done['faults']}")
    ensure(done["head"] == pattern(FRESH, 0, PAGE).hex(), "the transfer has other bytes")
    observe.require(board.holds(moved, FRESH, SIZE))
    del after
    # And who faults and never transfers does not keep it for ever.
    *_, waited = board.run(
        do("fault", importer=importer),
        do("move", buffer="b", to="device"),
        do("wait", fence="move", timeout_s=10.0),
        do("settle"),
        do("state", buffer="b"),
    )
    ensure(waited["placement"] == "device", f"never evicted: {waited}")
    observe.require(board.holds(waited, FRESH, SIZE))
    observe.conclude("no refault in the transfer, no access blocked, evicted after 2 s at most")


@pytest.mark.requirement("FLT-03")
def test_an_importer_gets_on_while_its_buffer_churns(
    board: NegotiationBoard, observe: Observer
) -> None:
    """The exporter moves the buffer at each opportunity. With keep-alive fences each fault is worth
    a whole transfer; without them the importer gets nothing, which is what they are for.
    """
    moves, pieces_each = 6, SIZE // PAGE
    importer, steps = make_on_demand(board, 5000)
    churn = do("churn", buffer="b", importer=importer, moves=moves, piece_bytes=PAGE, seed=FRESH)
    with board.faults() as faults:
        *_, kept = board.run(*steps, churn)
    observe.require(judge_no_fault(faults.window))
    board.clean()
    importer, steps = make_on_demand(board, 0)
    *_, starved, state = board.run(*steps, churn, do("state", buffer="b"))
    for name, found in (("with", kept), ("without", starved)):
        for key, unit in (
            ("pieces", "pieces"), ("faults", "faults"), ("moves", "moves"), ("elapsed_ns", "ns")
        ):  # fmt: skip
            observe.add(Counter(f"{key} {name} keep-alive", found[key], unit))
    ensure(kept["wrong"] == 0 and starved["wrong"] == 0, "pieces with other bytes")
    floor = (kept["faults"] - 1) * pieces_each  # the last transfer may be under way
    ensure(kept["faults"] > 1, f"no churn: {kept}")
    ensure(kept["pieces"] >= floor, f"{kept['pieces']} pieces of {kept['faults']} faults: {floor}")
    starving = (starved["faults"] - 1) * pieces_each
    ensure(starved["pieces"] < starving, "it gets on without keep-alive fences: nothing is shown")
    observe.require(board.holds(state, FRESH, SIZE))
    observe.conclude(
        f"{kept['pieces']} pieces in {kept['moves']} moves (floor {floor}); without: "
        f"{starved['pieces']} pieces, {starved['faults']} faults"
    )


@pytest.mark.requirement("FLT-06")
def test_operations_are_a_graph_without_cycles(board: NegotiationBoard, observe: Observer) -> None:
    """A cycle is refused and names its operations; what is a future cannot be used early."""
    exporter, importer = board.gpus[:2]
    *_, mapped, _, early, cycle = board.attempt(
        export(board, "b", exporter, "pcie", "system"),
        do("fill", buffer="b", seed=THEIRS),
        attach(board, "b", importer, "pcie", "system"),
        do("hold", device=exporter),
        do("move", buffer="b", to="system", fence="gate"),
        do("map", attachment=importer),
        do("submit", attachment=importer, size_bytes=SIZE, fence="read"),
        do("signalled", fence="read"),
        do("cycle"),
    )
    ensure(mapped["future"], "a mapping of bytes that are on their way is not marked")
    ensure(not early["signalled"], "the read began before the copy ended")
    refused = cycle.get("refused")
    ensure(refused is not None, f"the cycle was accepted, and ran: {cycle}")
    assert refused is not None
    ensure(refused["type"] == "CycleError", f"{refused}")
    observe.note(refused["message"])
    with board.faults() as faults:
        _, _, staged = board.run(
            do("go_on", device=exporter),
            do("wait", fence="read"),
            do("staging", device=importer),
        )
    observe.require(judge_no_fault(faults.window))
    observe.require(board.holds(staged, THEIRS, SIZE))
    observe.conclude(f"{refused['message']}; the others went on in their order")
