# SPDX-License-Identifier: Apache-2.0
"""What is promised, and how it is said whether it holds."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.benchmarks import figures, promised, virtme
from testbed.benchmarks.commands import Commands
from testbed.benchmarks.figures import Figure
from testbed.benchmarks.plot import svg
from testbed.benchmarks.promised import Bed, Measured
from testbed.errors import CapabilityMissing, ExitCode, HostError, InputError

SECONDS = {"version": 0.25, "validate": 0.5, "warm-start": 1.0, "pristine": 0.5, "suite": 8.0}


def bed(runs: int = 3) -> Bed:
    nothing: Any = None
    return Bed(nothing, nothing, nothing, "tcg", nothing, runs, lambda _: None)


def figure(name: str, measure: Callable[[Bed, int], Measured], **more: Any) -> Figure:
    return Figure(name, "a figure", "s", 1.0, measure, **more)


def says(*values: float) -> Callable[[Bed, int], Measured]:
    return lambda _, runs: Measured(values[:runs], {"why": "a detail"})


def raises(error: Exception) -> Callable[[Bed, int], Measured]:
    def measure(_: Bed, __: int) -> Measured:
        raise error

    return measure


def report(monkeypatch: pytest.MonkeyPatch, *table: Figure, runs: int = 3) -> dict[str, Any]:
    monkeypatch.setattr(figures, "FIGURES", table)
    return figures.report([each.name for each in table if not each.asked], bed(runs))


def test_the_table_says_what_was_promised() -> None:
    table = {each.name: each for each in figures.FIGURES}
    assert len(table) == len(figures.FIGURES)
    assert {name: table[name].wanted for name in SECONDS} == SECONDS
    assert table["warm-against-virtme"].wanted == pytest.approx(1 / 15)
    assert table["all-suites"].wanted == 6 * 60
    assert (table["racks"].wanted, promised.RACKS) == (150, 16)
    assert table["overhead"].wanted == 15


def test_the_limit_itself_is_good_where_at_most_is_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_most = figure("at-most", says(1.0))
    under = figure("under", says(1.0), inclusive=False)
    rows = report(monkeypatch, at_most, under)["figures"]
    assert [(row["holds"], row["compare"]) for row in rows] == [(True, "<="), (False, "<")]


def test_the_median_is_judged_and_all_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    result = report(monkeypatch, figure("a", says(9.0, 0.5, 0.6)))
    (row,) = result["figures"]
    assert row["holds"]
    assert row["measured"] == {"min": 0.5, "median": 0.6, "max": 9.0, "runs": [9.0, 0.5, 0.6]}
    assert row["details"] == {"why": "a detail"}
    assert (result["holds"], result["of_wanted"]) == (True, {"a": 0.6})
    assert figures.exit_code(result) is ExitCode.PASS
    assert "0.6" in svg("figures", result)
    (row,) = report(monkeypatch, figure("b", says(0.5, 1.2, 0.4)), runs=2)["figures"]
    assert (row["measured"]["median"], row["holds"]) == (0.85, True)
    (row,) = report(monkeypatch, figure("b", says(0.5, 1.2, 9.0)))["figures"]
    assert not row["holds"], "one good run is not enough"


def test_one_that_is_missed_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = report(
        monkeypatch,
        figure("slow", says(2.0)),
        figure("lost", raises(HostError("no memory"))),
        figure("good", says(0.5)),
    )
    assert [row["holds"] for row in result["figures"]] == [False, None, True]
    assert result["figures"][1]["why"] == "no memory"
    assert figures.exit_code(result) is ExitCode.FAIL


@pytest.mark.parametrize(
    ("error", "code"),
    [(CapabilityMissing("no 9p"), ExitCode.SKIP), (HostError("broken"), ExitCode.ERROR)],
)
def test_what_cannot_be_measured_is_neither_held_nor_missed(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: ExitCode
) -> None:
    result = report(monkeypatch, figure("good", says(0.5)), figure("gone", raises(error)))
    assert result["holds"] is None
    assert figures.exit_code(result) is code


def test_what_takes_long_waits_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (figure("long", says(9.0), asked="takes long"), figure("good", says(0.5, 0.6), most=1))
    result = report(monkeypatch, *table)
    long, good = result["figures"]
    assert (long["holds"], long["why"], long["asked_for"]) == (None, "takes long", False)
    assert good["measured"]["runs"] == [0.5]
    assert figures.exit_code(result) is ExitCode.PASS
    chosen = figures.chosen(["every"])
    assert "all-suites" in chosen
    assert "all-suites" not in figures.chosen([])


def test_a_figure_that_does_not_exist_is_said_with_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        figures.chosen(["warmstart", "validate", "suit"])
    assert [each.nearest for each in caught.value.diagnostics] == ["warm-start", "suite"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Commands]]:
    """Commands whose `testbed` is a script."""
    with Commands() as made:

        def of(script: str) -> Commands:
            monkeypatch.setattr(made, "_program", [sys.executable, "-c", script])
            return made

        yield of
        of("")


SAYS = """
import sys, time
time.sleep(0.3); print("first", file=sys.stderr)
time.sleep(0.3); print("all agents answered after 1 s", file=sys.stderr)
until = time.process_time() + 0.2
while time.process_time() < until: pass
print("result"); sys.exit(3)
"""


def test_a_command_is_timed_to_what_it_says_and_to_its_end(
    commands: Callable[[str], Commands],
) -> None:
    ran = commands(SAYS).run(["up"], until="all agents answered")
    assert 0.6 <= ran.said_s <= ran.seconds - 0.2
    assert 0.2 <= ran.cpu_s <= ran.seconds
    assert (ran.exit_code, ran.stdout) == (3, b"result\n")
    assert ran.stderr.splitlines() == ["first", "all agents answered after 1 s"]


def test_a_command_that_does_not_do_as_it_should_is_no_measurement(
    commands: Callable[[str], Commands],
) -> None:
    with pytest.raises(HostError, match=r"testbed up x: ended with 3: first"):
        commands(SAYS).run(["up", "x"], good=(0, 1))
    with pytest.raises(HostError, match="never said 'ready'"):
        commands(SAYS).run(["up"], until="ready")
    with pytest.raises(HostError, match="left no record"):
        commands("").judged(["p2p-iommu"])
    with pytest.raises(HostError, match="did not end within 1 s"):
        commands("import time; time.sleep(60)").run(["up"], timeout_s=1)


def test_racks_and_history_of_a_measurement_are_its_own(
    commands: Callable[[str], Commands],
) -> None:
    script = "import os; print(os.environ['TESTBED_STATE_DIR'], os.environ['TESTBED_RUNTIME_DIR'])"
    ran = commands(script).run([])
    assert all(
        Path(word).is_relative_to(tempfile.gettempdir()) for word in ran.stdout.decode().split()
    )


@pytest.mark.parametrize("runs", [True, False])
def test_virtme_counts_if_its_command_ran(tmp_path: Path, runs: bool) -> None:
    """Its exit code says nothing on a host without udev."""
    program = tmp_path / "vng"
    act = 'sleep 0.2; eval "$3"' if runs else "echo cannot boot >&2"
    program.write_text(f"#!/bin/sh\n{act}\nsleep 0.5\nexit 255\n")
    program.chmod(0o755)
    peer = virtme.Peer("1", "7.0", (str(program),), {"PATH": "/usr/bin:/bin"})
    if not runs:
        with pytest.raises(HostError, match="its command did not run: cannot boot"):
            peer.run()
        return
    boot = peer.run()
    assert 0.15 <= boot.ran_s < boot.seconds - 0.4


def test_the_release_of_virtme_is_read_where_it_was_installed(tmp_path: Path) -> None:
    folder = tmp_path / "lib/python3.13/site-packages/virtme_ng-1.42.dist-info"
    folder.mkdir(parents=True)
    assert virtme.version_in(tmp_path) == "1.42"
    assert virtme.version_in(tmp_path / "lib") == ""
