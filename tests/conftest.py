# SPDX-License-Identifier: Apache-2.0
"""For every test: runs and history go to a folder of the test session, not to the developer's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from testbed.host import facts
from testbed.topology.units import GIB

VM = Path(__file__).parent / "vm"
# The most that a file of tests/vm has running at once: four machines of half a GiB, or one large.
MEMORY_OF_A_WORKER_BYTES = 3 * GIB

# How long an example takes is the busy host's affair.
settings.register_profile("testbed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("testbed")


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: tests that boot machines wait a third of their time, so that one worker more
    than there are processors keeps these busy."""
    room = facts.available_memory() // MEMORY_OF_A_WORKER_BYTES
    return max(1, min(len(os.sched_getaffinity(0)) + 1, room))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Machines first: what is short then fills the gaps, and the end."""
    items.sort(key=lambda item: VM not in item.path.parents)
