# SPDX-License-Identifier: Apache-2.0
"""The words of a report for what stands in a rack: devices, and memories to read and write. Pure.

``gpu0`` or ``host0/gpu0`` is a device. ``gpu0.vram`` (or just ``gpu0``), ``gpu0.registers`` and
``nvme0.cmb`` are memories; so are a disk's contents (``nvme0``), a buffer and what a step `p2pmem`
allocated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from testbed.instruments.bench import DOORBELL_BAR
from testbed.instruments.memory import VRAM_BAR
from testbed.topology.plan import Function, RackPlan, Role
from testbed.topology.problem import listing, nearest

CMB_BAR = 2  # QEMU hw/nvme/nvme.h: NVME_CMB_BIR
_INTERNAL = (Role.NETWORK, Role.IOMMU)
_DMA_FIRST = (Role.ENGINE, Role.DEVICE, Role.NVME, Role.PASSTHROUGH)


class NoSuchPlace(Exception):
    """A word means nothing here; with what could have been meant."""

    def __init__(self, message: str, expected: str = "", near: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.nearest = near


@dataclass(frozen=True)
class PlaceFound:
    """A memory: of a ``function`` (its ``bar``, or the disk's contents), or known by ``name``."""

    node: str
    name: str
    function: Function | None = None
    bar: int | None = None
    is_p2pmem: bool = False

    @property
    def is_disk(self) -> bool:
        """The contents of a disk."""
        return self.function is not None and self.bar is None


def find_functions(plan: RackPlan, word: str) -> list[tuple[str, Function]]:
    """A device's functions, each with its node; the one that does DMA first.

    :raises NoSuchPlace: there is no such device, or several nodes have one.
    """
    node, _, name = word.rpartition("/")
    found = [
        (each.name, function)
        for each in plan.nodes.values()
        if node in ("", each.name)
        for function in each.of_device(name)
        if function.role not in _INTERNAL
    ]
    nodes = {each for each, _ in found}
    if len(nodes) > 1:
        words = [f"{each}/{name}" for each in sorted(nodes)]
        raise NoSuchPlace(f"'{name}' is in several nodes", listing(words))
    if not found:
        names = device_names(plan)
        raise NoSuchPlace(f"the rack has no device '{word}'", listing(names), nearest(word, names))
    return sorted(found, key=lambda each: each[1].role not in _DMA_FIRST)


def device_names(plan: RackPlan) -> list[str]:
    """Every device by its name; with its node's where names alone do not tell."""
    pairs = [
        (node.name, function.device)
        for node in plan.nodes.values()
        for function in node.functions
        if function.role not in _INTERNAL
    ]
    prefix = len(plan.nodes) > 1
    return list(dict.fromkeys(f"{node}/{name}" if prefix else name for node, name in pairs))


def fields_of_devices(plan: RackPlan) -> dict[str, tuple[str, ...]]:
    """What references may ask of a device: ``${gpu0.bdf}``, and the functions of its roles."""
    return {name: tuple(values) for name, values in values_of_devices(plan).items()}


def values_of_devices(plan: RackPlan) -> dict[str, dict[str, str]]:
    """The same with their values: addresses such as ``0000:01:00.1``.

    Devices whose name is in several nodes have none.
    """
    values: dict[str, dict[str, str]] = {}
    for word in device_names(plan):
        name = word.rpartition("/")[2]
        try:
            functions = [function for _, function in find_functions(plan, name)]
        except NoSuchPlace:
            continue
        values[name] = {"bdf": functions[0].bdf} | {str(f.role): f.bdf for f in functions}
    return values


def find_place(
    plan: RackPlan, word: str, buffers: Mapping[str, str], p2pmem: Collection[str]
) -> PlaceFound:
    """The memory that a word means; ``buffers`` name their nodes.

    :raises NoSuchPlace: none.
    """
    if word in p2pmem:
        return PlaceFound("", word, is_p2pmem=True)
    if word in buffers:
        return PlaceFound(buffers[word], word)
    name, _, part = word.partition(".")
    try:
        functions = find_functions(plan, name)
    except NoSuchPlace as error:
        names = [*_memories(plan), *buffers, *p2pmem]
        message = f"there is no memory '{word}'"
        raise NoSuchPlace(message, listing(names), nearest(word, names)) from error
    node = functions[0][0]
    roles = {function.role: function for _, function in functions}
    if Role.VRAM in roles and part in ("", "vram"):
        return PlaceFound(node, name, roles[Role.VRAM], VRAM_BAR)
    if Role.ENGINE in roles and part == "registers":
        doorbell = roles.get(Role.DOORBELL, roles[Role.ENGINE])
        return PlaceFound(node, name, doorbell, DOORBELL_BAR)
    if Role.NVME in roles and part == "":
        return PlaceFound(node, name, roles[Role.NVME])
    if Role.NVME in roles and part == "cmb" and roles[Role.NVME].options.get("cmb_bytes"):
        return PlaceFound(node, name, roles[Role.NVME], CMB_BAR)
    names = [each for each in _memories(plan) if each.partition(".")[0] == name]
    what = f"one of {listing(names)}" if names else "a GPU or a disk"
    raise NoSuchPlace(f"'{name}' has no memory '{part or name}'", what, nearest(word, names))


def _memories(plan: RackPlan) -> list[str]:
    names: list[str] = []
    for node in plan.nodes.values():
        for function in node.functions:
            if function.role is Role.VRAM:
                names += [f"{function.device}.vram", f"{function.device}.registers"]
            elif function.role is Role.NVME:
                cmb = [f"{function.device}.cmb"] if function.options.get("cmb_bytes") else []
                names += [function.device, *cmb]
    return names
