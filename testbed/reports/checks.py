# SPDX-License-Identifier: Apache-2.0
"""What a single step cannot show: names that nothing has, steps of another kind, closed devices.

Everything here is known before anything boots, and found at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from testbed.reports.conditions import Condition, Faulted, MachineLost, NoFault
from testbed.reports.conditions import Path as PathCondition
from testbed.reports.model import Report
from testbed.reports.places import NoSuchPlace, fields_of_devices, find_functions, find_place
from testbed.reports.references import references
from testbed.reports.steps import (
    ANY,
    FAILURE,
    Acs,
    Buffer,
    Call,
    Checksum,
    Close,
    Config,
    Copy,
    Fill,
    Inject,
    Map,
    Open,
    P2pMem,
    Step,
    Transfer,
    Unplug,
    Write32,
)
from testbed.topology.plan import MODEL_KINDS, Function, RackPlan, Role
from testbed.topology.problem import DataPath, Problem, listing, nearest

BRIDGES = (Role.ROOT_PORT, Role.SWITCH_UPSTREAM, Role.SWITCH_DOWNSTREAM)


@dataclass
class _Known:
    """What is known when a step begins."""

    plan: RackPlan
    fields: dict[str, tuple[str, ...]]
    later: dict[str, int]  # the number of the step that will have a name
    kinds: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)  # name → node
    opened: dict[str, int] = field(default_factory=dict)  # node/device → its container


Functions = list[tuple[str, Function]]


@dataclass(frozen=True)
class _Need:
    """What the device of a step must have: one function that ``fits``."""

    attribute: str
    fits: Callable[[Function], object]
    lacks: str
    expected: str
    opened: bool = False


_NEEDS: Mapping[tuple[type[Step], ...], _Need] = {
    (Copy, Write32): _Need(
        "engine", lambda f: f.role is Role.ENGINE, "has no engine", "a GPU or a NIC", opened=True
    ),
    (P2pMem,): _Need(
        "provider",
        lambda f: f.options.get("cmb_bytes"),
        "has no controller memory",
        "an nvme with 'cmb:'",
    ),
    (Transfer,): _Need("client", lambda f: f.role is Role.NVME, "is no disk", "an nvme"),
    (Acs,): _Need(
        "port", lambda f: f.acs, "has no port with ACS", "a port or switch with 'acs: redirect'"
    ),
    (Inject,): _Need(
        "device",
        lambda f: f.kind in MODEL_KINDS,
        "is no model, and does nothing wrong on purpose",
        "engine: model",
    ),
    (Unplug,): _Need("device", lambda f: f.role not in BRIDGES, "is a port", "a device"),
    (Config,): _Need("device", lambda _: True, "", ""),
}


def problems(report: Report, plan: RackPlan, data: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Every fault of a report whose single values are right; ``data`` is what it was made of."""
    return tuple(_problems(report, plan, data))


def _problems(report: Report, plan: RackPlan, data: Mapping[str, Any]) -> Iterator[Problem]:
    devices = fields_of_devices(plan)
    later = {step.name: n for n, step in reversed(list(enumerate(report.steps, 1))) if step.name}
    known = _Known(plan, dict(devices), later)
    for index, step in enumerate(report.steps):
        path: DataPath = ("steps", index)
        number = index + 1
        yield from _unknown_references(data["steps"][index], path, known, number)
        yield from _wrong_steps(step, step.refers, path, known, number)
        yield from _wrong_places(step, path, known)
        for name in step.expect:
            if ANY not in step.results and name not in (*step.results, *FAILURE):
                fields = [*step.results, *FAILURE]
                message = f"step '{step.kind}' does not see '{name}'"
                yield Problem(
                    (*path, "expect", name), message, listing(fields), nearest(name, fields), True
                )
        if step.name is None:
            continue
        if step.name in devices:
            yield Problem((*path, "as"), f"'{step.name}' is a device of the rack", "another name")
        elif step.name in known.kinds:
            yield Problem((*path, "as"), f"an earlier step is called '{step.name}' already")
        known.kinds[step.name] = step.kind
        known.fields[step.name] = (*step.results, *FAILURE)
    for expectation in ("as_reported", "when_fixed"):
        conditions: Mapping[str, Condition] = getattr(report.expect, expectation)
        for name, condition in conditions.items():
            path = ("expect", expectation, name)
            found = data["expect"][expectation][name]
            yield from _unknown_references(found, path, known, 0)
            yield from _wrong_steps(condition, condition.refers, path, known, 0)
            yield from _wrong_condition(condition, report, path, known)


def _unknown_references(data: Any, path: DataPath, known: _Known, number: int) -> Iterator[Problem]:
    for place, text in _texts(data, path):
        for found in references(text):
            if found.wrong:
                expected = "${name.field} or ${name.field+NUMBER}; in a shell, $NAME"
                yield Problem(place, f"{found.text} is no reference", expected)
            elif found.name not in known.fields:
                yield _no_step(place, found.name, known, number)
            elif not _has(known.fields[found.name], found.field):
                fields = known.fields[found.name]
                message = f"'{found.name}' has no '{found.field}'"
                yield Problem(place, message, listing(fields), nearest(found.field, fields))


def _has(fields: Iterable[str], name: str) -> bool:
    return name in fields or ANY in fields


def _texts(data: Any, path: DataPath) -> Iterator[tuple[DataPath, str]]:
    """Every text below a place; what a word of JSON or YAML is made of."""
    if isinstance(data, str):
        yield path, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _texts(value, (*path, index))


def _no_step(place: DataPath, name: str, known: _Known, number: int) -> Problem:
    at = known.later.get(name)
    if at is not None and at == number:
        return Problem(place, f"'{name}' is this step itself", "an earlier step")
    if at is not None and at > number > 0:
        return Problem(place, f"'{name}' is step {at}, which comes later", "an earlier step")
    names = list(known.fields)
    return Problem(place, f"no step is called '{name}' (`as:`)", "", nearest(name, names))


def _wrong_steps(
    part: Step | Condition,
    refers: Mapping[str, tuple[str, ...]],
    path: DataPath,
    known: _Known,
    number: int,
) -> Iterator[Problem]:
    """Keys that name a step which is not there, or one of another kind."""
    for key, kinds in refers.items():
        word = getattr(part, _attribute(part, key))
        if word is None:
            continue
        expected = f"a step '{listing(kinds)}'"
        if word not in known.kinds:
            found = _no_step((*path, key), word, known, number)
            near = nearest(word, [n for n, kind in known.kinds.items() if kind in kinds])
            yield Problem(found.path, found.message, found.expected or expected, near)
        elif known.kinds[word] not in kinds:
            message = f"'{word}' is a step '{known.kinds[word]}'"
            yield Problem((*path, key), message, expected)


def _attribute(part: Step | Condition, key: str) -> str:
    return next(n for n, f in type(part).model_fields.items() if (f.alias or n) == key)


def _wrong_places(step: Step, path: DataPath, known: _Known) -> Iterator[Problem]:
    """Devices, memories and nodes that the rack does not have, or not in a state to be used."""
    for kinds, need in _NEEDS.items():
        if isinstance(step, kinds):
            yield from _needed(step, need, (*path, step.kind), known)
    if hasattr(step, "node"):
        yield from _node(step.node, (*path, "node"), known)
    match step:
        case Open():
            for index, word in enumerate(step.devices):
                yield from _open(word, (*path, "open", index), known)
        case Close():
            functions = yield from _functions(step.device, (*path, "close"), known)
            container = known.opened.get(_key(functions), None)
            yield from _is_open(functions, step.device, (*path, "close"), known)
            known.opened = {d: c for d, c in known.opened.items() if c != container}
        case Buffer():
            if step.buffer in known.fields or step.buffer in known.buffers:
                yield Problem((*path, "buffer"), f"the name '{step.buffer}' is taken", "another")
            known.buffers[step.buffer] = step.node or next(iter(known.plan.nodes))
        case Map() | Fill() | Checksum():
            yield from _memory(step, path, known)
        case Config():
            if step.offset % step.width:
                message = f"{step.offset:#x} is no multiple of 'width'"
                yield Problem((*path, "offset"), message, f"a multiple of {step.width}")


def _needed(step: Step, need: _Need, path: DataPath, known: _Known) -> Iterator[Problem]:
    word = getattr(step, need.attribute)
    functions = yield from _functions(word, path, known)
    if not functions:
        return
    if not any(need.fits(function) for _, function in functions):
        yield Problem(path, f"'{word}' {need.lacks}", need.expected)
    elif need.opened:
        yield from _is_open(functions, word, path, known)


def _functions(word: str, path: DataPath, known: _Known) -> Generator[Problem, None, Functions]:
    try:
        return find_functions(known.plan, word)
    except NoSuchPlace as error:
        yield Problem(path, error.message, error.expected, error.nearest)
        return []


def _open(word: str, where: DataPath, known: _Known) -> Iterator[Problem]:
    functions = yield from _functions(word, where, known)
    if not functions:
        return
    if functions[0][1].role in BRIDGES:
        yield Problem(where, f"'{word}' is a port", "a device")
    elif _key(functions) in known.opened:
        yield Problem(where, f"'{word}' is open already")
    known.opened[_key(functions)] = int(where[1])


def _key(functions: Functions) -> str:
    return f"{functions[0][0]}/{functions[0][1].device}" if functions else ""


def _is_open(functions: Functions, word: str, path: DataPath, known: _Known) -> Iterator[Problem]:
    if functions and _key(functions) not in known.opened:
        yield Problem(path, f"'{word}' is not open", f"a step 'open' with {word} before it")


def _memory(step: Map | Fill | Checksum, path: DataPath, known: _Known) -> Iterator[Problem]:
    where = (*path, step.kind)
    p2pmem = [name for name, kind in known.kinds.items() if kind == P2pMem.kind]
    try:
        place = find_place(known.plan, step.memory, known.buffers, p2pmem)
    except NoSuchPlace as error:
        yield Problem(where, error.message, error.expected, error.nearest)
        return
    if place.bar is not None and place.function is not None:
        functions = [(place.node, place.function)]
        whole_pages = not isinstance(step, Map) and not (step.offset | step.size_bytes) % 4096
        is_vram = place.function.role is Role.VRAM
        if not (is_vram and whole_pages):  # as the processor sees it, whoever drives the device
            yield from _is_open(functions, step.memory, where, known)
    if isinstance(step, Map):
        if place.is_disk or place.is_p2pmem:
            yield Problem(where, f"'{step.memory}' cannot be mapped", "a BAR or a buffer")
        if step.offset % 4096:
            yield Problem((*path, "offset"), f"{step.offset:#x} is not a page", "a multiple of 4K")
        if step.into is not None:
            functions = yield from _functions(step.into, (*path, "into"), known)
            yield from _is_open(functions, step.into, (*path, "into"), known)
        elif not known.opened:
            yield Problem(where, "no device is open", "a step 'open' before it")
    elif (place.is_disk or place.is_p2pmem) and (step.offset or step.size_bytes != 8192):
        message = f"of '{step.memory}' the first 8 KiB are used"
        yield Problem(where, message, "'size: 8K' and no 'offset'")


def _node(name: str, path: DataPath, known: _Known) -> Iterator[Problem]:
    nodes = list(known.plan.nodes)
    if name and name not in nodes:
        yield Problem(path, f"there is no node '{name}'", listing(nodes), nearest(name, nodes))
    elif not name and len(nodes) > 1:
        yield Problem(path[:-1], "which node? the rack has several", f"node: {listing(nodes)}")


def _wrong_condition(
    condition: Condition, report: Report, path: DataPath, known: _Known
) -> Iterator[Problem]:
    word = getattr(condition, "step", "")
    step = next((each for each in report.steps if each.name == word), None)
    if isinstance(condition, Faulted | NoFault) and isinstance(step, Call) and not step.watch:
        message = f"nobody watches for faults of '{word}'"
        yield Problem((*path, condition.kind), message, "'watch: true' in that step")
    if isinstance(condition, Faulted):
        yield from _functions(condition.requester, (*path, "by"), known)
    if isinstance(condition, PathCondition) and isinstance(step, Copy | Write32):
        functions = yield from _functions(step.engine, (*path, "path"), known)
        if functions and not any(f.kind in MODEL_KINDS for _, f in functions):
            message = f"'{step.engine}' keeps no count of its paths"
            yield Problem((*path, "path"), message, "engine: model")
    if isinstance(condition, MachineLost) and path[1] == "when_fixed":
        yield Problem((*path, "lost"), "a machine that dies is not fixed", at_key=True)
