# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import InputError
from testbed.verbs.run_folders import find_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESTBED_STATE_DIR", str(tmp_path))
    return tmp_path / "runs"


def test_a_run_is_found_by_its_name_or_the_beginning_of_it(runs: Path) -> None:
    for name in ("20260101-quad", "20260102-quad", "20260102-quad-2"):
        (runs / name).mkdir(parents=True)
    assert find_run("20260101").name == "20260101-quad"
    assert find_run("20260102-quad").name == "20260102-quad"
    assert find_run(str(runs / "20260101-quad")).name == "20260101-quad"
    assert find_run(None).name == "20260102-quad-2"
    with pytest.raises(InputError, match="several runs; expected 20260102-quad-2 or"):
        find_run("20260102")
    with pytest.raises(InputError, match="did you mean '20260101-quad'"):
        find_run("20260101-quat")


def test_without_any_run(runs: Path) -> None:
    with pytest.raises(InputError, match="no run yet in"):
        find_run(None)
    with pytest.raises(InputError, match="no such run"):
        find_run("x")


def test_the_newest_is_one_that_has_ended(runs: Path) -> None:
    for name in ("20260101-quad", "20260102-quad", "20260103-up"):
        (runs / name).mkdir(parents=True)
    for name in ("20260101-quad", "20260102-quad"):
        (runs / name / "record.json").touch()
    assert find_run(None).name == "20260102-quad"
