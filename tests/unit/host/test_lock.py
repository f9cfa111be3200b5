# SPDX-License-Identifier: Apache-2.0
"""What may change between the reviewed packages and those of today, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import SetupError
from testbed.host import lock
from testbed.host.lock import LockedPackage


def package(name: str, version: str = "1", sha256: str = "aa") -> LockedPackage:
    return LockedPackage(name, version, "amd64", sha256, 100)


OLD = (package("a"), package("b"), package("c"))


def test_the_same_is_the_same() -> None:
    assert lock.compare(OLD, reversed(OLD)) == lock.Drift()
    assert lock.check("set", OLD, OLD, locked=True) == lock.Drift()


def test_each_kind_of_change_is_told() -> None:
    drift = lock.compare(OLD, (package("a"), package("b", "2", "bb"), package("d")))
    assert drift.conflicts == ()
    assert drift.changes == ("b 1 is now 2", "c 1 is gone", "d 1 is new")


def test_newer_is_used_unless_locked() -> None:
    new = (package("a"), package("b", "2", "bb"), package("c"))
    assert lock.check("set", OLD, new, locked=False).changes == ("b 1 is now 2",)
    with pytest.raises(SetupError, match="set is not as reviewed: b 1 is now 2"):
        lock.check("set", OLD, new, locked=True)


@pytest.mark.parametrize("locked", [False, True])
def test_other_bytes_under_a_known_version_are_refused(locked: bool) -> None:
    new = (package("a", sha256="ff"), package("b"), package("c"))
    with pytest.raises(SetupError, match=r"other content .*a 1: ff instead of aa") as caught:
        lock.check("set", OLD, new, locked=locked)
    assert "--mirror" in caught.value.hint


def test_a_set_that_was_never_reviewed() -> None:
    assert lock.check("set", None, OLD, locked=False) == lock.Drift()
    with pytest.raises(SetupError, match=r"not in images/lock\.json"):
        lock.check("set", None, OLD, locked=True)


def test_the_file_keeps_the_other_sets(tmp_path: Path) -> None:
    file = tmp_path / "lock.json"
    assert lock.read_reviewed(file) == {}
    lock.write_reviewed(file, {"one": OLD})
    lock.write_reviewed(file, {"two": OLD[:1]})
    assert lock.read_reviewed(file) == {"one": OLD, "two": OLD[:1]}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "sets": {}}'])
def test_a_broken_file_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lock.json"
    file.write_text(text)
    with pytest.raises(SetupError, match="not a lock file"):
        lock.read_reviewed(file)


def test_an_entry_that_means_nothing(tmp_path: Path) -> None:
    file = tmp_path / "lock.json"
    file.write_text('{"format": 1, "sets": {"one": [{"name": "a"}]}}')
    with pytest.raises(SetupError, match="not understood"):
        lock.read_reviewed(file)
