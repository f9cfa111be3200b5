# SPDX-License-Identifier: Apache-2.0
"""Which tests get machines that no other test has used, and what is known of them beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Hashable

import pytest

from testbed.harness.racks import RackPool
from testbed.harness.spares import Kind, most_at_once

PRISTINE = "pristine"
WITHOUT_DISKS = "without_disks"
VARIANT = "variant"  # the fixture of who wants another rack


class FreshMachines:
    """A pytest plugin: machines for the test that begins, and others that get ready meanwhile.

    :param all_tests: whether all want fresh machines, or those that are marked so.
    """

    def __init__(self, pool: RackPool, *, all_tests: bool) -> None:
        self._pool = pool
        self._all_tests = all_tests
        self._at_once: int | None = None  # spares; asked when it is needed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Fresh machines for a test that wants them."""
        if self._wants_one(item):
            for rack in self._pool.all():
                rack.refresh()
        alone = self._is_alone(item, nextitem)
        self._pool.main.set_up(self._kind(item, alone), self._upcoming(nextitem), alone=alone)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Note which fixture it is that makes something on the rack."""
        item = request.node  # of a fixture for several tests, what they have in common
        alone = self._pool.main.serves_one_test
        mine = isinstance(item, pytest.Item) and self._wants_one(item)
        key = self._key(fixturedef.argname, item, alone) if mine else None
        with self._pool.main.set_up_by(key):
            return (yield)

    def _upcoming(self, nextitem: pytest.Item | None) -> list[Kind | None]:
        """The kinds of the tests whose machines shall get ready while one runs."""
        if nextitem is None:
            return []
        if self._at_once is None:
            self._at_once = most_at_once(self._pool.source.topology)
        items = nextitem.session.items
        begin = items.index(nextitem)
        following = items[begin : begin + self._at_once + 1]
        pairs = zip(following, [*following[1:], None], strict=True)
        return [
            self._kind(item, self._is_alone(item, after))
            for item, after in itertools.islice(pairs, self._at_once)
            if self._wants_one(item)
            and VARIANT not in fixtures_of(item)  # it has a rack of its own
        ]

    def _is_alone(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """On its machine: none was there before, and the next test has another."""
        return self._wants_one(item) and (nextitem is None or self._wants_one(nextitem))

    def _kind(self, item: pytest.Item, alone: bool) -> Kind | None:
        """Of a test that wants a fresh machine, what sets it up; None for others."""
        if not self._wants_one(item):
            return None
        fixtures = tuple(self._key(name, item, alone) for name in fixtures_of(item))
        return Kind(fixtures, disks=not (alone and is_without_disks(item)))

    def _key(self, name: str, item: pytest.Item, alone: bool) -> Hashable:
        """All that decides what a fixture of that name makes."""
        several = len(self._pool.source.plan.nodes) > 1
        case = item.callspec.id if isinstance(item, pytest.Function) and _has_case(item) else ""
        return name, _where(name, item), item.name if several else case, alone

    def _wants_one(self, item: pytest.Item) -> bool:
        return self._all_tests or item.get_closest_marker(PRISTINE) is not None


def is_without_disks(item: pytest.Item) -> bool:
    """It says that it looks at no disk."""
    return item.get_closest_marker(WITHOUT_DISKS) is not None


def fixtures_of(item: pytest.Item) -> list[str]:
    """The names of all that set it up, in their order."""
    return list(getattr(item, "fixturenames", ()))


def _where(name: str, item: pytest.Item) -> Hashable:
    """Equal for tests whose fixtures of that name are the same."""
    module = getattr(item, "module", None)
    if module is None or name in vars(module):
        return item.path
    return item.path.parent, tuple(getattr(module, "pytest_plugins", ()))


def _has_case(item: pytest.Function) -> bool:
    return hasattr(item, "callspec")  # pytest gives it only to who has parameters
