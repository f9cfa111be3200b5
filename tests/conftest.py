# SPDX-License-Identifier: Apache-2.0
"""For every test: runs and history go to a folder of the test session, not to the developer's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield
