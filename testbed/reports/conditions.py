# SPDX-License-Identifier: Apache-2.0
"""The conditions of an expectation: what was seen if a report is REPRODUCED, or FIXED.

Each names the step that saw it. ``refers`` says of which kinds that step may be.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from testbed.reports.fields import Address, Device, Line, Refers, StepName, Value
from testbed.topology.fields import Entries, rule_error
from testbed.topology.reading import Strict

_WATCHED = ("copy", "write32", "transfer", "call")
_PATTERNS = ("fill", "pattern")
PathName = Literal["iommu", "peer", "link", "network", "local"]
Reason = Annotated[int, Field(strict=True, ge=0, le=255)]


class Condition(Strict):
    """What all conditions have."""

    kind: ClassVar[str]
    refers: ClassVar[Refers] = {}


class BytesAre(Condition):
    """What was read is the pattern that a `fill` wrote, by all witnesses; or (`are_not`) is not."""

    kind = "bytes"
    refers: ClassVar[Refers] = {"bytes": ("checksum",), "are": _PATTERNS, "are_not": _PATTERNS}
    read: StepName = Field(alias="bytes", description="The `checksum` that read.")
    are: StepName | None = Field(None, description="The `fill` or `pattern` whose bytes they are.")
    are_not: StepName | None = Field(None, description="That whose bytes they are not.")

    @model_validator(mode="after")
    def _one_of_two(self) -> BytesAre:
        if (self.are is None) is (self.are_not is None):
            raise rule_error("which bytes?", expected="'are' or 'are_not', and a step that fills")
        return self


class Faulted(Condition):
    """The IOMMU refused: this requester, this address, this direction and reason, and no other."""

    kind = "fault"
    refers: ClassVar[Refers] = {"fault": _WATCHED}
    step: StepName = Field(alias="fault", description="The step that did DMA.")
    requester: Device = Field(alias="by", description="The device.")
    address: Address = Field(description="The bus address it asked for.")
    access: Literal["read", "write"] = Field(description="The direction, as the device sees it.")
    reasons: Entries[Reason] = Field(
        (),
        alias="reason",
        description="VT-d's reason codes, any of them; as for an unmapped address if left out.",
    )


class NoFault(Condition):
    """The IOMMU refused nothing."""

    kind = "no_fault"
    refers: ClassVar[Refers] = {"no_fault": _WATCHED}
    step: StepName = Field(alias="no_fault", description="The step that did DMA.")


class Path(Condition):
    """The device wrote all bytes by this path, as its model counted; not for QEMU's devices."""

    kind = "path"
    refers: ClassVar[Refers] = {"path": ("copy", "write32")}
    step: StepName = Field(alias="path", description="The step that did DMA.")
    by: PathName = Field(description="The path.")


class Values(Condition):
    """Something that a step saw has a value."""

    kind = "value"
    value: Value = Field(description="What a step saw, such as ${io.errno}.")
    equal: Value | None = Field(None, alias="is", description="It is this.")
    unequal: Value | None = Field(None, alias="is_not", description="It is not this.")
    least: Address | None = Field(None, alias="at_least", description="It is this number or more.")
    most: Address | None = Field(None, alias="at_most", description="It is this number or less.")
    part: Line | None = Field(None, alias="contains", description="This is a part of the text.")

    @model_validator(mode="after")
    def _compares(self) -> Values:
        if all(x is None for x in (self.equal, self.unequal, self.least, self.most, self.part)):
            expected = "'is', 'is_not', 'at_least', 'at_most' or 'contains'"
            raise rule_error("compared with nothing", expected=expected)
        return self


class Logged(Condition):
    """The guest's kernel said it, or (`lacks`) did not."""

    kind = "log"
    refers: ClassVar[Refers] = {"log": ("kernel_log", "transfer")}
    step: StepName = Field(alias="log", description="The step that read the log.")
    part: Line | None = Field(None, alias="contains", description="Some line has this in it.")
    missing: Line | None = Field(None, alias="lacks", description="No line has this in it.")

    @model_validator(mode="after")
    def _asks(self) -> Logged:
        if self.part is None and self.missing is None:
            raise rule_error("asks for nothing", expected="'contains' or 'lacks'")
        return self


class MachineLost(Condition):
    """The machine died in the steps, and its console's end says this: for panics and hangs."""

    kind = "lost"
    part: Line = Field(alias="lost", description="A part of the console's last lines.")


CONDITIONS: tuple[type[Condition], ...] = (
    *(BytesAre, Faulted, NoFault, Path, Values, Logged, MachineLost),
)
CONDITION_OF = {condition.kind: condition for condition in CONDITIONS}


def _tag_of(value: object) -> str | None:
    if isinstance(value, Condition):
        return f"({value.kind})"
    if isinstance(value, dict):
        return next((f"({kind})" for kind in value if kind in CONDITION_OF), None)
    return None


AnyCondition = Annotated[
    Annotated[BytesAre, Tag("(bytes)")]
    | Annotated[Faulted, Tag("(fault)")]
    | Annotated[NoFault, Tag("(no_fault)")]
    | Annotated[Path, Tag("(path)")]
    | Annotated[Values, Tag("(value)")]
    | Annotated[Logged, Tag("(log)")]
    | Annotated[MachineLost, Tag("(lost)")],
    Discriminator(_tag_of),
]
