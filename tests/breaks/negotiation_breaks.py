# SPDX-License-Identifier: Apache-2.0
"""Each deliberate break of the protocol core, and the tests that must FAIL of it.

Not collected by itself: ``test_suite_negotiation.py`` runs it as a suite, so that all breaks share
one opening of the devices. A test here passes if the suite's test does not while the core is
broken, and does when it is mended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from testbed.instruments.mutations import Mutation
from testbed.instruments.negotiation_board import NegotiationBoard
from testbed.instruments.observer import Observer
from testbed.suites import p2p_negotiation as choice
from testbed.suites import p2p_negotiation_bad as bad
from testbed.suites import p2p_negotiation_life as life
from testbed.suites import p2p_negotiation_sharing as sharing
from testbed.suites import p2p_negotiation_use as use
from tests.breaks.guards import parameters

pytest_plugins = ["testbed.suites.negotiation_fixtures"]

Test = Callable[..., None]

GUARDS: list[tuple[Mutation, Test, dict[str, Any]]] = [
    (
        Mutation.NEGO_FIRST_OFFER,
        choice.test_the_core_matches_and_the_exporter_decides_among_equals,
        {},
    ),
    (
        Mutation.NEGO_FIRST_OFFER,
        choice.test_of_several_ways_the_best_is_taken_every_time,
        {},
    ),
    (Mutation.NEGO_FIRST_OFFER, choice.test_every_candidate_has_the_reason_why_it_lost, {}),
    (Mutation.NEGO_NEW_ADDRESS, use.test_one_interconnect_and_one_address_until_it_moves, {}),
    (Mutation.NEGO_SWALLOW_ERRNO, choice.test_what_each_errno_means, {}),
    (Mutation.NEGO_ONE_KIND, use.test_a_link_and_pcie_on_one_buffer_at_once, {}),
    (Mutation.NEGO_ANY_LINK, use.test_a_link_and_pcie_on_one_buffer_at_once, {}),
    (Mutation.NEGO_STRAND_IMPORTER, use.test_a_move_leaves_no_active_importer_behind, {}),
    (Mutation.NEGO_NO_FALL_BACK, use.test_from_the_link_to_pcie_to_system_memory, {}),
    (Mutation.NEGO_NO_FALL_BACK, use.test_what_cannot_be_mapped_becomes_a_scatter_list, {}),
    (Mutation.NEGO_UNASKED_HOST, choice.test_a_virtual_interconnect_needs_the_host_s_word, {}),
    (
        Mutation.NEGO_ANY_SCATTER_LIST,
        choice.test_a_peer_s_scatter_list_needs_acceptance_and_a_distance,
        {},
    ),
    *(
        (
            Mutation.NEGO_TRUST_STATIC,
            life.test_who_cannot_let_go_gets_no_device_memory,
            {"kind": kind},
        )
        for kind in ("static", "not-revocable", "no-p2p")
    ),
    (Mutation.NEGO_KEEP_MAPPING, life.test_a_revoke_tells_waits_and_takes_away, {}),
    (Mutation.NEGO_FORGIVE_LATE, life.test_who_never_unmaps_is_named_and_cut_off, {}),
    (Mutation.NEGO_BELIEVE_IMPORTER, bad.test_who_lies_about_its_reach_is_named, {}),
    (Mutation.NEGO_UNMAP_AGAIN, bad.test_who_unmaps_twice_is_named, {}),
    (Mutation.NEGO_DEAD_FENCES, bad.test_who_dies_with_a_fence_holds_nobody_up, {}),
    (Mutation.NEGO_SKIP_FENCE, life.test_a_move_is_pipelined_behind_its_fence, {}),
    (Mutation.NEGO_IGNORE_PIN, life.test_what_is_pinned_stays_and_what_is_not_moves, {}),
    (Mutation.NEGO_HALF_MOVE, life.test_a_list_of_buffers_moves_wholly_or_not_at_all, {}),
    (Mutation.NEGO_PAGE_OVER_PCIE, sharing.test_between_linked_devices_a_page_stays_in_place, {}),
    (Mutation.NEGO_FOREIGN_MIGRATES, sharing.test_with_pcie_alone_a_page_stays_in_place, {}),
    (Mutation.NEGO_MIGRATE_UNSEEN, sharing.test_without_a_path_a_page_migrates, {}),
    (Mutation.NEGO_ANY_OWNER, sharing.test_owner_groups_depend_on_the_order_of_joining, {}),
    (Mutation.NEGO_ONE_ADDRESS, sharing.test_each_importer_has_an_address_of_its_own, {}),
    (Mutation.NEGO_ANY_LINK, sharing.test_paths_are_offered_exactly_where_links_are, {}),
    (Mutation.NEGO_FAULT_AT_ONCE, sharing.test_fault_map_go_on_and_fault_again_after_a_move, {}),
    (
        Mutation.NEGO_NO_KEEP_ALIVE,
        sharing.test_a_keep_alive_fence_bounds_refaults_and_nothing_else,
        {},
    ),
    (Mutation.NEGO_NO_KEEP_ALIVE, sharing.test_an_importer_gets_on_while_its_buffer_churns, {}),
    # Last: what it leaves queued waits for its deadline.
    (Mutation.NEGO_ALLOW_CYCLE, sharing.test_operations_are_a_graph_without_cycles, {}),
]


@pytest.mark.parametrize(("mutation_", "test", "more"), parameters(GUARDS))
def test_a_broken_core_fails(
    board: NegotiationBoard,
    observe: Observer,
    mutation_: Mutation,
    test: Test,
    more: dict[str, Any],
) -> None:
    board.break_(mutation_)
    reason = ""
    try:
        test(board, Observer(), **more)
    except AssertionError as error:
        reason = str(error)
    assert reason, f"{test.__name__} passed, though the core is broken: {mutation_}"
    board.mend()
    test(board, observe, **more)
    observe.conclude(f"broken: {reason}; mended, it passes")
