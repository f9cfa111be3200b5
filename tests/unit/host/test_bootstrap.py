# SPDX-License-Identifier: Apache-2.0
"""The shell scripts of the project are clean."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ("bootstrap", "images/init")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_is_content(name: str) -> None:
    tool = shutil.which("shellcheck")
    assert tool, "shellcheck is a part of the dev extra"
    done = subprocess.run([tool, str(ROOT / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_can_be_run(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111
