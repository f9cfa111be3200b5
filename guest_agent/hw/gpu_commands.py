# SPDX-License-Identifier: Apache-2.0
"""Commands of the GPU model as a caller writes them, checked and put into bytes.

``{"op": "copy", "source": PLACE, "target": PLACE, "size_bytes": 4096}``, where a place is
``{"space": "virtual", "address": 0x1000}``; of space ``link``, with the link's number as ``link``.
"""

from __future__ import annotations

import struct

from guest_agent import rpc
from guest_agent.hw import model_registers as hw
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SPACES = {
    "vram": hw.APERTURE_VRAM,
    "system": hw.APERTURE_SYSTEM,
    "peer": hw.APERTURE_PEER,
    "virtual": hw.APERTURE_VIRTUAL,
    "link": hw.APERTURE_LINK,
}
_PLACE = "dict[str, Any]"
_COPY = {"source": _PLACE, "target": _PLACE, "size_bytes": "int"}
_OPTIONS = {"fence": _PLACE, "keep_going": "bool", "interrupt": "bool"}
# What each operation needs; what ends in "?" it may have.
_OPERATIONS: dict[str, tuple[int, dict[str, str]]] = {
    "nop": (hw.OPCODE_NOP, {}),
    "copy": (hw.OPCODE_COPY, _COPY),
    "copy_2d": (
        hw.OPCODE_COPY_2D,
        {**_COPY, "source_pitch": "int", "target_pitch": "int", "rows": "int"},
    ),
    "fill": (hw.OPCODE_FILL, {"target": _PLACE, "size_bytes": "int", "value": "int"}),
    "atomic_add": (hw.OPCODE_ATOMIC_ADD, {"target": _PLACE, "size_bytes": "int", "value": "int"}),
    "signal": (hw.OPCODE_SIGNAL, {"target": _PLACE, "value": "int"}),
    "wait": (hw.OPCODE_WAIT, {"source": _PLACE, "value": "int"}),
    "interrupt": (hw.OPCODE_INTERRUPT, {}),
    "invalidate": (hw.OPCODE_INVALIDATE, {"target?": _PLACE}),
}
_BITS = {"source_pitch": 32, "target_pitch": 32, "rows": 32}


def place(name: str, value: Mapping[str, Any], more: Mapping[str, str] | None = None) -> int:
    """The aperture byte of a place. :raises ParameterError: it is none, or has other parts.

    :param more: parts that it needs besides, with their types.
    """
    rpc.check_parts(
        name, value, {"space": "str", "address": "int", **(more or {})}, {"link": "int"}
    )
    space = value["space"]
    if space not in SPACES:
        raise ParameterError(f"{name}.space: {space!r} is none of {', '.join(SPACES)}")
    fits(f"{name}.address", value["address"], 64)
    if (space == "link") != ("link" in value):
        raise ParameterError(f"{name}.link: needed with space 'link', and only there")
    return SPACES[space] | fits(f"{name}.link", value.get("link", 0), 4) << 4


def fits(name: str, value: int, bits: int) -> int:
    """The value. :raises ParameterError: it has more bits."""
    if value >> bits:
        raise ParameterError(f"{name}: {value:#x} has more than {bits} bits")
    return value


def encode(name: str, command: Mapping[str, Any]) -> bytes:
    """One command. :raises ParameterError: what is wrong with it, by ``name`` and part."""
    operation = command.get("op")
    if not isinstance(operation, str) or operation not in _OPERATIONS:
        raise ParameterError(f"{name}.op: {operation!r} is none of {', '.join(_OPERATIONS)}")
    opcode, parts = _OPERATIONS[operation]
    needed = {part: kind for part, kind in parts.items() if not part.endswith("?")}
    allowed = {part[:-1]: kind for part, kind in parts.items() if part.endswith("?")}
    rpc.check_parts(name, command, {"op": "str", **needed}, {**allowed, **_OPTIONS})
    apertures = {
        end: place(f"{name}.{end}", command[end]) for end in ("source", "target") if end in command
    }
    addresses = {end: command[end]["address"] for end in apertures}
    numbers = {
        part: fits(f"{name}.{part}", command[part], _BITS.get(part, 64))
        for part in ("size_bytes", "source_pitch", "target_pitch", "rows", "value")
        if part in command
    }
    flags = 0
    fence = command.get("fence", {})
    fence_aperture = 0
    if fence:
        fence_aperture = place(f"{name}.fence", fence, {"value": "int"})
        fits(f"{name}.fence.value", fence["value"], 32)
        flags |= hw.COMMAND_FLAG_FENCE
    if command.get("keep_going"):
        flags |= hw.COMMAND_FLAG_KEEP_GOING
    if command.get("interrupt"):
        flags |= hw.COMMAND_FLAG_INTERRUPT
    size = numbers.get("size_bytes", 0)
    if operation == "invalidate":
        size = int("target" in command)  # 0: everything
    return struct.pack(
        hw.COMMAND_FORM,
        opcode, flags,
        apertures.get("source", 0), apertures.get("target", 0), fence_aperture, 0, 0,
        addresses.get("source", 0), addresses.get("target", 0), size,
        numbers.get("source_pitch", 0), numbers.get("target_pitch", 0), numbers.get("rows", 0),
        fence.get("value", 0), numbers.get("value", 0), fence.get("address", 0),
    )  # fmt: skip


def said(command: dict[str, Any]) -> str:
    """A command that moves bytes, for people; encoding it checks it."""
    ends = (command.get("source"), command.get("target"))
    places = [f"{each['space']} {each['address']:#x}" for each in ends if each]
    return f"{command.get('size_bytes', 0):#x} bytes, {' → '.join(places)}"
