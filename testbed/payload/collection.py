# SPDX-License-Identifier: Apache-2.0
"""One collection of kselftests, as the user's checkout built it: which programs it has.

Nothing of it is run on this host. Which files are tests is read from the Makefile's plain words
(``TEST_GEN_PROGS``, ``TEST_PROGS``; Documentation/dev-tools/kselftest.rst); where there is no
Makefile (what ``make install`` leaves), every program of the folder is one.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import InputError

DEFAULT_COLLECTION = "vfio"
FOLDER = "tools/testing/selftests"
SHARED = "kselftest"  # shell functions that the collections' scripts share, beside them

DEFAULT_TIMEOUT_S = 45  # tools/testing/selftests/kselftest/runner.sh
EMULATED_FACTOR = 4  # an emulated processor is slower than those that the limits were made on
MAX_BYTES = 256 << 20

_WORDS = re.compile(r"^(TEST_GEN_PROGS|TEST_PROGS)\s*[:+?]?=\s*(.*)$", re.MULTILINE)
_PLAIN = re.compile(r"[\w./+-]+")
_TIMEOUT = re.compile(r"^timeout=([0-9]{1,6})\s*$", re.MULTILINE)
_NOT_SHIPPED = {".c", ".h", ".o", ".d", ".mk", ".cmd", ".S", ".rst", ".a"}
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Program:
    """One test program.

    ``path``         relative to the collection's folder.
    ``interpreter``  of a script (``/bin/bash``); "" of an ELF program.
    ``built``        it is there, and executable.
    """

    path: str
    interpreter: str = ""
    built: bool = True

    @property
    def name(self) -> str:
        """For results: the path without what would nest it."""
        return self.path.replace("/", ".")


@dataclass(frozen=True)
class Collection:
    """A collection: ``timeout_s`` is what each program may take on real hardware."""

    name: str
    folder: Path
    programs: tuple[Program, ...]
    timeout_s: int

    def files(self) -> Iterator[tuple[Path, str]]:
        """What is shipped, and where to: programs, scripts and data, no sources."""
        yield from ((path, str(path.relative_to(self.folder))) for path in _walk(self.folder))
        shared = self.folder.parent / SHARED
        if self.folder.name != SHARED and shared.is_dir():
            yield from ((path, f"../{SHARED}/{path.name}") for path in _walk(shared))

    def archive(self) -> bytes:
        """Those files as an uncompressed tar: ``NAME/…`` and ``kselftest/…``.

        :raises InputError: they are more than :data:`MAX_BYTES`, or cannot be read.
        """
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path, place in self.files():
                try:
                    tar.add(path, os.path.normpath(f"{self.name}/{place}"), recursive=False)
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror}") from error
                if buffer.tell() > MAX_BYTES:
                    raise InputError(
                        f"{self.folder}: more than {MAX_BYTES >> 20} MiB to bring into the guest"
                    )
        return buffer.getvalue()


@dataclass(frozen=True)
class Payload:
    """What of whose tests a run shall do.

    ``devices``    ``gpu0`` or ``host0/gpu0.engine``; none means one that the collection can use.
    ``timeout_s``  for each program; None for what the collection says, and the room that an
        emulated processor needs.
    """

    collection: Collection
    devices: tuple[str, ...] = ()
    timeout_s: float | None = None

    @property
    def deadline_s(self) -> float:
        """What each program may take here."""
        return self.timeout_s or self.collection.timeout_s * EMULATED_FACTOR


def find_collection(word: str, tree: Path | None) -> Collection:
    """The collection called ``word`` in a kernel tree; or that in the folder ``word``, if it has
    a slash.

    :raises InputError: it is not there, or nothing of it was built.
    """
    folder = Path(word).expanduser().absolute()
    if "/" not in word:
        if tree is None:
            raise InputError(
                "whose kselftests?",
                hint="--kernel-tree DIR of the checkout, or --collection DIR of what was built",
            )
        folder = tree / FOLDER / word
    if not folder.is_dir():
        near = sorted(p.parent.name for p in folder.parent.glob("*/Makefile"))
        raise InputError(
            f"kselftests {folder}: no such folder",
            hint="the collections there: " + ", ".join(near[:20]) if near else "",
        )
    programs = tuple(_programs(folder))
    if not any(program.built for program in programs):
        raise InputError(
            f"kselftests {folder}: no test program was built",
            hint=f"make -C {FOLDER} TARGETS={folder.name}, in the kernel tree",
        )
    return Collection(folder.name, folder, programs, _timeout_s(folder))


def _programs(folder: Path) -> Iterator[Program]:
    makefile = folder / "Makefile"
    if makefile.is_file():
        text = makefile.read_text(errors="replace").replace("\\\n", " ")
        found = [word for _, words in _WORDS.findall(text) for word in words.split()]
        named = [word for word in found if _PLAIN.fullmatch(word) and ".." not in word]
        # Words that make would work out (per architecture) have left their programs, if built.
        listed = named or [path.name for path in _top(folder)]
    else:
        listed = [path.name for path in _top(folder)]
    for name in dict.fromkeys(listed):
        path = folder / name
        built = path.is_file() and os.access(path, os.X_OK)
        yield Program(name, _interpreter(path) if built else "", built)


def _top(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in _NOT_SHIPPED
        and os.access(path, os.X_OK)
        and (_head(path).startswith(_ELF) or _interpreter(path))
    ]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(256)


def _interpreter(path: Path) -> str:
    head = _head(path)
    if not head.startswith(b"#!"):
        return ""
    words = head[2:].split(b"\n", 1)[0].decode(errors="replace").split()
    if words and words[0].endswith("/env"):
        words = [word for word in words[1:] if not word.startswith("-")]
    return words[0] if words else ""


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files below it that a test may want, without following links out of it."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix in _NOT_SHIPPED or path.name == "Makefile":
            continue
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            yield path


def _timeout_s(folder: Path) -> int:
    """From the collection's ``settings``; 0 there means no limit, which nothing has here."""
    settings = folder / "settings"
    found = _TIMEOUT.search(settings.read_text(errors="replace")) if settings.is_file() else None
    return (int(found[1]) if found else 0) or DEFAULT_TIMEOUT_S
