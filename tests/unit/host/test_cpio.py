# SPDX-License-Identifier: Apache-2.0
"""The archive writer, read back by an independent reader written from the format's description."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from testbed.host import cpio


def read(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int], int]]:
    """(name, mode, content, device, mtime) of each entry, of all archives in ``data``."""
    found = []
    position = 0
    while position < len(data):
        assert data[position : position + 6] == b"070701"
        fields = [int(data[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        start = position + 110
        name = data[start : start + name_size - 1].decode()
        assert data[start + name_size - 1] == 0
        content = (start + name_size + 3) & ~3
        if name != "TRAILER!!!":
            body = data[content : content + size]
            found.append((name, fields[1], body, (fields[9], fields[10]), fields[5]))
        position = (content + size + 3) & ~3
    return found


def test_what_goes_in_comes_out() -> None:
    data = cpio.archive(
        [
            cpio.regular("/etc/motd", b"hello", 0o600),
            cpio.symlink("/bin", "usr/bin"),
            cpio.character_device("/dev/console", 5, 1),
            cpio.directory("/tmp", 0o1777),
        ]
    )
    entries = {name: rest for name, *rest in read(data)}
    assert entries["etc/motd"] == [stat.S_IFREG | 0o600, b"hello", (0, 0), 0]
    assert entries["bin"] == [stat.S_IFLNK | 0o777, b"usr/bin", (0, 0), 0]
    assert entries["dev/console"] == [stat.S_IFCHR | 0o600, b"", (5, 1), 0]
    assert entries["tmp"][0] == stat.S_IFDIR | 0o1777
    assert entries["etc"][0] == stat.S_IFDIR | 0o755, "the way to a file is made"


def test_directories_come_before_what_is_in_them() -> None:
    data = cpio.archive([cpio.regular("/a/b/c", b""), cpio.directory("/a/b", 0o700)])
    assert [(name, mode & 0o777) for name, mode, *_ in read(data)] == [
        ("a", 0o755),
        ("a/b", 0o700),
        ("a/b/c", 0o644),
    ]


def test_the_order_of_the_entries_does_not_matter() -> None:
    entries = [cpio.regular(f"/f{i}", bytes(i)) for i in range(9)]
    assert cpio.archive(entries) == cpio.archive(reversed(entries))


def test_archives_can_follow_each_other() -> None:
    first = cpio.archive([cpio.regular("/a", b"123")])
    second = cpio.archive([cpio.regular("/b", b"4")])
    assert len(first) % 4 == 0
    assert [name for name, *_ in read(first + second)] == ["a", "b"]


@pytest.mark.parametrize("path", ["a", "", "/a/../b"])
def test_paths_are_absolute_and_plain(path: str) -> None:
    with pytest.raises(ValueError, match="not an absolute path"):
        cpio.archive([cpio.regular(path, b"")])


def test_one_path_has_one_content() -> None:
    same = cpio.regular("/a", b"1")
    assert len(read(cpio.archive([same, same]))) == 1
    with pytest.raises(ValueError, match="two files named /a"):
        cpio.archive([same, cpio.regular("/a", b"2")])


def test_a_host_file_loses_its_owner_and_special_bits(tmp_path: Path) -> None:
    file = tmp_path / "tool"
    file.write_bytes(b"#!")
    file.chmod(0o4775)
    (tmp_path / "link").symlink_to("tool")
    assert cpio.from_file("/t", file) == cpio.Entry("/t", stat.S_IFREG | 0o755, b"#!")
    assert cpio.from_file("/l", tmp_path / "link") == cpio.symlink("/l", "tool")
