# SPDX-License-Identifier: Apache-2.0
"""What a kernel file is: bzImage or vmlinux, its release, and its PVH entry.

QEMU starts an uncompressed ELF kernel that has a PVH note at its 32-bit entry, without firmware
code, boot loader or decompressor; emulated, that saves seconds of each boot.

Sources: the kernel's ``Documentation/arch/x86/boot.rst`` (bzImage header),
``include/xen/interface/elfnote.h`` (XEN_ELFNOTE_PHYS32_ENTRY), ``lib/decompress.c`` (magics).
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard

from testbed.errors import InputError

_ELF_MAGIC = b"\x7fELF"
_EM_X86_64 = 62
_PT_NOTE = 4
_PVH_NOTE = (18, b"Xen\0")
_BUILD_ID_NOTE = (3, b"GNU\0")
_BOOT_FLAG = 0xAA55
_HEADER_MAGIC = b"HdrS"
_MIN_HEADER_BYTES = 0x268
_MAX_WINDOW_BYTES = 1 << 31  # kernels are compressed with zstd's largest window


@dataclass(frozen=True)
class KernelFile:
    """A kernel that QEMU can start.

    ``release``  as ``uname -r`` will say, "" if the file does not tell.
    ``pvh``      ``data`` is an ELF file with a PVH entry; otherwise it is the bzImage itself.
    ``build_id`` hexadecimal, "" if there is none, or it is compressed in a way not known here.
    """

    release: str
    pvh: bool
    data: bytes
    build_id: str = ""


def read(path: Path) -> KernelFile:
    """Read a bzImage (yielding the vmlinux in it where that is possible) or a vmlinux.

    :raises InputError: it cannot be read, is no x86-64 Linux kernel, or is a vmlinux that QEMU
        cannot start because it has no PVH entry.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"kernel {path}: {error.strerror}") from error
    if data[:4] == _ELF_MAGIC:
        if not _is_x86_64(data):
            raise InputError(f"kernel {path}: an ELF file, but not for x86-64")
        if not has_pvh_entry(data):
            raise InputError(
                f"kernel {path}: an ELF file without a PVH entry, which QEMU cannot start",
                hint="give the bzImage, or build the kernel with CONFIG_PVH=y",
            )
        return KernelFile(_release_in_vmlinux(data), True, data, build_id(data))
    if not is_bzimage(data):
        raise InputError(
            f"kernel {path}: neither a bzImage nor a vmlinux",
            hint="arch/x86/boot/bzImage of a built kernel tree, or /boot/vmlinuz-…",
        )
    if len(data) < (whole := _whole_bytes(data)):
        raise InputError(
            f"kernel {path}: a bzImage of {whole} bytes, of which {len(data)} are there",
            hint="copy or build it again",
        )
    release = _release_in_bzimage(data)
    vmlinux = extract_vmlinux(data)
    if vmlinux is not None and has_pvh_entry(vmlinux):
        return KernelFile(release, True, vmlinux, build_id(vmlinux))
    return KernelFile(release, False, data, build_id(vmlinux) if vmlinux else "")


def is_bzimage(data: bytes) -> bool:
    """It begins with the header that boot loaders look for."""
    return (
        len(data) >= _MIN_HEADER_BYTES
        and struct.unpack_from("<H", data, 0x1FE)[0] == _BOOT_FLAG
        and data[0x202:0x206] == _HEADER_MAGIC
    )


def _whole_bytes(bzimage: bytes) -> int:
    """How long it says that it is, without what may follow (a signature): ``setup_sects`` and
    ``syssize`` of Documentation/arch/x86/boot.rst.
    """
    syssize: int = struct.unpack_from("<I", bzimage, 0x1F4)[0]
    return ((bzimage[0x1F1] or 4) + 1) * 512 + syssize * 16


def extract_vmlinux(bzimage: bytes) -> bytes | None:
    """The ELF file in a bzImage; None if it is compressed in a way that is not known here."""
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    for magic, decompressor in _DECOMPRESSORS.items():
        if payload.startswith(magic):
            try:
                data = _unpacked(decompressor(), payload)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError):
                return None
            return data if data and data[:4] == _ELF_MAGIC and _is_x86_64(data) else None
    return None


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _unpacked(decompressor: _Decompressor, payload: bytes) -> bytes | None:
    """The content, None if it is not whole. What follows it (its own length) is left alone."""
    data = decompressor.decompress(payload)
    return data if decompressor.eof else None


def _zstd() -> _Decompressor:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    return unpacker.decompressobj()


_DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"\xfd7zXZ\0": lzma.LZMADecompressor,
    b"\x5d\x00\x00": lzma.LZMADecompressor,
    b"BZh": bz2.BZ2Decompressor,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def _is_x86_64(elf: bytes) -> bool:
    return len(elf) >= 64 and elf[4] == 2 and struct.unpack_from("<H", elf, 18)[0] == _EM_X86_64


def has_pvh_entry(elf: bytes) -> bool:
    """A PT_NOTE segment holds XEN_ELFNOTE_PHYS32_ENTRY."""
    return any((kind, name) == _PVH_NOTE for kind, name, _ in _notes(elf))


def build_id(elf: bytes) -> str:
    """The linker's hash of the program, "" if there is none (ld(1), ``--build-id``)."""
    found = (content for kind, name, content in _notes(elf) if (kind, name) == _BUILD_ID_NOTE)
    return next(found, b"").hex()


def _notes(elf: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The notes in all PT_NOTE segments: type, owner, content."""
    table, size, count = (
        struct.unpack_from("<Q", elf, 32)[0],
        *struct.unpack_from("<HH", elf, 54),
    )
    if size < 56:
        return
    for index in range(count):
        header = elf[table + index * size : table + index * size + 56]
        if len(header) < 56:
            return
        if struct.unpack_from("<I", header)[0] == _PT_NOTE:
            offset, file_size = (
                struct.unpack_from("<Q", header, 8)[0],
                struct.unpack_from("<Q", header, 32)[0],
            )
            yield from _notes_in(elf[offset : offset + file_size])


def _notes_in(notes: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    position = 0
    while position + 12 <= len(notes):
        name_size, content_size, kind = struct.unpack_from("<III", notes, position)
        name = position + 12
        content = name + (name_size + 3 & ~3)
        yield kind, notes[name : name + name_size], notes[content : content + content_size]
        position = content + (content_size + 3 & ~3)


def _release_in_bzimage(data: bytes) -> str:
    pointer = struct.unpack_from("<H", data, 0x20E)[0]
    if not pointer:
        return ""
    text = data[pointer + 0x200 : pointer + 0x200 + 256].split(b"\0", 1)[0]
    return text.decode("ascii", "replace").split(" ", 1)[0]


def _release_in_vmlinux(data: bytes) -> str:
    found = re.search(rb"Linux version ([0-9][^ \0]{2,80}) ", data)
    return found[1].decode("ascii", "replace") if found else ""
