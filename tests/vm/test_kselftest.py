# SPDX-License-Identifier: Apache-2.0
"""Other people's programs in a real guest: with a device of vfio-pci's, and through an oops."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.harness.sources import TopologySource
from testbed.payload.collection import FOLDER, Payload, find_collection
from testbed.results.verdicts import Verdict
from tests.vm.conftest import shipped
from tests.vm.runs import run

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


def test_programs_end_in_every_way(warm: StartOptions, tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / "vfio"
    folder.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    source = TopologySource(shipped("minimal"), tmp_path, options=warm)
    payload = Payload(find_collection("vfio", tmp_path))
    ran = run("kselftest", source, tmp_path, payload=payload)
    device = "-gpu0.engine"
    outcomes = {o.test.replace(device, ""): o for o in ran.outcomes}
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
    assert ran.code is ExitCode.FAIL
