# SPDX-License-Identifier: Apache-2.0
"""A rack as a picture: which boxes, where they stand, what joins them. Pure; no drawing yet.

The PCI tree of each machine grows from left to right, one leaf a row, so that a rack of any size
stays readable by scrolling down; a bridge stands beside the middle of what is below it. Private
links are brackets to the right of the GPUs. The layout of a tree takes these few lines; Graphviz,
which could do it, is a system package that a machine may not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from testbed.topology.drawing import endpoint
from testbed.topology.model import Node
from testbed.topology.oracle import iommu_groups
from testbed.topology.peers import LINK_WORDS
from testbed.topology.plan import Function, NodePlan, RackPlan, Role

# All lengths in pixels at 100 %.
MARGIN = 24.0
TITLE_HEIGHT = 34.0
NODE_TITLE_HEIGHT = 30.0
ROW_HEIGHT = 52.0
BOX_HEIGHT = 36.0
COLUMN_GAP = 34.0
GROUP_PADDING = 7.0
NODE_GAP = 26.0
CHARACTER = 7.3  # of a monospace font of 12 pixels
BOX_PADDING = 10.0
LINK_GAP = 15.0  # between the uprights of two links

LEGEND = (
    "g#: IOMMU group, in order of address (the kernel's own numbers differ); "
    "ACS: this port can redirect peers' requests"
)
LEGEND_HEIGHT = 30.0

_KINDS = {
    Role.ROOT_PORT: "port",
    Role.SWITCH_UPSTREAM: "switch",
    Role.VRAM: "gpu",
    Role.NVME: "nvme",
    Role.PASSTHROUGH: "other",
    Role.DEVICE: "other",
    Role.NETWORK: "other",
    Role.IOMMU: "other",
}


@dataclass(frozen=True)
class Rect:
    """A rectangle; ``x`` and ``y`` are its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    @property
    def middle(self) -> float:
        """Of its height."""
        return self.y + self.height / 2

    def overlaps(self, other: Rect) -> bool:
        """Whether they share more than an edge."""
        return (
            self.x < other.right
            and other.x < self.right
            and self.y < other.bottom
            and other.y < self.bottom
        )

    def contains(self, other: Rect) -> bool:
        """Whether the other lies wholly in it."""
        return (
            self.x <= other.x
            and other.right <= self.right
            and self.y <= other.y
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Box:
    """A device, a port or a switch.

    ``kind``   what it is drawn as: root, port, switch, gpu, nic, nvme, other.
    ``parent`` the ``key`` of the box that it hangs on, or "".
    ``group``  the number of its IOMMU group in order of address, or 0 if it is in none.
    """

    key: str
    kind: str
    rect: Rect
    name: str
    detail: str
    tip: str
    parent: str = ""
    group: int = 0
    acs: bool = False


@dataclass(frozen=True)
class Group:
    """An IOMMU group of several boxes, and the room behind them."""

    number: int
    rect: Rect


@dataclass(frozen=True)
class Arc:
    """A private link: a bracket to the right, ``x`` being where its upright stands.

    ``one`` is the upper end.
    """

    one: str
    other: str
    kind: str
    label: str
    x: float


@dataclass(frozen=True)
class Machine:
    """One node: its title and the room that it takes."""

    name: str
    detail: str
    rect: Rect


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn, and how large the whole is."""

    title: str
    description: str
    width: float
    height: float
    machines: tuple[Machine, ...]
    groups: tuple[Group, ...]
    boxes: tuple[Box, ...]
    arcs: tuple[Arc, ...]

    def box(self, key: str) -> Box:
        """The box of that key; KeyError if there is none."""
        for box in self.boxes:
            if box.key == key:
                return box
        raise KeyError(key)


def layout(plan: RackPlan) -> Picture:
    """The rack's picture; the same plan always gives the same."""
    topology = plan.topology
    boxes: list[Box] = []
    groups: list[Group] = []
    machines: list[Machine] = []
    y = MARGIN + TITLE_HEIGHT
    for name, node in plan.nodes.items():
        spec = topology.nodes[name]
        tree = _Tree.of(node, spec)
        placed = tree.place(MARGIN + BOX_PADDING, y + NODE_TITLE_HEIGHT)
        right = max(box.rect.right for box in placed) + 2 * GROUP_PADDING
        bottom = max(box.rect.bottom for box in placed) + 2 * GROUP_PADDING
        detail = _node_detail(spec)
        right = max(right, MARGIN + BOX_PADDING * 2 + CHARACTER * len(f"{name}  {detail}"))
        machines.append(Machine(name, detail, Rect(MARGIN, y, right - MARGIN, bottom - y)))
        groups += _groups(placed)
        boxes += placed
        y = bottom + NODE_GAP
    right = max(machine.rect.right for machine in machines)
    arcs = tuple(_arcs(plan, boxes, right))
    if arcs:
        right = max(arc.x for arc in arcs) + LINK_GAP
    title = f"rack {topology.rack}"
    widest = max(len(title) * 1.4, len(topology.description), len(LEGEND)) * CHARACTER
    width = max(right, MARGIN + widest) + MARGIN
    return Picture(
        title,
        topology.description,
        width,
        y - NODE_GAP + LEGEND_HEIGHT + MARGIN,
        tuple(machines),
        tuple(groups),
        tuple(boxes),
        arcs,
    )


def _node_detail(spec: Node) -> str:
    iommu = spec.iommu
    words = "no IOMMU" if iommu.kind == "none" else f"{iommu.kind} IOMMU, {iommu.mode}"
    return f"cpu {spec.machine.cpu}, {words}"


@dataclass(frozen=True)
class _Item:
    """What becomes one box: the functions of a port, of a switch's upper side, or of a device."""

    functions: tuple[Function, ...]

    @property
    def first(self) -> Function:
        return self.functions[0]


@dataclass(frozen=True)
class _Tree:
    """One machine's items by the bridge above them, and its IOMMU groups by address."""

    node: NodePlan
    below: Mapping[str, Sequence[_Item]]
    groups: Mapping[str, int]

    @classmethod
    def of(cls, node: NodePlan, spec: Node) -> _Tree:
        grouped = iommu_groups(node, spec)
        numbers = {bdf: number for number, group in enumerate(grouped, 1) for bdf in group}
        slots: dict[tuple[str, int, str], list[Function]] = {}
        for function in node.functions:
            alone = function.name if function.secondary_bus else function.device
            slots.setdefault((function.parent, function.slot, alone), []).append(function)
        below: dict[str, list[_Item]] = {}
        for (parent, _, _), functions in sorted(slots.items(), key=lambda slot: slot[0][1]):
            below.setdefault(parent, []).append(_Item(tuple(functions)))
        return cls(node, below, numbers)

    def place(self, x: float, y: float) -> list[Box]:
        """Boxes from the root complex on, parents before children."""
        root = self._key("")
        title, detail = "root complex", "bus 00"
        width = _box_width(title, detail)
        below, _ = self._place_below("", root, x + width + COLUMN_GAP, y)
        middle = _middle(below, root) if below else y + ROW_HEIGHT / 2
        rect = Rect(x, middle - BOX_HEIGHT / 2, width, BOX_HEIGHT)
        return [Box(root, "root", rect, title, detail, f"{self.node.name}: {title}"), *below]

    def _place_below(
        self, parent: str, parent_key: str, x: float, y: float
    ) -> tuple[list[Box], float]:
        """Everything below one bridge, and the first free height under it."""
        placed: list[Box] = []
        items = self.below.get(parent, ())
        widths = [_box_width(*self._texts(item)) for item in items]
        for item in items:
            first = item.first
            key = self._key(first.name if first.secondary_bus else first.device)
            below: list[Box] = []
            end = y + ROW_HEIGHT
            if first.secondary_bus and self.below.get(first.qemu_id):
                column = x + max(widths) + COLUMN_GAP
                below, end = self._place_below(first.qemu_id, key, column, y)
            middle = _middle(below, key) if below else y + ROW_HEIGHT / 2
            name, detail = self._texts(item)
            rect = Rect(x, middle - BOX_HEIGHT / 2, max(widths), BOX_HEIGHT)
            placed.append(
                Box(
                    key,
                    _kind(item),
                    rect,
                    name,
                    detail,
                    _tip(item, self.groups.get(first.bdf, 0)),
                    parent_key,
                    self.groups.get(first.bdf, 0),
                    first.acs,
                )
            )
            placed += below
            y = end
        return placed, y

    def _key(self, name: str) -> str:
        return f"{self.node.name}/{name}"

    def _texts(self, item: _Item) -> tuple[str, str]:
        name, detail = self._plain_texts(item)
        group = self.groups.get(item.first.bdf, 0)
        return name, f"{detail} g{group}" if group else detail

    @staticmethod
    def _plain_texts(item: _Item) -> tuple[str, str]:
        first = item.first
        address = first.bdf.removeprefix("0000:")
        if first.secondary_bus:
            name = first.name
            if first.role is Role.SWITCH_DOWNSTREAM:
                name = name.removeprefix(f"{first.device}.")
            return name, f"{address}{' ACS' if first.acs else ''}"
        address = address if len(item.functions) == 1 else address[:-2]
        return first.device, f"{address} {endpoint(first)}".rstrip()


def _middle(below: Sequence[Box], parent: str) -> float:
    children = [box.rect.middle for box in below if box.parent == parent]
    return (children[0] + children[-1]) / 2


def _box_width(name: str, detail: str) -> float:
    return max(len(name), len(detail)) * CHARACTER + 2 * BOX_PADDING


def _kind(item: _Item) -> str:
    first = item.first
    if first.role is Role.SWITCH_DOWNSTREAM:
        return "port"
    if any(function.role is Role.VRAM for function in item.functions):
        return "gpu"
    return "nic" if first.role is Role.ENGINE else _KINDS.get(first.role, "other")


def _tip(item: _Item, group: int) -> str:
    lines = [f"{f.bdf} {f.name} ({f.kind})" for f in item.functions]
    first = item.first
    if first.secondary_bus:
        lines.append(f"leads to bus {first.secondary_bus:02x}")
        lines.append("has ACS" if first.acs else "has no ACS")
    return "\n".join([*lines, *([f"IOMMU group {group}"] if group else [])])


def _groups(boxes: Sequence[Box]) -> Iterator[Group]:
    """A group of several boxes is a part of the tree, or neighbours on the root bus."""
    members: dict[int, list[Box]] = {}
    for box in boxes:
        if box.group:
            members.setdefault(box.group, []).append(box)
    for number, together in members.items():
        if len(together) > 1:
            x = min(box.rect.x for box in together) - GROUP_PADDING
            y = min(box.rect.y for box in together) - GROUP_PADDING
            right = max(box.rect.right for box in together) + GROUP_PADDING
            bottom = max(box.rect.bottom for box in together) + GROUP_PADDING
            yield Group(number, Rect(x, y, right - x, bottom - y))


def _arcs(plan: RackPlan, boxes: Sequence[Box], right: float) -> Iterator[Arc]:
    """Short links stand inside, so that they cross as seldom as they can."""
    where = {box.key: box for box in boxes}
    spans = []
    for position, link in enumerate(plan.topology.links):
        one, other = sorted(link.between, key=lambda end: where[end].rect.y)
        span = where[other].rect.y - where[one].rect.y
        label = f"{LINK_WORDS[link.kind]}{link.width}"
        spans.append((span, position, Arc(one, other, link.kind, label, 0.0)))
    for lane, (_, _, arc) in enumerate(sorted(spans, key=lambda each: each[:2]), 1):
        yield replace(arc, x=right + LINK_GAP * lane)
