# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin with someone's own tests, on a fake rack: every end that a test can have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from testbed.errors import ExitCode
from testbed.results.record import load_record
from testbed.results.verdicts import Verdict
from tests.contract.own_runs import Run

PASS, FAIL, SKIP, LOST, ERROR = Verdict


def test_the_policy_of_a_run_is_what_tests_get_and_the_record_has(tmp_path: Path) -> None:
    body = """
        def test_policy(policy):
            assert policy == "mailing-list"
    """
    run = Run(tmp_path, body, policy="mailing-list")
    assert run.verdicts == [PASS]
    assert run.result.record.policy == "mailing-list"
    assert load_record(tmp_path / "record.json").policy == "mailing-list"
    assert '"policy": "mailing-list"' in (tmp_path / "options.json").read_text()
    assert Run(tmp_path, body).result.record.policy == ""


def test_each_end_has_its_word(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        @pytest.mark.requirement("MINE-01", "MINE-02")
        def test_pass(rack, observe):
            assert call(rack)["kernel"]
            observe.note("seen")
            observe.conclude("it answers")

        def test_fail(rack):
            assert 1 == 2, "one is not two"

        def test_judged(observe):
            observe.require(Judgement(False, "it does not hold"))

        def test_skip(rack):
            raise CapabilityMissing("a device that is not there")

        def test_pytest_skip(rack):
            pytest.skip("not today")

        def test_error(rack):
            {}["x"]

        def test_agent_error(rack):
            call(rack, "no.such")
        """,
    )
    assert run.verdicts == [PASS, FAIL, FAIL, SKIP, SKIP, ERROR, ERROR]
    passed = run.outcomes["pass"]
    assert passed.requirements == ("MINE-01", "MINE-02")
    assert passed.reason == "it answers"
    assert [str(e) for e in passed.evidence] == ["seen"]
    assert run.outcomes["fail"].reason == "one is not two"
    assert "_own.py" in run.outcomes["fail"].details
    assert "pluggy" not in run.outcomes["fail"].details
    assert run.outcomes["judged"].reason == "it does not hold"
    assert run.outcomes["skip"].reason == "a device that is not there"
    assert run.outcomes["error"].reason == "KeyError: 'x'"
    assert run.result.code is ExitCode.FAIL
    assert all(rack.closed for rack in run.source.racks)
    assert "not ok 6 error # ERROR KeyError: 'x'" in run.stream.getvalue()


def test_the_phases_combine_to_the_worst(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        @pytest.fixture
        def breaks_after():
            yield
            raise OSError("cannot clean up")

        @pytest.fixture
        def refutes_before():
            assert False, "set-up refuted"

        def test_passes(rack, breaks_after): pass
        def test_fails(rack, breaks_after): assert False, "no"
        def test_is_not_reached(rack, refutes_before): pass
        """,
    )
    assert run.verdicts == [ERROR, FAIL, FAIL]
    assert run.outcomes["passes"].reason == "OSError: cannot clean up"
    assert run.outcomes["fails"].reason == "no"


def test_faults_that_cannot_be_taken_back_are_an_error_and_the_next_test_has_a_fresh_rack(
    tmp_path: Path,
) -> None:
    run = Run(
        tmp_path,
        """
        class Deaf:
            def restore(self):
                raise HostError("no answer")

        from testbed.errors import HostError

        def test_of_no_model(rack, faults): faults.arm("gpu0", "drop write")
        def test_kept(rack, faults):
            call(rack)
            faults._touched["host0/gpu0"] = Deaf()
        def test_after(rack, faults, witness): call(rack)
        """,
    )
    assert run.verdicts == [ERROR, ERROR, PASS]
    assert "host0/gpu0 is no model device" in run.outcomes["of_no_model"].reason
    said = run.outcomes["kept"].reason
    assert said == "HostError: faults of host0/gpu0 could not be taken back: no answer"
    assert len(run.source.racks) == 2


class TestGates:
    BODY = """
        @pytest.mark.requirement("SET-UP")
        def test_gate(rack): {gate}

        @pytest.mark.gated_by("SET-UP")
        def test_behind(rack): pass

        def test_beside(rack): pass
        """

    @pytest.mark.parametrize(
        ("gate", "verdict", "reason"),
        [
            ("pass", PASS, ""),
            ("assert 0, 'no good'", SKIP, "set-up invalid, SET-UP failed: no good"),
            ("pytest.skip('no IOMMU')", SKIP, "no IOMMU"),
            ("{}['x']", SKIP, "set-up not shown to be valid: SET-UP ended ERROR"),
        ],
    )
    def test_a_gate_decides(self, tmp_path: Path, gate: str, verdict: Verdict, reason: str) -> None:
        run = Run(tmp_path, self.BODY.replace("{gate}", gate))
        assert run.outcomes["behind"].verdict is verdict
        assert run.outcomes["behind"].reason == reason
        assert run.outcomes["beside"].verdict is PASS

    @pytest.mark.parametrize("keyword", ["BEHIND_1", "behind-1", "not BESIDE_1 and not SET-UP"])
    def test_a_keyword_may_be_a_requirement(self, tmp_path: Path, keyword: str) -> None:
        body = self.BODY.replace("{gate}", "pass").replace(
            "def test_beside", "@pytest.mark.requirement('BESIDE-1')\n        def test_beside"
        )
        body = body.replace(
            "def test_behind", "@pytest.mark.requirement('BEHIND-1')\n        def test_behind"
        )
        run = Run(tmp_path, body, keyword=keyword)
        assert list(run.outcomes) == ["gate", "behind"]

    def test_a_keyword_does_not_take_the_gate_away(self, tmp_path: Path) -> None:
        run = Run(tmp_path, self.BODY.replace("{gate}", "pass"), keyword="behind")
        assert list(run.outcomes) == ["gate", "behind"]
        assert run.stream.getvalue().startswith("KTAP version 1\n1..2\n")


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, "import no_such_module_anywhere")
    assert run.verdicts == [ERROR]
    assert "no_such_module_anywhere" in run.result.record.outcomes[0].reason
    assert run.result.code is ExitCode.ERROR
    assert "1..1" in run.stream.getvalue()


def test_an_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        def test_one(rack): call(rack)
        def test_two(rack): raise KeyboardInterrupt
        def test_three(rack): call(rack)
        """,
    )
    assert run.verdicts == [PASS]
    assert run.result.code is ExitCode.INTERRUPTED
    assert load_record(tmp_path / "record.json").exit_code == ExitCode.INTERRUPTED
    assert run.stream.getvalue().splitlines()[-2:] == [
        "# 2 of 3 tests not run",
        "# interrupted",
    ]
    assert all(rack.closed for rack in run.source.racks)


def test_an_interrupt_is_not_taken_for_what_clean_up_then_meets(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        @pytest.fixture
        def tidy(rack):
            yield
            if rack.is_running:
                call(rack)

        def test_one(rack, tidy):
            try:
                raise KeyboardInterrupt
            finally:
                call(rack, "iommu.groups")

        def test_two(rack): call(rack)
        """,
        {"dies_on": "iommu.groups"},
    )
    assert run.verdicts == []
    assert run.result.code is ExitCode.INTERRUPTED


def test_tests_print_nothing_into_the_results(tmp_path: Path) -> None:
    run = Run(tmp_path, "def test_one(rack): print('noise')")
    assert "noise" not in run.stream.getvalue()


def run_pytest(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "testbed.harness.pytest_plugin", *arguments],
        cwd=cwd,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_unused_it_imports_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import sys\n"
        "def test_x():\n"
        "    names = ('testbed', 'pydantic', 'rich')\n"
        "    ours = {m for m in sys.modules if m.split('.')[0] in names}\n"
        "    assert ours <= {'testbed', 'testbed.harness', 'testbed.harness.pytest_plugin'}\n"
    )
    done = run_pytest("-q", "--strict-markers", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_without_a_rack_the_fixture_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_x(rack): pass\n")
    done = run_pytest("-q", cwd=tmp_path)
    assert done.returncode == 1
    assert "which rack? give --testbed-topology FILE" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--testbed-topology=no-such.yaml"], "no-such.yaml"),
        (["--testbed-topology=a", "--testbed-rack=b"], "choose"),
        (["--testbed-rack=b", "--testbed-break=x"], "unknown mutation 'x'"),
        (["--testbed-rack=b", "--testbed-policy=x"], "unknown policy 'x'"),
    ],
)
def test_bad_options_are_a_usage_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "test_x.py").write_text("def test_x(rack): pass\n")
    done = run_pytest("-q", f"--testbed-run-dir={tmp_path}", *arguments, cwd=tmp_path)
    assert done.returncode == 4, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
