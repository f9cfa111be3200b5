# SPDX-License-Identifier: Apache-2.0
"""What switches do with a request: the decision, from trees made by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.machine.pci_tree import Acs, Bar, Bridge, PciTree, Port, Range, TreeFunction
from testbed.models.fabric import Claim, Outcome, decide

MIB = 1 << 20
LINUX = Acs.of(0x1D)  # what Linux turns on: SV, RR, CR, UF
NO_REDIRECT = Acs.of(0x11)
NO_FORWARDING = Acs.of(0x0D)


class Tree:
    """Makes a tree. Every GPU has 1 MiB of memory in function 0 and an engine in function 1."""

    def __init__(self) -> None:
        self.functions: list[TreeFunction] = []
        self.next_bus = 1
        self.memory: dict[str, Range] = {}

    def port(self, name: str, above: str, kind: Port, window: Range, acs: Acs | None) -> None:
        """A bridge below the one named (or on the root bus)."""
        bus = self.next_bus
        self.next_bus += 1
        slot = len([f for f in self.functions if f.parent == self.bdf(above)])
        bridge = Bridge(kind, bus, bus, (window,), number=slot, acs=acs)
        self.functions.append(
            TreeFunction(name, self.address(above, slot, 0), self.bdf(above), (), bridge)
        )

    def gpu(self, name: str, above: str, window: Range) -> None:
        memory = Range(window.start, window.start + MIB)
        registers = Range(window.start + MIB, window.start + MIB + 0x4000)
        for number, (part, bar) in enumerate(
            (("vram", Bar(2, memory)), ("engine", Bar(0, registers)))
        ):
            self.functions.append(
                TreeFunction(
                    f"{name}-{part}", self.address(above, 0, number), self.bdf(above), (bar,)
                )
            )
        self.memory[name] = memory

    def bdf(self, name: str) -> str:
        return next((f.bdf for f in self.functions if f.qemu_id == name), "")

    def address(self, above: str, slot: int, number: int) -> str:
        bridge = next((f.bridge for f in self.functions if f.qemu_id == above), None)
        return f"0000:{bridge.secondary if bridge else 0:02x}:{slot:02x}.{number}"

    def switch(
        self, name: str, above: str, window: Range, acs: tuple[Acs | None, ...]
    ) -> tuple[Range, ...]:
        """An upstream port and a downstream port for each of ``acs``; their windows."""
        self.port(name, above, Port.UPSTREAM, window, None)
        size = window.size_bytes // len(acs)
        windows = []
        for number, control in enumerate(acs):
            start = window.start + number * size
            windows.append(Range(start, start + size))
            self.port(f"{name}.{number}", name, Port.DOWNSTREAM, windows[-1], control)
        return tuple(windows)

    def done(self) -> PciTree:
        return PciTree(tuple(self.functions))


def one_switch(*acs: Acs | None) -> Tree:
    """GPUs below the ports of one switch; gpu9 on a root port beside it."""
    tree = Tree()
    whole = Range(64 * MIB, 128 * MIB)
    tree.port("rp0", "", Port.ROOT, whole, LINUX)
    for number, window in enumerate(tree.switch("sw", "rp0", whole, acs)):
        tree.gpu(f"gpu{number}", f"sw.{number}", window)
    beside = Range(128 * MIB, 192 * MIB)
    tree.port("rp1", "", Port.ROOT, beside, None)
    tree.gpu("gpu9", "rp1", beside)
    return tree


def nested(top: Acs | None, below: tuple[Acs | None, Acs | None]) -> Tree:
    """gpu0 and gpu1 below the inner switch, whose port in the outer one has ``top``; gpu2 below the
    outer one.
    """
    tree = Tree()
    whole = Range(64 * MIB, 128 * MIB)
    tree.port("rp0", "", Port.ROOT, whole, None)
    first, second = tree.switch("outer", "rp0", whole, (top, None))
    for number, window in enumerate(tree.switch("inner", "outer.0", first, below)):
        tree.gpu(f"gpu{number}", f"inner.{number}", window)
    tree.gpu("gpu2", "outer.1", second)
    return tree


def claim_at(tree: PciTree, requester: str, address: int) -> Claim | None:
    found = [
        claim
        for claim in decide(tree, f"{requester}-engine")
        if claim.range.start <= address < claim.range.end
    ]
    assert len(found) < 2
    return found[0] if found else None


def between(tree: Tree, requester: str, peer: str) -> tuple[Outcome, str]:
    """Where an access to the last byte of the peer's memory ends, and why."""
    claim = claim_at(tree.done(), requester, tree.memory[peer].end - 1)
    if claim is None:
        return Outcome.UPSTREAM, ""
    if claim.outcome is Outcome.PEER:
        assert (claim.function, claim.bar) == (f"{peer}-vram", 2)
        assert claim.range.start - claim.offset == tree.memory[peer].start
    return claim.outcome, claim.why


class TestOneSwitch:
    def test_a_plain_switch_routes(self) -> None:
        assert between(one_switch(None, None), "gpu0", "gpu1") == (Outcome.PEER, "routed by sw")

    def test_a_redirecting_port_sends_up(self) -> None:
        tree = one_switch(LINUX, LINUX)
        assert between(tree, "gpu0", "gpu1") == (Outcome.UPSTREAM, "redirected by sw.0")

    def test_the_port_that_a_request_comes_in_through_decides(self) -> None:
        tree = one_switch(LINUX, NO_REDIRECT)
        assert between(tree, "gpu0", "gpu1")[0] is Outcome.UPSTREAM
        assert between(tree, "gpu1", "gpu0")[0] is Outcome.PEER

    def test_completion_redirect_alone_does_not_turn_requests(self) -> None:
        assert between(one_switch(Acs.of(0x08), None), "gpu0", "gpu1")[0] is Outcome.PEER

    def test_root_ports_send_up(self) -> None:
        tree = one_switch(None, None)
        assert between(tree, "gpu0", "gpu9") == (Outcome.UPSTREAM, "")
        assert between(tree, "gpu9", "gpu0") == (Outcome.UPSTREAM, "")

    def test_an_address_of_no_device_goes_up(self) -> None:
        assert claim_at(one_switch(None, None).done(), "gpu0", 1 << 40) is None

    @pytest.mark.parametrize(
        ("control", "vector", "outcome"),
        [
            (0x20, 0b10, Outcome.REFUSED),
            (0x20, 0b01, Outcome.PEER),
            (0x24, 0b10, Outcome.UPSTREAM),
            (0x24, 0b01, Outcome.PEER),
        ],
    )
    def test_egress_control(self, control: int, vector: int, outcome: Outcome) -> None:
        tree = one_switch(Acs.of(control, vector), None)
        assert between(tree, "gpu0", "gpu1")[0] is outcome

    def test_a_hole_in_a_window_is_refused_below_the_root(self) -> None:
        tree = one_switch(None, None)
        claim = claim_at(tree.done(), "gpu0", 128 * MIB - 1)
        assert claim is not None
        assert (claim.outcome, claim.why) == (Outcome.REFUSED, "no BAR below sw.1")


class TestOneSlot:
    def test_functions_of_one_slot_reach_one_another(self) -> None:
        tree = one_switch(None, None)
        assert between(tree, "gpu0", "gpu0")[0] is Outcome.PEER
        assert between(tree, "gpu9", "gpu9")[0] is Outcome.PEER

    @pytest.mark.parametrize("control", [0x04 | 0x10, 0x08 | 0x10, 0x20 | 0x10])
    def test_unless_the_port_above_redirects_in_any_way(self, control: int) -> None:
        tree = one_switch(Acs.of(control), None)
        assert between(tree, "gpu0", "gpu0") == (Outcome.UPSTREAM, "redirected by sw.0")

    def test_what_leads_back_is_refused_without_forwarding(self) -> None:
        assert between(one_switch(NO_FORWARDING, None), "gpu0", "gpu0")[0] is Outcome.REFUSED


class TestNestedSwitches:
    def test_all_plain(self) -> None:
        tree = nested(None, (None, None))
        assert between(tree, "gpu0", "gpu1") == (Outcome.PEER, "routed by inner")
        assert between(tree, "gpu0", "gpu2") == (Outcome.PEER, "routed by outer")
        assert between(tree, "gpu2", "gpu1") == (Outcome.PEER, "routed by outer")

    def test_a_redirecting_port_below_does_not_turn_what_leaves_its_switch(self) -> None:
        tree = nested(None, (LINUX, LINUX))
        assert between(tree, "gpu0", "gpu2") == (Outcome.PEER, "routed by outer")

    def test_a_redirecting_port_above_turns_what_comes_up_through_it(self) -> None:
        tree = nested(LINUX, (None, None))
        assert between(tree, "gpu0", "gpu2") == (Outcome.UPSTREAM, "redirected by outer.0")
        assert between(tree, "gpu0", "gpu1")[0] is Outcome.PEER
        assert between(tree, "gpu2", "gpu0")[0] is Outcome.PEER

    @pytest.mark.parametrize(
        ("top", "outcome"),
        [
            (LINUX, Outcome.UPSTREAM),
            (NO_FORWARDING, Outcome.REFUSED),
            (None, Outcome.UPSTREAM),
        ],
    )
    def test_a_redirected_request_needs_upstream_forwarding(
        self, top: Acs | None, outcome: Outcome
    ) -> None:
        assert between(nested(top, (LINUX, LINUX)), "gpu0", "gpu1")[0] is outcome


class TestWhatChanges:
    def test_memory_decoding_off(self) -> None:
        tree = one_switch(None, None)
        at = tree.functions.index(next(f for f in tree.functions if f.qemu_id == "gpu1-vram"))
        tree.functions[at] = tree.functions[at]._replace(bars=())
        assert between(tree, "gpu0", "gpu1") == (Outcome.REFUSED, "no BAR below sw.1")

    def test_a_bridge_that_forwards_no_memory(self) -> None:
        tree = one_switch(None, None)
        at = tree.functions.index(next(f for f in tree.functions if f.qemu_id == "sw.1"))
        bridge = tree.functions[at].bridge
        assert bridge is not None
        tree.functions[at] = tree.functions[at]._replace(bridge=bridge._replace(windows=()))
        assert between(tree, "gpu0", "gpu1") == (Outcome.REFUSED, "no BAR below sw")

    def test_a_peer_that_was_unplugged(self) -> None:
        tree = one_switch(None, None)
        tree.functions = [f for f in tree.functions if not f.qemu_id.startswith("gpu1")]
        assert between(tree, "gpu0", "gpu1")[0] is Outcome.REFUSED

    def test_a_requester_that_was_unplugged(self) -> None:
        assert decide(one_switch(None).done(), "gpu7-engine") == ()

    def test_a_bar_that_sticks_out_of_the_window_is_reached_inside_it(self) -> None:
        tree = one_switch(None, None)
        at = tree.functions.index(next(f for f in tree.functions if f.qemu_id == "gpu1-vram"))
        window = Range(96 * MIB, 128 * MIB)
        bar = Bar(2, Range(window.start - MIB, window.start + MIB))
        tree.functions[at] = tree.functions[at]._replace(bars=(bar,))
        claim = claim_at(tree.done(), "gpu0", window.start)
        assert claim is not None
        assert (claim.function, claim.offset) == ("gpu1-vram", MIB)
        outside = claim_at(tree.done(), "gpu0", window.start - 1)
        assert outside is not None
        assert outside.outcome is Outcome.REFUSED  # gpu0's own window


def test_of_bars_that_overlap_the_first_is_reached_and_the_rest_of_the_other() -> None:
    tree = one_switch(None, None)
    at = tree.functions.index(next(f for f in tree.functions if f.qemu_id == "gpu1-engine"))
    end = tree.memory["gpu1"].end
    bar = Bar(0, Range(end - 0x2000, end + 0x2000))
    tree.functions[at] = tree.functions[at]._replace(bars=(bar,))
    assert between(tree, "gpu0", "gpu1")[0] is Outcome.PEER
    claim = claim_at(tree.done(), "gpu0", end)
    assert claim is not None
    assert (claim.function, claim.offset) == ("gpu1-engine", 0x2000)


@given(
    acs=st.lists(st.none() | st.integers(0, 0x3F).map(Acs.of), min_size=2, max_size=4),
    requester=st.integers(0, 3),
)
def test_no_address_is_claimed_twice_and_each_bar_leads_to_itself(
    acs: list[Acs | None], requester: int
) -> None:
    tree = one_switch(*acs).done()
    claims = decide(tree, f"gpu{requester}-engine")
    for before, after in pairwise(claims):
        assert before.range.end <= after.range.start
    for claim in claims:
        if claim.outcome is Outcome.PEER:
            function = tree.find(claim.function)
            assert function is not None
            (bar,) = [bar for bar in function.bars if bar.index == claim.bar]
            assert bar.range.common(claim.range) == claim.range
            assert claim.offset == claim.range.start - bar.range.start
