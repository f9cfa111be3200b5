# SPDX-License-Identifier: Apache-2.0
"""From a run folder to the bytes of its bundle: what goes in, what is cut, what stays at home.

The members keep their places in the run folder, so that what reads run folders reads an unpacked
bundle too. Nothing of the clock, of the host or of the order of its folders gets in.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from testbed.bundle import archive, manifest
from testbed.bundle.manifest import LeftOut, Manifest
from testbed.bundle.scrub import SCRUBBED, scrubber
from testbed.errors import InputError
from testbed.host import places
from testbed.page.render import render
from testbed.reports.runner import REPORT_YAML
from testbed.results import options, record
from testbed.results.ktap import one_line
from testbed.run_products import KERNEL_CONFIG

SUFFIX = ".testbed.zip"
INDEX = "index.html"
KERNELS = "kernels"  # their configurations, each once whatever racks ran it
_SUFFIXES = frozenset((".json", ".jsonl", ".log", ".txt", ".xml", ".yaml"))
_PRIVATE = frozenset((places.FILE_NAME, "pytest.ini"))
_KEPT_BYTES = 1 << 20  # of a log; of more the middle is left out
_LOGS = frozenset((".jsonl", ".log"))


@dataclass
class _Found:
    members: dict[str, bytes] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)


def write(file: Path, content: bytes) -> None:
    """Write a bundle, whole or not at all (OSError)."""
    record.write_atomically(file, content)


def bundle(run_dir: Path) -> tuple[Manifest, bytes]:
    """The bundle of the run in a folder: its manifest and its file.

    :raises InputError: it is no folder of a run that has ended, or holds too much.
    """
    _check(run_dir)
    found = _collect(run_dir, scrubber(places.read_places(run_dir)))
    for name in (record.FILE_NAME, options.FILE_NAME):
        if name not in found.members:
            raise InputError(
                f"{run_dir}: no {name}",
                hint="a run of this version of testbed that has ended has one",
            )
    found.members[INDEX] = _page(found.members)
    written = record.parse_record(record.FILE_NAME, found.members[record.FILE_NAME])
    listed = manifest.make(
        found.members,
        tool_version=written.tool_version,
        kind="report" if REPORT_YAML in found.members else "run",
        left_out=tuple(found.left_out),
        scrubbed=SCRUBBED,
        cut=found.cut,
    )
    content = archive.write(listed, found.members)
    archive.parse(str(run_dir), content)  # what we would not read we do not write
    return listed, content


def _check(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise InputError(
            f"{run_dir}: no such folder", hint="the folder that a run named at its end"
        )
    if not (run_dir / record.FILE_NAME).is_file():
        parts = sorted(p.parent.name for p in run_dir.glob(f"*/{record.FILE_NAME}"))
        hint = f"it holds several runs: {', '.join(parts)}" if parts else "has the run ended?"
        raise InputError(f"{run_dir}: no {record.FILE_NAME}", hint=hint)


def _collect(run_dir: Path, scrub: Callable[[bytes], bytes]) -> _Found:
    found = _Found()
    for path in _files(run_dir):
        name = path.relative_to(run_dir).as_posix()
        if path.name in _PRIVATE or (path.suffix == ".zip" and archive.is_bundle(path)):
            continue  # nobody's business, or what we made before: it must not change what we make
        why = _why_not(path, name)
        if why:
            shown = one_line(name.encode("ascii", "backslashreplace").decode())
            found.left_out.append(LeftOut(name=shown[:1000], why=why))
            continue
        try:
            content = scrub(_read(path, name, found.cut))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if path.name.startswith(KERNEL_CONFIG):
            name = f"{KERNELS}/{path.name}"
        found.members[name] = content
    return found


def _files(folder: Path) -> Iterator[Path]:
    """All below, in an order of their own; links are followed nowhere."""
    for path in sorted(folder.iterdir(), key=lambda each: each.name):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from _files(path)
        elif not stat.S_ISSOCK(mode):
            yield path


def _why_not(path: Path, name: str) -> str:
    """Why a file is left out; "" if it is not."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return "no plain file"
    if path.name == INDEX:
        return "made again"
    if PurePosixPath(name).suffix not in _SUFFIXES and not path.name.startswith(KERNEL_CONFIG):
        return "not of a kind that a bundle has"
    return "a name that a bundle cannot have" if manifest.wrong_name(name) else ""


def _read(path: Path, name: str, cut: dict[str, int]) -> bytes:
    """A file, or a log's beginning and end."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= _KEPT_BYTES or path.suffix not in _LOGS:
            return file.read()
        begin = file.read(_KEPT_BYTES // 4).rpartition(b"\n")[0]
        end_bytes = _KEPT_BYTES * 3 // 4
        file.seek(size_bytes - end_bytes)
        end = file.read(end_bytes).partition(b"\n")[2]
    cut[name] = size_bytes - len(begin) - len(end) - 1
    return begin + b"\n" + end


def _page(members: Mapping[str, bytes]) -> bytes:
    """The page of what is in the bundle, and of nothing else."""
    with tempfile.TemporaryDirectory(prefix="testbed-page-") as made:
        folder = Path(made) / "run"
        for name, content in members.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return render(folder).encode()
