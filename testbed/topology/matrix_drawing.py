# SPDX-License-Identifier: Apache-2.0
"""The peer matrix as text for people, and everything behind one of its cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import zip_longest
from textwrap import wrap
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from testbed.topology.matrix import (
    Arrival,
    Cell,
    MapKind,
    Matrix,
    Measured,
    Platform,
    Prediction,
    Unknown,
)
from testbed.topology.oracle import FIRST_ZEN_FAMILY, MapType, Route, ingress_port, through_host
from testbed.topology.peers import LINK_NAMES, LINK_WORDS, Near, Peer, way_between
from testbed.topology.plan import Function, RackPlan
from testbed.topology.units import format_duration, format_rate

_Word = TypeVar("_Word", Near, MapKind, Arrival)

_NEAR_TEXTS = {
    Near.SELF: "the device itself",
    Near.ONE_SWITCH: "one PCIe switch between them",
    Near.SWITCHES: "several PCIe switches, no host bridge",
    Near.HOST_BRIDGE: "through the host bridge of their machine",
    Near.SYSTEM: "in two machines",
}
_KIND_TEXTS = {
    MapKind.BUS: "Linux gives out the peer's bus address; the number is the distance",
    MapKind.IOVA: "through the host bridge, translated by the IOMMU",
    MapKind.PHYSICAL: "through the host bridge, nothing translates",
    MapKind.NONE: "Linux refuses it (VFIO, which measures, asks no such rule)",
}
_ARRIVAL_TEXTS = {
    Arrival.PEER: "bytes sent to the raw bus address arrived, below the IOMMU",
    Arrival.IOMMU: "bytes arrived by an IOVA; the raw bus address was refused",
    Arrival.ROOT: "bytes arrived through the root complex, untranslated",
    Arrival.ARRIVED: "bytes arrived (this engine does not tell by which path)",
    Arrival.REFUSED: "bytes did not arrive: a fault, or the kernel's EINVAL",
    Arrival.ABSENT: "bytes did not arrive; nothing here tells whether they were refused",
    Arrival.LOST: "bytes did not arrive, and nobody refused them",
}
_DIFFERS_TEXT = (
    "Linux minds the ACS of every port on the way, hardware only that of the port of entry: it "
    "routes what Linux does not allow"
)
_LABEL_WIDTH = 8
_LABELS = ("", "predicted", "kernel", "measured")
DISAGREES, DIFFERS = "!", "~"
_PADDING = 2


def text(matrix: Matrix, width: int) -> str:
    """The matrix as tables of at most ``width`` characters, the legend, and what disagrees."""
    if len(matrix.peers) < 2:
        return "no two devices that could be peers"
    lines = ["peers: each row does DMA to the memory of each column", ""]
    for columns in _chunks(matrix, width):
        lines += [_table(matrix, columns, width), ""]
    for label, meaning in legend(matrix):
        wrapped = wrap(meaning, width - _LABEL_WIDTH - 3) or [""]
        for part, name in zip_longest(wrapped, [label], fillvalue=""):
            lines.append(f"  {name:<{_LABEL_WIDTH}} {part}")
    return "\n".join(lines)


def _chunks(matrix: Matrix, width: int) -> Iterator[Sequence[Peer]]:
    """As many columns as fit, as evenly as they can be shared out."""
    names = max(len(peer.name) for peer in matrix.peers) + _PADDING
    left = width - max(names, len("from")) - len("predicted") - 2 * _PADDING
    cells = [line for cell in matrix.cells.values() for line in _lines(matrix, cell)]
    one = max(map(len, (*cells, *(peer.name for peer in matrix.peers)))) + _PADDING
    most = max(1, left // one)
    count = -(-len(matrix.peers) // most)
    size = -(-len(matrix.peers) // count)
    for start in range(0, len(matrix.peers), size):
        yield matrix.peers[start : start + size]


def _table(matrix: Matrix, columns: Sequence[Peer], width: int) -> str:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_lines=False)
    table.add_column("from", no_wrap=True)
    table.add_column("to:", no_wrap=True)
    for peer in columns:
        table.add_column(peer.name, no_wrap=True)
    labels = [label for label, shown in zip(_LABELS, _shown(matrix), strict=True) if shown]
    for row in matrix.peers:
        cells = [
            str(Near.SELF)
            if column is row
            else "\n".join(_lines(matrix, matrix.cells[row.name, column.name]))
            for column in columns
        ]
        table.add_row(row.name, "\n".join(labels), *cells)
    file = StringIO()
    Console(file=file, width=max(width, 40), color_system=None, legacy_windows=False).print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def _shown(matrix: Matrix) -> tuple[bool, ...]:
    return True, True, matrix.has_kernel, matrix.has_measured


def _lines(matrix: Matrix, cell: Cell) -> list[str]:
    differs = DIFFERS if cell.notes else ""
    lines = [
        cell.predicted.word,
        f"{cell.predicted.decision}{differs}",
        f"{cell.kernel}{DISAGREES if cell.kernel_disagreements else ''}",
        f"{cell.measured}{DISAGREES if cell.measured_disagreements else ''}",
    ]
    return [line for line, shown in zip(lines, _shown(matrix), strict=True) if shown]


def legend(matrix: Matrix) -> Iterator[tuple[str, str]]:
    """Only what occurs."""
    cells = list(matrix.cells.values())
    words = [word for cell in cells for word in cell.predicted.word.split("+")]
    for kind, prefix in LINK_WORDS.items():
        if any(word.startswith(prefix) and word[len(prefix) :].isdigit() for word in words):
            yield f"{prefix}#", f"a private {LINK_NAMES[kind]} of # lanes or links"
    yield from _explained(_NEAR_TEXTS, [Near.SELF, *words])
    decisions = [each for c in cells for each in (c.predicted.decision, c.kernel)]
    yield from _explained(_KIND_TEXTS, [d.kind for d in decisions if not isinstance(d, Unknown)])
    yield from _explained(
        _ARRIVAL_TEXTS, [c.measured.best for c in cells if isinstance(c.measured, Measured)]
    )
    asked = [
        *((cell.kernel for cell in cells) if matrix.has_kernel else ()),
        *((cell.measured for cell in cells) if matrix.has_measured else ()),
    ]
    whys = dict.fromkeys(value.why for value in asked if isinstance(value, Unknown))
    yield from (("" if position else "-", why) for position, why in enumerate(whys))
    if any(cell.notes for cell in cells):
        yield DIFFERS, _DIFFERS_TEXT
    if any(cell.disagreements for cell in cells):
        yield DISAGREES, "DISAGREES, see below"
    yield from (("note", note) for note in matrix.notes)


def _explained(texts: Mapping[_Word, str], seen: Iterable[object]) -> Iterator[tuple[str, str]]:
    words = set(map(str, seen))
    yield from ((word, meaning) for word, meaning in texts.items() if word in words)


# --- one cell


def explanation(plan: RackPlan, cell: Cell, platform: Platform) -> list[str]:
    """Every fact behind one cell, one line each: label, then what is so."""
    return [f"{label:<12} {fact}" for label, fact in _facts(plan, cell, platform)]


def _facts(plan: RackPlan, cell: Cell, platform: Platform) -> Iterator[tuple[str, str]]:
    requester, target, predicted = cell.requester, cell.target, cell.predicted
    memory = target.provider or target.client
    yield "pair", f"{requester.client.name} ({requester.client.bdf}) does DMA to {_memory(target)}"
    yield "word", f"{predicted.word}: PCIe {predicted.near}, {_NEAR_TEXTS[predicted.near]}"
    yield "links", _links(plan, requester, target)
    if requester.node != target.node:
        yield "machines", "no PCIe joins them: only a link, or NICs on one wire"
        return
    node, spec = plan.nodes[requester.node], plan.topology.nodes[requester.node]
    tree = way_between(node, requester.client, memory)
    yield from (("way up" if not i else "", _step(s, platform)) for i, s in enumerate(tree.up))
    meets = tree.common.name if tree.common else "the root complex"
    yield "they meet", f"in {meets}"
    yield from (("way down" if not i else "", _step(s, platform)) for i, s in enumerate(tree.down))
    yield "distance", f"{tree.distance} (steps up and down, as Linux counts them)"
    yield "processor", _processor(spec.machine.cpu, platform)
    vendor, device = platform.host_bridge
    yield "host bridge", f"{vendor:04x}:{device:04x}; " + _trust(platform)
    yield "IOMMU", "none" if spec.iommu.kind == "none" else f"{spec.iommu.kind}, {spec.iommu.mode}"
    yield "Linux's rule", _rule(cell, platform)
    yield "hardware", _hardware(plan, cell, memory)
    yield "predicted", _predicted(predicted)
    if cell.now != predicted:
        yield "as set now", _predicted(cell.now)
    yield "kernel", _or_why(cell.kernel)
    yield (
        "measured",
        (
            ", ".join(f"{way} → {arrival}" for way, arrival in cell.measured.moves.items())
            if isinstance(cell.measured, Measured)
            else _or_why(cell.measured)
        ),
    )
    yield from (("note", note) for note in cell.notes)
    yield from (("DISAGREES", text) for text in cell.disagreements)


def _predicted(predicted: Prediction) -> str:
    moves = [f"{way} → {arrival}" for way, arrival in predicted.moves.items()]
    return "; ".join([str(predicted.decision), *moves])


def _memory(target: Peer) -> str:
    if target.provider is None:
        return f"{target.client.name} ({target.client.bdf}), which has no memory for peers"
    return f"{target.provider.name} ({target.provider.bdf})"


def _links(plan: RackPlan, one: Peer, other: Peer) -> str:
    ends = {f"{peer.node}/{peer.client.device}" for peer in (one, other)}
    found = []
    for link in plan.topology.links:
        if set(link.between) == ends:
            rate, delay = link.bandwidth_bytes_per_s, link.latency_ns
            pace = [format_rate(rate)] if rate else []
            pace += [format_duration(delay)] if delay else []
            found.append(", ".join([f"{LINK_NAMES[link.kind]} x{link.width}", *pace]))
    return "; ".join(found) or "none"


def _step(port: Function, platform: Platform) -> str:
    if not port.secondary_bus:
        return f"{port.bdf} {port.name}"
    redirects = port.bdf in platform.redirecting
    acs = "ACS redirects" if redirects else "ACS, redirects nothing" if port.acs else "no ACS"
    return f"{port.bdf} {port.name} ({acs})"


def _processor(name: str, platform: Platform) -> str:
    cpu = platform.cpu
    if cpu is None:
        return f"{name}: whatever the host has; taken for one that Linux does not trust"
    is_zen = cpu.vendor == "AuthenticAMD" and cpu.family >= FIRST_ZEN_FAMILY
    found = f", {cpu.vendor} family {cpu.family:#x}" if cpu.vendor else ""
    verdict = "of AMD's family 0x17 or later" if is_zen else "not of AMD's family 0x17 or later"
    return f"{name}{found}: {verdict}"


def _trust(platform: Platform) -> str:
    allowed = (
        platform.cpu is not None
        and through_host(platform.cpu, platform.host_bridge) is not MapType.NONE
    )
    return f"Linux {'lets' if allowed else 'does not let'} peers through it"


def _rule(cell: Cell, platform: Platform) -> str:
    decision = cell.predicted.decision
    if decision.kind is MapKind.BUS:
        return "a bridge in common, and no port on the way redirects: bus address"
    why = "no bridge in common"
    if cell.predicted.redirects:
        why = f"redirected by {', '.join(cell.predicted.redirects)}"
    return f"{why}, so through the host bridge: {_trust(platform)}: {decision.kind}"


def _hardware(plan: RackPlan, cell: Cell, memory: Function) -> str:
    port = ingress_port(plan.nodes[cell.requester.node], cell.requester.client, memory)
    if port is None:
        return "no switch in common: a raw bus address goes up to the root complex"
    entry = f"a request enters the common switch through {port.name}, which"
    if cell.predicted.route is Route.REDIRECTED:
        return f"{entry} redirects: it goes up to the root complex"
    routed = f"{entry} does not redirect: it is routed to the peer"
    if not cell.requester.routes:
        routed += " (QEMU sends its own devices' up all the same: docs/switch-router.md)"
    return routed


def _or_why(value: object) -> str:
    return f"- ({value.why})" if isinstance(value, Unknown) else str(value)
