# SPDX-License-Identifier: Apache-2.0
"""Other people's programs, run over a link that is a local shell: every way in which they end."""

from __future__ import annotations

import io
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed.errors import CapabilityMissing, ExitCode, LinkLost
from testbed.harness.runner import Choice, run_suites
from testbed.payload import guest as payload_guest
from testbed.payload.collection import FOLDER, Collection, Payload, find_collection
from testbed.payload.guest import Died, GuestCollection
from testbed.results.verdicts import Verdict
from tests.contract.fake_rack import FakeNode, FakeSource, quad_gpu

PASS, FAIL, SKIP, LOST, ERROR = Verdict
DEVICE = "0000:00:00.0"


@dataclass
class Result:
    exit_status: int
    stdout: bytes
    stderr: bytes


class LocalChannel:
    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE)
        assert self._process.stdout
        self._out = self._process.stdout
        self._timeout_s: float | None = None

    def settimeout(self, timeout: float | None, /) -> None:
        self._timeout_s = timeout

    def recv(self, nbytes: int, /) -> bytes:
        if not select.select([self._out], [], [], self._timeout_s)[0]:
            raise TimeoutError
        return self._out.read1(nbytes)  # type: ignore[attr-defined,no-any-return]

    def exit_status_ready(self) -> bool:
        return self._process.poll() is not None

    def recv_exit_status(self) -> int:
        return self._process.wait()

    def close(self) -> None:
        self._out.close()
        self._process.wait(10)


class LocalLink:
    """A guest that is this host: whatever runs there stays below a folder of the test's."""

    def open_channel(self, command: str, *, timeout_s: float = 20.0) -> LocalChannel:
        return LocalChannel(command)

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60.0) -> Result:
        done = subprocess.run(
            ["/bin/sh", "-c", command], input=stdin, capture_output=True, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)


def collection(folder: Path, **scripts: str) -> Collection:
    """`name="echo ok 1 a"` for each program; its interpreter is sh unless it says another."""
    where = folder / FOLDER / "mine"
    where.mkdir(parents=True)
    for name, text in scripts.items():
        path = where / name
        path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return find_collection("mine", folder)


@pytest.fixture(autouse=True)
def guest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(payload_guest, "GUEST_FOLDER", str(tmp_path / "guest"))
    return tmp_path / "guest"


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    rack = FakeSource(quad_gpu(), tmp_path).start(quad_gpu(), "rack")
    made = next(iter(rack.nodes.values()))
    assert isinstance(made, FakeNode)
    made.link = LocalLink()
    return made


def guest_of(node: FakeNode, found: Collection, folder: Path) -> GuestCollection:
    return GuestCollection(node, found, str(folder))


def test_output_status_arguments_and_environment(
    node: FakeNode, tmp_path: Path, guest_folder: Path
) -> None:
    found = collection(tmp_path, a='echo "$1 $X"; echo err >&2; exit 3', b="kill -SEGV $$")
    guest = guest_of(node, found, guest_folder)
    said, ending = guest.run(found.programs[0], ["one two"], {"X": "$y"}, 20)
    assert (said, ending.status) == ("one two $y\nerr\n", 3)
    assert guest.run(found.programs[1], [], {}, 20)[1].signal == "SIGSEGV"


def test_what_hangs_is_killed_with_its_children(
    node: FakeNode, tmp_path: Path, guest_folder: Path
) -> None:
    found = collection(tmp_path, a="echo begun; sleep 1000 & echo $! >child; wait")
    said, ending = guest_of(node, found, guest_folder).run(found.programs[0], [], {}, 1)
    assert said == "begun\n"
    assert (ending.status, ending.reason) == (None, "it did not end within 1 s")
    child = int((guest_folder / "mine/child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_child_that_is_left_running_does_not_keep_the_result(
    node: FakeNode, tmp_path: Path, guest_folder: Path
) -> None:
    found = collection(tmp_path, a="sleep 30 & echo $! >child; echo ok 1 a")
    said, ending = guest_of(node, found, guest_folder).run(found.programs[0], [], {}, 20)
    assert (said, ending.status) == ("ok 1 a\n", 0)
    node.link.run(f"kill $(cat {guest_folder}/mine/child)")


def test_what_was_said_before_the_machine_died_is_kept(
    node: FakeNode, tmp_path: Path, guest_folder: Path
) -> None:
    found = collection(tmp_path, a="echo ok 1 a; exec sleep 3")
    guest = guest_of(node, found, guest_folder)
    node.alive = False
    with pytest.raises(Died) as death:
        guest.run(found.programs[0], [], {}, 20)
    assert death.value.said == "ok 1 a\n"
    assert isinstance(death.value.error, LinkLost)


def test_what_cannot_start_names_what_it_lacks(
    node: FakeNode, tmp_path: Path, guest_folder: Path
) -> None:
    found = collection(
        tmp_path,
        a="#!/no/such/shell\n",
        b="echo './b: error while loading shared libraries: libx.so.9: no'; exit 127",
    )
    guest = guest_of(node, found, guest_folder)
    with pytest.raises(CapabilityMissing, match="/no/such/shell, which the guest lacks"):
        guest.check(found.programs[0])
    with pytest.raises(CapabilityMissing, match=r"shared libraries: libx.so.9"):
        guest.run(found.programs[1], [], {}, 20)


class LocalSource(FakeSource):
    """Racks whose machines are this host's shell."""

    def start(self, *args: Any, **words: Any) -> Any:
        rack = super().start(*args, **words)
        for node in rack.nodes.values():
            assert isinstance(node, FakeNode)
            node.link = LocalLink()
        return rack


def test_a_collection_is_judged_in_the_usual_forms(tmp_path: Path) -> None:
    found = collection(
        tmp_path,
        good="echo TAP version 13; echo 1..2; echo ok 1 a; echo ok 2 b '# SKIP none'",
        bad="echo 1..1; echo not ok 1 c; exit 1",
        hangs="echo 1..2; echo ok 1 d; sleep 1000",
    )
    source = LocalSource(quad_gpu(), tmp_path)
    stream = io.StringIO()
    result = run_suites(
        Choice(["kselftest"], payload=Payload(found, timeout_s=1)),
        source,
        tmp_path,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    verdicts = {o.test: o.verdict for o in result.record.outcomes}
    assert verdicts == {
        "good/a": PASS,
        "good/b": SKIP,
        "bad/c": FAIL,
        "hangs/d": PASS,
        "hangs": LOST,
    }
    assert result.code is ExitCode.FAIL
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if not line.startswith((" ", "#"))] == [
        "KTAP version 1",
        "1..3",
        "not ok 1 kselftest[bad]",
        "ok 2 kselftest[good]",
        "not ok 3 kselftest[hangs] # LOST see its tests",
    ]
    assert "  ok 2 good/b # SKIP none" in lines
    assert '<testcase classname="testbed" name="bad/c"' in (tmp_path / "junit.xml").read_text()
