# SPDX-License-Identifier: Apache-2.0
"""A bundle's file: one for given members, and one error for anything else. Nothing is written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.bundle import archive, manifest
from testbed.errors import InputError
from tests.unit.bundle.run_folders import MEMBERS, make_bundle

GOOD = make_bundle()


def refused(content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        archive.parse("x.zip", content)
    assert caught.value.exit_code == 2
    assert len(caught.value.diagnostics) == 1
    assert str(caught.value).startswith("x.zip")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zipped(
    entries: list[tuple[zipfile.ZipInfo | str, bytes]],
    compression: int = zipfile.ZIP_STORED,
    *,
    listed: bool = True,
) -> bytes:
    """A ZIP with a manifest that names all entries, made as others make them."""
    names = {e if isinstance(e, str) else e.filename: content for e, content in entries}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names twice
        if listed:
            small = {name: content for name, content in names.items() if len(name) < 150}
            made.writestr(
                plain("manifest.json"),
                manifest.dump(manifest.make(small, tool_version="0", kind="run")),
            )
        for entry, content in entries:
            info = plain(entry) if isinstance(entry, str) else entry
            made.writestr(info, content, compression)
    return buffer.getvalue()


def plain(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.external_attr = mode << 16
    info.create_system = 3
    return info


def edited(old: bytes, new: bytes) -> bytes:
    """The good bundle with a word changed wherever it stands, lengths kept."""
    assert len(old) == len(new)
    assert old in GOOD
    return GOOD.replace(old, new)


def relisted(change: Callable[[dict[str, object]], None]) -> bytes:
    """The good bundle with another manifest."""
    data = json.loads(manifest.dump(manifest.make(MEMBERS, tool_version="0", kind="run")))
    change(data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr(plain("manifest.json"), json.dumps(data))
        for name, content in sorted(MEMBERS.items()):
            made.writestr(plain(name), content)
    return buffer.getvalue()


def with_deep_manifest() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr(plain("manifest.json"), "[" * 200_000)
    return buffer.getvalue()


def bomb() -> bytes:
    return zipped([("a.txt", bytes(manifest.MOST_MEMBER_BYTES))], zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """Many entries of the directory over the same bytes: a bomb without compression."""
    content = bytes(1 << 20)
    base = zipped([("a.txt", content)])
    end = base.rindex(b"PK\x05\x06")
    _, _, _, count, _, size, offset, _ = struct.unpack("<4s4H2LH", base[end:])
    directory = base[offset:end]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    more = b"".join(entry.replace(b"a.txt", b"b%04d" % n) for n in range(200))
    tail = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, count + 200, count + 200, size + len(more), offset, 0
    )
    return base[:offset] + directory + more + tail


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is no bundle"),
    "text": (lambda: b"title: x\n", "is no bundle"),
    "tar": (lambda: b"\x28\xb5\x2f\xfd" + bytes(100), "is no bundle"),
    "truncated": (lambda: GOOD[:-30], "is cut off"),
    "half": (lambda: GOOD[: len(GOOD) // 2], "is cut off"),
    "only its beginning": (lambda: GOOD[:10], "is cut off"),
    "something behind it": (lambda: GOOD + b"x", "after its end"),
    "something before it": (lambda: b"PK\x03\x04" + GOOD, "not where it must be"),
    "a comment": (lambda: GOOD[:-2] + b"\x03\x00abc", "after its end"),
    "a flipped member": (lambda: edited(b"line\nline\n", b"line\nlime\n"), "is damaged"),
    "climbs": (lambda: zipped([("../evil", b"x")]), "leads out of the bundle: '../evil'"),
    "climbs further in": (lambda: zipped([("a/../../b", b"x")]), "leads out"),
    "absolute": (lambda: zipped([("/etc/passwd", b"x")]), "is absolute"),
    "a drive": (lambda: zipped([("C:/x", b"x")]), "is absolute"),
    "backslashes": (lambda: zipped([("..\\evil", b"x")]), "has characters"),
    "a hidden file": (lambda: zipped([(".bashrc", b"x")]), "has characters"),
    "an empty part": (lambda: zipped([("a//b", b"x")]), "has characters"),
    "a device's name": (lambda: zipped([("rack/aux.log", b"x")]), "has characters"),
    "right to left": (lambda: zipped([("a\u202egpj.log", b"x")]), "'a\\u202egpj.log'"),
    "another alphabet": (lambda: zipped([("rec\u043erd.json", b"x")]), "has characters"),
    "an escape": (lambda: zipped([("a\x1b[2Jb", b"x")]), "has characters"),
    "a NUL": (
        lambda: zipped([("abcdef.txt", b"x")]).replace(b"abcdef.txt", b"abc\x00ef.txt"),
        "has characters",
    ),
    "a long name": (lambda: zipped([("a" * 201, b"x")]), "too long"),
    "too deep": (lambda: zipped([("a/b/c/d/e/f/g", b"x")]), "deeper than 6"),
    "a link": (
        lambda: zipped([(plain("a.txt", stat.S_IFLNK | 0o777), b"/etc/passwd")]),
        "'a.txt' is a link",
    ),
    "a device": (lambda: zipped([(plain("a.txt", stat.S_IFBLK), b"")]), "'a.txt' is no file"),
    "a pipe": (lambda: zipped([(plain("a.txt", stat.S_IFIFO), b"")]), "'a.txt' is no file"),
    "a folder": (lambda: zipped([(plain("a/", stat.S_IFDIR), b"")]), "has characters"),
    "no kind": (lambda: zipped([(plain("a.txt", 0), b"x")]), "'a.txt' is no file"),
    "twice": (lambda: zipped([("a.txt", b"x"), ("a.txt", b"x")]), "are one name"),
    "twice by case": (lambda: zipped([("a.txt", b"x"), ("A.TXT", b"y")]), "are one name"),
    "compressed": (
        lambda: zipped([("a.txt", b"x" * 999)], zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a bomb": (bomb, "is compressed"),
    "overlapping": (overlapping, "larger than itself"),
    "a large member": (
        lambda: zipped([("a.txt", bytes(manifest.MOST_MEMBER_BYTES + 1))]),
        "at most 16777216",
    ),
    "too many": (
        lambda: zipped([(f"{n}.txt", b"") for n in range(2002)], listed=False),
        "at most 2000",
    ),
    "encrypted": (
        lambda: zipped([("a.txt", b"x")]).replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
        ),
        "is encrypted",
    ),
    "no manifest": (lambda: zipped([("a.txt", b"x")], listed=False), "expected 'manifest.json'"),
    "a manifest of anything": (
        lambda: zipped([("manifest.json", b"[1]")], listed=False),
        "another version",
    ),
    "a manifest that is no JSON": (
        lambda: zipped([("manifest.json", b"{")], listed=False),
        "is no JSON",
    ),
    "a deep manifest": (with_deep_manifest, "is no JSON"),
    "another version": (
        lambda: edited(b"testbed.bundle/1", b"testbed.bundle/2"),
        "is damaged",  # the CRC; rightly made it is the next one
    ),
    "another version, rightly": (
        lambda: relisted(lambda data: data.update(schema="testbed.bundle/2")),
        "a bundle of another version: schema 'testbed.bundle/2'; expected 'testbed.bundle/1'",
    ),
    "an unknown key": (lambda: relisted(lambda data: data.update(kin="x")), "did you mean 'kind'"),
    "another kind": (lambda: relisted(lambda data: data.update(kind="x")), "'report' or 'run'"),
    "a member missing": (
        lambda: relisted(
            lambda data: data["members"].append(  # type: ignore[attr-defined]
                {"name": "z", "size_bytes": 0, "sha256": "0" * 64}
            )
        ),
        "'z' is in its manifest.json alone",
    ),
    "a member more": (
        lambda: relisted(lambda data: data["members"].pop()),  # type: ignore[attr-defined]
        "'record.json' is not in its manifest.json",
    ),
    "another digest": (
        lambda: relisted(
            lambda data: data["members"][0].update(  # type: ignore[index]
                sha256="0" * 64
            )
        ),
        "'a.txt' was changed",
    ),
    "another order of keys": (
        lambda: relisted(lambda data: data.update(members=data.pop("members"))),
        "no testbed wrote it so",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_bundle_is_one_error(name: str) -> None:
    make, said = WRONG[name]
    assert said in refused(make())


def test_the_same_members_are_the_same_file() -> None:
    again = archive.write(manifest.make(MEMBERS, tool_version="0", kind="run"), MEMBERS)
    assert again == GOOD
    found = archive.parse("x", GOOD)
    assert dict(found.members) == MEMBERS
    assert found.manifest.kind == "run"
    with pytest.raises(InputError, match="has no member 'b'"):
        found.member("b")


def test_a_file_is_read_only_if_it_is_one(tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(GOOD)
    assert archive.is_bundle(file)
    assert archive.read(file).members == MEMBERS
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert not archive.is_bundle(pipe)
    for path, said in (
        (pipe, "is no file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            archive.read(path)
    with file.open("r+b") as opened:
        opened.truncate(manifest.MOST_BYTES + 1)  # sparse
    with pytest.raises(InputError, match="is too large"):
        archive.read(file)


@contextlib.contextmanager
def nothing_is_written(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
    assert not list(folder.iterdir())


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_happens_to_a_bundle_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "number", "double"])):
            case "flip" if content:
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=30))
            case "drop":
                del content[at : at + data.draw(st.integers(1, 30))]
            case "number":
                number = data.draw(st.sampled_from([0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF]))
                content[at : at + 4] = struct.pack("<L", number)
            case "double":
                end = data.draw(st.integers(at, len(content)))
                content[at:at] = content[at:end]
    with nothing_is_written(tmp_path_factory.mktemp("empty", numbered=True)):
        if bytes(content) == GOOD:
            return
        refused(bytes(content))


NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["manifest.json", "record.json", "a", "../a", "/a", "a/b", "A"]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            NAMES, st.binary(max_size=40), st.sampled_from([0o100644, 0o120777, 0o040755, 0])
        ),
        max_size=6,
    ),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
def test_no_archive_of_others_gets_past(
    entries: list[tuple[str, bytes, int]], compression: int
) -> None:
    with contextlib.suppress(ValueError, UnicodeEncodeError):
        made = [(plain(name, mode), content) for name, content, mode in entries if name]
        with contextlib.suppress(InputError):
            found = archive.parse("x", zipped([*made], compression))
            assert all(not manifest.wrong_name(name) for name in found.members)


def test_the_verb_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(zipped([("../evil", b"x")]))
    for words in (["repro", str(file)], ["bundle", "--show", str(file)]):
        done = subprocess.run(
            [sys.executable, "-m", "testbed.cli", *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert "leads out of the bundle: '../evil'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
