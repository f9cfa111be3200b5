# SPDX-License-Identifier: Apache-2.0
"""What a bundle says of itself, what its members may be called, and how much it may hold. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from testbed.errors import Diagnostic, InputError
from testbed.topology.problem import nearest
from testbed.topology.reading import Strict

SCHEMA = "testbed.bundle/1"
MANIFEST = "manifest.json"

MIB = 1 << 20
MOST_BYTES = 64 * MIB  # of the file, and so of all its members, which are not compressed
MOST_MEMBER_BYTES = 16 * MIB
MOST_MANIFEST_BYTES = MIB
MOST_MEMBERS = 2000
LONGEST_NAME = 200
DEEPEST = 6

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~+-]*")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows

Count = Annotated[int, Field(strict=True, ge=0, le=MOST_BYTES)]
Words = Annotated[str, Field(max_length=4096)]


class Member(Strict):
    """One file. ``cut_bytes``: so much of its middle was left out."""

    name: Annotated[str, Field(max_length=LONGEST_NAME)]
    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    cut_bytes: Annotated[int, Field(strict=True, ge=0)] = 0


class LeftOut(Strict):
    """A file of the run folder that is not in the bundle."""

    name: Words
    why: Words


class Manifest(Strict):
    """The first member, ``manifest.json``.

    ``kind``     a ``report`` that was to happen again, or a ``run`` of suites.
    ``members``  all others, by name.
    """

    schema_: Literal["testbed.bundle/1"] = Field(alias="schema")
    tool_version: Annotated[str, Field(max_length=100)]
    kind: Literal["report", "run"]
    members: Annotated[tuple[Member, ...], Field(max_length=MOST_MEMBERS)]
    left_out: Annotated[tuple[LeftOut, ...], Field(max_length=MOST_MEMBERS)] = ()
    scrubbed: Annotated[tuple[Words, ...], Field(max_length=100)] = ()


def wrong_name(name: str) -> str:
    """Why a member may not be called so; "" if it may.

    Only what means the same everywhere: letters, digits and ``._~+-`` between slashes.
    """
    if not name or len(name) > LONGEST_NAME:
        return "is empty or too long"
    parts = name.split("/")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "is absolute"
    if ".." in parts:
        return "leads out of the bundle"
    if len(parts) > DEEPEST:
        return f"is deeper than {DEEPEST} folders"
    for part in parts:
        if not _PART.fullmatch(part) or part.endswith(".") or _DEVICES.fullmatch(part):
            return "has characters or words that no name in a bundle has"
    return ""


def dump(manifest: Manifest) -> bytes:
    """As the member's content."""
    data = manifest.model_dump(mode="json", by_alias=True)
    for member in data["members"]:
        if not member["cut_bytes"]:
            del member["cut_bytes"]
    return (json.dumps(data, indent=1, ensure_ascii=True) + "\n").encode()


def load(name: str, content: bytes) -> Manifest:
    """What :func:`dump` wrote; ``name`` is the bundle's.

    :raises InputError: it is none, or of another version.
    """

    def refuse(message: str, expected: str = "", near: str = "") -> InputError:
        return InputError(
            diagnostics=[Diagnostic(f"{name}: {MANIFEST}", 0, 0, message, expected, near)]
        )

    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is no JSON: {str(error)[:100]}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        shown = repr(schema)[:60]
        raise refuse(f"a bundle of another version: schema {shown}", f"'{SCHEMA}'")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:100]
        near = nearest(str(first["loc"][-1]), [*Manifest.model_fields]) if first["loc"] else ""
        raise refuse(f"{place}: {first['msg']}", near=near) from None


def make(members: Mapping[str, bytes], **more: Any) -> Manifest:
    """The manifest of these members; ``more`` are its other fields, and ``cut`` bytes by name."""
    cut: Mapping[str, int] = more.pop("cut", {})
    listed = tuple(
        Member(
            name=name,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            cut_bytes=cut.get(name, 0),
        )
        for name, content in sorted(members.items())
    )
    return Manifest(schema=SCHEMA, members=listed, **more)
