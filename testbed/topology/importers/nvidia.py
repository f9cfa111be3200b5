# SPDX-License-Identifier: Apache-2.0
"""The matrix of ``nvidia-smi topo -m`` to a tree that gives the same matrix.

The letters (from the tool's own legend): PIX, at most one PCIe bridge between two devices; PXB,
several; PHB, a host bridge; NODE and SYS, several of those; NV#, so many NVLinks. A pair with
NVLinks does not show its PCIe path, but both have one to the NICs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from testbed.topology.importers.machine import Kind, Machine, Notes, Part, Wire, counted
from testbed.topology.importers.source import decode, plain
from testbed.topology.source import Fault, Source

MOST_DEVICES = 256
MOST_LINKS = 64
_CELL = re.compile(r"X|PIX|PXB|PHB|NODE|SYS|SOC|NV[0-9]{1,2}", re.ASCII)
_GPU = re.compile(r"GPU[0-9]{1,3}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,31}", re.ASCII)
_LEGEND = re.compile(r"\s+(NIC[0-9]{1,3}):\s+(\S{1,64})\s*", re.ASCII)
_FIRST_OF_OTHER_COLUMNS = ("CPU", "NUMA", "GPU")
_LEVELS = ("PIX", "PXB")


@dataclass
class _Matrix:
    source: Source
    labels: list[str]
    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    places: dict[tuple[str, str], int] = field(default_factory=dict)
    legend: dict[str, str] = field(default_factory=dict)


def read(name: str, content: bytes) -> Machine:
    """The machine in a file's bytes; InputError with the place of the first fault."""
    source = decode(name, content)
    matrix = _read_matrix(source)
    notes = Notes()
    _say_contradictions(matrix, notes)
    roots = tuple(_root(matrix, group) for group in _groups(matrix, matrix.labels, _LEVELS))
    notes.unknown.append(f"PCI addresses and root ports: {len(roots)} root ports made up")
    notes.unknown.append(
        "whether GPUs and NICs that share no switch are on one socket: the rack has one root bus"
    )
    wires = tuple(_wires(matrix))
    if wires:
        notes.unknown.append(
            "the PCIe paths between GPUs with NVLinks: made up from their paths to the NICs"
        )
    return Machine("nvidia-smi topo -m", roots, notes, wires)


def _read_matrix(source: Source) -> _Matrix:
    matrix: _Matrix | None = None
    index = 0
    for line in source.text.split("\n"):
        words = [(m.group(), index + m.start()) for m in re.finditer(r"\S+", line)]
        if matrix is None:
            matrix = _header(source, words)
        elif words and words[0][0] in matrix.labels:
            _row(matrix, words)
        else:
            legend = _LEGEND.fullmatch(line)
            if legend:
                matrix.legend[legend[1]] = legend[2]
        index += len(line) + 1
    if matrix is None:
        expected = "the output of `nvidia-smi topo -m`"
        raise source.error(Fault(0, "no line names the matrix's columns, GPU0 first", expected))
    for row in matrix.labels:
        if (row, row) not in matrix.cells:
            message = f"the matrix ends without a row for {row}"
            raise source.error(Fault(len(source.text), message))
    _check_symmetry(matrix)
    return matrix


def _header(source: Source, words: list[tuple[str, int]]) -> _Matrix | None:
    """The names of the columns, up to those that are about processors."""
    if not words or not _GPU.fullmatch(words[0][0]):
        return None
    labels: list[str] = []
    for word, index in words:
        if word in _FIRST_OF_OTHER_COLUMNS:
            break
        if _LABEL.fullmatch(word) is None or word in labels:
            raise source.error(Fault(index, f"'{plain(word)}' cannot name a column here"))
        labels.append(word)
        if len(labels) > MOST_DEVICES:
            raise source.error(Fault(index, f"more than {MOST_DEVICES} columns"))
    return _Matrix(source, labels)


def _row(matrix: _Matrix, words: list[tuple[str, int]]) -> None:
    row, start = words[0]
    if (row, row) in matrix.cells:
        raise matrix.source.error(Fault(start, f"a second row for {row}"))
    for number, column in enumerate(matrix.labels, 1):
        if number >= len(words):
            message = f"the row of {row} ends before its column {column}"
            raise matrix.source.error(Fault(words[-1][1], message, f"{len(matrix.labels)} cells"))
        cell, index = words[number]
        if _CELL.fullmatch(cell) is None or (cell == "X") != (row == column):
            message = f"'{plain(cell)}' for {row} and {column}"
            expected = "X" if row == column else "PIX, PXB, PHB, NODE, SYS or NV#"
            raise matrix.source.error(Fault(index, message, expected))
        if cell.startswith("NV") and not 1 <= int(cell[2:]) <= MOST_LINKS:
            fault = Fault(index, f"{cell} is no number of links", f"1 to {MOST_LINKS}")
            raise matrix.source.error(fault)
        matrix.cells[row, column] = cell
        matrix.places[row, column] = index


def _check_symmetry(matrix: _Matrix) -> None:
    for (row, column), cell in matrix.cells.items():
        other = matrix.cells[column, row]
        if cell != other:
            message = f"{row} to {column} is {cell}, and {column} to {row} is {other}"
            fault = Fault(matrix.places[row, column], message, "a symmetric matrix")
            raise matrix.source.error(fault)


def _groups(matrix: _Matrix, labels: list[str], levels: Iterable[str]) -> list[list[str]]:
    """The devices that pairs at one of these levels hold together, in the matrix's order."""
    wanted = set(levels)
    groups: list[list[str]] = []
    for label in labels:
        near = [g for g in groups if any(matrix.cells[label, other] in wanted for other in g)]
        merged = [other for group in near for other in group] + [label]
        groups = [group for group in groups if group not in near]
        groups.append(sorted(merged, key=labels.index))
    return sorted(groups, key=lambda group: labels.index(group[0]))


def _root(matrix: _Matrix, group: list[str]) -> Part:
    """A root port for a group: one device, a switch, or a switch above switches."""
    switches = _groups(matrix, group, ("PIX",))
    single = [labels for labels in switches if len(labels) == 1]
    below: Part
    if len(group) == 1:
        below = _device(matrix, group[0])
    elif len(switches) == 1:
        below = _switch(matrix, group)
    else:
        # Devices that are several bridges apart have at most one of them at the upper switch.
        parts = [
            _device(matrix, labels[0]) if single == [labels] else _switch(matrix, labels)
            for labels in switches
        ]
        below = Part(Kind.SWITCH, f"above {group[0]}", below=tuple(parts))
    return Part(Kind.ROOT_PORT, f"above {group[0]}", below=(below,))


def _switch(matrix: _Matrix, labels: list[str]) -> Part:
    parts = tuple(_device(matrix, label) for label in labels)
    words = "for" if len(labels) == 1 else "shared by"
    return Part(Kind.SWITCH, f"{words} {' '.join(labels[:4])}", below=parts)


def _device(matrix: _Matrix, label: str) -> Part:
    kind = Kind.GPU if _GPU.fullmatch(label) else Kind.NIC
    return Part(kind, label, (matrix.labels.index(label),), plain(matrix.legend.get(label, "")))


def _wires(matrix: _Matrix) -> Iterable[Wire]:
    for (row, column), cell in matrix.cells.items():
        if cell.startswith("NV") and matrix.labels.index(row) < matrix.labels.index(column):
            yield Wire("nvlink", (row, column), int(cell[2:]))


def _say_contradictions(matrix: _Matrix, notes: Notes) -> None:
    """Pairs that the matrix holds apart though others hold them together."""
    found: list[str] = []
    for levels in (_LEVELS[:1], _LEVELS):
        for group in _groups(matrix, matrix.labels, levels):
            found += [
                f"{a} and {b}"
                for a, b in itertools.combinations(group, 2)
                if matrix.cells[a, b] not in levels and not matrix.cells[a, b].startswith("NV")
            ]
    if found:
        notes.changed.append(
            f"{counted(len(set(found)), 'pair')} further apart in the file than here ({found[0]}): "
            "each shares a switch with a third device"
        )
