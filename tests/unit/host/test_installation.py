# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a finished set-up, and when it is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.host import installation, paths
from testbed.host.agent import AgentBundle
from testbed.host.image import GuestImage, GuestPython
from testbed.host.installation import Installation, recall, remember
from testbed.host.kernel import KernelImage
from testbed.host.lock import LockedPackage
from testbed.host.toolroot import Qemu


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our own files, as far as a set-up depends on them."""
    folder = tmp_path / "shipped"
    for name, text in {
        "images/init": "#!/bin/sh",
        "images/manifest.yaml": "version: 1",
        "guest_agent/agent.py": "1",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(paths, "data_dir", lambda name: folder / name)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "current").mkdir(parents=True)
    (folder / "current/guest-1.json").write_text("{}")
    return folder


@pytest.fixture
def made(cache: Path) -> Installation:
    for name in ("qemu", "base.cpio", "agent.cpio", "vmlinux", "modules.cpio", "config"):
        (cache / name).touch()
    kernel = KernelImage(
        name="default",
        release="7.3.4",
        image=cache / "vmlinux",
        pvh=True,
        sha256="aa",
        source=cache / "gone",
        config=cache / "config",
        modules=cache / "modules.cpio",
        missing=("none",),
        build_id="bb",
    )
    return Installation(
        qemu=Qemu((str(cache / "qemu"), "-L", "x"), {"A": "b"}, "11.1.2", "1:11", "id", "qboot"),
        image=GuestImage(cache / "base.cpio", "k", GuestPython(cache, Path("bin/python"), "c")),
        agent=AgentBundle("0123", "/opt", cache / "agent.cpio"),
        kernels={"default": kernel},
        packages={"guest": (LockedPackage("a", "1", "amd64", "cc", 7),)},
    )


def test_what_was_remembered_is_recalled(shipped: Path, cache: Path, made: Installation) -> None:
    assert shipped.exists()
    assert recall(("default",), cache) is None
    remember(made, cache)
    assert recall(("default",), cache) == made
    assert recall(("default", "default"), cache) == made
    assert recall(("other",), cache) is None


def _edit_init(shipped: Path, _cache: Path) -> None:
    (shipped / "images/init").write_text("#!/bin/bash")


def _permit_init(shipped: Path, _cache: Path) -> None:
    (shipped / "images/init").chmod(0o755)


def _add_to_agent(shipped: Path, _cache: Path) -> None:
    (shipped / "guest_agent/hw").mkdir()
    (shipped / "guest_agent/hw/new.py").touch()


def _edit_manifest(shipped: Path, _cache: Path) -> None:
    (shipped / "images/manifest.yaml").write_text("version: 2")


def _edit_agent(shipped: Path, _cache: Path) -> None:
    (shipped / "guest_agent/agent.py").write_text("22")


def _point_elsewhere(_shipped: Path, cache: Path) -> None:
    (cache / "current/guest-1.json").write_text('{"key": 1}')


def _lose_image(_shipped: Path, cache: Path) -> None:
    (cache / "base.cpio").unlink()


def _lose_kernel(_shipped: Path, cache: Path) -> None:
    (cache / "vmlinux").unlink()


def _lose_qemu(_shipped: Path, cache: Path) -> None:
    (cache / "qemu").unlink()


def _garble(_shipped: Path, cache: Path) -> None:
    (file,) = (cache / "remembered").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "qemu": {"words": 3}}))


@pytest.mark.parametrize(
    "change",
    [
        _edit_init,
        _permit_init,
        _edit_manifest,
        _edit_agent,
        _add_to_agent,
        _point_elsewhere,
        _lose_image,
        _lose_kernel,
        _lose_qemu,
        _garble,
    ],
)
def test_it_holds_only_while_nothing_changes(
    shipped: Path, cache: Path, made: Installation, change: Callable[[Path, Path], None]
) -> None:
    remember(made, cache)
    change(shipped, cache)
    assert recall(("default",), cache) is None


def test_only_so_many_are_kept(
    shipped: Path, cache: Path, made: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "_MOST", 2)
    for number in range(4):
        (shipped / "images/init").write_text("#" * number)
        remember(made, cache)
    assert len(list((cache / "remembered").iterdir())) == 2
    assert recall(("default",), cache) == made
