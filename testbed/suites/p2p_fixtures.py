# SPDX-License-Identifier: Apache-2.0
"""Fixtures of suites about pairs of devices behind an IOMMU: ``pair``, ``ground``, ``doorbell`` ….

A test module that wants them says ``pytest_plugins = ["testbed.suites.p2p_fixtures"]``. What they
yield is taken from the topology before anything boots, so that tests are numbered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.harness.session import SESSION
from testbed.instruments import cases
from testbed.instruments.bench import Bench
from testbed.instruments.cases import Doorbell, Pair
from testbed.instruments.interface import Rack
from testbed.instruments.mutations import Mutation
from testbed.instruments.reasons import Reasons, reasons_of
from testbed.suites.ground import Ground
from testbed.topology.oracle import Route
from testbed.topology.plan import RackPlan

T = TypeVar("T")

Variant = Callable[[str], LiveRack]

_CHOICES = pytest.StashKey[dict[str, list[Any]]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Pairs, doorbells and nodes are those of the rack."""
    session = metafunc.config.stash.get(SESSION, None)
    if session is None:
        return
    source = session.pool.source
    choices = metafunc.config.stash.setdefault(_CHOICES, {})
    if not choices:  # the same for each test
        pairs = cases.pairs(source.plan)
        choices |= {
            "pair": list({pair.node: pair for pair in reversed(pairs)}.values()),
            "each_pair": list(pairs),
            "switched_pair": [pair for pair in pairs if pair.route is not Route.ROOT],
            "doorbell": list(cases.doorbells(source.plan, source.topology)),
            "node_name": list(source.plan.nodes),
        }
    several = len(source.plan.nodes) > 1
    for name in set(choices) & set(metafunc.fixturenames):
        values = choices[name]
        ids = [
            f"{value.node}/{value}" if several and not isinstance(value, str) else str(value)
            for value in values
        ]
        metafunc.parametrize(name, values or [None], ids=ids or ["none"], indirect=True)


def has_pairs(plan: RackPlan) -> bool:
    """Whether any test about a pair will get as far as its rack."""
    return bool(cases.pairs(plan))


@pytest.fixture(autouse=True, scope="session")
def give_back(rack: LiveRack) -> Iterator[None]:
    """At the end the devices go back to their drivers, in a rack that lives on."""
    yield
    if rack.is_running and not rack.ours:
        rack.drop_all()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The first pair of each node."""
    return _given(request, Pair, "two devices, one of which has video memory")


@pytest.fixture
def each_pair(request: pytest.FixtureRequest) -> Pair:
    """A pair for each kind of path of each node."""
    return _given(request, Pair, "two devices, one of which has video memory")


@pytest.fixture
def switched_pair(request: pytest.FixtureRequest) -> Pair:
    """A pair with a switch in common, which routes between them or sends their requests up."""
    return _given(request, Pair, "two devices below one switch")


@pytest.fixture
def doorbell(request: pytest.FixtureRequest) -> Doorbell:
    """A doorbell page, and a device of another slot that rings it."""
    return _given(request, Doorbell, "a GPU with `doorbell: true` and a second device")


@pytest.fixture
def node_name(request: pytest.FixtureRequest) -> str:
    """Each node of the rack."""
    return _given(request, str, "nodes")


@pytest.fixture
def pair_bench(
    rack: LiveRack, mutation: Mutation, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    """The bench that all tests share, of the node on which the test has a pair."""
    of_the_test = request.node.callspec.params.values()
    used = [case for case in of_the_test if isinstance(case, Pair | Doorbell)]
    shared = shared_bench(rack, used[0].node, mutation, *used)
    yield shared
    if rack.is_running and not rack.serves_one_test:
        shared.clean()


@pytest.fixture
def ground(pair: Pair, pair_bench: Bench) -> Ground:
    """The node's first pair, ready."""
    return Ground.of(pair_bench, pair)


@pytest.fixture
def each_ground(each_pair: Pair, pair_bench: Bench) -> Ground:
    """As ``ground``, once for each kind of path."""
    return Ground.of(pair_bench, each_pair)


@pytest.fixture
def switched_ground(switched_pair: Pair, pair_bench: Bench) -> Ground:
    """As ``ground``, for each kind of pair with a switch in common."""
    return Ground.of(pair_bench, switched_pair)


@pytest.fixture
def reasons(rack: LiveRack, request: pytest.FixtureRequest) -> Reasons:
    """The reason codes of the IOMMU under test."""
    names = ("each_pair", "switched_pair", "pair")
    chosen = next(name for name in names if name in request.fixturenames)
    return reasons_of(rack.topology.nodes[request.getfixturevalue(chosen).node].iommu)


def _given(request: pytest.FixtureRequest, kind: type[T], what: str) -> T:
    if not isinstance(request.param, kind):
        raise CapabilityMissing(f"this rack lacks {what}")
    return request.param


def shared_bench(rack: LiveRack, node: str, mutation: Mutation, *used: Pair | Doorbell) -> Bench:
    """The node's bench, opened for all devices of its pairs and doorbells.

    :param used: those that the test uses: where no other uses its machine, they will do.
    """
    alone = used if rack.serves_one_test else ()

    def make(booted: Rack) -> Bench:
        return _open_bench(booted, node, mutation, alone)

    return rack.once(("bench", node), make, Bench.close, holds="bench", ahead=True)


def _open_bench(
    rack: Rack, node: str, mutation: Mutation, alone: Sequence[Pair | Doorbell]
) -> Bench:
    chosen = alone or (*cases.pairs(rack.plan), *cases.doorbells(rack.plan, rack.topology))
    used = [function for case in chosen if case.node == node for function in case.functions]
    return Bench.open(rack.nodes[node], used, mutation)
