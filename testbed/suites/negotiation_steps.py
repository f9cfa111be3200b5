# SPDX-License-Identifier: Apache-2.0
"""What tests of the suite ``p2p-negotiation`` share: steps, and how their ends are judged."""

from __future__ import annotations

from typing import Any

from testbed.instruments.negotiation_board import NegotiationBoard, do
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter
from testbed.results.judging import judge_no_fault

PAGE = 4096
SIZE = 64 << 10
MINE, THEIRS, FRESH = 31, 32, 33
_PATHS = {"xgmi": "link", "nvlink": "link", "xelink": "link", "virtual": "link"}


def ensure(holds: bool, why: str) -> None:
    """A claim that is no judgement of bytes or faults."""
    if not holds:
        raise Refuted(why)


def deliver(
    board: NegotiationBoard,
    observe: Observer,
    attachment: str,
    path: dict[str, Any],
    *,
    seed: int = MINE,
    size: int = SIZE,
) -> dict[str, Any]:
    """The importer writes through its mapping, and reads back: bytes and path are right, nothing
    faulted. Answers where the bytes are.
    """
    device, way = path["device"], _PATHS.get(path["kind"], "iommu")
    with board.faults() as faults, board.watch(device) as watch:
        where, _ = board.run(
            do("write", attachment=attachment, seed=seed, size_bytes=size),
            do("read", attachment=attachment, size_bytes=size),
        )
    observe.require(judge_no_fault(faults.window))
    observe.require(board.holds(where, seed, size))
    (staged,) = board.run(do("staging", device=device))
    observe.require(board.holds(staged, seed, size))
    moved = watch.moved()
    names = ("iommu", "message") if way == "iommu" else (way,)
    for index, verb in enumerate(("read", "wrote")):
        count = sum(moved[name][index] for name in names if name in moved)
        observe.add(Counter(f"{device} {verb} by path '{way}'", count, "bytes"))
        ensure(count >= size, f"{device} {verb} {count} of {size} bytes by path '{way}': {moved}")
    others = {"link", "peer"} - {way}
    strange = {name for name in others if any(moved.get(name, ()))}
    ensure(not strange, f"{device} also moved bytes by path {strange}")
    return dict(where)


def export(board: NegotiationBoard, name: str, device: str, *kinds: str, **more: Any) -> Any:
    """The step that makes a buffer with a GPU's offers."""
    offers = board.gpu_offers(device, *kinds)
    return do("export", buffer=name, device=device, size_bytes=SIZE, offers=offers, **more)


def attach(board: NegotiationBoard, buffer: str, device: str, *kinds: str, **more: Any) -> Any:
    """The step that attaches a GPU with its offers."""
    return do(
        "attach", buffer=buffer, importer=device, offers=board.gpu_offers(device, *kinds), **more
    )


def refused_by_device(
    board: NegotiationBoard, observe: Observer, device: str, address: dict[str, object]
) -> None:
    """The device uses the address by itself: refused, and the IOMMU (or the link) says so."""
    with board.faults() as faults:
        refused = board.refused(
            do("touch", user=device, address=address, size_bytes=PAGE, seed=FRESH)
        )
    ensure(refused["type"] == "FaultError", f"not by the device: {refused}")
    if "port" not in address:
        ensure(bool(faults.window.records), "the device was refused, and nobody saw a fault")
        for record in faults.window.records:
            same = record.requester == board.requesters[device]
            ensure(same, f"the fault of another: {record}")
        observe.add(*faults.window.records[:2])
    observe.note(refused["message"])
