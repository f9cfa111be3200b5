# SPDX-License-Identifier: Apache-2.0
"""Loading and unloading modules, with an insmod and a rmmod of our own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from guest_agent import modules
from guest_agent.observe.kmsg import KernelLog


class Log(KernelLog):
    """A kernel log that says what it is told to."""

    def __init__(self, *texts: str) -> None:
        super().__init__("/nonexistent")
        self.texts = texts

    def mark(self) -> int:
        return 7

    def since(
        self, sequence: int, words: tuple[bytes, ...] = (b"",)
    ) -> tuple[list[dict[str, Any]], int]:
        assert sequence == 7
        return [{"level": 3, "text": text} for text in self.texts], 0


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LOADED", "SENT", "PROCESSES", "FOLDER"):
        monkeypatch.setattr(modules, name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    tool(tmp_path, "insmod", f'cp "$1" {tmp_path}/sent; shift; echo "$*" >{tmp_path}/words')
    tool(tmp_path, "rmmod", f'rmdir {tmp_path}/LOADED/"$1"')
    return tmp_path


def tool(guest: Path, name: str, script: str) -> None:
    (guest / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (guest / "bin" / name).chmod(0o755)


def test_a_sent_module_is_loaded_and_its_file_is_gone(guest: Path) -> None:
    records = modules.insert("demo", b"content", ["a=1", "b=two"], Log("demo: hello"))
    assert (guest / "sent").read_bytes() == b"content"
    assert (guest / "words").read_text() == "a=1 b=two\n"
    assert [each["text"] for each in records] == ["demo: hello"]
    assert not list((guest / "SENT").iterdir())


def test_a_refusal_says_what_the_kernel_said(guest: Path) -> None:
    tool(guest, "insmod", 'echo "insmod: can\'t insert: invalid module format" >&2; exit 1')
    said = "demo: version magic '6.1 SMP' should be '7.2 SMP'"
    log = Log("eth0: link up", "demo: loading out-of-tree module taints kernel.", said)
    with pytest.raises(modules.ModuleRefusedError) as caught:
        modules.insert("demo", b"x", [], log)
    assert caught.value.strerror == said
    with pytest.raises(modules.ModuleRefusedError, match="invalid module format"):
        modules.insert("demo", b"x", [], Log())
    assert not list((guest / "SENT").iterdir())


def test_a_module_is_not_loaded_twice(guest: Path) -> None:
    (guest / "LOADED/demo").mkdir()
    with pytest.raises(FileExistsError):
        modules.insert("demo", b"x", [], Log())


def test_what_a_module_depends_on_comes_first(guest: Path) -> None:
    folder = guest / "FOLDER" / os.uname().release
    folder.mkdir()
    (folder / "closure").write_text("first zero first\nsecond\n")
    tool(guest, "insmod", f'echo "${{1##*/}}" >>{guest}/order')
    modules.insert("demo", b"\0depends=first,second\0x", [], Log())
    assert (guest / "order").read_text().split() == ["zero.ko", "first.ko", "demo.ko"]
    with pytest.raises(OSError, match="this kernel has no module third"):
        modules.insert("other", b"\0depends=third\0", [], Log())


def test_a_module_that_stays_names_its_holders(guest: Path) -> None:
    loaded = guest / "LOADED/demo"
    (loaded / "holders/other").mkdir(parents=True)
    descriptors = guest / "PROCESSES/42/fd"
    descriptors.mkdir(parents=True)
    (descriptors / "3").symlink_to("/dev/demo")
    (guest / "PROCESSES/42/comm").write_text("sleep\n")
    tool(guest, "rmmod", "echo busy >&2; exit 1")
    with pytest.raises(
        modules.ModuleBusyError, match=r"does not unload: module other, process 42 \(sleep\)"
    ):
        modules.remove("demo")
    (descriptors / "3").unlink()
    (loaded / "holders/other").rmdir()
    (loaded / "refcnt").write_text("2\n")
    with pytest.raises(modules.ModuleBusyError, match="2 users in the kernel"):
        modules.remove("demo")


def test_a_module_that_goes_is_gone(guest: Path) -> None:
    (guest / "LOADED/demo").mkdir()
    modules.remove("demo")
    with pytest.raises(FileNotFoundError):
        modules.remove("demo")
