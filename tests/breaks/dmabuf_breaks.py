# SPDX-License-Identifier: Apache-2.0
"""Each deliberate break about dma-bufs, and the tests of suite ``p2p-dmabuf`` that must FAIL of it.

Not collected by itself: ``tests/vm/test_suite_dmabuf.py`` runs it as a suite, so that all breaks
share one machine. A test here passes if the suite's test does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer
from testbed.suites import p2p_dmabuf as maps
from testbed.suites import p2p_dmabuf_life as life
from testbed.suites import p2p_dmabuf_loss as loss
from testbed.suites import p2p_dmabuf_moves as moves
from testbed.suites import p2p_dmabuf_vfio as vfio
from testbed.suites.dmabuf_fixtures import ArrangeBuffers
from testbed.topology.model import Topology
from tests.breaks.guards import parameters

pytest_plugins = ["testbed.suites.dmabuf_fixtures"]

Test = Callable[..., None]

GUARDS: list[tuple[Mutation, Test, dict[str, Any]]] = [
    (Mutation.NO_MISTAKE, maps.test_an_exporter_that_forgets_to_refuse_the_cpu, {}),
    (Mutation.NO_MISTAKE, maps.test_an_exporter_that_hands_out_the_bus_address, {}),
    (Mutation.NO_MISTAKE, maps.test_an_exporter_that_does_not_ask_p2pdma, {}),
    (Mutation.NULL_PAGE, maps.test_no_cpu_access, {}),
    (Mutation.NULL_PAGE, maps.test_peer_addresses_need_acceptance_and_a_path, {}),
    (Mutation.NULL_PAGE, life.test_importers_that_cannot_be_told, {}),
    (Mutation.GIVE_PAGES, maps.test_a_list_without_pages, {}),
    (Mutation.WRONG_PAGE, maps.test_a_list_without_pages, {}),
    (Mutation.SHORT_MAP, maps.test_a_list_without_pages, {}),
    (Mutation.NO_CHECK, maps.test_peer_addresses_need_acceptance_and_a_path, {}),
    (Mutation.BAR_ADDRESS, maps.test_a_mask_that_translation_makes_wide_enough, {}),
    (Mutation.BAR_ADDRESS, life.test_dma_after_a_revoke_faults, {}),
    (Mutation.FIRST_RANGE, maps.test_two_ranges_in_one_export, {}),
    (Mutation.LENGTH_32_BITS, maps.test_exports_beyond_32_bits, {}),
    (Mutation.SKIP_UNMAP, life.test_a_buffer_that_can_move_does_so_first, {}),
    (Mutation.SKIP_UNMAP, life.test_no_mapping_after_a_revoke, {}),
    (Mutation.SKIP_UNMAP, life.test_a_revoke_waits_for_fences_and_unmapping, {}),
    (Mutation.SKIP_UNMAP, life.test_dma_after_a_revoke_faults, {}),
    (Mutation.SKIP_UNMAP, life.test_a_pinned_buffer_stays, {}),
    (Mutation.SKIP_UNMAP, moves.test_a_fault_is_served_and_again_after_a_move, {}),
    (Mutation.SKIP_UNMAP, moves.test_how_long_dma_lands_after_an_unmapping, {}),
    (Mutation.SKIP_REVOKE, life.test_no_mapping_after_a_revoke, {}),
    (Mutation.SKIP_REVOKE, life.test_a_revoke_waits_for_fences_and_unmapping, {}),
    (Mutation.SKIP_REVOKE, life.test_dma_after_a_revoke_faults, {}),
    (Mutation.SKIP_REVOKE, life.test_an_importer_that_never_unmaps, {}),
    (Mutation.SKIP_REVOKE, vfio.test_vfio_takes_it_back, {"how": "decode"}),
    (Mutation.SKIP_REVOKE, loss.test_the_exporter_is_unbound, {}),
    (Mutation.KEEP_OPEN, life.test_no_mapping_after_a_revoke, {}),
    (Mutation.NO_WAIT, life.test_a_revoke_waits_for_fences_and_unmapping, {}),
    (Mutation.NO_WAIT, life.test_an_importer_that_never_unmaps, {}),
    (Mutation.IGNORE_PIN, life.test_a_pinned_buffer_stays, {}),
    (Mutation.NO_COPY, life.test_a_buffer_that_can_move_does_so_first, {}),
    (Mutation.NO_COPY, moves.test_a_move_behind_a_fence, {}),
    (Mutation.EARLY_FENCE, moves.test_a_move_behind_a_fence, {}),
    (Mutation.EARLY_FENCE, moves.test_a_fault_is_served_and_again_after_a_move, {}),
    (Mutation.SKIP_FENCE, moves.test_a_move_behind_a_fence, {}),
    (Mutation.SKIP_FENCE, moves.test_a_fault_is_served_and_again_after_a_move, {}),
    (Mutation.NO_FAULT, moves.test_a_fault_is_served_and_again_after_a_move, {}),
    (Mutation.NO_FAULT, moves.test_how_long_faults_take, {}),
    (Mutation.FREE_EARLY, life.test_the_exporting_process_ends, {}),
]


def rack_variants(topology: Topology) -> dict[str, Topology]:
    """The suite's."""
    return maps.rack_variants(topology)


@pytest.mark.parametrize(("broken", "test", "more"), parameters(GUARDS))
def test_a_break_fails(
    arrange_buffers: ArrangeBuffers,
    observe: Observer,
    broken: Mutation,
    test: Test,
    more: dict[str, Any],
) -> None:
    reason = ""
    try:
        test(partial(arrange_buffers, broken=broken), Observer(), **more)
    except AssertionError as error:
        reason = str(error)
    assert reason, f"{test.__name__} passed, though this is broken: {broken}"
    # What the kernel refuses by itself (MAP-15) would show nothing of the break.
    assert maps.LINKED_TWICE not in reason
    observe.conclude(f"broken: {reason}")
