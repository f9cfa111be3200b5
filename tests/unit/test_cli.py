# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: help, errors, exit codes, the generated page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed import cli
from testbed.verbs.group import VERBS
from testbed.verbs.reference import cli_markdown

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_page_is_in_step() -> None:
    page = ROOT / "docs" / "cli.md"
    assert page.read_text() == cli_markdown(), (
        "run: python -m testbed.verbs.reference > docs/cli.md"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_every_option_an_environment_variable(verb: str) -> None:
    done = command(verb, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    options = [line for line in done.stdout.splitlines() if line.startswith("  -")]
    assert done.stdout.count(f"TESTBED_{verb.upper()}_") == len(options) - 1  # all but --help


def test_an_unknown_verb_names_the_nearest() -> None:
    done = command("valdate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'validate'?" in done.stderr


def test_wrong_input_is_one_message_and_exit_2(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("rack: x\nnodes:\n  host0:\n    pcie:\n      - gpuu: gpu0\n        vram: 3M\n")
    done = command("plan", str(wrong))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{wrong}:5:9: " in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_judges_every_file_and_prints_json(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("rack: [")
    good = ROOT / "topologies" / "quad-gpu.yaml"
    done = command("validate", "--format", "json", str(good), str(wrong))
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert answer["format"] == "testbed.validate/1"
    assert [file["valid"] for file in answer["files"]] == [True, False]


def test_a_topology_may_come_from_stdin_and_from_the_shipped_ones() -> None:
    text = (ROOT / "topologies" / "quad-gpu.yaml").read_text()
    piped = command("plan", "-", "--format", "argv", stdin=text)
    named = command("plan", "quad-gpu", "--format", "argv")
    assert piped.returncode == named.returncode == 0
    assert piped.stdout == named.stdout


def test_an_option_can_come_from_the_environment() -> None:
    done = command("plan", "quad-gpu", TESTBED_PLAN_FORMAT="json", TESTBED_PLAN_SET="gpus=2")
    answer = json.loads(done.stdout)
    names = {f["device"] for f in answer["nodes"]["host0"]["functions"]}
    assert "gpu1" in names
    assert "gpu2" not in names


@pytest.mark.parametrize(
    ("module", "ours"), [("xxhash", False), ("testbed.no_such_room", True), ("guest_agent.x", True)]
)
def test_a_package_that_is_missing_is_named(
    module: str, ours: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ModuleNotFoundError(f"No module named '{module}'", name=module)
    assert cli._answer(missing, debug=False) == 128
    said = capsys.readouterr().err
    assert ("the testbed's own fault" in said) is ours
    assert ("`./bootstrap --version`" in said) is not ours
    assert module in said


@pytest.mark.parametrize("buffering", [[], ["-u"]], ids=["at-the-end", "in-the-verb"])
def test_a_closed_pipe_is_no_error_and_no_pass(buffering: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as pipe:
        done = subprocess.run(
            [sys.executable, *buffering, "-m", "testbed.cli", "schema"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_rack_that_does_not_run(tmp_path: Path) -> None:
    for verb in (["ssh"], ["logs"], ["down"], ["inspect"], ["qmp"]):
        extra = ["query-status"] if verb == ["qmp"] else []
        done = command(*verb, "nosuch", *extra, TESTBED_RUNTIME_DIR=str(tmp_path / "r"))
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "nosuch" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = command("completion", shell)
    assert done.returncode == 0
    assert "_TESTBED_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kernel-tree", ".", "--kernel", "generic"], "--kernel-tree goes with neither"),
        (["--kernel-tree", "topologies"], "no kernel in this folder"),
        (["--modules", "docs"], "--modules belongs to a kernel"),
        (["--kernel", "generic", "--modules", "docs"], "--modules belongs to a kernel"),
    ],
)
def test_kernel_options_that_contradict_one_another(words: list[str], message: str) -> None:
    done = command("plan", "minimal", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_kernel_options_become_one_word(tmp_path: Path) -> None:
    (tmp_path / "bzImage").touch()
    words = ["--kernel", f"{tmp_path}/bzImage", "--modules", "docs"]
    done = command("plan", "minimal", *words, "--format", "json")
    nodes = json.loads(done.stdout)["topology"]["nodes"]
    assert {node["kernel"] for node in nodes.values()} == {
        f"{tmp_path}/bzImage,modules={ROOT / 'docs'}"
    }


def test_kernels_are_listed_without_a_mirror(tmp_path: Path) -> None:
    done = command("kernel", "list", TESTBED_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0
    assert "7.2-generic" in done.stdout
    assert "not downloaded" in done.stdout
    assert command("kernel", "show").returncode == 2


def test_an_unknown_topology_names_the_nearest_shipped_one() -> None:
    for words in (["plan", "quad-gpo"], ["validate", "quad-gpo"], ["graph", "quad-gpo"]):
        done = command(*words)
        assert done.returncode == 2
        assert "did you mean 'quad-gpu'?" in done.stdout + done.stderr, words


def test_a_folder_without_a_topology_is_not_valid(tmp_path: Path) -> None:
    done = command("validate", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no *.yaml is in this folder" in done.stderr
