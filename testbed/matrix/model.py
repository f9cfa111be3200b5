# SPDX-License-Identifier: Apache-2.0
"""A matrix file as frozen values; the JSON Schema and the field reference are made from them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from testbed.topology.fields import (
    CpuModel,
    Entries,
    Flag,
    KernelName,
    Name,
    Text,
    VariableValue,
    rule_error,
    shown,
)
from testbed.topology.machine import IommuKind, IommuMode
from testbed.topology.problem import nearest
from testbed.topology.reading import Strict

SUFFIX = ".matrix.yaml"
MOST_CELLS = 10_000
MOST_REPEATS = 10_000
MOST_DEADLINE_S = 86_400
EMPTY_SUITE = "empty"
# In the order in which cells are told apart, the slowest to change first.
AXES = ("kernel", "qemu", "topology", "cpu", "iommu", "engine", "suite")
PLURALS = {axis: f"{axis}s" for axis in AXES} | {"topology": "topologies"}
DEFAULT_QEMU = "default"

_KINDS: tuple[str, ...] = get_args(IommuKind)
_MODES: tuple[str, ...] = get_args(IommuMode)
SCALABLE = "scalable"


@dataclass(frozen=True)
class IommuWords(Text):
    """An IOMMU in up to three words; kept as words."""

    def validate(self, value: object) -> str:
        """The words, one space between them."""
        words = value.split() if isinstance(value, str) else []
        if not words:
            raise rule_error(f"{shown(value)} is not {self.what}", expected=self.expected)
        for at, word in enumerate(words):
            known = _KINDS if at == 0 else (SCALABLE, *_MODES)
            if word not in known:
                message = f"'{word}' in {shown(value)} is not {self.what}"
                near = nearest(word, (*_KINDS, SCALABLE, *_MODES))
                raise rule_error(message, expected=self.expected, nearest=near)
        if len(set(words) & set(_MODES)) > 1 or len(set(words)) < len(words):
            raise rule_error(f"{shown(value)} says it twice", expected=self.expected)
        return " ".join(words)


@dataclass(frozen=True)
class ShellWords(Text):
    """One line of words, quoted as a shell's; kept as text."""

    def validate(self, value: object) -> str:
        """The line, unchanged."""
        text = super().validate(value)
        try:
            shlex.split(text)
        except ValueError as error:
            message = f"{shown(value)} is not {self.what}: {error}"
            raise rule_error(message, expected=self.expected) from None
        return text


_LINE = r"[^\x00-\x1f\x7f]{1,300}"
IommuWord = Annotated[
    str,
    IommuWords(
        "an IOMMU",
        rf"({'|'.join(_KINDS)})( ({'|'.join((SCALABLE, *_MODES))}))*",
        f"{', '.join(_KINDS)}, then {SCALABLE} or not, then {', '.join(_MODES)} or nothing",
    ),
]
TopologyWord = Annotated[
    str,
    ShellWords(
        "a topology",
        _LINE,
        "a shipped name or a file, then settings, such as quad-gpu gpus=2",
    ),
]
SuiteWord = Annotated[
    str,
    Text(
        "a suite",
        _LINE,
        f"a suite's name (`testbed run --list`), `all`, `{EMPTY_SUITE}`, a test file or a report",
    ),
]
QemuWord = Annotated[
    str, Text("a QEMU", r"[^\x00-\x1f\x7f]{1,4096}", f"{DEFAULT_QEMU}, or the path of a program")
]
EngineWord = Literal["model", "igb", "edu"]
Pattern = Annotated[str, Text("a pattern", _LINE, "an entry of that axis; * stands for anything")]
Line = Annotated[str, Text("one line", _LINE, "1 to 300 characters")]


class Exclusion(Strict):
    """Cells that match all that is named here are left out; with a reason they stay, as SKIP."""

    kernel: Pattern | None = Field(None, description="Pattern for the kernel.")
    qemu: Pattern | None = Field(None, description="Pattern for the QEMU.")
    topology: Pattern | None = Field(None, description="Pattern for the topology's words.")
    cpu: Pattern | None = Field(None, description="Pattern for the CPU model.")
    iommu: Pattern | None = Field(None, description="Pattern for the IOMMU's words.")
    engine: Pattern | None = Field(None, description="Pattern for the copy engine.")
    suite: Pattern | None = Field(None, description="Pattern for the suite.")
    reason: Line | None = Field(
        None, description="Why they cannot run: they stay in the table, as SKIP."
    )

    @property
    def patterns(self) -> Mapping[str, str]:
        """By axis, those that are named."""
        found = {axis: getattr(self, axis) for axis in AXES}
        return {axis: pattern for axis, pattern in found.items() if pattern is not None}


class Inclusion(Strict):
    """One more cell (or one for each suite of the file); what is not named is the topology's."""

    kernel: KernelName | None = Field(None, description="The kernel.")
    qemu: QemuWord | None = Field(None, description="The QEMU.")
    topology: TopologyWord = Field(description="The topology, with settings.")
    cpu: CpuModel | None = Field(None, description="The CPU model.")
    iommu: IommuWord | None = Field(None, description="The IOMMU.")
    engine: EngineWord | None = Field(None, description="The copy engine.")
    suite: SuiteWord | None = Field(None, description="The suite; all of `suites` if not named.")


class Matrix(Strict):
    """The product of the axes, less `exclude`, with `include`; the rest is the topology's."""

    matrix: Name = Field(description="The matrix's name.")
    description: str = Field("", strict=True, description="One sentence for people.")
    vars: Mapping[Name, VariableValue] = Field(
        default_factory=dict,
        description="Values for the template, each changed with `-s NAME=VALUE`, as in a topology.",
    )
    kernels: Entries[KernelName] = Field(
        (), description="Kernels of every node: `default`, a name, or a path."
    )
    qemus: Entries[QemuWord] = Field(
        (), description="QEMUs: `default` (the tool root's), or the path of a program."
    )
    topologies: Entries[TopologyWord] = Field(
        (), description="Shipped names or files, each with its settings: `quad-gpu gpus=2`."
    )
    cpus: Entries[CpuModel] = Field((), description="CPU models of every node.")
    iommus: Entries[IommuWord] = Field(
        (),
        description="IOMMUs of every node: kind, `scalable`, mode, as in `intel scalable strict`. "
        "What is not said is as the kind's default.",
    )
    engines: Entries[EngineWord] = Field((), description="Copy engines of every GPU and NIC.")
    suites: Entries[SuiteWord] = Field(
        ("p2p-iommu",),
        description="Suites, each a cell of its own: a name, `all`, a test file, a bug report; "
        f"`{EMPTY_SUITE}` starts nothing and tests nothing.",
        min_length=1,
    )
    exclude: Entries[Exclusion] = Field((), description="Cells to leave out.")
    include: Entries[Inclusion] = Field((), description="More cells.")
    repeat: int = Field(
        1, strict=True, ge=1, le=MOST_REPEATS, description="How often each cell runs."
    )
    keyword: str = Field("", strict=True, description="Only tests that match, as `run -k`.")
    deadline_s: int = Field(
        1800,
        strict=True,
        ge=1,
        le=MOST_DEADLINE_S,
        description="Seconds after which a cell is ended, and an ERROR.",
    )
    needs_kvm: Flag = Field(
        False, description="Cells run only where KVM works; elsewhere they are SKIP."
    )
    warm: Flag = Field(False, description="Restore saved machines instead of booting, as --warm.")

    def values(self, axis: str) -> tuple[str, ...]:
        """The entries of an axis; one that says nothing if the file names none."""
        return getattr(self, PLURALS[axis]) or ("",)


def put_iommu(words: str, iommu: dict[str, Any]) -> dict[str, Any]:
    """The node's ``iommu`` with what the words say; all else is the kind's default."""
    kind, *rest = words.split()
    modes = [word for word in rest if word in _MODES]
    changed: dict[str, Any] = {"kind": kind, "scalable": SCALABLE in rest}
    if modes:
        changed["mode"] = modes[0]
    if "aw_bits" in iommu and kind == iommu.get("kind"):
        changed["aw_bits"] = iommu["aw_bits"]
    return changed


def slug(text: str) -> str:
    """A word that can be in a file's name."""
    return re.sub(r"[^A-Za-z0-9._=]+", "-", text.rsplit("/", 1)[-1]).strip("-.")[:40]
