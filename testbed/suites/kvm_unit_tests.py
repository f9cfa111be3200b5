# SPDX-License-Identifier: Apache-2.0
"""Programs of kvm-unit-tests in the kernel's place, as the user's checkout built them.

One test for each program (docs/kvm-unit-tests.md), each on a machine of its own, which is rendered
as the rack's first node is; its results are those that the program prints on the serial port.
"""

from __future__ import annotations

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.session import SESSION, ConformanceSession
from testbed.harness.sources import TopologySource
from testbed.instruments.observer import Observer
from testbed.payload.multiboot import MachineProgram, MachinePrograms
from testbed.results.machine_report import MachineEnd, read_report

_ROOM_S = 60.0  # beside a program's deadline: to start the machine and to end it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each program."""
    programs = metafunc.config.stash[SESSION].payload
    if not isinstance(programs, MachinePrograms):
        raise pytest.UsageError("kvm-unit-tests: whose? give --tree")
    marks = pytest.mark.timeout(programs.deadline_s + _ROOM_S)
    cases = [pytest.param(each, id=each.name, marks=marks) for each in programs.programs]
    metafunc.parametrize("program", cases)


@pytest.fixture
def source(pytestconfig: pytest.Config) -> TopologySource:
    """Where machines come from; CapabilityMissing: a rack that is up."""
    session: ConformanceSession = pytestconfig.stash[SESSION]
    found = session.pool.source
    if not isinstance(found, TopologySource) or not found.restartable:
        raise CapabilityMissing(
            "a topology: a program in the kernel's place cannot run in a rack that is up"
        )
    return found


def test_kvm_unit_tests(
    source: TopologySource,
    observe: Observer,
    program: MachineProgram,
    pytestconfig: pytest.Config,
) -> None:
    """One program."""
    programs = pytestconfig.stash[SESSION].payload
    assert isinstance(programs, MachinePrograms)
    end = source.run_program(program.file, program.name, programs.deadline_s)
    if end.exit is None:
        how = MachineEnd(None, f"it did not end within {programs.deadline_s:g} s")
    elif end.exit.status < 0:
        how = MachineEnd(None, f"QEMU {end.exit}: {end.qemu_said.strip()[-300:]}")
    else:
        how = MachineEnd(end.exit.status)
        if end.qemu_said.strip():
            observe.note(f"QEMU said: {end.qemu_said.strip()[-300:]}")
    observe.report(*read_report(program.name, end.said, how))
