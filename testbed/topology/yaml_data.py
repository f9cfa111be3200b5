# SPDX-License-Identifier: Apache-2.0
"""YAML to plain data, with the place of every key and value.

The YAML 1.2 core schema (10.3.2) with three limits: no tags; mapping keys are text; a plain ``1.5``
stays text unless asked for, so that the address ``02.1`` and the kernel ``6.12`` need no quotes. In
YAML 1.1 the word ``off`` would be false; here it is the IOMMU mode that it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from testbed.topology.problem import DataPath
from testbed.topology.source import Fault

# Bounds against input that is small and becomes large ("YAML bombs"), or nests without end.
MOST_VALUES = 50_000
MOST_LEVELS = 100

# libyaml's parser is ten times as fast; where it refuses, the other one words the error.
_FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INTEGER = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,40}|[0-9]{1,40}(\.[0-9]{0,40})?)([eE][-+]?[0-9]{1,3})?")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Place:
    """Where a value stands, and the key before it (the value itself for a list's entry)."""

    key: int
    value: int


@dataclass(frozen=True)
class Parsed:
    """Data with the place of each path in it; of no use if there are faults."""

    data: Any
    places: dict[DataPath, Place]
    faults: tuple[Fault, ...]


class _YamlFault(Exception):
    """A fault after which nothing more can be read."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def scalar(text: str, *, floats: bool = False) -> bool | int | float | str | None:
    """The value of an unquoted word."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if floats and _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse(text: str, *, floats: bool = False) -> Parsed:
    """One YAML document; all its faults if it is none."""
    try:
        root = _compose(text)
        builder = _Builder(floats)
        data = builder.build(root, (), root.index)
    except _YamlFault as error:
        return Parsed(None, {}, (error.fault,))
    return Parsed(data, builder.places, tuple(builder.faults))


@dataclass
class _Node:
    """A node of the document: ``items`` of a list, ``pairs`` of a mapping, or a scalar's text."""

    index: int
    text: str | None = None
    plain: bool = False
    items: list[_Node] | None = None
    pairs: list[tuple[_Node, _Node]] | None = None
    open: bool = field(default=False)


def _events(text: str) -> list[yaml.Event]:
    try:
        return list(yaml.parse(text, Loader=_FAST_LOADER))
    except yaml.YAMLError:
        try:
            return list(yaml.parse(text, Loader=yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            words = [part for part in (error.context, error.problem) if part]
            # What is never closed is shown where it opens.
            is_open = "end of stream" in (error.problem or "") and error.context_mark
            mark = error.context_mark if is_open else error.problem_mark
            index = mark.index if mark else 0
            raise _YamlFault(Fault(index, f"not YAML: {', '.join(words)}")) from None
        except yaml.YAMLError as error:
            raise _YamlFault(Fault(0, f"not YAML: {error}")) from None


def _compose(text: str) -> _Node:
    events = iter(_events(text))
    anchors: dict[str, _Node] = {}
    documents: list[_Node] = []
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            if documents:
                raise _YamlFault(Fault(_index(event), "a second document", "one"))
            documents.append(_node(event, events, anchors, 0))
    if not documents:
        raise _YamlFault(Fault(0, "there is nothing in it", expected="a topology"))
    return documents[0]


def _index(event: yaml.Event) -> int:
    return event.start_mark.index if event.start_mark else 0


def _node(
    event: yaml.Event, events: Iterator[yaml.Event], anchors: dict[str, _Node], level: int
) -> _Node:
    index = _index(event)
    if isinstance(event, yaml.AliasEvent):
        return _aliased(event, anchors)
    if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
        raise TypeError(f"{event} where a value should start")
    _check_level(index, level)
    if event.tag not in (None, "!"):
        raise _YamlFault(Fault(index, f"the tag '{event.tag}' is not allowed", "plain data"))
    node = _Node(index)
    if event.anchor:
        anchors[event.anchor] = node
    node.open = True
    if isinstance(event, yaml.ScalarEvent):
        node.text, node.plain = event.value, event.implicit[0]
    elif isinstance(event, yaml.SequenceStartEvent):
        node.items = []
        while not isinstance(child := next(events), yaml.SequenceEndEvent):
            node.items.append(_node(child, events, anchors, level + 1))
    else:
        node.pairs = []
        while not isinstance(child := next(events), yaml.MappingEndEvent):
            key = _node(child, events, anchors, level + 1)
            node.pairs.append((key, _node(next(events), events, anchors, level + 1)))
    node.open = False
    return node


def _check_level(index: int, level: int) -> None:
    if level > MOST_LEVELS:
        raise _YamlFault(Fault(index, "nested too deeply", f"at most {MOST_LEVELS} levels"))


def _aliased(event: yaml.AliasEvent, anchors: dict[str, _Node]) -> _Node:
    index, name = _index(event), event.anchor or ""
    node = anchors.get(name)
    if node is None:
        raise _YamlFault(Fault(index, f"there is no anchor '&{name}' before this alias"))
    if node.open:
        raise _YamlFault(Fault(index, f"the alias '*{name}' stands inside its own anchor"))
    return node


class _Builder:
    """Nodes to data; an aliased node is built again for each use, and counted each time."""

    def __init__(self, floats: bool) -> None:
        self.places: dict[DataPath, Place] = {}
        self.faults: list[Fault] = []
        self._floats = floats
        self._count = 0

    def build(self, node: _Node, path: DataPath, key_index: int) -> Any:
        """The data of a node; places and faults are collected on the way."""
        _check_level(node.index, len(path))  # aliases nest too
        self._count += 1
        if self._count > MOST_VALUES:
            message = f"more than {MOST_VALUES} values once its aliases are expanded"
            raise _YamlFault(Fault(node.index, message, "a topology of a size that can be built"))
        self.places[path] = Place(key_index, node.index)
        if node.items is not None:
            return [
                self.build(item, (*path, number), item.index)
                for number, item in enumerate(node.items)
            ]
        if node.pairs is not None:
            return self._mapping(node.pairs, path)
        text = node.text or ""
        return scalar(text, floats=self._floats) if node.plain else text

    def _mapping(self, pairs: list[tuple[_Node, _Node]], path: DataPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in pairs:
            if key.text is None:
                self.faults.append(Fault(key.index, "a key is a list or a mapping", "text"))
            elif key.text in data:
                self.faults.append(Fault(key.index, f"the key '{key.text}' stands here twice"))
            else:
                data[key.text] = self.build(value, (*path, key.text), key.index)
        return data
