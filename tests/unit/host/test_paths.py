# SPDX-License-Identifier: Apache-2.0
"""Where things are kept, and that nobody else can get at the runtime folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from testbed.errors import HostError
from testbed.host import paths


@pytest.fixture(autouse=True)
def no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "STATE", "RUNTIME"):
        monkeypatch.delenv(f"TESTBED_{name}_DIR", raising=False)


def test_the_users_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "STATE", "RUNTIME"):
        monkeypatch.setenv(f"TESTBED_{name}_DIR", str(tmp_path / name))
    assert paths.cache_dir() == tmp_path / "CACHE"
    assert paths.state_dir() == tmp_path / "STATE"
    assert paths.runtime_dir() == tmp_path / "RUNTIME"
    assert not paths.cache_dir().exists()


def test_the_runtime_folder_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = paths.runtime_dir()
    assert folder == tmp_path / "testbed"
    folder.chmod(0o755)
    assert paths.runtime_dir().stat().st_mode & 0o777 == 0o700


def test_without_a_session_it_is_in_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert paths.runtime_dir() == Path(f"/tmp/testbed-{os.getuid()}")


def test_somebody_elses_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("TESTBED_RUNTIME_DIR", str(tmp_path / "link"))
    with pytest.raises(HostError, match="belongs to someone else"):
        paths.runtime_dir()


def test_no_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TESTBED_RUNTIME_DIR", str(tmp_path / "file/x"))
    with pytest.raises(HostError, match="cannot be made"):
        paths.runtime_dir()


def test_what_is_shipped() -> None:
    assert (paths.data_dir("images") / "manifest.yaml").is_file()
    with pytest.raises(HostError, match="no 'nothing' folder"):
        paths.data_dir("nothing")
