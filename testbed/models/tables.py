# SPDX-License-Identifier: Apache-2.0
"""How registers, codes and records are declared: each once, as values with their explanation.

From such a declaration come the constants that the models use, those of the agent's driver and the
page that explains them (:mod:`testbed.models.registers_document`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum, StrEnum
from struct import Struct
from typing import Generic, NamedTuple, Self, TypeVar, get_args, get_type_hints


class Access(StrEnum):
    """What the guest may do with a register."""

    RO = "read"
    RW = "read, write"
    W1C = "read, write 1 to clear"
    WO = "write"


class Register(IntEnum):
    """Base of register tables: the value is the offset; a 64-bit register is two, LOW then HIGH."""

    access: Access
    text: str

    def __new__(cls, offset: int, access: Access, text: str) -> Self:
        """One 32-bit register."""
        member = int.__new__(cls, offset)
        member._value_ = offset
        member.access = access
        member.text = text
        return member


class Code(IntEnum):
    """Base of tables of numbers: bits of a register, opcodes, causes."""

    text: str

    def __new__(cls, number: int, text: str) -> Self:
        """One number and what it means."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.text = text
        return member

    @classmethod
    def of(cls, number: int) -> Self:
        """The member with that number; ValueError if there is none."""
        for member in cls:
            if member == number:
                return member
        raise ValueError(f"{number} is no {cls.__name__}")


class Item(NamedTuple):
    """A field of a record: its struct code and what it means."""

    code: str
    text: str


Record = TypeVar("Record", bound=Iterable[int])


class RecordLayout(Generic[Record]):
    """The bytes of a NamedTuple whose fields are ``Annotated[int, Item(...)]``, little-endian."""

    def __init__(self, record: type[Record]) -> None:
        self._make: Callable[..., Record] = record
        self.name = record.__name__
        self.text = record.__doc__ or ""
        self.items: dict[str, Item] = {}
        for name, hint in get_type_hints(record, include_extras=True).items():
            self.items[name] = next(part for part in get_args(hint) if isinstance(part, Item))
        self.form = "<" + "".join(item.code for item in self.items.values())
        self._struct = Struct(self.form)
        self.size_bytes = self._struct.size

    def offsets(self) -> dict[str, int]:
        """Where each field begins."""
        found = {}
        before = "<"
        for name, item in self.items.items():
            found[name] = Struct(before).size
            before += item.code
        return found

    def decode(self, data: bytes | memoryview) -> Record:
        """The record in ``data``, which is of its size."""
        return self._make(*self._struct.unpack(data))

    def encode(self, record: Record) -> bytes:
        """The bytes of ``record``."""
        return self._struct.pack(*record)
