# SPDX-License-Identifier: Apache-2.0
"""A cell with a real machine: its worker is killed, and another one finishes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(400)]

TEXT = """\
matrix: real
topologies: [minimal]
suites: [./test_real.py, empty]
deadline_s: 150
"""
# The first time it is killed with its machine up; what runs then is noted.
TEST = """\
import os, pathlib, signal, time
MARK = pathlib.Path({mark!r})
def test_real(rack):
    (node,) = rack.nodes.values()
    assert node.agent.call("iommu.groups")
    if not MARK.exists():
        MARK.write_text(str(rack.run_dir))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
"""


def test_a_killed_workers_rack_ends_and_its_cell_is_finished_by_another(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    mark, out = tmp_path / "mark", tmp_path / "run"
    (tmp_path / "test_real.py").write_text(TEST.format(mark=str(mark)))
    (tmp_path / "m.matrix.yaml").write_text(TEXT)
    runtime = Path(os.environ["TESTBED_RUNTIME_DIR"]) / f"m{os.getpid()}"
    runtime.mkdir(mode=0o700)
    words = [sys.executable, "-m", "testbed.cli", "matrix", str(tmp_path / "m.matrix.yaml")]
    done = subprocess.run(
        [*words, "--cluster", "local:2", "--output", str(out)],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
        env={**os.environ, "TESTBED_RUNTIME_DIR": str(runtime)},
    )
    assert done.returncode == 0, done.stderr
    real, empty = json.loads((out / "matrix.json").read_text())["cells"]
    assert (real["verdict"], real["attempts"], empty["verdict"]) == ("PASS", 2, "SKIP")
    record = json.loads((out / real["folder"] / "run" / "record.json").read_text())
    assert record["versions"]["qemu"]
    console = out / real["folder"] / "run" / "rack" / "host0" / "console.log"
    assert console.stat().st_size, "the logs came back"
    assert mark.exists()
    assert not list(runtime.glob("racks/*")), "no rack is left"
