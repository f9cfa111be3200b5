# SPDX-License-Identifier: Apache-2.0
"""A real browser for the page: Debian's headless Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testbed.errors import MirrorError, SetupError
from testbed.host import browser, manifest, prepare

if TYPE_CHECKING:
    from playwright.sync_api import Browser

START_TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for a module's tests. SKIP if it cannot be had; that it does not start is an error.

    Playwright has an event loop running as long as it is there: no other test may meet it.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no Python package 'playwright'")
    home = tmp_path_factory.mktemp("browser")
    try:
        found = browser.prepare(manifest.load().browser, prepare.options(), home)
    except (MirrorError, SetupError) as error:
        pytest.skip(f"no Chromium: {error}")
    with playwright.sync_playwright() as driver:
        # No sandbox: it needs user namespaces, which not every host lets a user have. The pages
        # are our own.
        started = driver.chromium.launch(
            executable_path=found.program,
            env=dict(found.environment),
            chromium_sandbox=False,
            timeout=START_TIMEOUT_MS,
        )
        yield started
        started.close()


@pytest.fixture
def html(tmp_path: Path) -> Path:
    """Where a test's page is."""
    return tmp_path / "page.html"
