# SPDX-License-Identifier: Apache-2.0
"""Which file a module is, remembered as long as nothing that it depends on has changed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.host import built_modules, guest_modules, paths, prepare


class Builds:
    """Stands for what builds; counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cache" / "modules" / "key" / "p2p_router.ko"
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(b"\x7fELF")
        self.is_packaged = True
        self.asked: list[tuple[str, str]] = []

    def builder(self, kernel: str, _setup: Any) -> Any:
        def build(name: str) -> Any:
            self.asked.append((kernel, name))
            return SimpleNamespace(file=self.file)

        return SimpleNamespace(build=build, is_packaged=self.is_packaged)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    made = Builds(tmp_path)
    for name in ("images", "guest_agent", "cache/current"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(paths, "data_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(guest_modules, "builder", made.builder)
    monkeypatch.setattr(prepare, "options", lambda **_: None)
    return made


def ask(kernel: str = "default", name: str = "p2p_router") -> Path:
    return built_modules.module_file(kernel, name)


def test_it_is_worked_out_once(builds: Builds) -> None:
    assert [ask(), ask(), ask()] == [builds.file] * 3
    assert builds.asked == [("default", "p2p_router")]


def test_another_kernel_and_another_module_are_others(builds: Builds) -> None:
    for kernel, name in (("default", "one"), ("generic", "one"), ("default", "two")):
        ask(kernel, name)
    assert len(builds.asked) == 3


@pytest.mark.parametrize("changed", ["images", "guest_agent", "cache/current"])
def test_what_it_depends_on_has_changed(builds: Builds, tmp_path: Path, changed: str) -> None:
    """The manifest or the lock, a module's sources, which packages entries point to."""
    ask()
    (tmp_path / changed / "file").write_text("something else")
    ask()
    assert len(builds.asked) == 2


def test_the_file_is_gone(builds: Builds) -> None:
    ask()
    data = builds.file.read_bytes()
    builds.file.unlink()
    builds.file.with_name("other.ko").write_bytes(data)
    builds.file = builds.file.with_name("other.ko")
    assert ask() == builds.file
    assert len(builds.asked) == 2


def test_nothing_is_remembered_of_a_path(builds: Builds) -> None:
    """Whoever builds a tree again has another kernel in the same place."""
    builds.is_packaged = False
    ask("/home/me/linux")
    ask("/home/me/linux")
    assert len(builds.asked) == 2


def test_what_is_remembered_makes_no_sense(builds: Builds, tmp_path: Path) -> None:
    ask()
    (stored,) = (tmp_path / "cache" / "remembered").glob("module-*.json")
    for text in ("{", "[1]", '{"a": 1}', '"/nowhere"'):
        stored.write_text(text)
        os.utime(stored)
        assert ask() == builds.file
