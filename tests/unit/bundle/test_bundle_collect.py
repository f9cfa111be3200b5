# SPDX-License-Identifier: Apache-2.0
"""From a run folder to a bundle: the same bytes wherever it is made, and nothing of the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.bundle import archive, collect, show
from testbed.bundle.scrub import scrubber
from testbed.errors import InputError
from tests.unit.bundle.run_folders import HOME, KEY, PLACES, make_run

ROOT = Path(__file__).resolve().parents[3]


def test_a_run_becomes_a_bundle(tmp_path: Path) -> None:
    listed, content = collect.bundle(make_run(tmp_path / "1", report=True))
    found = archive.parse("x", content)
    assert listed.kind == "report"
    assert set(found.members) == {
        "index.html",
        "junit.xml",
        "kernels/config-1fe9968467f27552",
        "options.json",
        "pytest.log",
        "rack/commands.json",
        "rack/host0/console.log",
        "rack/host0/observations.jsonl",
        "rack/topology.json",
        "record.json",
        "report.yaml",
    }
    assert [(each.name, each.why) for each in listed.left_out] == [
        ("rack/host0/core", "not of a kind that a bundle has")
    ]
    console = next(each for each in listed.members if each.name.endswith("console.log"))
    assert console.cut_bytes + console.size_bytes == 1_500_000
    assert console.size_bytes <= 1 << 20
    assert found.member(console.name).startswith(b"line\nline\n")
    said = "\n".join(show.lines(found))
    assert "REPRODUCED x.report.yaml" in said
    assert f"{console.cut_bytes} bytes of its middle left out" in said
    assert show.data(found)["reports"] == [{"title": "t", "word": "REPRODUCED"}]


def test_nothing_of_the_host_is_in_it(tmp_path: Path) -> None:
    found = archive.parse("x", collect.bundle(make_run(tmp_path / "1"))[1])
    everything = b"\n".join(found.members.values())
    for words in ("alice", "/srv/src", "/home/", "PRIVATE KEY", str(tmp_path), "places.json"):
        assert words.encode() not in everything, words
    assert b"rootdir: $RUN\n  $TESTBED/a.py:1" in found.member("pytest.log")
    assert json.loads(found.member("rack/commands.json"))[0]["argv"][0].startswith("$CACHE/")
    json.loads(found.member("rack/host0/observations.jsonl"))  # a key went, the line did not


def test_it_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    first = make_run(tmp_path / "1", report=True)
    _, content = collect.bundle(first)
    elsewhere = tmp_path / "other" / "place"
    shutil.copytree(first, elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    # Another user, umask, time zone, locale and hash seed; nobody's cache.
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "bob"),
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "XDG_RUNTIME_DIR": "",
        "TESTBED_RUNTIME_DIR": os.environ.get("TESTBED_RUNTIME_DIR", ""),
        "SOURCE_DATE_EPOCH": "5",
    }
    file = tmp_path / "x.zip"
    line = f"umask 077; exec {sys.executable} -m testbed.cli bundle {elsewhere} -o {file}"
    done = subprocess.run(
        ["sh", "-c", line], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == content


def test_a_link_is_followed_nowhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "1")
    (tmp_path / "secret.json").write_text("secret")
    (folder / "rack" / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / "rack" / "folder").symlink_to(tmp_path)
    os.mkfifo(folder / "rack" / "pipe.log")
    listed, content = collect.bundle(folder)
    assert b"secret" not in b"".join(archive.parse("x", content).members.values())
    left = {each.name for each in listed.left_out}
    assert {"rack/link.json", "rack/folder", "rack/pipe.log"} <= left


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no record.json"),
    ):
        with pytest.raises(InputError, match=said):
            collect.bundle(path)
    make_run(tmp_path / "several" / "one")
    make_run(tmp_path / "several" / "two")
    with pytest.raises(InputError) as caught:
        collect.bundle(tmp_path / "several")
    assert caught.value.hint == "it holds several runs: one, two"
    folder = make_run(tmp_path / "old")
    (folder / "options.json").unlink()
    with pytest.raises(InputError, match=r"no options\.json"):
        collect.bundle(folder)


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"{HOME}/x", "$HOME/x"),
        (f"'{HOME}'", "'$HOME'"),
        (f"{HOME}/.cache/testbed/packages", "$CACHE/packages"),
        (f"{HOME}x/y", "$HOME/y"),  # somebody else's
        ("/home/bob/y and /Users/eve/z", "$HOME/y and $HOME/z"),
        ("../../srv/src/testbed/a.py", "$TESTBED/a.py"),
        ("/srv/src/testbed-2/a.py", "/srv/src/testbed-2/a.py"),
        ("/opt/srv/src/testbed", "/opt/srv/src/testbed"),
        ("/root/x", "$HOME/x"),
        ("$CACHE/packages/0/root/usr", "$CACHE/packages/0/root/usr"),
        ("root port /rootfs", "root port /rootfs"),
        ("/tmp/x", "/tmp/x"),  # where somebody stood says nothing
        (f'{{"a":"{KEY}"}}', '{"a":"(a private key was here)"}'),
        ('{"a":"-----BEGIN PRIVATE KEY-----MTIz","b":1}', '{"a":"(a private key was here)","b":1}'),
        ("alice", "alice"),  # may be any word
    ],
)
def test_paths_and_keys_are_taken_out(text: str, scrubbed: str) -> None:
    assert scrubber(PLACES)(text.encode()).decode() == scrubbed


def test_the_verb_names_the_file_after_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "my-run")

    def verb(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "testbed.cli", "bundle", *words],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TESTBED_STATE_DIR": str(tmp_path / "state"),  # in which no run is yet
            },
            capture_output=True,
            text=True,
            check=False,
        )

    done = verb(".")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("my-run.testbed.zip (")
    assert "left out: rack/host0/core: not of a kind" in done.stderr
    made = folder / "my-run.testbed.zip"
    again = verb(".", "-o", str(tmp_path / "again.zip"))
    assert again.returncode == 0
    assert (tmp_path / "again.zip").read_bytes() == made.read_bytes()
    assert archive.read(made).manifest.kind == "run"
    for words, said in (
        ((), "no run yet in"),
        ((".", "--show", "x"), "which of the two?"),
        (("--show", "none.zip"), "cannot be read"),
        ((".", "-o", "none/x.zip"), "cannot write none/x.zip"),
        ((".", "-o", str(tmp_path)), "cannot write"),
        (("none",), "no such run"),
    ):
        done = verb(*words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
