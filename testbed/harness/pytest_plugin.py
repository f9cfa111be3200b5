# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: real racks for your own tests, judged by the same rules as the suites.

Ten lines are a whole test::

    # test_mine.py        pytest --testbed-topology quad-gpu.yaml test_mine.py
    import pytest

    @pytest.mark.requirement("MINE-01")
    def test_four_gpus_are_there(rack, observe):
        node = rack.nodes["host0"]
        tree = node.agent.call("pci.tree")["devices"]
        vram = [d for d in tree if d["vendor"] == 0x1AF4 and d["device"] == 0x1110]
        assert len(vram) == 4
        observe.conclude("the guest sees four video memories")

Fixtures: ``rack`` is the running rack (:class:`testbed.harness.racks.LiveRack`; ``rack.once`` keeps
what is dear to make); ``observe`` takes evidence and judgements
(:class:`testbed.instruments.observer.Observer`); ``variant("name")`` is another rack, which the
module's function ``rack_variants(topology)`` describes; ``mutation`` is the deliberate break in
force (:mod:`testbed.instruments.mutations`); ``faults`` lets model devices go wrong and takes it
back, ``witness("gpu0")`` counts what one does in a ``with`` block
(:mod:`testbed.harness.device_faults`, docs/faults.md); ``disks`` is for who looks at the kernel's
disks.

Markers: ``requirement("ID", …)`` names what a test shows; ``gated_by("ID")`` skips it unless the
tests of ID have passed before; ``boots("name", …)`` lets these variants boot in the background as
soon as a test that uses them is chosen (:mod:`testbed.harness.early`); ``pristine`` gives a test a
machine that no other has used; ``without_disks`` says that it looks at no disk, nor at what one's
driver makes: a machine that it has alone, and that is restored, then has none for them.

Ends: an AssertionError is a FAIL, :class:`~testbed.errors.LostError` is LOST (the next test gets a
fresh machine), :class:`~testbed.errors.CapabilityMissing` is a SKIP, anything else is an ERROR.

Bug reports (``*.report.yaml``, docs/reports.md) are tests too: each boots a rack of its own, and
passes if it is FIXED (``--testbed-expect reproduced``: if it still happens).

Without one of its options, or a report by its name, this plugin does nothing, and importing it
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testbed.harness.device_faults import Faults
    from testbed.harness.racks import LiveRack
    from testbed.harness.session import ConformanceSession
    from testbed.instruments.devices import Watch
    from testbed.instruments.mutations import Mutation
    from testbed.instruments.observer import Observer

_MARKERS = (
    "requirement(id, ...): the requirements of the conformance catalogue that this test shows",
    "gated_by(id, ...): skip unless the tests of these requirements passed before",
    "boots(variant, ..., when=fits): these variants (the rack itself) may boot early if fits(plan)",
    "pristine: start on a machine that no other test has used",
    "without_disks: it looks at no disk, so disks of a machine of its own need no driver",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options; each also has a place in the environment of ``testbed run``."""
    group = parser.getgroup("testbed", "virtual GPU racks")
    group.addoption(
        "--testbed-topology", metavar="FILE", help="boot this rack for the tests, and end it after"
    )
    group.addoption(
        "--testbed-set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set one of the topology's vars",
    )
    group.addoption(
        "--testbed-trust",
        action="store_true",
        help="run the Python files that the topology names as devices",
    )
    group.addoption("--testbed-rack", metavar="NAME", help="use this running rack")
    group.addoption(
        "--testbed-run-dir",
        metavar="DIR",
        type=Path,
        help="keep logs, record.json and junit.xml there",
    )
    group.addoption(
        "--testbed-break",
        metavar="MUTATION",
        default="",
        help="break something on purpose, to see a FAIL",
    )
    group.addoption(
        "--testbed-policy",
        metavar="POLICY",
        default="",
        help="how interconnects are chosen in p2p-negotiation",
    )
    group.addoption(
        "--testbed-expect",
        choices=["fixed", "reproduced"],
        default="fixed",
        help="what bug reports (*.report.yaml) must say to pass",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; start a session if a rack was asked for."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    options = config.option
    if options.testbed_topology or options.testbed_rack:
        from testbed.errors import InputError  # noqa: PLC0415  nothing to import when unused
        from testbed.harness.runner import session_from_options  # noqa: PLC0415

        try:
            session = session_from_options(
                topology=options.testbed_topology,
                settings=options.testbed_set,
                rack=options.testbed_rack,
                run_dir=options.testbed_run_dir,
                mutation=options.testbed_break,
                policy=options.testbed_policy,
                trust=options.testbed_trust,
            )
        except InputError as error:
            raise pytest.UsageError(str(error)) from error
        config.pluginmanager.register(session, "testbed-session")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Bug reports that are named on the command line, or stand where a session's tests do."""
    if not file_path.name.endswith(".report.yaml"):
        return None
    from testbed.harness.report_items import ReportFile  # noqa: PLC0415  nothing to import when unused
    from testbed.harness.session import SESSION  # noqa: PLC0415

    if SESSION not in parent.config.stash and not parent.session.isinitpath(file_path):
        return None
    return ReportFile.from_parent(parent, path=file_path)


@pytest.fixture(scope="session")
def rack(request: pytest.FixtureRequest) -> LiveRack:
    """The rack under test; the tests after its death get a fresh one under the same name."""
    return _session(request).pool.main


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest) -> Callable[[str], LiveRack]:
    """``variant("name")``: a rack that the module's ``rack_variants(topology)`` describes."""
    return _session(request).pool.variant


@pytest.fixture(scope="session")
def mutation(request: pytest.FixtureRequest) -> Mutation:
    """What is broken on purpose in this session."""
    return _session(request).mutation


@pytest.fixture(scope="session")
def policy(request: pytest.FixtureRequest) -> str:
    """How interconnects are chosen (``--policy``), or "" for the suite's default."""
    return _session(request).policy


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Observer:
    """Takes the test's evidence and judgements."""
    return _session(request).observer(request.node)


@pytest.fixture
def disks() -> None:
    """Asked for by whoever looks at disks, or at what their drivers make: in a test that is marked
    ``without_disks`` that is an ERROR."""


@pytest.fixture
def faults(rack: LiveRack) -> Iterator[Faults]:
    """Faults on purpose in model devices; taken back at the end of the test, or it is an ERROR."""
    from testbed.harness.device_faults import Faults  # noqa: PLC0415  nothing to import when unused

    injected = Faults(rack)
    yield injected
    injected.disarm()


@pytest.fixture(scope="session")
def witness(rack: LiveRack) -> Callable[[str], Watch]:
    """``with witness("gpu0") as watch``: by which paths it moved how much, and what happened."""
    from testbed.instruments.devices import find_device  # noqa: PLC0415  nothing to import when unused

    return lambda word: find_device(rack.nodes, word).watch()


def _session(request: pytest.FixtureRequest) -> ConformanceSession:
    from testbed.harness.session import SESSION  # noqa: PLC0415  nothing to import when unused

    session = request.config.stash.get(SESSION, None)
    if session is None:
        raise pytest.UsageError(
            "which rack? give --testbed-topology FILE or --testbed-rack NAME, or use `testbed run`"
        )
    return session
