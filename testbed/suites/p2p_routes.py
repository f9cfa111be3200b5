# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-iommu``, second part: who decides where a peer's bus address leads.

A switch without ACS redirect sends a request for a peer's BAR straight to that peer, and no IOMMU
is asked; one that redirects sends it up, where nothing maps it (PCI Express Base Specification 6.0,
6.12). The bytes alone cannot tell the two apart from a mapping: the device's own count of paths and
the IOMMU's faults can.
"""

from __future__ import annotations

import pytest

from testbed.errors import CapabilityMissing
from testbed.instruments.observer import Observer, Refuted
from testbed.instruments.paths import PathWatch
from testbed.instruments.reasons import Reasons
from testbed.results.judging import PAGE_BYTES
from testbed.suites.ground import PEER_OFFSET, PROBE_BYTES, Ground
from testbed.topology.oracle import Route

gated = pytest.mark.gated_by("MAP-01")
pytest_plugins = ["testbed.suites.p2p_fixtures"]
pytestmark = pytest.mark.without_disks

# Seeds of patterns: each place has one of its own, so that bytes tell where they come from.
MINE, THEIRS, FRESH = 1, 2, 3


@gated
@pytest.mark.requirement("TOPO-16")
def test_where_a_bus_address_leads(
    switched_ground: Ground, reasons: Reasons, observe: Observer
) -> None:
    """Two devices with a switch in common: routed by it, or sent up by it, as its ACS says."""
    if switched_ground.route is Route.SWITCH:
        routed_to_the_peer(switched_ground, observe)
    else:
        sent_to_the_iommu(switched_ground, reasons, observe)


def routed_to_the_peer(ground: Ground, observe: Observer) -> None:
    """The bytes arrive, the IOMMU never sees them, and the device's own count says so."""
    witness, address = ground.engine.witness, ground.peer.bus_address
    assert address is not None
    if witness is None:
        raise CapabilityMissing(
            f"a requester whose switch routes: QEMU sends all that {ground.engine.function.kind}"
            " does to the IOMMU"
        )
    size = ground.engine.bulk_bytes
    mine = ground.fill_local(MINE, size)
    ground.fill_peer(THEIRS, size)
    local = ground.map_local()
    raw = address + PEER_OFFSET
    observe.require(ground.deliver_to_peer(local, raw, mine, path="peer"))
    fresh = ground.fill_peer(FRESH, size)
    with PathWatch(witness) as paths:
        observe.require(ground.deliver_to_local(raw, local, fresh, path=None))
    if paths.moved()["peer"][0] < size:
        raise Refuted(f"only {paths.moved()['peer'][0]} bytes were read from the peer directly")
    observe.conclude(f"{size} bytes each way by bus address {raw:#x}, below the IOMMU")


def sent_to_the_iommu(ground: Ground, reasons: Reasons, observe: Observer) -> None:
    """The same address goes up to the IOMMU, which has no mapping for it."""
    address = ground.peer.bus_address
    assert address is not None
    ground.fill_local(MINE, PROBE_BYTES)
    before = ground.fill_peer(THEIRS, PAGE_BYTES)
    raw = address + PEER_OFFSET
    with PathWatch(ground.engine.witness) as paths:
        observe.require(ground.write_refused(ground.map_local(), raw, reasons.unmapped_write))
    observe.require(ground.peer.judge(PEER_OFFSET, before))
    if any(paths.moved().get("peer", ())):
        raise Refuted("it faulted, and yet bytes went directly to the peer")
    observe.conclude(f"{raw:#x} faults; nothing went by the switch")
