# SPDX-License-Identifier: Apache-2.0
"""What a kernel or a module of its does wrong for good: said of the requirement that ran, and of no
other, which has a fresh machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.harness.sources import TopologySource
from testbed.host import kmod_sources
from testbed.results.verdicts import Verdict
from tests.vm.conftest import shipped
from tests.vm.runs import run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

MODULES = {
    # A write to nowhere while it is loaded; and a module that has no exit.
    "oopses": "*(volatile int *)NULL = 1;",
    "stays": "",
}
SOURCE = """\
// SPDX-License-Identifier: GPL-2.0-only
#include <linux/module.h>
static int __init begin(void)
{{
	{}
	return 0;
}}
module_init(begin);
MODULE_DESCRIPTION("Wrong on purpose");
MODULE_LICENSE("GPL");
"""
SUITE = """\
import pytest
from testbed.suites.kernel_fixtures import kernel_module


def fresh(node):
    modules = ["oopses", "stays"]
    found = node.agent.call("modules.loaded", names=modules)
    assert found == dict.fromkeys(modules, False)
    made = node.link.run("mkdir /run/used")
    assert made.exit_status == 0, "the machine that another test has used"


@pytest.mark.requirement("OWN-1")
def test_oops(rack):
    fresh(rack.nodes["host0"])
    with kernel_module(rack.nodes["host0"], "oopses"):
        pass


@pytest.mark.requirement("OWN-2")
def test_after_the_oops(rack):
    fresh(rack.nodes["host0"])
    rack.nodes["host0"].link.run("rmdir /run/used")


@pytest.mark.requirement("OWN-3")
def test_stays(rack):
    fresh(rack.nodes["host0"])
    with kernel_module(rack.nodes["host0"], "stays"):
        pass


@pytest.mark.requirement("OWN-4")
def test_after_the_module_that_stays(rack):
    fresh(rack.nodes["host0"])
"""


def test_each_fault_is_one_requirements(
    warm: StartOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, statement in MODULES.items():
        folder = tmp_path / "kmod" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.c").write_text(SOURCE.format(statement))
        (folder / "Kbuild").write_text(f"obj-m := {name}.o\n")
        (folder / "module.yaml").write_text("config: []\n")
    monkeypatch.setattr(kmod_sources, "folder", lambda: tmp_path / "kmod")
    suite = tmp_path / "test_faults_of_the_guest.py"  # a name of its own: pytest imports by it
    suite.write_text(SUITE)
    ran = run(suite, TopologySource(shipped("minimal"), tmp_path, options=warm), tmp_path)
    assert ran.verdicts == {
        "OWN-1": Verdict.LOST,
        "OWN-2": Verdict.PASS,
        "OWN-3": Verdict.ERROR,
        "OWN-4": Verdict.PASS,
    }, [outcome.reason for outcome in ran.outcomes]
    oops, _, stays, _ = ran.outcomes
    assert "the guest kernel panicked: Fatal exception (BUG: kernel NULL pointer" in oops.reason
    for words in ("NULL pointer dereference", "begin", "[oopses]", "Call Trace"):
        assert words in oops.console_tail
    assert "module stays does not unload: rmmod: " in stays.reason
