# SPDX-License-Identifier: Apache-2.0
"""Telling kernels from other files, by tiny files made to the formats' descriptions."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from testbed.errors import InputError
from testbed.host import kernel_file

RELEASE = "7.2.0-test"
BUILD_ID = "00112233445566778899aabbccddeeff00112233"


def elf(*, pvh: bool = True, machine: int = 62) -> bytes:
    """A 64-bit ELF header, one PT_NOTE segment, and the words that tell a kernel's release."""
    notes = struct.pack("<III", 4, 4, 6) + b"GNU\0" + bytes(4)
    notes += struct.pack("<III", 4, 20, 3) + b"GNU\0" + bytes.fromhex(BUILD_ID)
    if pvh:
        notes += struct.pack("<III", 4, 8, 18) + b"Xen\0" + struct.pack("<Q", 0x1000000)
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 0, 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(notes), len(notes), 4)
    return header + program + notes + f"Linux version {RELEASE} (me@here)\0".encode()


def bzimage(payload: bytes) -> bytes:
    """A bzImage: two sectors of set-up code, then the payload followed by its length, as linked."""
    image = bytearray(1024)
    image[0x1F1] = 1
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x300 - 0x200)
    version = f"{RELEASE} (me) #1\0".encode()
    image[0x300 : 0x300 + len(version)] = version
    payload += struct.pack("<I", 0x1234)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + bytes(16) + payload + bytes(64)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "kernel"
    path.write_bytes(data)
    return path


def alone(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


def test_a_bzimage_that_is_cut_short(tmp_path: Path) -> None:
    image = bytearray(bzimage(gzip.compress(elf())))
    sectors = (len(image) - 1024) // 16
    struct.pack_into("<I", image, 0x1F4, sectors)
    kernel_file.read(write(tmp_path, bytes(image)))
    with pytest.raises(InputError, match=rf"of {1024 + 16 * sectors} bytes, of which 1030 are"):
        kernel_file.read(write(tmp_path, bytes(image[:1030])))


@pytest.mark.parametrize(
    "compress", [gzip.compress, lzma.compress, alone, bz2.compress, zstandard.compress]
)
def test_the_vmlinux_in_a_bzimage(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    found = kernel_file.read(write(tmp_path, bzimage(compress(elf()))))
    assert found == kernel_file.KernelFile(RELEASE, True, elf(), BUILD_ID)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x02\x21\x4c\x18" + bytes(64),
        gzip.compress(elf())[:-20],
        b"\x28\xb5\x2f\xfd broken",
        gzip.compress(elf(pvh=False)),
        gzip.compress(b"no kernel"),
    ],
    ids=["lz4", "truncated", "broken", "no PVH", "no ELF"],
)
def test_a_bzimage_that_stays_one(tmp_path: Path, payload: bytes) -> None:
    image = bzimage(payload)
    found = kernel_file.read(write(tmp_path, image))
    assert (found.release, found.pvh, found.data) == (RELEASE, False, image)


def test_a_vmlinux(tmp_path: Path) -> None:
    assert kernel_file.read(write(tmp_path, elf())) == kernel_file.KernelFile(
        RELEASE, True, elf(), BUILD_ID
    )


def test_a_vmlinux_that_qemu_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a PVH entry") as caught:
        kernel_file.read(write(tmp_path, elf(pvh=False)))
    assert "bzImage" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", b"#!/bin/sh\n", bytes(4096), b"MZ" + bytes(0x400)],
    ids=["empty", "cut", "script", "zeros", "EFI"],
)
def test_no_kernel(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError):
        kernel_file.read(write(tmp_path, data))


def test_another_machines_program(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not for x86-64"):
        kernel_file.read(write(tmp_path, elf(machine=183)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        kernel_file.read(tmp_path / "none")


def test_random_files_are_refused_and_break_nothing(tmp_path: Path) -> None:
    for size in range(0, 3000, 97):
        for start in (b"", b"\x7fELF\x02\x01\x01"):
            with pytest.raises(InputError):
                kernel_file.read(write(tmp_path, start + os.urandom(size)))
