# SPDX-License-Identifier: Apache-2.0
"""Device-private pages seen by another device: left in place over a link, over PCIe, or migrated.

The 2024-03/04 discussion of HMM across devices names the ways: 1a, leave the page where it is and
use the devices' own interconnect; 1b, leave it and use PCIe peer-to-peer, each device asking for an
address that is right for itself; otherwise migrate to system memory, which is what the kernel's
``hmm_range_fault`` does for a page of a foreign owner. Owner groups are formed as in
drivers/gpu/drm/drm_pagemap_util.c (``drm_pagemap_acquire_owner``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from guest_agent.p2p.errors import GoneError, NoPathError, P2PError
from guest_agent.p2p.interconnect import FABRIC_KINDS, PRIVATE_KINDS, Placement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.backend import Backing
    from guest_agent.p2p.core import Core
    from guest_agent.p2p.interconnect import Offer, Path


class OwnerGroups:
    """Which devices may use one another's pages in place, because all of them are linked.

    A device joins the first group, in the order in which groups were founded, whose every member
    it is linked to; otherwise it founds one. So the groups depend on the order of joining: if A is
    linked to B and B to C but A not to C, joining as A, B, C gives {A, B}, {C}.

    :param linked: whether two devices have a fast interconnect; symmetrical.
    """

    def __init__(self, linked: Callable[[str, str], bool]) -> None:
        self._linked = linked
        self._groups: list[list[str]] = []

    def join(self, device: str) -> int:
        """Join, and return the owner: the group's place in the order of founding.

        :raises P2PError: it has joined before.
        """
        if self.owner_of(device) is not None:
            raise P2PError(f"{device} has joined before")
        for number, members in enumerate(self._groups):
            if members and all(self._linked(device, member) for member in members):
                members.append(device)
                return number
        self._groups.append([device])
        return len(self._groups) - 1

    def leave(self, device: str) -> None:
        """Leave; an empty group is joined by nobody again. :raises GoneError: it is in none."""
        owner = self.owner_of(device)
        if owner is None:
            raise GoneError(f"{device} is in no owner group")
        self._groups[owner].remove(device)

    def owner_of(self, device: str) -> int | None:
        """The device's owner, or None."""
        for number, members in enumerate(self._groups):
            if device in members:
                return number
        return None

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The members of each group that has any, in the order of joining."""
        return tuple(tuple(members) for members in self._groups if members)


class Action(enum.Enum):
    """What is done with a foreign page."""

    LOCAL = "local"  # the device's own
    LINK = "1a: in place over the link"
    PCIE = "1b: in place over PCIe"
    MIGRATE = "migrate to system memory"


@dataclass(frozen=True)
class Decision:
    """What is done, over which path, and why not something better."""

    action: Action
    path: Path | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """A range of memory that processes share: where it is now, and for whom a driver keeps it.

    ``owner``  the owner group of device-private memory; None in system memory.
    """

    backing: Backing
    owner: int | None

    @property
    def is_private(self) -> bool:
        """Whether the CPU cannot reach it."""
        return self.backing.placement is Placement.DEVICE


def decide(
    core: Core,
    page: Page,
    device: str,
    owner: int | None,
    exporter: Sequence[Offer],
    importer: Sequence[Offer],
) -> Decision:
    """What ``device``, of owner group ``owner``, does with the page.

    Links are used only within an owner group, as ``hmm_range_fault`` gives a device's own page
    frame only for pages of the caller's owner; PCIe needs no common owner.

    :param exporter: what the device that has the page offers.
    :param importer: the paths of ``device``.
    """
    if page.is_private and page.backing.device == device:
        return Decision(Action.LOCAL, None, ())
    if not page.is_private:
        path = _path(core, device, exporter, importer, Placement.SYSTEM)
        if isinstance(path, str):
            raise GoneError(f"{device} does not even reach system memory: {path}")
        return Decision(Action.MIGRATE, path, ("it is in system memory",))
    reasons = []
    links = [offer for offer in importer if offer.kind in (*PRIVATE_KINDS, *FABRIC_KINDS)]
    if page.owner is None or page.owner != owner:
        reasons.append(f"no link: owner {owner} is not the page's owner {page.owner}")
    else:
        path = _path(core, device, exporter, links, Placement.DEVICE)
        if not isinstance(path, str):
            return Decision(Action.LINK, path, ())
        reasons.append(f"no link: {path}")
    others = [offer for offer in importer if offer not in links]
    path = _path(core, device, exporter, others, Placement.DEVICE)
    if not isinstance(path, str):
        return Decision(Action.PCIE, path, tuple(reasons))
    reasons.append(f"no PCIe peer-to-peer: {path}")
    path = _path(core, device, exporter, importer, Placement.SYSTEM)
    if isinstance(path, str):
        raise GoneError(f"{device} does not even reach system memory: {path}")
    return Decision(Action.MIGRATE, path, tuple(reasons))


def _path(
    core: Core,
    device: str,
    exporter: Sequence[Offer],
    importer: Sequence[Offer],
    placement: Placement,
) -> Path | str:
    try:
        return core.negotiate(f"page for {device}", exporter, importer, [placement]).path
    except NoPathError as error:
        why = [each.reason for each in error.report.candidates() if each.reason]
        return "; ".join(dict.fromkeys(why)) or str(error)


class Mirror:
    """One shared page, and the devices that have it in their page tables.

    :param offers: of each device that may have or want the page.
    """

    def __init__(
        self,
        core: Core,
        name: str,
        page: Page,
        offers: dict[str, Sequence[Offer]],
        owners: OwnerGroups,
    ) -> None:
        self.page = page
        self.name = name
        self._core = core
        self._offers = offers
        self._owners = owners
        self._tables: dict[str, tuple[Path, Address]] = {}

    def fault(self, device: str) -> Address | None:
        """``device`` touches the page: it gets an address of its own, or None if it is its own.

        A migration takes the page out of every device's page tables first.

        :raises GoneError: the device reaches no memory at all.
        :raises FenceFailedError: the migration's copy failed.
        """
        if device in self._tables:
            return self._tables[device][1]
        with self._core.events.span("fault", f"{device} on {self.name}") as span:
            decision = decide(
                self._core,
                self.page,
                device,
                self._owners.owner_of(device),
                self._offers[self.page.backing.device],
                self._offers[device],
            )
            span.details.update(action=decision.action.value, reasons=list(decision.reasons))
            if decision.path is None:
                return None
            if decision.action is Action.MIGRATE and self.page.is_private:
                self._migrate(span.number)
            backend, backing = self._core.backend, self.page.backing
            address = backend.reserve(backing, decision.path)
            try:
                backend.map(backing, decision.path, address, writable=True)
            except OSError:
                backend.release(decision.path, address)
                raise
            self._tables[device] = (decision.path, address)
            return address

    def invalidate(self) -> None:
        """Take the page out of all page tables (the MMU notifier)."""
        for path, address in self._tables.values():
            self._core.backend.unmap(self.page.backing, path, address)
            self._core.backend.release(path, address)
        self._tables.clear()

    def _migrate(self, cause: int) -> None:
        core, old = self._core, self.page.backing
        new = core.backend.allocate(old.device, Placement.SYSTEM, old.size_bytes)
        with core.events.span("move", self.name, cause, way="device → system"):
            self.invalidate()
            try:
                core.backend.copy(old, new).wait(core.clock)
            except OSError:
                core.backend.free(new)
                raise
        core.backend.free(old)
        self.page = replace(self.page, backing=new, owner=None)
