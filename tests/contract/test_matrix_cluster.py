# SPDX-License-Identifier: Apache-2.0
"""`testbed matrix --cluster`: real schedulers and workers, some of which die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.host.child import DIE_WITH_US
from tests.contract import matrix_runs as runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
pytest.importorskip("distributed")


@contextlib.contextmanager
def dask(kind: str, folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Dask `scheduler` or `worker` of our own; what it says is in a file."""
    # Also when these tests are killed.
    program = [*DIE_WITH_US, sys.executable, "-m", f"distributed.cli.dask_{kind}", *words]
    with (folder / f"{kind}.log").open("ab") as log:
        process = subprocess.Popen(
            program, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def scheduler(
    folder: Path, port: int = 0
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One that writes its address to `scheduler.json`."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    words = ["--no-dashboard", "--host", "127.0.0.1", "--port", str(port)]
    return dask("scheduler", folder, *words, "--scheduler-file", str(file))


def worker(
    folder: Path, address: str, resources: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One with one thread."""
    words = [address, "--nthreads", "1", "--no-dashboard", "--resources", resources]
    return dask("worker", folder, *words, "--local-directory", str(folder))


def address_of(folder: Path) -> str:
    """Of the scheduler, when it listens."""
    file = folder / "scheduler.json"
    runs.await_that("the scheduler listens", lambda: file.exists() and file.read_text().strip())
    return str(json.loads(file.read_text())["address"])


def test_a_killed_workers_cell_is_finished_by_another(tmp_path: Path) -> None:
    text = """\
matrix: deaths
topologies: [minimal]
cpus: [max, EPYC]
suites: [./test_quick.py, ./test_once.py, ./test_always.py, empty]
exclude:
  - {cpu: EPYC, suite: "*always*"}
"""
    file = runs.write(
        tmp_path,
        text,
        quick=runs.QUICK,
        once=runs.killer(tmp_path / "mark", always=False),
        always=runs.killer(tmp_path / "mark-always", always=True),
    )
    out = tmp_path / "run"
    code, table, errors = runs.run(tmp_path, file, "--cluster", "local:3", "--output", out)
    assert code == 128, errors
    cells = {cell["values"]["cpu"] + cell["name"][-9:]: cell for cell in runs.record(out)["cells"]}
    assert len(cells) == 7, "the table is complete"
    ends = [cell["verdict"] for cell in runs.record(out)["cells"]]
    assert ends == ["PASS", "PASS", "ERROR", "SKIP", "PASS", "PASS", "SKIP"]
    once = [c for c in cells.values() if "once" in c["name"]]
    assert sorted(c["attempts"] for c in once) == [1, 2]
    assert all((out / c["folder"] / "run" / "record.json").exists() for c in once)
    ran = [out / cell["folder"] / "run" for cell in cells.values() if cell["counts"]]
    assert all((folder / "page.html").exists() for folder in ran)
    assert runs.remembered(tmp_path) == set(ran), "the folder of each is where it came to"
    always = next(c for c in cells.values() if "always" in c["name"])
    assert "3 workers died while they ran it" in always["reason"]
    assert "died; begun again on" in errors
    assert not runs.runners(out)
    assert not (out / "workers").exists()
    assert "ERROR" in table


def test_interrupted_the_cluster_ends_too(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_gated.py]\nrepeat: 3\n"
    file = runs.write(tmp_path, text, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with runs.running(tmp_path, file, "--cluster", "local:2", "--output", out) as process:
        runs.await_that("cells run", lambda: runs.waiting(tmp_path) == 2)
        children = runs.pids(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=runs.DEADLINE_S)
        assert process.returncode == 130, errors
        runs.await_that("all of it ends", lambda: not any(map(runs.alive, children)), 20)
    assert "3 of 3 not run" in errors


def test_interrupted_a_cell_ends_and_its_worker_lives_on(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_gated.py]\n"
    file = runs.write(tmp_path, text, gated=runs.gated(tmp_path))
    with scheduler(tmp_path), contextlib.ExitStack() as later:
        address = address_of(tmp_path)
        server = later.enter_context(worker(tmp_path, address, "memory=8e9"))
        process = later.enter_context(runs.running(tmp_path, file, "--cluster", address))
        runs.await_that("the cell runs", lambda: runs.waiting(tmp_path))
        assert runs.pids(server)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=runs.DEADLINE_S)
        assert process.returncode == 130, errors
        runs.await_that("the cell ends", lambda: not runs.runners(tmp_path), 30)
        assert server.poll() is None


def test_killed_the_cluster_ends_too(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_gated.py]\nrepeat: 3\n"
    file = runs.write(tmp_path, text, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with runs.running(tmp_path, file, "--cluster", "local:2", "--output", out) as process:
        runs.await_that("cells run", lambda: runs.waiting(tmp_path) == 2)
        children = runs.pids(process)
        os.kill(process.pid, signal.SIGKILL)
        runs.await_that("all of it ends", lambda: not any(map(runs.alive, children)), 30)


def test_a_scheduler_that_comes_back_loses_nothing_that_ended(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_quick.py, ./test_gated.py]\n"
    file = runs.write(tmp_path, text, quick=runs.QUICK, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with contextlib.ExitStack() as later:
        with scheduler(tmp_path):
            address = address_of(tmp_path)
            later.enter_context(worker(tmp_path, address, "memory=8e9"))
            process = later.enter_context(
                runs.running(tmp_path, file, "--cluster", address, "--output", out)
            )
            runs.await_that("the second cell runs", lambda: runs.waiting(tmp_path))
        (tmp_path / "go").touch()
        later.enter_context(scheduler(tmp_path, int(address.rpartition(":")[2])))
        assert address_of(tmp_path) == address
        later.enter_context(worker(tmp_path, address, "memory=8e9"))
        _, errors = process.communicate(timeout=runs.DEADLINE_S)
        assert process.returncode == 0, errors
    assert "the scheduler is gone" in errors
    assert list(runs.verdicts(out).values()) == ["PASS", "PASS"]
    assert runs.record(out)["cells"][0]["attempts"] == 1


def test_a_scheduler_that_stays_away_is_said_and_the_rest_can_be_run(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_quick.py, ./test_gated.py]\n"
    file = runs.write(tmp_path, text, quick=runs.QUICK, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with contextlib.ExitStack() as later:
        with scheduler(tmp_path):
            address = address_of(tmp_path)
            later.enter_context(worker(tmp_path, address, "memory=8e9"))
            words = ("--cluster", address, "--worker-timeout", "4", "--output", out)
            process = later.enter_context(runs.running(tmp_path, file, *words))
            runs.await_that("the second cell runs", lambda: runs.waiting(tmp_path))
        _, errors = process.communicate(timeout=runs.DEADLINE_S)
        assert process.returncode == 128, errors
    assert "did not come back" in errors
    assert "1 of 2 not run" in errors
    (tmp_path / "go").touch()
    code, _, errors = runs.run(tmp_path, file, "--resume", out)
    assert code == 0, errors
    assert "1 cells had ended; 1 are to run" in errors


def test_without_a_worker_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    file = runs.write(tmp_path, "matrix: m\ntopologies: [minimal]\nsuites: [empty]\n")
    with scheduler(tmp_path):
        address = address_of(tmp_path)
        words = ("--cluster", address, "--worker-timeout", "2")
        code, _, errors = runs.run(tmp_path, file, *words)
    assert code == 128
    assert "the cluster has had no worker for 2 s" in errors


def test_without_dask_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden").mkdir()
    # A module that cannot be found, whatever is installed.
    finder = "import sys\nsys.modules['distributed'] = None\n"
    (tmp_path / "hidden" / "sitecustomize.py").write_text(finder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    file = runs.write(tmp_path, "matrix: m\ntopologies: [minimal]\nsuites: [empty]\n")
    out = tmp_path / "run"
    code, _, errors = runs.run(tmp_path, file, "--cluster", "local:2", "--output", out)
    assert code == 125
    assert "--cluster needs Dask: no package distributed" in errors
    assert f"{sys.executable} -m pip install 'testbed[cluster]'" in errors
    assert not out.exists()


def test_what_no_worker_has_is_a_skip(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_quick.py]\nneeds_kvm: true\n"
    file = runs.write(tmp_path, text, quick=runs.QUICK)
    small = tmp_path / "small"
    small.mkdir()
    text = text.replace("needs_kvm: true\n", "").replace("minimal", "quad-gpu")
    other = runs.write(small, text, quick=runs.QUICK)
    with contextlib.ExitStack() as later:
        later.enter_context(scheduler(tmp_path))
        address = address_of(tmp_path)
        later.enter_context(worker(tmp_path, address, "memory=1e9"))
        code, table, _ = runs.run(tmp_path, file, "--cluster", address)
        assert code == 125
        assert "no worker declares the resource 'kvm'" in table
        code, table, _ = runs.run(tmp_path, other, "--cluster", address)
        assert code == 125
        assert "the largest worker has 0.9" in table
