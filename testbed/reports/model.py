# SPDX-License-Identifier: Apache-2.0
"""A bug report as frozen values; the JSON Schema and the field reference are made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from testbed.reports.conditions import AnyCondition
from testbed.reports.fields import ConditionName, Line, Link, Words
from testbed.reports.steps import AnyStep
from testbed.topology.fields import (
    CpuModel,
    Entries,
    KernelName,
    KernelWord,
    Name,
    Scalar,
    Text,
    VariableValue,
)
from testbed.topology.machine import IommuKind, IommuMode
from testbed.topology.reading import Strict

SUFFIX = ".report.yaml"
MOST_STEPS = 200

Conditions = Annotated[Mapping[ConditionName, AnyCondition], Field(min_length=1)]

ProgramPath = Annotated[
    str,
    Text(what="a program", pattern=r"[^\x00-\x1f\x7f]{1,4096}", expected="a path, with --trust"),
]


class Environment(Strict):
    """What the report was seen with, over what the topology says; options of the command line win.

    Paths on this host (a kernel, a QEMU) need `--trust`.
    """

    kernel: KernelName | None = Field(None, description="The kernel of every node, by name.")
    kernel_args: Entries[KernelWord] = Field((), description="More words for its command line.")
    iommu_kind: IommuKind | None = Field(None, description="Which IOMMU.")
    iommu_mode: IommuMode | None = Field(None, description="How the kernel uses it.")
    cpu: CpuModel | None = Field(None, description="The processor.")
    engine: Literal["model", "igb", "edu"] | None = Field(
        None, description="The copy engine of all GPUs and NICs."
    )
    qemu: ProgramPath | None = Field(None, description="Another QEMU than the tool root's.")


class Expectation(Strict):
    """What is seen while the bug is there, and what when it is gone; each all of its conditions."""

    as_reported: Conditions = Field(description="With the bug: all of these hold.")
    when_fixed: Conditions = Field(description="Without it: all of these hold.")


class Report(Strict):
    """One public bug, as something that happens again."""

    title: Line = Field(description="One line.")
    link: Link = Field(description="Where the bug was reported.")
    description: Words = Field("", description="What goes wrong, in a few sentences.")
    stand_ins: Entries[Words] = Field(
        (), description="What is something else here than the reporter had."
    )
    vars: Mapping[Name, VariableValue] = Field(
        default_factory=dict,
        description="Values for the template, each changed with `-s NAME=VALUE`.",
    )
    topology: str | Mapping[str, Any] = Field(
        description="The rack: as in a topology file, or the name of a shipped one, or a file "
        "beside the report."
    )
    settings: Mapping[Name, Scalar] = Field(
        default_factory=dict,
        alias="set",
        description="Settings of a topology that is named, as of `-s`.",
    )
    environment: Environment = Field(
        default_factory=Environment, description="Kernel, IOMMU, processor, QEMU."
    )
    steps: Entries[AnyStep] = Field(
        description="What was done, in order.", min_length=1, max_length=MOST_STEPS
    )
    expect: Expectation = Field(description="What is REPRODUCED, and what is FIXED.")
