# SPDX-License-Identifier: Apache-2.0
"""What a replay has otherwise than its bundle: machines before it, verdicts after it. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.errors import ExitCode
from testbed.reports.judge import Word
from testbed.reports.outcome import exit_code
from testbed.results.record import RunRecord
from testbed.results.verdicts import Verdict
from testbed.topology.problem import listing

_NOTHING = "not said"
_LONGEST = 120
_SHOWN_VALUES = 8
# What of a node has a name of its own.
_NAMES = {"iommu.kind": "IOMMU", "iommu.mode": "IOMMU", "machine.cpu": "CPU model"}
_RACK_FOLDER = re.compile(r"(\$RUNTIME/racks)/[^/]+/")
_BAD = (Verdict.FAIL, Verdict.LOST, Verdict.ERROR)


@dataclass(frozen=True)
class Difference:
    """``there`` is the bundle's, ``here`` the replay's."""

    what: str
    there: str
    here: str

    def __str__(self) -> str:
        return f"{self.what}: {self.there} there, {self.here} here"


@dataclass(frozen=True)
class Here:
    """What the replay runs on; ``topology`` as :func:`testbed.topology.model.to_data` has it."""

    tool_version: str
    versions: Mapping[str, Any]
    host: Mapping[str, Any]
    topology: Mapping[str, Any]


def environment(there: RunRecord, here: Here) -> tuple[Difference, ...]:
    """All that differs of testbed, QEMU, accelerator, kernels, packages, rack and host."""
    return tuple(_environment(there, here))


def _environment(there: RunRecord, here: Here) -> Iterator[Difference]:
    yield from _one("testbed", there.tool_version, here.tool_version)
    for what, key in (
        ("QEMU", "qemu"),
        ("QEMU's package", "qemu_package"),
        ("QEMU's build", "qemu_identity"),
        ("accelerator", "accelerator"),
        ("agent", "agent"),
    ):
        yield from _one(what, there.versions.get(key), here.versions.get(key))
    yield from _kernels(there.versions.get("kernels"), here.versions.get("kernels"))
    yield from _packages(there.versions.get("packages"), here.versions.get("packages"))
    yield from _topologies(there.topology, here.topology)
    for what, key in (("host's processor", "processor"), ("host's system", "system")):
        yield from _one(what, there.host.get(key), here.host.get(key))


def _one(what: str, there: Any, here: Any) -> Iterator[Difference]:
    if there != here:
        yield Difference(what, _shown(there), _shown(here))


def _shown(value: Any) -> str:
    text = _NOTHING if value in (None, "") else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _kernels(there: Any, here: Any) -> Iterator[Difference]:
    """By release and build-id: a kernel's name in a topology says nothing of what it is."""
    builds = [{_build(each) for each in _values(some)} for some in (there, here)]
    if builds[0] != builds[1]:
        words = [listing(sorted(each), "and") or _NOTHING for each in builds]
        yield Difference("kernel", _shown(words[0]), _shown(words[1]))


def _build(kernel: Any) -> str:
    facts = kernel if isinstance(kernel, Mapping) else {}
    identity = str(facts.get("build_id") or facts.get("sha256") or "")[:16]
    return f"{facts.get('release', '')} ({identity})"


def _values(some: Any) -> Iterable[Any]:
    return some.values() if isinstance(some, Mapping) else ()


def _packages(there: Any, here: Any) -> Iterator[Difference]:
    sets = [each if isinstance(each, Mapping) else {} for each in (there, here)]
    for name in sorted(set(sets[0]) & set(sets[1])):
        listed = [_versions(each[name]) for each in sets]
        changed = sorted(
            package
            for package in listed[0].keys() | listed[1].keys()
            if listed[0].get(package) != listed[1].get(package)
        )
        if changed:
            first = changed[0]
            words = [f"{first} {each.get(first, 'missing')}" for each in listed]
            more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
            yield Difference(f"packages of {name}", words[0], words[1] + more)


def _versions(packages: Any) -> dict[str, str]:
    found = packages if isinstance(packages, list | tuple) else ()
    return {
        str(each.get("name")): str(each.get("version"))
        for each in found
        if isinstance(each, Mapping)
    }


def _topologies(there: Any, here: Any) -> Iterator[Difference]:
    """By where it stands in the topology: ``nodes.host0.iommu.mode``."""
    pair = (dict(_flat(there)), dict(_flat(here)))
    changed = [
        path
        for path in dict.fromkeys([*pair[0], *pair[1]])
        if pair[0].get(path) != pair[1].get(path)
    ]
    for path in changed[:_SHOWN_VALUES]:
        words = _NAMES.get(path.rpartition("nodes.")[2].partition(".")[2], "rack's")
        yield Difference(f"{words} {path}", _shown(pair[0].get(path)), _shown(pair[1].get(path)))
    if len(changed) > _SHOWN_VALUES:
        more = f"{len(changed) - _SHOWN_VALUES} more values"
        yield Difference("rack's", more, "others")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        yield path, value
        return
    for key, each in pairs:
        yield from _flat(each, f"{path}.{key}" if path else str(key))


def command_lines(there: Any, here: Any) -> list[str]:
    """The QEMU command lines as a unified diff, word by word; the bundle's is only ever shown."""
    found = difflib.unified_diff(_words(there), _words(here), n=0, lineterm="")
    return [line for line in list(found)[2:] if not line.startswith("@@")]


def _words(commands: Any) -> list[str]:
    """Of machines, not of their helpers, which have a name of their own."""
    words: list[str] = []
    for each in commands if isinstance(commands, list) else ():
        if isinstance(each, Mapping) and each.get("name", each.get("node")) == each.get("node"):
            argv = each.get("argv")
            argv = each.get("argv")
            for word in argv if isinstance(argv, list) else ():
                # What a rack is called while another of its name runs is its own affair.
                said = _RACK_FOLDER.sub(r"\1/", str(word))
                words.append(f"{each.get('node')}: {said}")
    return words


def verdicts(record: RunRecord) -> dict[str, Verdict]:
    """By requirement; by name for tests that show none."""
    found = {each.requirement: each.verdict for each in record.requirements}
    for outcome in record.outcomes:
        if not outcome.requirements:
            found[outcome.test] = outcome.verdict
    return found


def changes(there: RunRecord, here: RunRecord) -> tuple[Difference, ...]:
    """The verdicts that are not the same; sorted by requirement."""
    pair = (verdicts(there), verdicts(here))
    return tuple(
        Difference(name, str(pair[0].get(name, "not run")), str(pair[1].get(name, "not run")))
        for name in sorted(set(pair[0]) | set(pair[1]))
        if pair[0].get(name) != pair[1].get(name)
    )


def word_of(there: RunRecord, here: RunRecord) -> tuple[Word, str]:
    """REPRODUCED: the same verdict for each requirement. FIXED: all that was bad passes now, and
    nothing else changed. Else DIFFERENT, LOST, SKIP or ERROR, as the replay ended.
    """
    changed = changes(there, here)
    if not changed:
        return Word.REPRODUCED, f"the same verdicts for all {len(verdicts(there))}"
    said = "; ".join(map(str, changed))
    before, after = verdicts(there), verdicts(here)
    bad = {name for name, verdict in before.items() if verdict in _BAD}
    passes = all(after.get(name) is Verdict.PASS for name in bad)
    if bad and passes and {each.what for each in changed} == bad:
        return Word.FIXED, said
    new = {after.get(each.what) for each in changed}
    if Verdict.ERROR in new:
        return Word.ERROR, said
    if Verdict.LOST in new:
        return Word.LOST, said
    if all(verdict is Verdict.SKIP for verdict in after.values()):
        return Word.SKIP, said
    return Word.DIFFERENT, said


def code_of(word: Word, there: RunRecord, expect: Word | None) -> ExitCode:
    """As of a report; but a run in which nothing was bad and which is REPRODUCED is good."""
    is_good = not any(verdict in _BAD for verdict in verdicts(there).values())
    if expect is None and word is Word.REPRODUCED and is_good:
        return ExitCode.PASS
    return exit_code([word], expect)
