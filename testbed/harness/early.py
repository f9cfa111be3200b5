# SPDX-License-Identifier: Apache-2.0
"""Which racks boot before a test asks for one: those that a test will use, as the topology says.

``@pytest.mark.boots("name", …, when=fits)`` lets variants of the rack boot in the background,
unless ``fits(plan)`` says of the rack's placement that the test will not get as far; without names
it stands for the rack itself, best as a module's ``pytestmark``. It decides nothing: a test that
uses a rack boots it then, and one that SKIPs before it does says why in its own words. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import pytest

from testbed.topology.plan import RackPlan

BOOTS = "boots"
Fits = Callable[[RackPlan], bool]


@dataclass
class Wanted:
    """What shall boot at once: the rack itself, and of each item the variants that it uses."""

    main: bool = False
    variants: dict[pytest.Item, set[str]] = field(default_factory=dict)


def wanted(items: Iterable[pytest.Item], plan: RackPlan) -> Wanted:
    """What the tests will use. ``plan``: of the rack under test.

    :raises TypeError: a marker's ``when`` cannot be called.
    """
    found = Wanted()

    @cache  # a module's question is the same for all of its tests
    def fits(when: Fits) -> bool:
        return when(plan)

    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        markers = [(m.args, m.kwargs.get("when")) for m in item.iter_markers(BOOTS)]
        if any(not names and when is not None and not fits(when) for names, when in markers):
            continue
        found.main |= "rack" in fixtures
        if "variant" in fixtures:
            found.variants[item] = {
                str(name) for names, when in markers if when is None or fits(when) for name in names
            }
    return found
