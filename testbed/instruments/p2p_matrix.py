# SPDX-License-Identifier: Apache-2.0
"""What a running rack says of its peers: its kernel's decisions, and where bytes really go.

The kernel is asked through the module ``p2p_probe``, which repeats no rule of it. Bytes are moved
by :mod:`testbed.instruments.p2p_moves`. Both leave the rack as they found it: what they write over
is put back, and functions return to the drivers that had them. What cannot be had is
:class:`~testbed.topology.matrix.Unknown`, with the reason; only the loss of a machine is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from testbed.errors import AgentError, LostError, TestbedError
from testbed.guest import modules
from testbed.instruments.kernel_p2p import MODULE, Tree, decisions, platform_of, providing
from testbed.instruments.memory import PROVIDED_BYTES
from testbed.instruments.p2p_moves import DiskMoves, engine_moves
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.topology.matrix import (
    Decision,
    Findings,
    Measured,
    Pair,
    Unknown,
)
from testbed.topology.peers import Peer, peers
from testbed.topology.plan import Function, Role
from testbed.topology.units import format_size

_OTHER_MACHINE = Unknown("the two are in different machines")


def find_out(
    rack: Rack, trees: Mapping[str, Tree], *, measure: bool, only: Collection[str] = ()
) -> Findings:
    """Ask every node of a running rack about its pairs.

    :param trees: the agents' ``pci.tree``, by node.
    :param measure: move bytes, too. Engines and disks are then used for some seconds.
    :param only: the names of the devices that are asked about; all if there are none.
    :raises LostError: a machine or the link to it died.
    """
    everyone = [peer for peer in peers(rack.plan) if not only or peer.name in only]
    platforms = {name: platform_of(node, trees[name]) for name, node in rack.nodes.items()}
    kernel: dict[Pair, Decision | Unknown] = {}
    measured: dict[Pair, Measured | Unknown] = {}
    for name, node in rack.nodes.items():
        ours = [peer for peer in everyone if peer.node == name]
        said, moved = _ask_kernel(node, ours, trees[name], measure=measure)
        kernel |= said
        if measure:
            measured |= moved | engine_moves(node, ours, trees[name])
    for one in everyone:
        for other in everyone:
            if one.node != other.node:
                kernel[one.name, other.name] = _OTHER_MACHINE
                measured[one.name, other.name] = _OTHER_MACHINE
    return Findings(platforms, kernel, measured if measure else None)


Said = dict[Pair, Decision | Unknown]
Moved = dict[Pair, Measured | Unknown]


def _ask_kernel(
    node: RackNode, ours: Sequence[Peer], tree: Tree, *, measure: bool
) -> tuple[Said, Moved]:
    said: Said = {}
    moved: Moved = {}
    try:
        with loaded(node, MODULE):
            for target in ours:
                others = [peer for peer in ours if peer is not target]
                _ask_about(node, target, others, tree, said, moved if measure else None)
    except LostError:
        raise
    except TestbedError as error:
        why = Unknown(f"no module {MODULE}: {error.message}")
        for one in ours:
            for other in ours:
                said.setdefault((one.name, other.name), why)
                if one.kind == "nvme":
                    moved.setdefault((one.name, other.name), why)
    return said, moved


def _ask_about(
    node: RackNode,
    target: Peer,
    others: Sequence[Peer],
    tree: Tree,
    said: Said,
    moved: Moved | None,
) -> None:
    """One column: every other device, and the memory of ``target``."""
    disks = [peer for peer in others if peer.kind == "nvme"]
    try:
        with _provider_of(node, target, tree) as provider:
            for requester, decision in _decisions(node, provider, others):
                said[requester.name, target.name] = decision
            if moved is not None and disks:
                _move_disks(node, target, provider, disks, moved)
    except _Refused as error:
        for requester in others:
            said.setdefault((requester.name, target.name), error.why)
        if moved is not None:
            for disk in disks:
                moved.setdefault((disk.name, target.name), error.why)


def _move_disks(
    node: RackNode, target: Peer, provider: Function, disks: Sequence[Peer], moved: Moved
) -> None:
    """As the rack is: without its switch router, bytes that the kernel sends to bus addresses are
    lost (docs/switch-router.md)."""
    try:
        with DiskMoves.into(node, provider) as moves:
            for disk in disks:
                moved[disk.name, target.name] = moves.move(disk.client)
    except LostError:
        raise
    except TestbedError as error:
        for disk in disks:
            moved.setdefault((disk.name, target.name), Unknown(error.message))


class _Refused(Exception):
    """Nothing can be said of one device's memory."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = Unknown(why)


@contextmanager
def _provider_of(node: RackNode, target: Peer, tree: Tree) -> Iterator[Function]:
    provider = target.provider
    if provider is None:
        raise _Refused(target.lacks_memory)
    if provider.role is Role.VRAM and provider.vram_size_bytes < PROVIDED_BYTES:
        least = format_size(PROVIDED_BYTES)
        raise _Refused(f"{provider.name} is too small: Linux wants {least} of peer-to-peer memory")
    driver = next((d["driver"] for d in tree if d["bdf"] == provider.bdf), "")
    if provider.role is Role.VRAM and driver:
        raise _Refused(f"{provider.name} belongs to the driver {driver}")
    with ExitStack() as stack:
        try:
            stack.enter_context(providing(node, provider))
        except AgentError as error:
            raise _Refused(f"{provider.name} is no peer-to-peer memory: {error.message}") from error
        yield provider


def _decisions(
    node: RackNode, provider: Function, others: Sequence[Peer]
) -> Iterator[tuple[Peer, Decision | Unknown]]:
    """All at once, or one by one if that fails for one of them."""
    try:
        said = decisions(node, provider, [peer.client for peer in others])
        yield from ((peer, said[peer.client.bdf]) for peer in others)
    except AgentError as error:
        if len(others) == 1:
            why = f"the kernel cannot be asked about {others[0].name}: {error.message}"
            yield others[0], Unknown(why)
            return
        for peer in others:
            yield from _decisions(node, provider, [peer])


@contextmanager
def loaded(node: RackNode, module: str) -> Iterator[None]:
    """Inside the block the guest's kernel has a module of ours; it goes if it was not there.

    :raises CapabilityMissing, ModuleBuildError, ModuleError: it cannot have it.
    """
    there = node.agent.call("modules.loaded", names=[module])[module]
    if not there:
        modules.load(node, module)
    try:
        yield
    finally:
        if not there and node.alive:
            modules.unload(node, module)
