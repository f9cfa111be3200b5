# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-kernel``, third part: providers and clients that go away while memory is shared.

The stock kernel's own ways: a driver unbound under a mapping (``pci_p2pdma_unmap_mappings()`` of
drivers/pci/p2pdma.c), and a disk unplugged in the middle of a transfer. QEMU's slots announce that
by ACPI (drivers/pci/hotplug/acpiphp_glue.c): the driver is asked to let go, whatever is under way.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from signal import SIGBUS, Signals
from typing import Any

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.interface import RackNode
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.instruments.storage import PROVIDED_BYTES, Provided
from testbed.results.evidence import Counter, Note
from testbed.suites.kernel_fixtures import Arrange, Machine, Needs, is_trusted_amd
from testbed.suites.p2p_kernel import BACK, DISK, STALE, rack_variants
from testbed.topology.oracle import Route
from testbed.topology.plan import Function

__all__ = ["rack_variants"]
pytest_plugins = ["testbed.suites.kernel_fixtures"]

ANY_ROUTE = (Route.SWITCH, Route.REDIRECTED, Route.ROOT)
STREAM_BYTES = 1 << 20  # of one transfer
UNDER_WAY = 3  # transfers, before something is unplugged
DEADLINE_S = 30.0
_POLL_S = 0.1
# What the block layer says of a disk that is gone, and direct I/O of memory that is.
CLEAN_ERRORS = ("EIO", "ENODEV", "ENXIO", "EREMOTEIO", "EFAULT", "ENOENT")
_TROUBLE = re.compile(r"BUG:|WARNING:|Oops|general protection|refcount_t|Call Trace|blocked for")


@pytest.mark.requirement("LIFE-08")
def test_a_provider_is_unbound_under_a_mapping(
    arrange: Arrange, mutation: Mutation, observe: Observer
) -> None:
    """User mappings are torn down, the unbinding ends, and no page of the memory is lost."""
    machine = arrange(Needs(ANY_ROUTE))
    node, provider, provided = machine.node, machine.pair.provider, machine.provided
    call, mark = node.agent.call, log_mark(node)
    observe.require(provided.judge(provided.fill(STALE)))
    touched(provided, 0)
    free_bytes = call("p2pmem.providers")[provider.bdf]["available_bytes"] + PROVIDED_BYTES
    limits: dict[str, Any] = {"device": provider.bdf, "timeout_s": DEADLINE_S}
    is_unbound = mutation is not Mutation.KEEP_PROVIDER
    if is_unbound:
        answer = call("loss.unbind", 2 * DEADLINE_S, **limits)
        observe.add(Counter("unbinding", int(answer["seconds"] * 1000), "ms"))
        if not answer["ended"]:
            raise Refuted(f"the unbinding of {provider.name} waits for a process's mapping")
    try:
        touched(provided, SIGBUS)
        goes_on(machine, machine.pair.client, observe)
    finally:
        if is_unbound:
            call("loss.rebind", 2 * DEADLINE_S, **limits)
    memory = until(lambda: call("p2pmem.providers").get(provider.bdf), f"{provider.name} is back")
    if memory["available_bytes"] != free_bytes:  # the driver itself has taken some
        raise Refuted(f"of {free_bytes} bytes only {memory['available_bytes']} came back")
    again = Provided.of(node, provider, "again")
    try:
        observe.require(again.judge(again.fill(BACK)))
    finally:
        again.free()
    no_trouble(node, mark, observe)
    observe.conclude("the mapping was torn down (SIGBUS), the provider came back with all memory")


@pytest.mark.requirement("LIFE-09")
@pytest.mark.parametrize("unplugged", ["client", "provider"])
def test_unplugged_in_the_middle_of_a_transfer(
    rack: LiveRack,
    variant: Callable[[str], LiveRack],
    arrange: Arrange,
    mutation: Mutation,
    observe: Observer,
    unplugged: str,
) -> None:
    """The transfer ends with an error, the kernel lets go, and the other disk goes on."""
    if not rack.ours:
        raise CapabilityMissing("a rack of its own: this takes a device away for good")
    amd = is_trusted_amd(next(iter(rack.nodes.values())))
    # Where Linux lets the pair do peer-to-peer DMA at all.
    routes, where = (ANY_ROUTE[1:], "") if amd else ((Route.SWITCH,), "iommu-off")
    machine = arrange(Needs(routes, variant=where))
    live = variant(where) if where else rack
    gone, left = machine.pair.client, machine.pair.provider
    if unplugged == "provider":
        gone, left = left, gone
    try:
        transfer_ends(machine, gone, mutation, observe)
        goes_on(machine, left, observe)
        if unplugged == "client":
            observe.require(machine.provided.judge(machine.provided.fill(BACK)))
        else:
            touched(machine.provided, SIGBUS)
    finally:
        live.renew()  # with the disk in its slot
    observe.conclude(f"{gone.name} unplugged: a clean error; {left.name} goes on")


def transfer_ends(machine: Machine, gone: Function, mutation: Mutation, observe: Observer) -> None:
    """Unplug a disk while data moves between it and the other, and judge how that ends."""
    node, pair = machine.node, machine.pair
    call, mark = node.agent.call, log_mark(node)
    provider = pair.provider.bdf
    call("p2pmem.alloc", name="stream", provider=provider, size_bytes=STREAM_BYTES)
    target = {"ram": "stream"}
    call("loss.start", device=pair.client.bdf, target=target, size_bytes=STREAM_BYTES)
    until(lambda: call("loss.progress")["transfers"] >= UNDER_WAY, "transfers are under way")
    if mutation is not Mutation.KEEP_PLUGGED:
        node.qmp("device_del", id=gone.qemu_id)
    answer = call("loss.end", 3 * DEADLINE_S, timeout_s=DEADLINE_S)
    observe.add(Counter("transfers before", answer["transfers"]), Note(str(answer["error"])))
    if not answer["by_itself"]:
        raise Refuted(f"{DEADLINE_S:.0f} s later transfers with {gone.name} still go on, or hang")
    if answer["error"] not in CLEAN_ERRORS:
        raise Refuted(f"the transfer ended with '{answer['error']}'")
    until(lambda: gone.bdf not in call("nvme.namespaces"), f"the kernel lets go of {gone.name}")
    until(lambda: gone.qemu_id not in peripherals(node), f"{gone.name} is out of the machine")
    no_trouble(node, mark, observe)


def peripherals(node: RackNode) -> set[str]:
    """What is plugged into the machine."""
    return {each["name"] for each in node.qmp("qom-list", path="/machine/peripheral")}


def goes_on(machine: Machine, disk: Function, observe: Observer) -> None:
    """The other disk reads and writes as before."""
    observe.require(machine.disks.judge(disk, machine.disks.fill(disk, DISK)))


def touched(provided: Provided, wanted: int) -> None:
    """A process that reads the memory gets this signal, or none."""
    got = provided.node.agent.call("loss.touch", target=provided.target)["signal"]
    if got != wanted:
        words = [Signals(each).name if each else "no signal" for each in (got, wanted)]
        raise Refuted(f"a process that reads {provided.name} gets {words[0]}, not {words[1]}")


def log_mark(node: RackNode) -> int:
    """Where the kernel's log ends now."""
    return int(node.agent.call("kmsg.mark")["sequence"])


def no_trouble(node: RackNode, mark: int, observe: Observer) -> None:
    """The kernel has complained of nothing since."""
    records = node.agent.call("kmsg.since", sequence=mark)["records"]
    lines = [record["text"] for record in records]
    observe.add(*(Note(f"kernel: {line}") for line in lines[:4]))
    if bad := next((line for line in lines if _TROUBLE.search(line)), ""):
        raise Refuted(f"the kernel says: {bad}")


def until(seen: Callable[[], Any], what: str) -> Any:
    """Wait for it, and return it. Refuted when the time is up."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := seen()):
        if time.monotonic() > deadline_s:
            raise Refuted(f"not within {DEADLINE_S:.0f} s: {what}")
        time.sleep(_POLL_S)
    return found
