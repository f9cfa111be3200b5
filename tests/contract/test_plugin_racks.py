# SPDX-License-Identifier: Apache-2.0
"""Which racks the pytest plugin boots, and what becomes of those that die, on fake ones."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from testbed.errors import ExitCode, LaunchError, NoHello
from testbed.results.verdicts import Verdict
from tests.contract.fake_rack import FakeSource
from tests.contract.own_runs import Run

PASS, FAIL, SKIP, LOST, ERROR = Verdict


class TestDeath:
    BODY = """
        def keep(rack):
            return rack.once("answer", lambda rack: call(rack)["kernel"])

        def test_before(rack): keep(rack)
        def test_dies(rack):
            keep(rack)
            call(rack, "iommu.groups")
        def test_after(rack): assert keep(rack) == "7.2"
        """

    def test_the_dead_rack_is_replaced_and_nothing_is_retried(self, tmp_path: Path) -> None:
        run = Run(tmp_path, self.BODY, {"dies_on": "iommu.groups"})
        assert run.verdicts == [PASS, LOST, PASS]
        assert run.outcomes["dies"].console_tail == "Kernel panic"
        log = (tmp_path / "pytest.log").read_text()
        assert "= LOST =" in log
        assert "dies: the channel closed\n    Kernel panic" in log
        assert len(run.source.racks) == 2
        assert all(rack.closed for rack in run.source.racks)
        assert run.result.code is ExitCode.LOST

    def test_a_rack_that_keeps_dying_is_given_up(self, tmp_path: Path) -> None:
        body = "\n".join(f"def test_{n}(rack): call(rack, 'iommu.groups')" for n in range(6))
        run = Run(tmp_path, body, *[{"dies_on": "iommu.groups"}] * 9)
        assert run.verdicts == [LOST] * 4 + [SKIP] * 2
        assert run.outcomes["4"].reason == "not run: rack rack died 4 times, last in 3"

    def test_someone_elses_rack_is_not_started_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeSource, "restartable", False)
        run = Run(tmp_path, self.BODY, {"dies_on": "iommu.groups"})
        assert run.verdicts == [PASS, LOST, SKIP]
        assert "is not ours to start again" in run.outcomes["after"].reason

    def test_a_death_in_clean_up_is_lost(self, tmp_path: Path) -> None:
        run = Run(
            tmp_path,
            """
            @pytest.fixture
            def tidy(rack):
                yield
                call(rack, "iommu.groups")

            def test_one(rack, tidy): call(rack)
            def test_two(rack): call(rack)
            """,
            {"dies_on": "iommu.groups"},
        )
        assert run.verdicts == [LOST, PASS]


class TestStart:
    TWO = """
        def test_one(rack): call(rack)
        def test_two(rack): call(rack)
        """

    def test_no_hello_is_lost_once_and_the_rest_is_not_run(self, tmp_path: Path) -> None:
        error = NoHello("host0 said nothing", node="host0", console_tail="grub>")
        run = Run(tmp_path, self.TWO, {"fails": error})
        assert run.verdicts == [LOST, SKIP]
        assert run.outcomes["one"].console_tail == "grub>"
        assert "did not start (host0 said nothing)" in run.outcomes["two"].reason
        assert run.result.code is ExitCode.LOST

    def test_qemu_that_does_not_start_is_an_error(self, tmp_path: Path) -> None:
        error = LaunchError(
            "QEMU ended with 1", node="host0", exit_status=1, command=["qemu"], output="bad option"
        )
        run = Run(tmp_path, self.TWO, {"fails": error})
        assert run.verdicts == [ERROR, SKIP]
        assert "bad option" in run.outcomes["one"].details
        assert run.result.code is ExitCode.ERROR


def test_a_variant_boots_in_the_background(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        from testbed.topology.model import with_overrides

        def rack_variants(topology):
            return {"twin": with_overrides(topology, rack="twin")}

        @pytest.mark.boots("twin")
        def test_twin(rack, variant):
            assert variant("twin").nodes["host0"].agent.call("system.info")
            assert variant("twin").name == "twin"

        def test_none(variant): variant("no-such").nodes
        """,
    )
    assert run.verdicts == [PASS, SKIP]
    assert len(run.source.racks) == 2


def test_what_no_test_will_use_does_not_boot(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        from testbed.errors import CapabilityMissing
        from testbed.topology.model import with_overrides

        def rack_variants(topology):
            return {name: with_overrides(topology, rack=name) for name in ("one", "two")}

        pytestmark = pytest.mark.boots(when=lambda plan: len(plan.nodes) > 7)

        @pytest.mark.boots("one")
        def test_lacking(rack, variant):
            raise CapabilityMissing(f"eight nodes, not {len(rack.topology.nodes)}")
        """,
    )
    assert (run.verdicts, run.outcomes["lacking"].reason) == ([SKIP], "eight nodes, not 1")
    assert run.source.racks == []


def test_who_was_taken_for_none_that_uses_a_rack_gets_it_all_the_same(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        from testbed.topology.model import with_overrides

        def rack_variants(topology):
            return {name: with_overrides(topology, rack=name) for name in ("one", "two")}

        @pytest.mark.boots(when=lambda plan: False)
        @pytest.mark.boots("one")
        def test_uses(rack): assert call(rack)

        @pytest.mark.boots("one", when=lambda plan: False)
        @pytest.mark.boots("two", when=lambda plan: "host0" in plan.nodes)
        def test_two(variant): assert variant("two").name == "two"
        """,
    )
    assert run.verdicts == [PASS, PASS]
    assert sorted(rack.name for rack in run.source.racks) == ["quad-gpu", "two"]


class TestPristine:
    """Several machines get ready while a test runs, and none is used twice or left over."""

    BODY = """
        seen = []

        def fresh(rack, *, is_fresh=True):
            assert (rack.run_dir not in seen) == is_fresh
            seen.append(rack.run_dir)
        """

    @pytest.fixture(autouse=True)
    def _two_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("testbed.harness.fresh.most_at_once", lambda _: 2)
        monkeypatch.setattr("testbed.harness.racks.has_room", lambda *_: True)

    @staticmethod
    def run(tmp_path: Path, body: str, *, every: bool = True) -> Run:
        # What each machine but the first is, whichever of two is first.
        dies = [{"dies_on": "iommu.groups"}] * 9
        body = textwrap.dedent(TestPristine.BODY) + textwrap.dedent(body)
        return Run(tmp_path, body, {}, *dies, pristine=every)

    def test_each_test_has_its_own(self, tmp_path: Path) -> None:
        run = self.run(tmp_path, "".join(f"def test_{n}(rack): fresh(rack)\n" for n in range(5)))
        assert run.verdicts == [PASS] * 5
        assert [rack.closed for rack in run.source.racks] == [True] * 5

    def test_who_wants_another_rack_has_no_spare(self, tmp_path: Path) -> None:
        run = self.run(
            tmp_path,
            """
            def test_one(rack): fresh(rack)
            def test_other(rack, variant): variant("no-such").nodes
            def test_two(rack): fresh(rack)
            """,
        )
        assert run.verdicts == [PASS, SKIP, PASS]
        assert [rack.closed for rack in run.source.racks] == [True] * 2

    def test_who_is_alone_on_its_machine_knows(self, tmp_path: Path) -> None:
        run = self.run(
            tmp_path,
            """
            def test_one(rack): assert not rack.serves_one_test
            @pytest.mark.pristine
            def test_two(rack): assert not rack.serves_one_test  # the next one uses it too
            def test_three(rack): assert not rack.serves_one_test
            @pytest.mark.pristine
            @pytest.mark.parametrize("n", [4, 5])
            def test_more(rack, n): assert rack.serves_one_test
            """,
            every=False,
        )
        assert run.verdicts == [PASS] * 5

    DISKS = """
        def disks_of(rack): return rack.get().disks

        def test_first(rack): assert disks_of(rack)
        @pytest.mark.pristine
        @pytest.mark.without_disks
        @pytest.mark.parametrize("n", range(3))
        def test_alone(rack, n): assert not disks_of(rack)
        @pytest.mark.pristine
        def test_looks(rack, disks): assert disks_of(rack)
        @pytest.mark.pristine
        @pytest.mark.without_disks
        def test_not_alone(rack): assert disks_of(rack)
        @pytest.mark.without_disks
        def test_on_the_same(rack): assert disks_of(rack)
        @pytest.mark.pristine
        @pytest.mark.without_disks
        def test_again(rack): assert not disks_of(rack)
        @pytest.mark.pristine
        def test_unmarked(rack): assert disks_of(rack)
        """

    def test_only_who_looks_at_no_disk_and_is_alone_gets_a_machine_without(
        self, tmp_path: Path
    ) -> None:
        run = self.run(tmp_path, self.DISKS, every=False)
        assert run.verdicts == [PASS] * 9

    def test_who_says_that_it_looks_at_no_disk_and_asks_for_them_does_not_run(
        self, tmp_path: Path
    ) -> None:
        run = self.run(
            tmp_path,
            """
            pytestmark = pytest.mark.without_disks

            @pytest.fixture
            def looks(disks): pass

            def test_one(rack): fresh(rack)
            def test_two(rack, looks): assert not seen, "it runs"
            def test_three(rack): fresh(rack)
            """,
        )
        assert run.verdicts == [PASS, ERROR, PASS]
        assert run.outcomes["two"].reason == (
            "TestbedError: it is marked without_disks, and asks for the fixture 'disks'"
        )

    AHEAD = """
        @pytest.fixture
        def made(rack, n):
            what = n, rack.serves_one_test
            return rack.once("it", lambda _: what, ahead=True)
        """

    def test_what_is_made_ahead_is_of_the_same_case(self, tmp_path: Path) -> None:
        each = """
        @pytest.mark.parametrize("n", [1, 2])
        def test_{}(made, n): assert made == (n, True)
        """
        run = self.run(tmp_path, "".join([self.AHEAD, *map(each.format, "abcd")]))
        assert run.verdicts == [PASS] * 8

    def test_what_is_made_for_one_test_is_not_for_two(self, tmp_path: Path) -> None:
        alone = """
        @pytest.mark.pristine
        @pytest.mark.parametrize("n", [1])
        def test_{}(made, n): assert made == (n, True)
        """
        shared = """
        @pytest.mark.pristine
        @pytest.mark.parametrize("n", [1])
        def test_shared(made, n): assert made == (n, False)
        @pytest.mark.parametrize("n", [1])
        def test_sharing(made, n): assert made == (n, False)
        """
        body = "".join([self.AHEAD, *map(alone.format, "abcd"), shared])
        assert self.run(tmp_path, body, every=False).verdicts == [PASS] * 6

    def test_only_who_wants_one(self, tmp_path: Path) -> None:
        run = self.run(
            tmp_path,
            """
            def test_one(rack): fresh(rack)
            def test_two(rack): fresh(rack, is_fresh=False)
            @pytest.mark.pristine
            def test_three(rack): fresh(rack)
            def test_four(rack): fresh(rack, is_fresh=False)
            def test_five(rack): fresh(rack, is_fresh=False)
            def test_six(rack): fresh(rack, is_fresh=False)
            @pytest.mark.pristine
            def test_seven(rack): fresh(rack)
            """,
            every=False,
        )
        assert run.verdicts == [PASS] * 7
        assert [rack.closed for rack in run.source.racks] == [True] * 3

    def test_those_of_tests_that_did_not_run_serve_others_or_end(self, tmp_path: Path) -> None:
        run = self.run(
            tmp_path,
            """
            def test_one(rack): fresh(rack)
            @pytest.mark.gated_by("MINE-01")
            def test_two(rack): fresh(rack)
            def test_three(): pass
            def test_four(rack): fresh(rack)
            """,
        )
        assert run.verdicts == [PASS, SKIP, PASS, PASS]
        assert [rack.closed for rack in run.source.racks] == [True] * 3

    def test_a_death_costs_one(self, tmp_path: Path) -> None:
        run = self.run(
            tmp_path,
            """
            def test_one(rack): fresh(rack)
            def test_two(rack):
                fresh(rack)
                call(rack, "iommu.groups")
            def test_three(rack): fresh(rack)
            """,
        )
        assert run.verdicts == [PASS, LOST, PASS]
        assert [rack.closed for rack in run.source.racks] == [True] * 3

    def test_an_interrupt_ends_all(self, tmp_path: Path) -> None:
        run = self.run(
            tmp_path,
            """
            def test_one(rack):
                fresh(rack)
                for machine in rack._spares._machines:
                    machine.rack.result()  # those that still boot are left to their keepers
                raise KeyboardInterrupt
            def test_two(rack): fresh(rack)
            def test_three(rack): fresh(rack)
            """,
        )
        assert run.verdicts == []
        assert [rack.closed for rack in run.source.racks] == [True] * 3


def test_a_rack_that_will_not_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise OSError("the keeper does not answer")

    monkeypatch.setattr("tests.contract.fake_rack.FakeRack.close", refuse)
    run = Run(tmp_path, "def test_one(rack): call(rack)")
    assert run.verdicts == [PASS, ERROR]
    assert run.outcomes["end of the rack"].reason == "the keeper does not answer"
