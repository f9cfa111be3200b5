# SPDX-License-Identifier: Apache-2.0
"""Tiny programs that take a kernel's place, made byte by byte; kvm-unit-tests' are made like them.

A multiboot program starts in protected mode with flat segments (Multiboot specification 0.6.96,
3.2). It prints on the first serial port, and ends QEMU through ``isa-debug-exit`` at port 0xf4.
"""

from __future__ import annotations

import struct

_AT = 0x100000
_HEADER = struct.Struct("<8I")
_MAGIC, _FLAGS = 0x1BADB002, 1 << 16  # the header itself says where everything goes
_VTD_VERSION = 0xFED90000  # QEMU's VT-d: VER_REG, the first of its registers

HANG = b"\xf4\xeb\xfd"  # hlt; jmp to it
TRIPLE_FAULT = bytes.fromhex("0f011d00000000 cd03".replace(" ", ""))  # lidt 0; int3


def printed(text: str, at: int) -> bytes:
    """Code at address ``at`` that prints ``text``, which stands behind it."""
    code = bytes.fromhex("66baf803 ac 84c0 7403 ee ebf8".replace(" ", ""))
    behind = at + 5 + len(code) + 2
    jump = b"\xeb" + bytes([len(text) + 1])
    if len(text) > 100:
        raise ValueError("a short jump leads over it")
    return b"\xbe" + struct.pack("<I", behind) + code + jump + text.encode() + b"\0"


def ended(status: int) -> bytes:
    """Code that ends QEMU with 2 * status + 1."""
    return b"\xb0" + bytes([status]) + b"\xe6\xf4" + HANG


class Program:
    """A program, step by step; :meth:`image` is the file."""

    def __init__(self) -> None:
        self._code = b""

    @property
    def _here(self) -> int:
        return _AT + _HEADER.size + len(self._code)

    def say(self, *lines: str) -> Program:
        """Print lines."""
        for line in lines:
            self._code += printed(line + "\n", self._here)
        return self

    def say_if_vtd(self, there: str, absent: str) -> Program:
        """Print one line or the other: does a VT-d unit answer where QEMU has it?"""
        load = b"\xa1" + struct.pack("<I", _VTD_VERSION)
        # Unassigned memory reads as all ones (or zeros); a version is neither.
        compare = b"\x8d\x50\x01\x83\xfa\x02"  # lea edx, [eax + 1]; cmp edx, 2
        first = len(printed(there + "\n", 0)) + 2
        head = load + compare + b"\x72" + bytes([first])  # jb
        yes = printed(there + "\n", self._here + len(head))
        no = printed(absent + "\n", self._here + len(head) + first)
        self._code += head + yes + b"\xeb" + bytes([len(no)]) + no
        return self

    def then(self, code: bytes) -> Program:
        """Any code."""
        self._code += code
        return self

    def image(self) -> bytes:
        """The file."""
        size = _HEADER.size + len(self._code)
        header = _HEADER.pack(
            _MAGIC,
            _FLAGS,
            -(_MAGIC + _FLAGS) & 0xFFFFFFFF,
            _AT,  # where the header stands
            _AT,  # what is loaded: from
            _AT + size,  # to
            _AT + size,  # nothing to be cleared
            _AT + _HEADER.size,  # the first instruction
        )
        return header + self._code
