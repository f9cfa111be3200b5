# SPDX-License-Identifier: Apache-2.0
"""The peer matrix as a heat map: one colour and one word for each of three lines a cell. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from testbed.topology.matrix import (
    Arrival,
    Cell,
    Decision,
    MapKind,
    Matrix,
    Measured,
    Unknown,
    platform_for,
)
from testbed.topology.matrix_drawing import explanation, legend
from testbed.topology.plan import RackPlan

MOST_EXPLAINED = 400  # cells whose facts are in the page

# From the shortest way to none; the names are the style sheet's.
_HEAT_OF_KIND = {
    MapKind.BUS: "near",
    MapKind.IOVA: "iommu",
    MapKind.PHYSICAL: "root",
    MapKind.NONE: "none",
}
_HEAT_OF_ARRIVAL = {
    Arrival.PEER: "near",
    Arrival.IOMMU: "iommu",
    Arrival.ROOT: "root",
    Arrival.ARRIVED: "root",
    Arrival.REFUSED: "none",
    Arrival.ABSENT: "none",
    Arrival.LOST: "lost",
}


@dataclass(frozen=True)
class Entry:
    """One line of a cell; ``why`` says why it is unknown, or what contradicts it."""

    label: str
    text: str
    heat: str
    why: str = ""


@dataclass(frozen=True)
class CellView:
    """One pair: its word, three entries, and every fact behind it."""

    requester: str
    target: str
    word: str
    entries: tuple[Entry, ...]
    facts: tuple[str, ...]
    disagrees: bool


@dataclass(frozen=True)
class MatrixView:
    """Rows of cells; None on the diagonal."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[CellView | None, ...]], ...]
    legend: tuple[tuple[str, str], ...]
    disagreements: tuple[str, ...]
    asked: int
    measured: int
    pairs: int


def matrix_view(plan: RackPlan, matrix: Matrix) -> MatrixView | None:
    """None if there are no two devices that could be peers."""
    if len(matrix.peers) < 2:
        return None
    few = len(matrix.cells) <= MOST_EXPLAINED
    names = tuple(peer.name for peer in matrix.peers)
    rows = tuple(
        (
            row,
            tuple(
                None if row == column else _cell(plan, matrix.cells[row, column], few)
                for column in names
            ),
        )
        for row in names
    )
    cells = matrix.cells.values()
    return MatrixView(
        names,
        rows,
        tuple(legend(matrix)),
        matrix.disagreements,
        sum(isinstance(cell.kernel, Decision) for cell in cells),
        sum(isinstance(cell.measured, Measured) for cell in cells),
        len(matrix.cells),
    )


def _cell(plan: RackPlan, cell: Cell, explained: bool) -> CellView:
    predicted = cell.predicted.decision
    platform = platform_for(plan, None, cell.requester.node)
    return CellView(
        cell.requester.name,
        cell.target.name,
        cell.predicted.word,
        (
            Entry("predicted", str(predicted), _HEAT_OF_KIND[predicted.kind]),
            _kernel(cell),
            _measured(cell),
        ),
        tuple(explanation(plan, cell, platform)) if explained else (),
        bool(cell.disagreements),
    )


def _kernel(cell: Cell) -> Entry:
    if isinstance(cell.kernel, Unknown):
        return Entry("kernel", "unknown", "unknown", cell.kernel.why)
    wrong = "; ".join(cell.kernel_disagreements)
    return Entry("kernel", str(cell.kernel), _HEAT_OF_KIND[cell.kernel.kind], wrong)


def _measured(cell: Cell) -> Entry:
    if isinstance(cell.measured, Unknown):
        heat = "lost" if " ended " in cell.measured.why else "unknown"
        return Entry("measured", "failed" if heat == "lost" else "unknown", heat, cell.measured.why)
    wrong = "; ".join(cell.measured_disagreements)
    return Entry("measured", str(cell.measured), _HEAT_OF_ARRIVAL[cell.measured.best], wrong)
