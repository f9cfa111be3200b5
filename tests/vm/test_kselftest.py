# SPDX-License-Identifier: Apache-2.0
"""Other people's programs in a real guest: with a device of vfio-pci's, and through an oops."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from testbed import deploy
from testbed.errors import ExitCode
from testbed.harness.runner import Choice, run_suites
from testbed.harness.sources import TopologySource
from testbed.host.prepare import Installation
from testbed.payload.collection import FOLDER, Payload, find_collection
from testbed.results.verdicts import Verdict
from tests.vm.conftest import shipped

pytestmark = pytest.mark.timeout(240)

# In the order of their names: those after the oops have a fresh machine.
PROGRAMS = {
    "a_bound": """
        driver=$(readlink /sys/bus/pci/devices/$VFIO_SELFTESTS_BDF/driver)
        echo TAP version 13; echo 1..2
        [ "${driver##*/}" = vfio-pci ] && echo ok 1 bound || echo not ok 1 bound
        set -- /dev/vfio/[0-9]*
        [ -c "$1" ] && echo ok 2 group || echo not ok 2 group
    """,
    "b_crash": "echo 1..2; echo ok 1 begun; kill -SEGV $$",
    "c_oops": "echo 1..2; echo ok 1 begun; sleep 1; echo c >/proc/sysrq-trigger; sleep 60",
    "d_after": "echo 1..1; echo not ok 1 refuted; exit 1",
}


def test_programs_end_in_every_way(
    installation: Installation, accelerator: str, tmp_path: Path
) -> None:
    folder = tmp_path / FOLDER / "vfio"
    folder.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    options = deploy.StartOptions(accelerator=accelerator, installation=installation)
    result = run_suites(
        Choice(["kselftest"], payload=Payload(find_collection("vfio", tmp_path))),
        TopologySource(shipped("minimal"), tmp_path, options=options),
        tmp_path,
        stream=io.StringIO(),
        console=Console(file=io.StringIO()),
    )
    device = "-gpu0.engine"
    outcomes = {o.test.replace(device, ""): o for o in result.record.outcomes}
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "a_bound/bound": Verdict.PASS,
        "a_bound/group": Verdict.PASS,
        "b_crash/begun": Verdict.PASS,
        "b_crash": Verdict.LOST,
        "c_oops/begun": Verdict.PASS,
        "kselftest[c_oops]": Verdict.LOST,
        "d_after/refuted": Verdict.FAIL,
    }
    assert "SIGSEGV" in outcomes["b_crash"].reason
    assert "sysrq" in outcomes["kselftest[c_oops]"].reason
    assert "write_sysrq_trigger" in outcomes["kselftest[c_oops]"].console_tail
    assert result.code is ExitCode.FAIL
