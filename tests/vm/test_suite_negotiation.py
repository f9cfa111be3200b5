# SPDX-License-Identifier: Apache-2.0
"""The p2p-negotiation suite on a real machine: all PASS, and deliberate breaks that must FAIL."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from testbed.benchmarks import faults
from testbed.benchmarks.cycles import cycles
from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.instruments.mutations import Mutation
from testbed.instruments.negotiation_board import NegotiationBoard, do
from testbed.rack import Rack
from testbed.results.trace import FILE_NAME
from testbed.results.verdicts import Verdict
from testbed.suites.negotiation_steps import SIZE
from tests.vm.conftest import Start, shipped
from tests.vm.runs import BorrowingSource, run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

IDS = (
    {f"NEG-{n:02}" for n in range(1, 12)}
    | {f"LIFE-{n:02}" for n in (1, 3, 5, 6, 7, 10, 12)}
    | {f"HMM-{n:02}" for n in (1, 2, 3, 5, 6)}
    | {f"FLT-{n:02}" for n in (1, 2, 3, 6)}
    | {"TOPO-14"}
)
BREAKS = Path(__file__).parents[1] / "breaks" / "negotiation_breaks.py"


SUITE = "p2p-negotiation"


@pytest.fixture(scope="module")
def mesh(start: Start, cold: StartOptions) -> Rack:
    return start(shipped("partial-mesh"), cold)


def test_every_requirement_is_shown_and_its_events_are_kept(
    mesh: Rack, cold: StartOptions, tmp_path: Path
) -> None:
    ran = run(SUITE, BorrowingSource(mesh, tmp_path, cold), tmp_path)
    assert ran.verdicts == dict.fromkeys(IDS, Verdict.PASS), ran.ktap
    for outcome in ran.outcomes:
        assert any(evidence.kind == "bytes" for evidence in outcome.evidence), outcome.test
    events = [json.loads(line) for line in (mesh.run_dir / FILE_NAME).read_text().splitlines()]
    assert {"negotiate", "attach", "map", "move", "revoke", "fault"} <= {e["kind"] for e in events}


def test_a_break_fails_what_guards_it_and_nothing_else(
    mesh: Rack, cold: StartOptions, tmp_path: Path
) -> None:
    keyword = "pipelined or a_peer_s_scatter_list"
    source = BorrowingSource(mesh, tmp_path, cold)
    ran = run(SUITE, source, tmp_path, keyword, Mutation.NEGO_SKIP_FENCE)
    assert ran.verdicts == {"LIFE-06": Verdict.FAIL, "NEG-10": Verdict.PASS}, ran.ktap
    assert ran.code is ExitCode.FAIL


def test_of_every_requirement_some_break_is_seen_and_mended(
    mesh: Rack, cold: StartOptions, tmp_path: Path
) -> None:
    ran = run(BREAKS, BorrowingSource(mesh, tmp_path, cold), tmp_path)
    assert ran.verdicts == dict.fromkeys(IDS, Verdict.PASS), ran.ktap
    assert ran.code is ExitCode.PASS


def test_three_hundred_cycles_leave_nothing_behind(mesh: Rack) -> None:
    """The short form of `testbed bench cycles`: on real devices, nothing grows anywhere."""
    found = cycles(mesh, 300)
    assert (found["wrong"], found["grown"]) == (0, []), found
    assert found["samples"][0]["mappings_left"] > 0  # the kernel's own count is there


def test_page_faults_are_timed_for_each_device_and_place(mesh: Rack) -> None:
    """FLT-04: `testbed faultlat`; the device's own trace has as many faults and replays."""
    result = faults.measure(mesh, 8)
    kinds = {(each["device"], each["path"]) for each in result["series"]}
    gpu = {("gpu", path) for path in ("VRAM", "system memory", "PCIe peer", "link")}
    assert kinds == gpu | {("nic", path) for path in ("system memory", "PCIe peer")}
    for each in result["series"]:
        assert each["count"] == sum(bucket["count"] for bucket in each["histogram"]) == 8
        assert 0 < each["on_device"]["median"] < each["total"]["max"]
    assert "gpu, link, 4 KiB pages, by poll: 8 faults, in us" in faults.text(result)


# --- the properties of the pure core, on devices

_WHO = st.integers(0, 2)
_OPERATIONS = st.one_of(
    st.tuples(st.just("write"), _WHO, st.integers(0, 200)),
    st.tuples(st.just("read"), _WHO),
    st.tuples(st.just("unmap"), _WHO),
    st.tuples(st.just("move"), st.sampled_from(["device", "system"])),
    st.tuples(st.just("revoke")),
)


def test_whatever_is_done_in_any_order_bytes_and_addresses_are_right(mesh: Rack) -> None:
    """Over a link, PCIe and a NIC: what one wrote every other reads, wherever the bytes are then,
    at an address that stays the same until they move or are taken away."""
    with contextlib.closing(NegotiationBoard(mesh, "host0", Mutation.NONE)) as board:

        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(_OPERATIONS, min_size=4, max_size=12))
        @example([("write", 0, 1), ("read", 1), ("move", "system"), ("read", 2), ("write", 2, 3),
                  ("move", "device"), ("read", 0), ("revoke",), ("read", 1)])  # fmt: skip
        def play(operations: list[tuple[Any, ...]]) -> None:
            try:
                _play(board, operations)
            finally:
                left = board.clean()
            assert not left["problems"]
            assert left["left"] == board.unused

        play()


def _play(board: NegotiationBoard, operations: list[tuple[Any, ...]]) -> None:
    exporter, b, c, nic = "gpu0", "gpu1", "gpu2", "nic0"
    users = (b, c, nic)
    offers = {name: board.gpu_offers(name) for name in (exporter, *users)}
    shadow, epoch = 7, 0
    known: dict[tuple[str, int], int] = {}
    board.run(
        do("export", buffer="b", device=exporter, size_bytes=SIZE, offers=offers[exporter]),
        do("fill", buffer="b", seed=shadow),
        *(do("attach", buffer="b", importer=name, offers=offers[name]) for name in users),
    )
    for operation, *rest in operations:
        if operation == "move":
            board.run(do("move", buffer="b", to=rest[0]), do("settle"))
            epoch += 1
        elif operation == "revoke":
            board.run(do("revoke", buffer="b", why="reset"), do("unrevoke", buffer="b"))
            epoch += 1
        else:
            user = users[rest[0]]
            mapped, path = board.run(do("map", attachment=user), do("path", attachment=user))
            assert known.setdefault((user, epoch), mapped["value"]) == mapped["value"]
            if operation == "write":
                shadow = rest[1]
                board.run(do("write", attachment=user, seed=shadow, size_bytes=SIZE))
            elif operation == "read":
                (staged,) = board.run(do("read", attachment=user, size_bytes=SIZE))
                assert board.holds(staged, shadow, SIZE).holds
            board.run(do("unmap", attachment=user))
            (state,) = board.run(do("state", buffer="b"))
            assert path["placement"] == state["placement"]  # reached where the bytes are
        (state,) = board.run(do("state", buffer="b"))
        assert board.holds(state, shadow, SIZE).holds, (operations, operation)
