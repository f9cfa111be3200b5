# SPDX-License-Identifier: Apache-2.0
"""Real machines for tests: the installation, a runtime folder of our own, racks.

Racks are restored from machines that were booted once and saved, in this session or an earlier one
(``warm``). What tests how machines boot, or boots one that no other test wants, says ``cold``.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed import deploy
from testbed.errors import TestbedError
from testbed.host import prepare, probe
from testbed.host.prepare import Installation
from testbed.rack import Rack
from testbed.topology import load
from testbed.topology.model import Topology

ROOT = Path(__file__).resolve().parents[2]

Start = Callable[..., Rack]


def shipped(name: str, **settings: str) -> Topology:
    """A topology that comes with the testbed."""
    return load.load(ROOT / "topologies" / f"{name}.yaml", settings)


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[Path]:
    """A runtime folder that no other rack of this user is in; it must be empty at the end."""
    # Not pytest's tmp_path: a socket's path may have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="tb-"))
    before = os.environ.get("TESTBED_RUNTIME_DIR")
    os.environ["TESTBED_RUNTIME_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TESTBED_RUNTIME_DIR"]
    else:
        os.environ["TESTBED_RUNTIME_DIR"] = before
    left = [path.name for path in (folder / "racks").glob("*")]
    shutil.rmtree(folder)
    assert not left, f"racks were left behind: {left}"


@pytest.fixture(scope="session")
def installation() -> Installation:
    """Set up, or the reason to skip (not so under TESTBED_REQUIRE_VM=1)."""
    try:
        return prepare.prepare()
    except TestbedError as error:
        if os.environ.get("TESTBED_REQUIRE_VM") == "1":
            raise
        pytest.skip(f"no machine can boot here: {error.message}")


@pytest.fixture(scope="session")
def accelerator(installation: Installation) -> str:
    """Probed once; every rack of the tests uses it."""
    return probe.accelerator(installation)


@pytest.fixture(scope="session")
def cold(installation: Installation, accelerator: str) -> deploy.StartOptions:
    """Racks boot."""
    return deploy.StartOptions(accelerator=accelerator, installation=installation)


@pytest.fixture(scope="session")
def warm(cold: deploy.StartOptions) -> deploy.StartOptions:
    """Racks are restored: for whatever does not test how they boot."""
    return dataclasses.replace(cold, warm=True)


@pytest.fixture(scope="module")
def start(warm: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts racks, which end with the module."""
    with ExitStack() as stack:

        def act(topology: Topology, options: deploy.StartOptions = warm) -> Rack:
            run_dir = tmp_path_factory.mktemp(topology.rack)
            return stack.enter_context(deploy.start(topology, run_dir=run_dir, options=options))

        yield act


@pytest.fixture(scope="session")
def rack(warm: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    """One running `minimal` rack for all tests that leave it as they found it."""
    options = dataclasses.replace(warm, name="shared")
    run_dir = tmp_path_factory.mktemp("shared")
    with deploy.start(shipped("minimal"), run_dir=run_dir, options=options) as running:
        yield running
