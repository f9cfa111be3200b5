# SPDX-License-Identifier: Apache-2.0
"""The manifest that is shipped, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import SetupError
from testbed.host import lock, manifest, prepare
from testbed.host.digest import digest


def test_the_shipped_one() -> None:
    shipped = manifest.load()
    assert {"default", "generic", "debian12", "debian13"} <= shipped.kernels.keys()
    assert shipped.toolroot.date_waived
    assert not shipped.guest.date_waived, "stable suites are within their date"


def test_what_every_setup_makes_is_reviewed() -> None:
    reviewed = lock.read_reviewed(prepare.lock_file())
    assert {
        "toolroot",
        "toolchain",
        "guest",
        "kernel:default",
        "headers:default",
        "virtme",
    } <= reviewed.keys()
    for packages in reviewed.values():
        assert all(len(package.sha256) == 64 for package in packages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version: 1", "version: 2"), "version"),
        (("toolroot:", "tools:"), "toolroot"),
        (("suites: [testing]", "suites: []"), r"toolroot\.suites"),
        (
            ("packages: [libtcmalloc-minimal4t64, qemu-system-x86]", "packages: [--option]"),
            r"toolroot\.packages",
        ),
        (("boot: [virtio_pci", "boot: [../x"), r"modules\.boot"),
        (("version: 1", "version: ["), "while parsing"),
    ],
)
def test_a_wrong_one_says_where(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (prepare.lock_file().parent / "manifest.yaml").read_text()
    assert change[0] in text
    file = tmp_path / "manifest.yaml"
    file.write_text(text.replace(*change, 1))
    with pytest.raises(SetupError, match=message):
        manifest.load(file)


def test_no_file_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file"):
        manifest.load(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SetupError, match="binary"):
        manifest.load(tmp_path / "binary")


def test_a_digest_depends_on_values_only() -> None:
    shipped = manifest.load()
    assert digest(1, shipped.guest) == digest(1, manifest.load().guest)
    assert digest(1, shipped.guest) != digest(2, shipped.guest)
    assert digest(b"a") != digest(b"b")
