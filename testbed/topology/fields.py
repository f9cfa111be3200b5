# SPDX-License-Identifier: Apache-2.0
"""Kinds of fields in a topology: what text, size or number is allowed, in one place for all uses.

Each rule validates, says what it expected, and describes itself to JSON Schema.
pydantic asks them when a file is read, and is imported only then (:mod:`testbed.topology.values`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from testbed.topology.units import (
    DURATION_EXPECTED,
    MAX_BYTES_PER_S,
    MIB,
    RATE_EXPECTED,
    SIZE_EXPECTED,
    SizeError,
    format_duration,
    format_rate,
    format_size,
    is_power_of_two,
    parse_duration,
    parse_rate,
    parse_size,
    power_of_two_at_least,
)

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema, PydanticCustomError

# Where a rule's expectation stands in its JSON Schema, until the schema's maker moves it.
EXPECTED_KEY = "x-expected"

Scalar = bool | int | float | str

# The type of every error that a rule raises; its context has `expected` and `nearest`.
RULE_ERROR = "topology_rule"


_T = TypeVar("_T")


def rule_error(message: str, *, expected: str = "", nearest: str = "") -> PydanticCustomError:
    """An error with what the loader's diagnostics need."""
    from pydantic_core import PydanticCustomError  # noqa: PLC0415

    context = {"said": message, "expected": expected, "nearest": nearest}
    return PydanticCustomError(RULE_ERROR, "{said}", context)


@dataclass(frozen=True)
class Size:
    """A size, written as a number of bytes or with a unit; bytes in the model."""

    least_bytes: int
    multiple_bytes: int = 1
    power_of_two: bool = False

    @property
    def expected(self) -> str:
        """In words, for messages and the reference."""
        text = f"at least {format_size(self.least_bytes)}"
        if self.power_of_two:
            return f"a power of two, {text}"
        if self.multiple_bytes > 1:
            return f"a multiple of {format_size(self.multiple_bytes)}, {text}"
        return f"a size of {text}"

    def validate(self, value: object) -> int:
        """Bytes from what the user wrote."""
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise rule_error(f"{shown(value)} is not a size", expected=SIZE_EXPECTED)
        try:
            size_bytes = parse_size(str(value))
        except SizeError as error:
            raise rule_error(str(error), expected=SIZE_EXPECTED, nearest=error.nearest) from None
        if size_bytes < self.least_bytes:
            raise rule_error(f"{shown(value)} is too small", expected=self.expected)
        if self.power_of_two and not is_power_of_two(size_bytes):
            above = power_of_two_at_least(size_bytes)
            raise rule_error(
                f"{shown(value)} is not a power of two, as a PCI BAR must be",
                expected=f"{format_size(above // 2)} or {format_size(above)}",
            )
        if size_bytes % self.multiple_bytes:
            raise rule_error(
                f"{shown(value)} is not a multiple of {format_size(self.multiple_bytes)}",
                expected=self.expected,
            )
        return size_bytes

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _checked(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "anyOf": [
                {"type": "integer", "minimum": self.least_bytes},
                {"type": "string", "pattern": r"^[0-9]+ *([kKmMgGtT]([iI]?[bB])?|[bB])?$"},
            ],
            EXPECTED_KEY: self.expected,
        }


@dataclass(frozen=True)
class Quantity:
    """A bandwidth or a time, written with its unit; a whole number in the model."""

    what: str
    expected: str
    parse: Callable[[str], int]
    format: Callable[[int], str]
    most: int

    def validate(self, value: object) -> int:
        """Bytes a second, or nanoseconds, from what the user wrote."""
        if not isinstance(value, str):
            raise rule_error(f"{shown(value)} is no {self.what}", expected=self.expected)
        try:
            number = self.parse(value)
        except SizeError as error:
            raise rule_error(str(error), expected=self.expected, nearest=error.nearest) from None
        if number > self.most:
            raise rule_error(
                f"{shown(value)} is too much", expected=f"at most {self.format(self.most)}"
            )
        return number

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _checked(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", EXPECTED_KEY: self.expected}


class FaultWords:
    """A fault rule in words; kept as words."""

    @property
    def expected(self) -> str:
        """In words, for messages and the reference."""
        from testbed.topology.fault_rules import RULE_EXPECTED  # noqa: PLC0415  seldom

        return RULE_EXPECTED

    def validate(self, value: object) -> str:
        """The words, one space between them."""
        from testbed.topology.fault_rules import RuleError, parse_rule  # noqa: PLC0415  likewise

        if not isinstance(value, str):
            raise rule_error(f"{shown(value)} is no fault rule", expected=self.expected)
        try:
            return parse_rule(value, by="topology").name
        except RuleError as error:
            raise rule_error(str(error), expected=error.expected, nearest=error.nearest) from None

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _checked(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        from testbed.topology.fault_rules import ACTIONS  # noqa: PLC0415  likewise

        return {
            "type": "string",
            "pattern": f"^ *({'|'.join(ACTIONS)})( |$)",
            EXPECTED_KEY: self.expected,
        }


class Variable:
    """A value for the template: a scalar, or a list of scalars."""

    expected: ClassVar[str] = "text, a number, true, false, or a list of these"

    @staticmethod
    def allows(value: object) -> bool:
        """Whether a template can have it as a variable."""
        items = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(item, bool | int | float | str) for item in items)

    def validate(self, value: object) -> object:
        """The value; a list as a tuple, so that it cannot change."""
        if not self.allows(value):
            message = f"{shown(value)} is not a value for a template"
            raise rule_error(message, expected=self.expected)
        return tuple(value) if isinstance(value, list | tuple) else value

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _checked(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        scalar = ["string", "number", "boolean"]
        return {"type": [*scalar, "array"], "items": {"type": scalar}, EXPECTED_KEY: self.expected}


@dataclass(frozen=True)
class Text:
    """A text of a given form; ``what`` names it in messages (``a name``)."""

    what: str
    pattern: str
    expected: str

    def validate(self, value: object) -> str:
        """The text, unchanged."""
        if not isinstance(value, str) or re.fullmatch(self.pattern, value) is None:
            raise rule_error(f"{shown(value)} is not {self.what}", expected=self.expected)
        return value

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _checked(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^(?:{self.pattern})$", EXPECTED_KEY: self.expected}


@dataclass(frozen=True)
class AlsoHolds:
    """One more rule for a value that is right in itself, beside what the fields before it are.

    ``check`` is given the value and pydantic's knowledge of those; it raises, or changes the value.
    """

    check: Callable[[Any, ValidationInfo], Any]

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.with_info_after_validator_function(self.check, handler(source))


class Listed:
    """A list; a key with nothing after it is an empty one, as a template may leave it."""

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415

        def filled(value: object) -> object:
            return () if value is None else value

        return core_schema.no_info_before_validator_function(filled, handler(source))


class TrueOrFalse:
    """Nothing that merely looks like it."""

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.bool_schema(strict=True)


def _checked(check: Callable[[Any], object]) -> CoreSchema:
    from pydantic_core import core_schema  # noqa: PLC0415

    return core_schema.no_info_plain_validator_function(check)


def shown(value: object) -> str:
    """A value as the user would recognize it, and not a page of it."""
    if value is None:
        return "an empty value"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    return f"'{text if len(text) <= 60 else text[:57] + '...'}'"


NAME = Text(
    what="a name",
    pattern=r"[A-Za-z][A-Za-z0-9_-]{0,31}",
    expected="a letter, then up to 31 letters, digits, '-' or '_'",
)
Name = Annotated[str, NAME]
Address = Annotated[
    str,
    Text(
        what="a PCI slot and function",
        pattern=r"[01]?[0-9A-Fa-f]\.[0-7]",
        expected="SS.F in hexadecimal, from 00.0 to 1f.7, such as 02.0",
    ),
]
HostAddress = Annotated[
    str,
    Text(
        what="a host PCI address",
        pattern=r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[01][0-9A-Fa-f]\.[0-7]",
        expected="DDDD:BB:SS.F as lspci -D prints it, such as 0000:3b:00.0",
    ),
]
CpuModel = Annotated[
    str,
    Text(
        what="a CPU model",
        pattern=r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}",
        expected="max, or a model that QEMU knows, such as EPYC or SapphireRapids",
    ),
]
KernelName = Annotated[
    str,
    Text(
        what="a kernel",
        pattern=r"[^\x00-\x1f\x7f]{1,4096}",
        expected="default, a name from images/, or a path",
    ),
]
KernelWord = Annotated[
    str,
    Text(
        what="a word of a kernel command line",
        pattern=r"[!-~]{1,1024}",
        expected="printable ASCII without spaces; one list entry a word",
    ),
]
DeviceClass = Annotated[
    str,
    Text(
        what="a device class",
        pattern=r"[^\x00-\x1f\x7f]{1,4096}\.py:[A-Za-z_][A-Za-z0-9_]*",
        expected="FILE.py:CLASS, such as cards/mine.py:Card",
    ),
]
Sha256 = Annotated[
    str,
    Text(what="a SHA-256 sum", pattern=r"[0-9a-f]{64}", expected="64 hexadecimal digits"),
]
GpuRef = Annotated[
    str,
    Text(
        what="a GPU of a node",
        pattern=r"[A-Za-z][A-Za-z0-9_-]{0,31}/[A-Za-z][A-Za-z0-9_-]{0,31}",
        expected="node/gpu, such as host0/gpu0",
    ),
]
VariableValue = Annotated[Scalar | tuple[Scalar, ...], Variable()]
MemorySize = Annotated[int, Size(least_bytes=128 * MIB, multiple_bytes=MIB)]
BAR_SIZE = Size(least_bytes=MIB, power_of_two=True)
BarSize = Annotated[int, BAR_SIZE]
DiskSize = Annotated[int, Size(least_bytes=MIB, multiple_bytes=MIB)]
Flag = Annotated[bool, TrueOrFalse()]
Entries = Annotated[tuple[_T, ...], Listed()]
MAX_LATENCY_NS = 1_000_000_000
Bandwidth = Annotated[
    int, Quantity("bandwidth", RATE_EXPECTED, parse_rate, format_rate, MAX_BYTES_PER_S)
]
Latency = Annotated[
    int, Quantity("time", DURATION_EXPECTED, parse_duration, format_duration, MAX_LATENCY_NS)
]
FaultRule = Annotated[str, FaultWords()]
