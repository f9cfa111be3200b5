# SPDX-License-Identifier: Apache-2.0
"""What the switches above a function do with its requests: pure, from a PCI tree as it was read.

A request goes up until a switch finds its address in the window of one of its other downstream
ports, and is routed down there; the root complex, and so the IOMMU, never sees it. The rules are
those of PCIe Base 6.0, 6.12.1 (ACS) and 7.5.1.3 (bridges):

* What a port decides, it decides for requests that come *in* from below it. ACS of the target's
  port does not matter to a request.
* P2P request redirect sends a request for another downstream port up instead. With egress control,
  its vector says for which ports: those are redirected, or without redirection refused; the others
  are routed even with redirection on.
* A redirected request comes into the next switch above through the port to which its address leads
  back. With upstream forwarding that port passes it on; with the capability but without the bit it
  is refused; a port without ACS is taken to pass it on, as Linux takes it to do.
* Completion redirect sends a read's completion through the root complex. Completions are not
  translated: the IOMMU sees nothing of it.
* An address in a switch's window at which no BAR answers is refused by the switch; it does not
  come up.
* Root ports, with or without ACS: up to the IOMMU. Whether a root complex does more is its own.

Functions of one slot: what happens inside a device is its own. As Linux's p2pdma does
(drivers/pci/p2pdma.c), it is taken for routed, unless the port above has any of request redirect,
completion redirect or egress control on.

A bridge's bus-master bit is not looked at, because QEMU does not look at it on the way up either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

from testbed.machine.pci_tree import Acs, Bridge, PciTree, Port, Range, TreeFunction


class Outcome(StrEnum):
    """Where a request ends."""

    PEER = "peer"  # at another function's BAR, below the root complex
    REFUSED = "refused"  # nowhere: Unsupported Request, or an ACS violation
    UPSTREAM = "upstream"  # at the root complex and its IOMMU


class Claim(NamedTuple):
    """Addresses, and what happens to a request for them; all others go upstream.

    ``function`` (QEMU's identifier), ``bar`` and ``offset`` in it say which BAR stands there.
    """

    range: Range
    outcome: Outcome
    why: str
    function: str = ""
    bar: int = -1
    offset: int = 0

    def part(self, rest: Range) -> Claim:
        """The same for a part of it."""
        return self._replace(range=rest, offset=self.offset + rest.start - self.range.start)


def decide(tree: PciTree, requester: str) -> tuple[Claim, ...]:
    """What becomes of the requests of the function with that ``qemu_id``, in order of address.

    Empty if there is no such function in the tree (it was unplugged), or nothing above it routes.
    """
    found = tree.find(requester)
    if found is None:
        return ()
    claims: list[Claim] = []
    function = found
    while (ingress := tree.parent(function)) is not None:
        entry = _bridge(ingress)
        if function is found:
            _add(claims, _own_slot(tree, ingress, entry))
        if entry.port is not Port.DOWNSTREAM:
            break
        claims = [_forwarded(claim, ingress, entry) for claim in claims]
        upstream = tree.parent(ingress)
        if upstream is None:
            break
        _add(claims, _switched(tree, ingress, entry, upstream))
        function = upstream
    return tuple(sorted(claims, key=lambda claim: claim.range.start))


def _bridge(function: TreeFunction) -> Bridge:
    if function.bridge is None:
        raise ValueError(f"{function.name} is no bridge")
    return function.bridge


def _own_slot(tree: PciTree, port: TreeFunction, entry: Bridge) -> Iterator[Claim]:
    """Addresses that lead back to the requester's own slot."""
    acs = entry.acs
    redirects = acs is not None and (
        acs.request_redirect or acs.completion_redirect or acs.egress_control
    )
    outcome = Outcome.UPSTREAM if redirects else Outcome.PEER
    why = f"redirected by {port.name}" if redirects else f"functions of one slot below {port.name}"
    yield from _reached(tree, port, outcome, why)
    if entry.port is Port.DOWNSTREAM:
        goes_up = acs is not None and acs.upstream_forwarding
        outcome = Outcome.UPSTREAM if goes_up else Outcome.REFUSED
        for window in entry.windows:
            yield Claim(window, outcome, f"leads back through {port.name}")


def _forwarded(claim: Claim, port: TreeFunction, entry: Bridge) -> Claim:
    """A redirected request at a port to which its address leads back."""
    inside = any(window.common(claim.range) for window in entry.windows)
    stays = entry.acs is not None and not entry.acs.upstream_forwarding
    if claim.outcome is Outcome.UPSTREAM and inside and stays:
        why = f"{claim.why}, not forwarded by {port.name}"
        return claim._replace(outcome=Outcome.REFUSED, why=why)
    return claim


def _switched(
    tree: PciTree, ingress: TreeFunction, entry: Bridge, upstream: TreeFunction
) -> Iterator[Claim]:
    """What one switch does with requests that came in through ``ingress``."""
    for egress in tree.below(upstream):
        if egress.bridge is None or egress is ingress:
            continue
        outcome, why = _acs_says(entry.acs, ingress, egress)
        yield from _reached(tree, egress, outcome, why or f"routed by {upstream.name}")
        for window in egress.bridge.windows:
            nothing = Outcome.REFUSED if outcome is Outcome.PEER else outcome
            yield Claim(window, nothing, why or f"no BAR below {egress.name}")
    for port in tree.below(upstream):  # the registers of the ports themselves
        for bar in port.bars:
            yield Claim(
                bar.range, Outcome.PEER, f"routed by {upstream.name}", port.qemu_id, bar.index
            )
    for window in _bridge(upstream).windows:
        yield Claim(window, Outcome.REFUSED, f"no BAR below {upstream.name}")


def _acs_says(acs: Acs | None, ingress: TreeFunction, egress: TreeFunction) -> tuple[Outcome, str]:
    """Request redirect and egress control together (PCIe Base 6.0, 6.12.3)."""
    if acs is None:
        return Outcome.PEER, ""
    if acs.egress_control:
        if not acs.egress_vector >> _bridge(egress).number & 1:
            return Outcome.PEER, ""
        if not acs.request_redirect:
            return Outcome.REFUSED, f"egress control of {ingress.name} forbids {egress.name}"
    if acs.request_redirect:
        return Outcome.UPSTREAM, f"redirected by {ingress.name}"
    return Outcome.PEER, ""


def _reached(
    tree: PciTree,
    bridge: TreeFunction,
    outcome: Outcome,
    why: str,
    limits: tuple[Range, ...] | None = None,
) -> Iterator[Claim]:
    """The BARs below a bridge that its windows, and those of the bridges below it, lead to."""
    windows = _bridge(bridge).windows
    if limits is not None:
        windows = tuple(both for w in windows for limit in limits if (both := w.common(limit)))
    for function in tree.below(bridge):
        for bar in function.bars:
            whole = Claim(bar.range, outcome, why, function.qemu_id, bar.index)
            for window in windows:
                common = bar.range.common(window)
                if common is not None:
                    yield whole.part(common)
        if function.bridge is not None:
            yield from _reached(tree, function, outcome, why, windows)


def _add(claims: list[Claim], more: Iterable[Claim]) -> None:
    """Add what is not claimed yet: the first to decide about an address has decided."""
    for claim in more:
        left = [claim.range]
        for known in claims:
            left = [part for rest in left for part in _without(rest, known.range)]
        claims += [claim.part(rest) for rest in left]


def _without(whole: Range, hole: Range) -> Iterator[Range]:
    if whole.common(hole) is None:
        yield whole
        return
    if whole.start < hole.start:
        yield Range(whole.start, hole.start)
    if hole.end < whole.end:
        yield Range(hole.end, whole.end)
