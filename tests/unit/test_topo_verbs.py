# SPDX-License-Identifier: Apache-2.0
"""`topo --predict` and `graph` as a user meets them; no machine is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from testbed.verbs.group import cli


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rack of this user's is in the way."""
    monkeypatch.setenv("TESTBED_RUNTIME_DIR", str(tmp_path / "runtime"))


def command(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def message(result: Result) -> str:
    """What the command line would print on stderr."""
    return str(result.exception)


def test_predict_needs_no_rack() -> None:
    done = command("topo", "nested-switches", "--predict")
    assert done.exit_code == 0
    assert "rack nested-switches" in done.stdout
    assert "bus 4" in done.stdout
    assert "kernel  " not in done.stdout.split("peers:")[1]


def test_predict_takes_settings_and_the_json_has_every_pair() -> None:
    done = command("topo", "quad-gpu", "--predict", "-s", "gpus=2", "--format", "json")
    data = json.loads(done.stdout)
    assert data["format"] == "testbed.topo/1"
    names = [peer["name"] for peer in data["peers"]]
    assert names == ["gpu0", "gpu1", "nic0", "nvme0"]
    assert {(c["from"], c["to"]) for c in data["cells"]} == {
        (one, other) for one in names for other in names if one != other
    }
    cell = next(c for c in data["cells"] if (c["from"], c["to"]) == ("gpu0", "gpu1"))
    assert cell["word"] == "XG16"
    assert cell["predicted"]["moves"] == {"raw": "refused", "iova": "iommu"}
    assert cell["kernel"] == {"unknown": "no machine was asked"}


def test_explain_names_the_nearest_device() -> None:
    done = command("topo", "quad-gpu", "--predict", "--explain", "gpu0", "gpu11")
    assert "no peer 'gpu11'" in message(done)
    assert "did you mean 'gpu1'" in message(done)
    assert "two devices" in message(
        command("topo", "quad-gpu", "--predict", "--explain", "gpu0", "gpu0")
    )


def test_explain_prints_one_pair() -> None:
    done = command("topo", "quad-gpu", "--predict", "--explain", "nic0", "gpu0")
    assert done.stdout.startswith("pair         nic0 ")
    assert "the root complex" in done.stdout


def test_settings_belong_to_a_topology() -> None:
    done = command("topo", "quad-gpu", "-s", "gpus=2")
    assert "-s changes a topology" in message(done)


def test_a_wrong_file_is_told_as_everywhere(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("rack: x\nnodes:\n  h:\n    pcie:\n      - gpuu: gpu0\n")
    for verb in (("topo", "--predict"), ("graph",)):
        assert f"{wrong}:5:9" in message(command(*verb, str(wrong)))


def test_graph_writes_a_file_or_to_stdout(tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert command("graph", "quad-gpu", "-o", str(out)).exit_code == 0
    assert out.read_text() == command("graph", "quad-gpu").stdout
    assert out.read_text().startswith("<svg ")
    dot = command("graph", "quad-gpu", "--format", "dot").stdout
    assert dot.startswith('graph "rack quad-gpu" {')
    assert '"host0/gpu0" -- "host0/gpu1"' in dot
    named = tmp_path / "out.dot"
    assert command("graph", "quad-gpu", "-o", str(named)).exit_code == 0
    assert named.read_text() == dot


def test_a_file_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    done = command("graph", "quad-gpu", "-o", str(tmp_path / "no" / "out.svg"))
    assert "No such file" in message(done)
