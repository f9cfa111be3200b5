# SPDX-License-Identifier: Apache-2.0
"""What a built collection of kselftests consists of, and what its programs are linked with."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import InputError
from testbed.payload.collection import FOLDER, Payload, Program, find_collection
from testbed.payload.libraries import STATIC, linkage, wanted


def program(path: Path, text: str = "#!/bin/sh\necho ok 1 a\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / FOLDER / "vfio"
    program(folder / "a_test")
    program(folder / "scripts/b.sh", "#!/usr/bin/env bash\n")
    program(folder / "helper")
    (folder / "a_test.c").write_text("int main() {}\n")
    (folder / "settings").write_text("timeout=7\n")
    program(folder.parent / "kselftest/ktap_helpers.sh")
    (folder / "Makefile").write_text(
        "CFLAGS = -O2\nTEST_GEN_PROGS := a_test \\\n\tnot_built\n"
        "TEST_PROGS += scripts/b.sh $(MORE)\nTEST_GEN_PROGS_EXTENDED = helper\n"
        "TEST_FILES += ../../etc\nTEST_PROGS += ../outside\n"
    )
    return tmp_path


def test_the_makefile_names_the_programs(tree: Path) -> None:
    found = find_collection("vfio", tree)
    assert found.programs == (
        Program("a_test", "/bin/sh"),
        Program("not_built", built=False),
        Program("scripts/b.sh", "bash"),
    )
    assert (found.name, found.timeout_s) == ("vfio", 7)
    assert Payload(found).deadline_s == 28
    assert Payload(found, timeout_s=3).deadline_s == 3


def test_without_a_makefile_every_program_is_a_test(tree: Path) -> None:
    (tree / FOLDER / "vfio/Makefile").unlink()
    found = find_collection(f"{tree}/{FOLDER}/vfio", None)
    assert [each.path for each in found.programs] == ["a_test", "helper"]


def test_programs_and_data_are_shipped_and_sources_are_not(tree: Path) -> None:
    (tree / FOLDER / "vfio/out").symlink_to("/etc/hostname")
    archive = find_collection("vfio", tree).archive()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == [
            "vfio/a_test",
            "vfio/helper",
            "vfio/scripts/b.sh",
            "vfio/settings",
            "kselftest/ktap_helpers.sh",
        ]


def test_what_is_not_there_is_told(tree: Path) -> None:
    with pytest.raises(InputError, match=r"vfoi: no such folder") as missing:
        find_collection("vfoi", tree)
    assert missing.value.hint == "the collections there: vfio"
    with pytest.raises(InputError, match="whose kselftests"):
        find_collection("vfio", None)
    for name in ("a_test", "scripts/b.sh"):
        (tree / FOLDER / "vfio" / name).unlink()
    with pytest.raises(InputError, match="no test program was built") as unbuilt:
        find_collection("vfio", tree)
    assert "TARGETS=vfio" in unbuilt.value.hint


def test_libraries_are_found_without_running_anything() -> None:
    python = Path(sys.executable).resolve()
    link = linkage(python)
    assert "libc.so.6" in link.needed
    assert link.loader.startswith("/lib64/ld-linux")
    assert wanted(python, lambda _: True).shipped == {}
    assert "libc.so.6" in wanted(python, lambda _: False).shipped
    nowhere = wanted(python, lambda name: name != "libc.so.6", folders=())
    assert nowhere.missing == {"libc.so.6": python.name}


@given(st.binary(max_size=200), st.integers(0, 1))
def test_any_file_has_a_linkage(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, elf: int
) -> None:
    path = tmp_path_factory.mktemp("elf") / "x"
    path.write_bytes(b"\x7fELF\x02\x01" * elf + data)
    assert linkage(path) == STATIC or elf
