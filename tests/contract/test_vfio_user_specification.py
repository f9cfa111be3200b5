# SPDX-License-Identifier: Apache-2.0
"""What a model process is told to serve, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import ExitCode
from tests.contract.model_process import (
    COMMAND,
    TIMEOUT_S,
    Process,
    Vfio,
    memory,
    names,
    specification,
)


def refused(folder: Path, spec: object, *arguments: str, fds: Any = ()) -> tuple[int, str]:
    """Exit status and message of a process that does not even begin to serve."""
    text = spec if isinstance(spec, bytes) else json.dumps(spec).encode() + b"\n"
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=text,
        capture_output=True,
        timeout=TIMEOUT_S,
        pass_fds=fds,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == b""
    assert names(folder) <= {"taken", "card.py"}
    return done.returncode, done.stderr.decode().strip()


class TestRefusal:
    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (b"", "one line of JSON"),
            (b"nonsense\n", "no JSON"),
            (b"[]\n", "expected an object"),
            ({}, "'control'"),
            ({"control": "c"}, "'devices'"),
            ({"control": "c", "devices": [], "colour": 1}, "unknown entry 'colour'"),
            ({"control": "x" * 200, "devices": []}, "longer than 107"),
            ({"control": "c", "devices": [{"name": "n", "kind": "gpu"}]}, "'socket'"),
            ({"control": "c", "devices": [], "memories": [{"name": "m"}]}, "'fd' or 'path'"),
        ],
    )
    def test_specifications(self, tmp_path: Path, spec: object, words: str) -> None:
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.BAD_INPUT
        assert words in said
        assert "\n" not in said

    def test_a_memory_that_is_none(self, tmp_path: Path) -> None:
        spec = specification(tmp_path, [])
        spec["memories"] = [{"name": "m", "fd": 77}]
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.ERROR
        assert "memory 'm'" in said

    def test_a_memory_that_cannot_be_sealed(self, tmp_path: Path) -> None:
        fd = memory("m", sealable=False)
        spec = specification(tmp_path, [fd])
        status, said = refused(tmp_path, spec, fds=[fd])
        os.close(fd)
        assert status == ExitCode.ERROR
        assert "MFD_ALLOW_SEALING" in said

    def test_a_socket_that_is_taken(self, tmp_path: Path) -> None:
        spec = specification(tmp_path, [])
        (tmp_path / "taken").touch()
        spec["control"] = str(tmp_path / "taken")
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.ERROR
        assert "could not be opened" in said


CARD = """
from testbed.models.config import Bar, Identity
from testbed.models.device import Device

class Card(Device):
    identity = Identity(0x1234, 1, 0x120000)
    bars = (Bar(0, 4096),)
    def __init__(self, name, answer=42):
        super().__init__(name)
        self.answer = answer
    def read(self, bar, offset, size):
        return self.answer

class NoDevice:
    pass
"""


class TestOwnDevice:
    def spec(self, folder: Path, kind: str, **options: object) -> dict[str, Any]:
        (folder / "card.py").write_text(CARD)
        device = {"name": "mine", "kind": kind, "socket": str(folder / "mine.vfu")}
        return {
            "control": str(folder / "control.sock"),
            "devices": [{**device, "options": options}],
        }

    def test_it_is_served(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, f"{tmp_path / 'card.py'}:Card", answer=43)
        process = Process(tmp_path, spec, "--trust")
        with process.connect("mine.vfu") as connection:
            assert Vfio(connection).read(0) == 43
        assert process.end()[0] == 0

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("card.py:Nobody", "no device class 'Nobody'"),
            ("card.py:NoDevice", "no device class 'NoDevice'"),
            ("card.py", "no kind"),
            ("missing.py:Card", "No such file"),
            ("telephone", "no kind 'telephone'"),
        ],
    )
    def test_what_is_no_device(self, tmp_path: Path, kind: str, words: str) -> None:
        spec = self.spec(tmp_path, str(tmp_path / kind) if "." in kind else kind)
        status, said = refused(tmp_path, spec, "--trust")
        assert status == ExitCode.BAD_INPUT
        assert words in said

    def test_options_it_does_not_take(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, f"{tmp_path / 'card.py'}:Card", colour="red")
        status, said = refused(tmp_path, spec, "--trust")
        assert status == ExitCode.BAD_INPUT
        assert "colour" in said

    def test_not_without_trust(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, f"{tmp_path / 'card.py'}:Card")
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.BAD_INPUT
        assert "--trust" in said
