# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-dmabuf``, last part: exporters and importers that go away with a buffer shared."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from errno import ENODEV

import pytest

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing
from testbed.harness.device_faults import Faults
from testbed.harness.racks import LiveRack
from testbed.instruments.dmabuf import EXPORTER, WRITTEN, judge_errno
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.results.judging import PAGE_BYTES
from testbed.suites.dmabuf_fixtures import ArrangeBuffers, has_buffers
from testbed.suites.p2p_dmabuf import both_ends, imported
from testbed.suites.p2p_dmabuf_life import revoked
from testbed.suites.p2p_kernel_life import log_mark, no_trouble

pytest_plugins = ["testbed.suites.dmabuf_fixtures"]
pytestmark = [pytest.mark.boots(when=has_buffers), pytest.mark.without_disks]

UNDER_WAY_S = 1.0  # from the doorbell until the card is pulled out


@pytest.mark.requirement("LIFE-03")
def test_the_exporter_is_unbound(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Its driver lets go of the device: importers are told, and what they try by then faults."""
    exchange = arrange_buffers()
    buffer = exchange.export("provider", revocable=True)
    importer = imported(buffer, observe)
    both_ends(importer, observe)
    mark = log_mark(exchange.node)
    if exchange.mutation is not Mutation.SKIP_REVOKE:
        exchange.call("unbind", device=exchange.pair.exporter.bdf)
    state = importer.command("state")
    if not state["invalidated"] or state["mapped"]:
        raise Refuted(f"told {state['invalidated']} times, and still mapped: {state['mapped']}")
    observe.require(judge_errno("map after the unbinding", importer.map().errno, ENODEV))
    # So that its memory can be looked at: a function without a driver decodes nothing.
    exchange.call("bind", device=exchange.pair.exporter.bdf, module=EXPORTER)
    if exchange.by_iova:
        observe.require(importer.refused())
    importer.close()
    buffer.call("close")
    both_ends(imported(exchange.export("provider"), observe), observe)
    no_trouble(exchange.node, mark, observe)
    observe.conclude("told, unmapped, ENODEV; bound again, it exports again")


@pytest.mark.requirement("LIFE-09")
def test_the_importer_is_pulled_out(
    rack: LiveRack, faults: Faults, arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """In the middle of a copy, by surprise: ENODEV, and the exporter is not held up."""
    if not rack.ours:
        raise CapabilityMissing("a rack of its own: this pulls a device out for good")
    exchange = arrange_buffers(here=True)  # where ``faults`` is
    importing, exporting = exchange.pair.importer, exchange.pair.exporter
    if importing.kind != "model":
        raise CapabilityMissing(f"an importer that can be pulled out (engine: model): {importing}")
    buffer = exchange.export("provider", revocable=True)
    importer = imported(buffer, observe)
    both_ends(importer, observe)
    contents = pattern(WRITTEN, 0, PAGE_BYTES)
    exchange.poke(buffer.bar_offset(0), contents)
    card, mark = f"{exchange.pair.node}/{importing.device}", log_mark(exchange.node)
    faults.stick(card)  # so that the copy is under way for as long as we like
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(importer.write, 0, bytes(PAGE_BYTES))
        time.sleep(UNDER_WAY_S)
        if said.done():
            raise Refuted("the copy ended before the card was pulled out")
        if exchange.mutation is not Mutation.KEEP_PLUGGED:
            faults.remove(card)
        error = said.result()
    observe.require(judge_errno("the copy", error, ENODEV))
    observe.require(exchange.judge_page(buffer.bar_offset(0), contents))
    revoked(buffer, observe)
    fresh = exchange.export("provider")
    exchange.poke(fresh.bar_offset(0), contents)
    observe.require(exchange.judge_page(fresh.bar_offset(0), contents))
    no_trouble(exchange.node, mark, observe)
    observe.conclude(f"{importing.name} pulled out: ENODEV; {exporting.name} goes on")
