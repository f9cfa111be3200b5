# SPDX-License-Identifier: Apache-2.0
"""From a whole machine to what a question is about: devices are chosen, empty bridges go.

Names are given before anything is folded, so that a device has the same name whatever is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from testbed.errors import Diagnostic, InputError
from testbed.topology.importers import DEFAULT_MOST
from testbed.topology.importers.machine import (
    DEVICES,
    Acs,
    Kind,
    Machine,
    Notes,
    Part,
    counted,
    parse_address,
)
from testbed.topology.problem import nearest

DEFAULT_KEEP = (Kind.GPU, Kind.NIC, Kind.NVME)
_PREFIXES = {Kind.GPU: "gpu", Kind.NIC: "nic", Kind.NVME: "nvme", Kind.OTHER: "dev"}
_NOUNS = {
    Kind.GPU: "GPU",
    Kind.NIC: "NIC",
    Kind.NVME: "NVMe disk",
    Kind.OTHER: "other device",
}


@dataclass(frozen=True)
class Choice:
    """What to keep.

    ``keep``    kinds, the most important first.
    ``most``    how many devices.
    ``around``  places to stay near: addresses, the file's labels, or new names.
    ``kinds``   what devices are, said by the user.
    """

    keep: tuple[Kind, ...] = DEFAULT_KEEP
    most: int = DEFAULT_MOST
    around: tuple[str, ...] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)


def retyped(machine: Machine, kinds: Mapping[str, Kind]) -> Machine:
    """The machine with the kinds that the user gave; InputError for an origin it has not."""
    wanted = {_origin(word): kind for word, kind in kinds.items()}
    known = {device.origin for device in machine.devices()}
    _refuse_unknown("--as", [w for w in kinds if _origin(w) not in known], known)

    def change(part: Part) -> Part:
        kind = wanted.get(part.origin, part.kind) if part.kind in DEVICES else part.kind
        return replace(part, kind=kind, below=tuple(map(change, part.below)))

    return replace(machine, roots=tuple(map(change, machine.roots)))


def names(machine: Machine) -> dict[str, str]:
    """The name of each device by its origin: gpu0, gpu1 ... in order of address."""
    found: dict[str, str] = {}
    devices = list(machine.devices())
    for kind, prefix in _PREFIXES.items():
        ranked = sorted((d for d in devices if d.kind is kind), key=lambda d: d.rank)
        found |= {device.origin: f"{prefix}{number}" for number, device in enumerate(ranked)}
    return found


def candidates(machine: Machine, choice: Choice, given: Mapping[str, str]) -> list[Part]:
    """The devices to keep, the most important first. InputError for a place that is not there."""
    near = _near(machine, choice.around, given) if choice.around else None
    order = {kind: number for number, kind in enumerate(choice.keep)}
    named = {_origin(word) for word in choice.around}
    named |= {origin for origin, name in given.items() if name in choice.around}
    kept = [
        device
        for device in machine.devices()
        if (device.kind in order or device.origin in named)
        and (near is None or device.origin in near)
    ]
    return sorted(kept, key=lambda d: (d.origin not in named, order.get(d.kind, 0), d.rank))


def _near(machine: Machine, around: Sequence[str], given: Mapping[str, str]) -> set[str]:
    """The devices below the same root ports as the places named."""
    by_name = {name: origin for origin, name in given.items()}
    wanted = {by_name.get(word, _origin(word)): word for word in around}
    near: set[str] = set()
    met: set[str] = set()
    for root in machine.roots:
        here = _origins(root)
        if here & wanted.keys():
            met |= here
            near |= {device.origin for device in root.devices()}
    known = {*by_name, *given}
    _refuse_unknown("--around", [w for origin, w in wanted.items() if origin not in met], known)
    return near


def _origins(part: Part) -> set[str]:
    return {part.origin}.union(*(_origins(below) for below in part.below))


def _origin(word: str) -> str:
    """An address in full, as parts have it; other words as they are."""
    address = parse_address(word)
    return word if address is None else str(address)


def _refuse_unknown(option: str, words: Sequence[str], known: Collection[str]) -> None:
    if words:
        raise InputError(
            diagnostics=[
                Diagnostic(f"{option} {word}", 0, 0, "the file has no such device", nearest=close)
                for word, close in ((word, nearest(word, known)) for word in words)
            ]
        )


def fold(machine: Machine, kept: Collection[str]) -> tuple[Part, ...]:
    """The roots with the devices of these origins only, and no bridge without a device."""
    pruned = (_pruned(root, kept) for root in machine.roots)
    return tuple(_settled(root) for root in pruned if root is not None)


def _pruned(part: Part, kept: Collection[str]) -> Part | None:
    if part.kind in DEVICES:
        return part if part.origin in kept else None
    below = tuple(p for p in (_pruned(each, kept) for each in part.below) if p is not None)
    return replace(part, below=below) if below else None


def _settled(part: Part) -> Part:
    """As a topology has it: below a root port one entry, below a switch no ports but entries."""
    if part.kind in DEVICES:
        return part
    if part.kind is Kind.SWITCH:
        ports = [each for each in part.below if each.kind is Kind.PORT]
        below = tuple(_entry(p) if p.kind is Kind.PORT else _settled(p) for p in part.below)
        return replace(part, acs=_acs_of(ports), below=below)
    return replace(part, below=(_entry(part),))


def _entry(port: Part) -> Part:
    """What stands at the end of a port's link; a switch for a bus that several share."""
    below = tuple(map(_settled, port.below))
    if len(below) == 1:
        return below[0]
    return Part(Kind.SWITCH, f"bus below {port.origin}", port.rank, acs=Acs.NONE, below=below)


def _acs_of(ports: Sequence[Part]) -> Acs:
    """A switch's ACS from its ports': redirecting if any of them redirects."""
    found = {port.acs for port in ports} or {Acs.UNKNOWN}
    return next(acs for acs in Acs if acs in found)


def say_folded(
    machine: Machine, chosen: Sequence[Part], kept: Collection[str], most: int, notes: Notes
) -> None:
    """Add to the notes what the rack has not: ``chosen``, the most important first, is asked for.

    Of these only the first ``most`` were tried, and ``kept`` had room.
    """
    wanted = {device.origin: number for number, device in enumerate(chosen)}
    for kind in DEVICES:
        here = [d for d in machine.devices() if d.kind is kind]
        asked = [d for d in here if d.origin in wanted]
        if len(here) > len(asked):
            count = counted(len(here) - len(asked), _NOUNS[kind])
            notes.folded.append(f"{count} not asked for (--keep, --around)")
        beyond = [d for d in asked if wanted[d.origin] >= most]
        if beyond:
            count = counted(len(beyond), _NOUNS[kind])
            notes.folded.append(f"{count} beyond {most} devices (--most), first {beyond[0].origin}")
        lost = [d for d in asked if d.origin not in kept and wanted[d.origin] < most]
        if lost:
            count = counted(len(lost), _NOUNS[kind])
            notes.folded.append(f"{count} for which there is no room, first {lost[0].origin}")
    if not kept and any(machine.devices()):
        notes.folded.append("everything; --keep other keeps what is neither GPU, NIC nor disk")
    bridges = sum(map(_bridges, machine.roots))
    left = sum(_bridges(p) for p in (_pruned(r, kept) for r in machine.roots) if p is not None)
    if bridges > left:
        notes.folded.append(f"{counted(bridges - left, 'bridge')} with nothing kept below")


def say_mixed(machine: Machine, kept: Collection[str], notes: Notes) -> None:
    """Add to the notes the switches whose ports do not agree about ACS."""
    stack = [p for p in (_pruned(root, kept) for root in machine.roots) if p is not None]
    while stack:
        part = stack.pop()
        stack.extend(part.below)
        found = {p.acs for p in part.below if p.kind is Kind.PORT}
        if part.kind is Kind.SWITCH and Acs.REDIRECT in found and len(found) > 1:
            notes.changed.append(
                f"some ports of the switch {part.origin} redirect and some do not: here all do"
            )


def _bridges(part: Part) -> int:
    return (part.kind not in DEVICES) + sum(map(_bridges, part.below))
