# SPDX-License-Identifier: Apache-2.0
"""One file to one topology: read, choose, fit, write, and read back what was written.

What fits is decided by the loader and the placement themselves: a draft that they refuse is made
smaller, first the GPUs' memory, then the number of devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testbed.errors import Diagnostic, InputError
from testbed.topology import load
from testbed.topology.importers import fold, hwloc, lspci, nccl, nvidia, source, write
from testbed.topology.importers.machine import Acs, Kind, Machine, Notes, Part, counted
from testbed.topology.model import Topology
from testbed.topology.problem import listing, nearest
from testbed.topology.units import GIB, MIB

READERS: Mapping[str, Callable[[str, bytes], Machine]] = {
    "lspci": lspci.read,
    "nccl": nccl.read,
    "hwloc": hwloc.read,
    "nvidia": nvidia.read,
}
_MOST_HALVINGS = 48


@dataclass(frozen=True)
class Options:
    """How a file becomes a topology; ``vram_bytes`` None: as the file says."""

    choice: fold.Choice = field(default_factory=fold.Choice)
    vram_bytes: int | None = write.DEFAULT_VRAM_BYTES
    rack: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """The file's text, what it says once loaded, what to tell the user, and devices' origins."""

    text: str
    topology: Topology
    notes: Notes
    origins: Mapping[str, str]


def convert(form: str, path: str, options: Options) -> Imported:
    """The topology for the file at ``path`` (``-``: standard input), which has the format ``form``.

    InputError if the file is not of that format, or an option names what is not in it.
    """
    return convert_bytes(form, *source.read(path), options)


def convert_bytes(form: str, name: str, content: bytes, options: Options) -> Imported:
    """The topology for the bytes of a file called ``name``, as :func:`convert` makes it."""
    machine = fold.retyped(READERS[form](name, content), options.choice.kinds)
    given = fold.names(machine)
    devices = fold.candidates(machine, options.choice, given)
    rack = options.rack or _rack_name(name)
    most = options.choice.most
    draft, reason = _fit(machine, devices[:most], given, options, rack)
    kept = {device.origin for device in draft.devices()}
    _check_settings(options.settings, write.variables(draft))
    notes = machine.notes
    fold.say_folded(machine, devices, kept, most, notes)
    fold.say_mixed(machine, kept, notes)
    _say_links(machine, draft, notes)
    _say_settings(machine, draft, options, reason, notes)
    text = write.topology(draft, options.settings, _head(machine, name, notes))
    try:
        topology = load.load_text(text, f"{name}, imported", {})
    except InputError as error:
        # Without settings it was placed already: they are at fault, and not the file's line.
        wrong = [d._replace(file="-s", line=0, column=0) for d in error.diagnostics]
        raise InputError(diagnostics=sorted(set(wrong))) from None
    origins = {given[device.origin]: device.origin for device in draft.devices()}
    return Imported(text, topology, notes, origins)


def _rack_name(file: str) -> str:
    """A name that a rack can have, from the file's own."""
    words = re.sub("[^A-Za-z0-9_-]+", "-", Path(file).name.partition(".")[0]).strip("-")
    words = words if words[:1].isalpha() else f"imported-{words}".rstrip("-")
    return words[:32].rstrip("-")


def _fit(
    machine: Machine,
    devices: Sequence[Part],
    given: Mapping[str, str],
    options: Options,
    rack: str,
) -> tuple[write.Draft, str]:
    """The largest draft that can be placed, and why it is not all of it ("" if it is)."""

    def draft(count: int, shift: int) -> write.Draft:
        kept = {device.origin for device in devices[:count]}
        gpus = {device.origin for device in devices[:count] if device.kind is Kind.GPU}
        return write.Draft(
            rack=rack,
            description=f"imported from {machine.source}",
            roots=fold.fold(machine, kept),
            wires=tuple(w for w in machine.wires if gpus.issuperset(w.ends)),
            names=given,
            cpu="EPYC" if machine.peers_through_host else "max",
            vram_bytes=options.vram_bytes or write.DEFAULT_VRAM_BYTES,
            as_found=options.vram_bytes is None,
            vram_shift=shift,
        )

    whole = draft(len(devices), 0)
    reason = _refusal(whole)
    if not reason:
        return whole, ""
    # With the least memory: how many devices have room. None at all always has.
    fits, too_many = 0, len(devices) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _refusal(draft(middle, _MOST_HALVINGS)):
            too_many = middle
        else:
            fits = middle
    # With that many devices: how much memory. Mostly all of it.
    largest = draft(fits, 0)
    if not _refusal(largest):
        return largest, reason
    enough, too_little = _MOST_HALVINGS, 0
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        if _refusal(draft(fits, middle)):
            too_little = middle
        else:
            enough = middle
    return draft(fits, enough), reason


def _refusal(draft: write.Draft) -> str:
    """Why a draft is no topology, in the words of the loader; "" if it is one."""
    try:
        load.load_text(write.topology(draft, {}, ()), draft.rack, {})
    except InputError as error:
        return error.diagnostics[0].message if error.diagnostics else error.message
    return ""


def _check_settings(settings: Mapping[str, str], known: Mapping[str, write.Variable]) -> None:
    """InputError for settings that the file would not have, or that would not be one value."""
    wrong = [
        Diagnostic(
            f"-s {name}={value}",
            0,
            0,
            f"the imported topology has no variable '{name}'"
            if name not in known
            else f"'{source.plain(value)}' is no plain value",
            listing(known) if name not in known else "letters, digits, '.', '+', '_' and '-'",
            nearest(name, known) if name not in known else "",
        )
        for name, value in settings.items()
        if name not in known or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", value)
    ]
    if wrong:
        raise InputError(diagnostics=wrong)


def _say_links(machine: Machine, draft: write.Draft, notes: Notes) -> None:
    if len(machine.wires) > len(draft.wires):
        count = counted(len(machine.wires) - len(draft.wires), "link")
        notes.folded.append(f"{count} to GPUs that are not kept")


def _say_settings(
    machine: Machine, draft: write.Draft, options: Options, reason: str, notes: Notes
) -> None:
    known = write.variables(draft)
    values = {name: options.settings.get(name, default) for name, (default, _) in known.items()}
    for variable, kind, noun in (
        ("root_port_acs", Kind.ROOT_PORT, "root port"),
        ("switch_acs", Kind.SWITCH, "switch"),
    ):
        parts = [part for part in _of(draft, kind) if part.acs is Acs.UNKNOWN]
        if parts:
            notes.unknown.append(
                f"ACS of {counted(len(parts), noun)}: -s {variable}=redirect|none "
                f"(now {values[variable]})"
            )
    bridges = [*_of(draft, Kind.ROOT_PORT), *_of(draft, Kind.SWITCH)]
    turned_off = sum(part.acs is Acs.OFF for part in bridges)
    if turned_off:
        notes.changed.append(
            f"ACS of {counted(turned_off, 'root port or switch', 'root ports and switches')} is "
            "turned off in the file: none here; Linux turns it on where it uses the IOMMU"
        )
    if machine.peers_through_host is None:
        notes.unknown.append(
            "whether Linux lets peers meet in the host bridge: -s cpu=EPYC allows it, max does not "
            f"(now {values['cpu']})"
        )
    elif machine.peers_through_host:
        notes.changed.append(
            "Linux lets peers meet in this machine's host bridges, and in the rack's only with a "
            f"CPU of AMD's: -s cpu=max refuses it (now {values['cpu']})"
        )
    notes.unknown.append(
        "the IOMMU: -s iommu_kind=..., -s iommu_mode=... "
        f"(now {values['iommu_kind']}, {values['iommu_mode']})"
    )
    gpus = _of(draft, Kind.GPU)
    if "vram" in values:
        largest_bytes = max((gpu.memory_bytes for gpu in gpus), default=0)
        size, unit = (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")
        real = f"; in the file up to {largest_bytes / size:.3g} {unit}" if largest_bytes else ""
        notes.changed.append(f"each GPU has {values['vram']} of memory (-s vram=SIZE){real}")
    if reason:
        scaled = f"; memory divided by {1 << draft.vram_shift}" if draft.vram_shift else ""
        notes.changed.append(f"made smaller to fit one virtual machine: {reason}{scaled}")


def _of(draft: write.Draft, kind: Kind) -> list[Part]:
    return list(write.parts_of(draft.roots, kind))


def _head(machine: Machine, name: str, notes: Notes) -> list[str]:
    """The comments that open the file."""
    file = source.plain(Path(name).name)
    lines = [f"Imported from {machine.source}: {file}"]
    for title, sentences in (
        ("Not known from the file", notes.unknown),
        ("Not as in the file", notes.changed),
        ("Folded", notes.folded),
    ):
        if sentences:
            lines += ["", f"{title}:", *(f"  * {source.plain(s, 300)}" for s in sentences)]
    return lines
