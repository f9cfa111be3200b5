# SPDX-License-Identifier: Apache-2.0
"""The kernel's own selftests in the rack, as the user's checkout built them (docs/kselftest.md).

One test for each program; its results are those that the program gives. The vfio collection takes
its device from the environment (tools/testing/selftests/vfio/lib/libvfio.c,
``VFIO_SELFTESTS_BDF``) and wants it to be vfio-pci's; the others are run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from testbed.errors import CapabilityMissing, Diagnostic, InputError
from testbed.harness.racks import LiveRack
from testbed.harness.session import SESSION
from testbed.instruments.interface import RackNode
from testbed.instruments.observer import Observer
from testbed.payload.collection import DEFAULT_COLLECTION, Payload, Program
from testbed.payload.guest import Died, GuestCollection
from testbed.reports.places import NoSuchPlace, find_functions
from testbed.results.ktap_reader import Ending, read_ktap
from testbed.topology.plan import Function, RackPlan, Role

DEVICE_VARIABLE = "VFIO_SELFTESTS_BDF"
_ROOM_S = 240.0  # beside a program's deadline: to bring the collection there, to kill what hangs


@dataclass(frozen=True)
class Case:
    """One program, on one device if the collection wants one."""

    payload: Payload
    program: Program
    node: str
    device: Function | None = None

    @property
    def name(self) -> str:
        """``vfio_pci_device_test-gpu0.engine``."""
        return self.program.name + (f"-{self.device.name}" if self.device else "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each program and device."""
    session = metafunc.config.stash[SESSION]
    payload = session.payload
    if not isinstance(payload, Payload):
        raise pytest.UsageError("kselftest: whose? give --kernel-tree or --collection")
    found = list(cases(payload, session.pool.source.plan))
    marks = pytest.mark.timeout(payload.deadline_s + _ROOM_S)
    metafunc.parametrize("case", [pytest.param(case, id=case.name, marks=marks) for case in found])


def cases(payload: Payload, plan: RackPlan) -> Iterator[Case]:
    """What is to be run.

    :raises InputError: there is no such device.
    """
    first = next(iter(plan.nodes))
    chosen: list[tuple[str, Function | None]]
    chosen = [_device(plan, word) for word in payload.devices]
    if not chosen and payload.collection.name == DEFAULT_COLLECTION:
        chosen = [(first, default_device(plan, first))]
    for node, device in chosen or [(first, None)]:
        for program in payload.collection.programs:
            yield Case(payload, program, node, device)


def default_device(plan: RackPlan, node: str) -> Function | None:
    """What the vfio collection can do most with: its own driver for igb, then any DMA engine."""
    functions = plan.nodes[node].by_role(Role.ENGINE, Role.NVME, Role.DEVICE)
    return min(functions, key=lambda f: (f.kind != "igb", f.role is not Role.ENGINE), default=None)


def _device(plan: RackPlan, word: str) -> tuple[str, Function]:
    try:
        return find_functions(plan, word)[0]
    except NoSuchPlace as error:
        raise InputError(
            diagnostics=[Diagnostic("--device", 0, 0, error.message, error.expected, error.nearest)]
        ) from error


def test_kselftest(rack: LiveRack, observe: Observer, case: Case) -> None:
    """One program, with the device that it shall use."""
    node = rack.nodes[case.node]
    if case.payload.collection.name == DEFAULT_COLLECTION and case.device is None:
        raise CapabilityMissing("a device that vfio-pci may own")
    guest = rack.once(
        ("payload", case.node), lambda _: GuestCollection(node, case.payload.collection)
    )
    guest.check(case.program)
    with _lent(rack, node, case.device) as environment:
        _run(rack, guest, case, environment, observe)


def _run(
    rack: LiveRack,
    guest: GuestCollection,
    case: Case,
    environment: dict[str, str],
    observe: Observer,
) -> None:
    try:
        said, ending = guest.run(case.program, (), environment, case.payload.deadline_s)
    except Died as death:
        *parts, whole = read_ktap(case.name, death.said, Ending(None, str(death)))
        observe.report(*parts)
        observe.add(*whole.evidence)
        raise death.error from death
    observe.report(*read_ktap(case.name, said, ending))
    if ending.status is None and rack.ours:
        # Killed, it may have left a device or the kernel in any state.
        rack.renew()


@contextmanager
def _lent(rack: LiveRack, node: RackNode, device: Function | None) -> Iterator[dict[str, str]]:
    """The device is vfio-pci's; what the programs are told of it."""
    if device is None:
        yield {}
        return
    iommu = rack.topology.nodes[node.name].iommu
    if iommu.kind == "none" or iommu.mode == "off":
        raise CapabilityMissing("an IOMMU: without one vfio-pci has no groups")
    node.agent.call("driver.lend", devices=[device.bdf], unsafe_interrupts=iommu.kind == "virtio")
    yield {DEVICE_VARIABLE: device.bdf}
    if rack.is_running and not rack.is_dead:
        node.agent.call("driver.give_back", 60.0)
