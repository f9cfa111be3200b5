# SPDX-License-Identifier: Apache-2.0
"""Kinds of fields in a bug report, beside those of a topology (:mod:`testbed.topology.fields`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from testbed.topology.fields import EXPECTED_KEY, Size, Text, rule_error, shown
from testbed.topology.units import MIB, format_size

MOST_SIZE_BYTES = 1 << 20  # of one fill, copy or checksum: what an emulated guest does in a second
MOST_BUFFER_BYTES = 16 * MIB
MOST_WAIT_S = 60
MOST_TIMEOUT_S = 120

# ${name}, ${name.field}, ${name.field+0x1000}: what an earlier step saw, see references.py.
REFERENCE = (
    r"\$\{[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)?( *[+] *(0x[0-9A-Fa-f]{1,16}|[0-9]{1,18}))?\}"
)

# Which keys of a step or condition name an earlier step, and of which kinds that may be.
Refers = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Number(Text):
    """A number, or a reference to one; the reference stays text until its step has run."""

    most: int = (1 << 64) - 1

    def validate(self, value: object) -> Any:
        """The number or the reference, unchanged."""
        if isinstance(value, str) and re.fullmatch(REFERENCE, value):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.most:
            raise rule_error(f"{shown(value)} is not {self.what}", expected=self.expected)
        return value

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": self.most},
                {"type": "string", "pattern": f"^{REFERENCE}$"},
            ],
            EXPECTED_KEY: self.expected,
        }


@dataclass(frozen=True)
class Scalar(Text):
    """Text, a number, true or false; text may hold references."""

    def validate(self, value: object) -> Any:
        """The value, unchanged."""
        if not isinstance(value, bool | int | str):
            raise rule_error(f"{shown(value)} is not {self.what}", expected=self.expected)
        return value

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": ["string", "integer", "boolean"], EXPECTED_KEY: self.expected}


_REFERRED = "or what an earlier step saw, such as ${peer.iova}"
Address = Annotated[
    int | str,
    Number("an address", "", f"a bus address (hexadecimal with 0x), {_REFERRED}"),
]
Word32 = Annotated[
    int | str,
    Number("a 32-bit value", "", f"0 to 0xffffffff, {_REFERRED}", (1 << 32) - 1),
]
Value = Annotated[
    bool | int | str, Scalar("a value", "", f"text, a number, true or false, {_REFERRED}")
]
StepName = Annotated[
    str,
    Text(
        what="a step's name",
        pattern=r"[A-Za-z][A-Za-z0-9_]{0,31}",
        expected="a letter, then up to 31 letters, digits or '_'",
    ),
]
Device = Annotated[
    str,
    Text(
        what="a device",
        pattern=r"([A-Za-z][A-Za-z0-9_-]{0,31}/)?[A-Za-z][A-Za-z0-9_-]{0,31}",
        expected="a name from the topology, such as gpu0 or host0/gpu0",
    ),
]
Place = Annotated[
    str,
    Text(
        what="a memory",
        pattern=r"([A-Za-z][A-Za-z0-9_-]{0,31}/)?[A-Za-z][A-Za-z0-9_-]{0,31}(\.[a-z0-9]{1,12})?",
        expected="gpu0.vram, gpu0.registers, nvme0.cmb, a disk, a buffer, or a step's 'p2pmem'",
    ),
]
NodeName = Annotated[
    str,
    Text(
        what="a node",
        pattern=r"([A-Za-z][A-Za-z0-9_-]{0,31})?",
        expected="a node of the topology; not needed if it has only one",
    ),
]
Line = Annotated[
    str,
    Text(what="one line", pattern=r"[^\x00-\x1f\x7f]{1,200}", expected="1 to 200 characters"),
]
Words = Annotated[
    str,
    Text(what="text", pattern=r"[^\x00-\x08\x0b-\x1f\x7f]{1,4000}", expected="text"),
]
LogWords = Annotated[
    str,
    Text(what="text", pattern=r"[^\x00-\x1f\x7f]{0,200}", expected="a part of a line, or ''"),
]
Link = Annotated[
    str,
    Text(
        what="a link",
        pattern=r"https?://[!-~]{1,500}",
        expected="the address of the public report, https://…",
    ),
]
Method = Annotated[
    str,
    Text(
        what="a method of the agent",
        pattern=r"[a-z][a-z0-9_]{0,30}\.[a-z][a-z0-9_]{0,30}",
        expected="AREA.METHOD, such as p2p.map_type",
    ),
]
ModuleName = Annotated[
    str,
    Text(what="a module", pattern=r"[a-z][a-z0-9_]{0,30}", expected="a folder of guest_agent/kmod"),
]
ConditionName = Annotated[
    str,
    Text(
        what="a condition's name",
        pattern=r"[A-Za-z0-9][^\x00-\x1f\x7f]{0,119}",
        expected="what is claimed, in up to 120 characters",
    ),
]


def _at_most(most_bytes: int) -> AfterValidator:
    def check(size_bytes: int) -> int:
        if size_bytes > most_bytes:
            expected = f"at most {format_size(most_bytes)}"
            raise rule_error(f"{format_size(size_bytes)} is too much", expected=expected)
        return size_bytes

    return AfterValidator(check)


BufferSize = Annotated[
    int, Size(least_bytes=4096, multiple_bytes=4096), _at_most(MOST_BUFFER_BYTES)
]
ByteSize = Annotated[int, Size(least_bytes=1), _at_most(MOST_SIZE_BYTES)]
Offset = Annotated[int, Size(least_bytes=0)]
Seed = Annotated[int, Field(strict=True, ge=0, le=255)]
Seconds = Annotated[float, Field(gt=0, le=MOST_WAIT_S)]
Timeout = Annotated[int, Field(strict=True, ge=1, le=MOST_TIMEOUT_S)]
