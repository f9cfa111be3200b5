# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-kernel``: the guest kernel's own peer-to-peer DMA (drivers/pci/p2pdma.c).

The stock kernel's NVMe driver moves data between one disk and another's controller memory; nothing
here maps anything by itself. What the kernel says it moved is held against the bytes at the
destination, against QEMU's record of every translation, and against the kernel's own log.

Each row of the catalogue wants a processor (Linux lets peers through the host bridge of an AMD EPYC
and not of an Intel one), and a mode of the IOMMU. The processor is the topology's; racks in other
modes are booted beside it.
"""

from __future__ import annotations

import pytest

from testbed.guest import switch_router
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.instruments.reasons import reasons_of, why_not_shown
from testbed.instruments.storage import TRANSFER_BYTES, Transfer, judge_read
from testbed.results.evidence import Access, Note
from testbed.results.judging import judge_fault
from testbed.suites.kernel_fixtures import (
    Arrange,
    Machine,
    Needs,
    kernel_module,
    routing,
    with_disks,
    without_kernel_module,
)
from testbed.topology.model import Topology, from_data, to_data, with_overrides
from testbed.topology.oracle import Route, redirecting_ports
from testbed.topology.placement import place

pytest_plugins = ["testbed.suites.kernel_fixtures"]

# The kernel's words (drivers/pci/p2pdma.c).
NO_WAY = "do not share an upstream bridge or whitelisted host bridge"
NOT_LISTED = "Host bridge not in P2PDMA whitelist"

ROUTER, PROBE = switch_router.MODULE, "p2p_probe"

# Seeds of patterns: what is on the disk, what the memory held before, what goes back to the disk.
DISK, STALE, BACK = 11, 12, 13

_ACS_REDIRECT = 0x04 | 0x08  # P2P request redirect, P2P completion redirect


def rack_variants(topology: Topology) -> dict[str, Topology]:
    """The same rack with its IOMMU in other modes, and with ACS redirection turned off."""
    variants = {
        "iommu-off": with_overrides(topology, iommu_mode="off"),
        "passthrough": with_overrides(topology, iommu_mode="passthrough"),
    }
    if any(node.iommu.kind == "none" for node in topology.nodes.values()):
        del variants["passthrough"]
    plan, data = place(topology), to_data(topology)
    for name, node in topology.nodes.items():
        ports = ";".join(sorted(redirecting_ports(plan.nodes[name], node)))
        if ports:
            words = data["nodes"][name].setdefault("kernel_args", [])
            words.append(f"pci=disable_acs_redir={ports}")
            variants["no-redirect"] = from_data(data)
    return variants


def both_ways(machine: Machine, observe: Observer, *, identity: bool = False) -> None:
    """From the client's disk into the provider's memory and back, judged at the destination.

    ``identity``: by the memory's bus address, which a switch routes; else by an IOVA.
    """
    pair, disks, provided = machine.pair, machine.disks, machine.provided
    expected = disks.fill(pair.client, DISK)
    provided.fill(STALE)
    transfer = disks.transfer(pair.client, provided)
    observe.require(judge_read(transfer, provided, expected))
    if machine.translates:
        observe.require(transfer.translated(identity=identity))
    back = provided.fill(BACK)
    written = disks.transfer(pair.client, provided, write=True)
    if written.moved_bytes != TRANSFER_BYTES:
        raise Refuted(f"a write out of the peer's memory ended with {written.error}")
    observe.require(disks.judge(pair.client, back))
    how = "its bus address" if identity or not machine.translates else "an IOVA"
    observe.conclude(f"{TRANSFER_BYTES} bytes each way between {pair} by {how}")


def refused(machine: Machine, observe: Observer, words: str = "") -> None:
    """The kernel says EINVAL and why, and nothing moves.

    Why it says only the first time that it decides about a pair.
    """
    pair, disks, provided = machine.pair, machine.disks, machine.provided
    disks.fill(pair.client, DISK)
    stale = provided.fill(STALE)
    transfer = disks.transfer(pair.client, provided)
    observe.require(transfer.said(words))
    observe.require(provided.judge(stale))
    if transfer.translations or transfer.faults.count:
        raise Refuted("the kernel refused it, and the device accessed the memory all the same")
    observe.conclude(f"EINVAL, '{words}', and nothing moved" if words else "EINVAL")


def unrouted(machine: Machine, observe: Observer) -> Transfer:
    """QEMU alone sends a bus address to the IOMMU: the kernel claims success, nothing arrives."""
    pair, disks, provided = machine.pair, machine.disks, machine.provided
    expected = disks.fill(pair.client, DISK)
    stale = provided.fill(STALE)
    transfer = disks.transfer(pair.client, provided)
    if transfer.moved_bytes != TRANSFER_BYTES:
        raise Refuted(f"the kernel moved {transfer.moved_bytes} bytes: {transfer.error}")
    judgement = judge_read(transfer, provided, expected)
    observe.add(*judgement.evidence)
    if judgement.holds:
        raise Refuted("without a router the bytes arrived: this machine routes by itself")
    observe.require(provided.judge(stale))
    iommu = machine.node_spec.iommu
    if why := why_not_shown(iommu):
        observe.note(f"the unchanged bytes alone show the refusal: {why}")
        return transfer
    observe.require(
        judge_fault(
            transfer.faults,
            requester=pair.client.bdf,
            address=provided.physical,
            access=Access.WRITE,
            reasons=reasons_of(iommu).unmapped_write,
            size_bytes=TRANSFER_BYTES,
        )
    )
    return transfer


@pytest.mark.boots("iommu-off", when=with_disks(Route.SWITCH, iommu_mode="off"))
@pytest.mark.requirement("TOPO-01")
def test_one_switch_and_no_iommu(arrange: Arrange, observe: Observer) -> None:
    """The kernel uses bus addresses, and the data is right."""
    both_ways(arrange(Needs((Route.SWITCH,), variant="iommu-off")), observe)


@pytest.mark.boots("passthrough", when=with_disks(Route.SWITCH))
@pytest.mark.requirement("TOPO-02")
def test_one_switch_and_passthrough(arrange: Arrange, observe: Observer) -> None:
    """The IOMMU is there and maps everything to itself: the data is right."""
    both_ways(arrange(Needs((Route.SWITCH,), variant="passthrough")), observe)


@pytest.mark.requirement("TOPO-03")
def test_a_plain_switch_and_a_translating_iommu(
    arrange: Arrange, mutation: Mutation, observe: Observer
) -> None:
    """Bus addresses, which the switch routes. Without a router the kernel reports success over
    stale bytes, and that is judged a failure."""
    machine = arrange(Needs((Route.SWITCH,)))
    with without_kernel_module(machine.node, ROUTER):
        unrouted(machine, observe)
    with routing(machine.node, mutation):
        both_ways(machine, observe, identity=True)
    observe.conclude(
        "routed, the data is right; not routed, the kernel's success over stale bytes is refuted"
    )


@pytest.mark.requirement("TOPO-04")
def test_two_root_ports_and_an_unlisted_host_bridge(arrange: Arrange, observe: Observer) -> None:
    """No switch in common, and Linux does not trust the host bridge: EINVAL, and it says so."""
    refused(arrange(Needs((Route.ROOT,), amd=False)), observe, NO_WAY)


@pytest.mark.requirement("TOPO-05")
def test_two_root_ports_of_an_amd_and_no_iommu(arrange: Arrange, observe: Observer) -> None:
    """Linux trusts the host bridge: the data is right."""
    both_ways(arrange(Needs((Route.ROOT,), amd=True, variant="iommu-off")), observe)


@pytest.mark.requirement("TOPO-06")
def test_two_root_ports_of_an_amd_and_an_iommu(arrange: Arrange, observe: Observer) -> None:
    """Through the host bridge, by an IOVA, and without a fault."""
    both_ways(arrange(Needs((Route.ROOT,), amd=True)), observe)


@pytest.mark.requirement("TOPO-07")
def test_a_redirecting_switch_and_an_unlisted_host_bridge(
    arrange: Arrange, observe: Observer
) -> None:
    """Redirected to a host bridge that Linux does not trust: refused, and it says so."""
    refused(arrange(Needs((Route.REDIRECTED,), amd=False)), observe, NOT_LISTED)


@pytest.mark.requirement("TOPO-08")
def test_a_redirecting_switch_of_an_amd(arrange: Arrange, observe: Observer) -> None:
    """Through the host bridge, by an IOVA."""
    both_ways(arrange(Needs((Route.REDIRECTED,), amd=True)), observe)


@pytest.mark.boots("no-redirect", when=with_disks(Route.REDIRECTED))
@pytest.mark.requirement("TOPO-09")
def test_redirection_turned_off_on_the_command_line(
    arrange: Arrange, mutation: Mutation, observe: Observer
) -> None:
    """``pci=disable_acs_redir=``: what TOPO-07 refuses goes by bus address."""
    machine = arrange(Needs((Route.REDIRECTED,), variant="no-redirect"))
    words = machine.node.agent.call("system.info")["cmdline"]
    observe.note(next(word for word in words.split() if "disable_acs_redir" in word))
    with without_kernel_module(machine.node, ROUTER):
        unrouted(machine, observe)
    with routing(machine.node, mutation):
        both_ways(machine, observe, identity=True)


@pytest.mark.requirement("TOPO-10")
def test_a_change_of_acs_after_the_first_mapping(arrange: Arrange, observe: Observer) -> None:
    """The kernel keeps its first decision for a pair: stale once ACS has changed."""
    machine = arrange(Needs((Route.REDIRECTED,), amd=False))
    refused(machine, observe)
    agent, pair = machine.node.agent, machine.pair
    ports = [f for f in machine.node.plan.functions if f.acs and f.device == pair.switch]
    before = {port.bdf: agent.call("acs.set", device=port.bdf, control=0)["old"] for port in ports}
    try:
        if not any(old & _ACS_REDIRECT for old in before.values()):
            raise Refuted("the kernel had not turned redirection on in any port")
        observe.add(*(Note(f"{bdf}: ACS control {old:#x} → 0") for bdf, old in before.items()))
        provided = machine.provided
        stale = provided.fill(STALE)
        again = machine.disks.transfer(pair.client, provided)
        observe.note(f"after the change: errno {again.error or 0}")
        if again.error != "EINVAL":
            raise Refuted("after the change the kernel decided anew: nothing stale is shown")
        observe.require(provided.judge(stale))
        with kernel_module(machine.node, PROBE):
            params = {"provider": pair.provider.bdf, "clients": [pair.client.bdf]}
            fresh = agent.call("p2p.distance", **params)[pair.client.bdf]
            observe.note(f"asked anew, the kernel finds distance {fresh}")
            if fresh is None:
                raise Refuted("asked anew, the kernel still finds no path")
    finally:
        for bdf, old in before.items():
            agent.call("acs.set", device=bdf, control=old)
    observe.conclude("the path is free, and the kernel goes on refusing it by its first decision")
