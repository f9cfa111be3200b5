# SPDX-License-Identifier: Apache-2.0
"""The file: a ZIP that nothing but its members' names and bytes decides. Reading trusts nothing.

Members are stored, not compressed: what a compressor makes depends on its version, and what is not
compressed cannot be a bomb. A manifest that names each member's size and SHA-256 is first, the
others follow by name; every one is a plain file of 1980 with mode 0644. So there is exactly one
file for these members, and reading ends by making it again: whatever is not that file, byte by
byte, is refused, however it came about. Nothing is ever written by reading.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from testbed.bundle import manifest
from testbed.bundle.manifest import MANIFEST, Manifest, Member
from testbed.errors import Diagnostic, InputError
from testbed.results.ktap import one_line

MAGIC = b"PK\x03\x04"
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = (stat.S_IFREG | 0o644) << 16
_UNIX = 3
# PKWARE APPNOTE 4.3.16: the end of the central directory, without a comment.
_END = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\x05\x06"
_END64_LOCATOR = b"PK\x06\x07"
_END64_LOCATOR_BYTES = 20
_ENTRY_BYTES = 46


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole. ``name`` as the user named it."""

    name: str
    manifest: Manifest
    members: Mapping[str, bytes] = field(repr=False)

    def member(self, name: str) -> bytes:
        """Its bytes.

        :raises InputError: the bundle has none of that name.
        """
        if name not in self.members:
            raise _refusal(self.name, f"has no member '{name}'")
        return self.members[name]


def write(listed: Manifest, members: Mapping[str, bytes]) -> bytes:
    """The file for these members, which ``listed`` names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        contents = {MANIFEST: manifest.dump(listed)}
        contents |= {member.name: members[member.name] for member in listed.members}
        for name, content in contents.items():
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = _MODE
            info.create_system = _UNIX
            archive.writestr(info, content)
    return buffer.getvalue()


def is_bundle(path: Path) -> bool:
    """It begins as bundles do; whether it is one, :func:`read` says."""
    try:
        return _begin(path) == MAGIC
    except OSError:
        return False


def _begin(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(len(MAGIC)) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


def read(path: Path) -> Bundle:
    """The bundle in a file.

    :raises InputError: it cannot be read, or is not a bundle as this version writes it.
    """
    name = str(path)
    try:
        # Not to wait for whoever might write into a named pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise _refusal(name, "is no file")
            if found.st_size > manifest.MOST_BYTES:
                raise _too_large(name)
            content = file.read(manifest.MOST_BYTES + 1)
    except OSError as error:
        raise _refusal(name, f"cannot be read: {error.strerror}") from error
    return parse(name, content)


def parse(name: str, content: bytes) -> Bundle:
    """The bundle in the bytes of a file called ``name``.

    :raises InputError: as :func:`read`.
    """
    if len(content) > manifest.MOST_BYTES:
        raise _too_large(name)
    _check_end(name, content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            _check_entries(name, entries, len(content))
            members = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
        raise _refusal(name, f"is damaged: {_said(error)}") from None
    except (RuntimeError, OverflowError, OSError, UnicodeError, KeyError, IndexError) as error:
        raise _refusal(name, f"is damaged: {_said(error)}") from None
    if entries[0].filename != MANIFEST:
        raise _refusal(name, f"begins with '{_shown(entries[0].filename)}'", f"'{MANIFEST}'")
    listed = manifest.load(name, members.pop(MANIFEST))
    _check_members(name, listed, members)
    if write(listed, members) != content:
        raise _refusal(name, "has something beside its members: no testbed wrote it so")
    return Bundle(name, listed, members)


def _check_end(name: str, content: bytes) -> None:
    """Where the directory is and how large, before anyone reads it."""
    if content[: len(MAGIC)] != MAGIC:
        raise _refusal(name, "is no bundle", "what `testbed bundle` writes")
    tail = content[-_END.size :]
    if len(tail) < _END.size or tail[:4] != _END_MAGIC:
        raise _refusal(name, "is cut off, or has something after its end")
    _, _, _, count, total, size_bytes, offset, comment = _END.unpack(tail)
    locator = content[-_END.size - _END64_LOCATOR_BYTES :][:4]
    if locator == _END64_LOCATOR or count != total or comment:
        raise _refusal(name, "is damaged: its directory is not as in a bundle")
    if count > manifest.MOST_MEMBERS + 1:
        raise _refusal(name, f"has {count} members", f"at most {manifest.MOST_MEMBERS}")
    most_bytes = count * (_ENTRY_BYTES + manifest.LONGEST_NAME)
    if size_bytes > most_bytes or offset + size_bytes + _END.size != len(content) or not count:
        raise _refusal(name, "is damaged: its directory is not where it must be")


def _check_entries(name: str, entries: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Before a single member is read: names, kinds and sizes."""
    seen: dict[str, str] = {}
    total = 0
    if not entries:
        raise _refusal(name, "is empty")
    for entry in entries:
        # What the archive has in its directory, before zipfile made a path of it.
        word = entry.orig_filename
        shown = _shown(word)
        wrong = manifest.wrong_name(word)
        if wrong:
            raise _refusal(name, f"a member's name {wrong}: '{shown}'")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind == stat.S_IFLNK:
            raise _refusal(name, f"'{shown}' is a link", "files alone")
        if kind != stat.S_IFREG or entry.is_dir():
            raise _refusal(name, f"'{shown}' is no file", "files alone")
        if entry.flag_bits & 1:
            raise _refusal(name, f"'{shown}' is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _refusal(name, f"'{shown}' is compressed", "members that are not")
        if word.casefold() in seen:
            raise _refusal(name, f"'{shown}' and '{_shown(seen[word.casefold()])}' are one name")
        seen[word.casefold()] = word
        limit = manifest.MOST_MANIFEST_BYTES if word == MANIFEST else manifest.MOST_MEMBER_BYTES
        if entry.file_size > limit:
            raise _refusal(name, f"'{shown}' has {entry.file_size} bytes", f"at most {limit}")
        total += entry.file_size
        if total > file_bytes:
            raise _refusal(name, "is damaged: its members are larger than itself")


def _check_members(name: str, listed: Manifest, members: Mapping[str, bytes]) -> None:
    """That they are exactly what the manifest says."""
    names = [member.name for member in listed.members]
    if len(set(names)) != len(names):
        raise _refusal(name, f"its {MANIFEST} names a member twice")
    for missing in sorted(set(names) - set(members)):
        raise _refusal(name, f"'{_shown(missing)}' is in its {MANIFEST} alone")
    for more in sorted(set(members) - set(names)):
        raise _refusal(name, f"'{more}' is not in its {MANIFEST}")
    for member in listed.members:
        if not _is(member, members[member.name]):
            raise _refusal(name, f"'{member.name}' was changed: its SHA-256 is another")


def _is(member: Member, content: bytes) -> bool:
    return (
        len(content) == member.size_bytes and hashlib.sha256(content).hexdigest() == member.sha256
    )


def _too_large(name: str) -> InputError:
    return _refusal(name, "is too large", f"at most {manifest.MOST_BYTES} bytes")


def _refusal(name: str, message: str, expected: str = "") -> InputError:
    return InputError(diagnostics=[Diagnostic(name, 0, 0, message, expected)])


def _said(error: Exception) -> str:
    return _shown(str(error)) or type(error).__name__


def _shown(text: str) -> str:
    """A stranger's words, fit for a terminal."""
    return one_line(text.encode("ascii", "backslashreplace").decode())[:100]
