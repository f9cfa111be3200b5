# SPDX-License-Identifier: Apache-2.0
"""Which tests have a fixture in common, by which machines are made ready for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.harness import fresh

PLUGINS = ["some.fixtures"]


def item(path: str, **module: Any) -> Any:
    """As pytest has it, of a test in a module with these attributes."""
    return SimpleNamespace(path=Path(path), module=SimpleNamespace(**module))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (item("/s/a.py", pytest_plugins=PLUGINS), item("/s/b.py", pytest_plugins=PLUGINS), True),
        (item("/s/a.py", pytest_plugins=PLUGINS), item("/t/b.py", pytest_plugins=PLUGINS), False),
        (item("/s/a.py", pytest_plugins=PLUGINS), item("/s/b.py"), False),
        (
            item("/s/a.py", pytest_plugins=PLUGINS),
            item("/s/b.py", pytest_plugins=PLUGINS, ground=1),  # its own of that name
            False,
        ),
        (item("/s/a.py", ground=1), item("/s/a.py", ground=1), True),
        (SimpleNamespace(path=Path("/r")), SimpleNamespace(path=Path("/r")), True),
    ],
)
def test_fixtures_of_one_name(one: Any, other: Any, *, same: bool) -> None:
    assert (fresh._where("ground", one) == fresh._where("ground", other)) is same
