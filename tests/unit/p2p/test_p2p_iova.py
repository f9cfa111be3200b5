# SPDX-License-Identifier: Apache-2.0
"""The IOVA API, its fabric twin, and addresses that cannot be taken for one another."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from guest_agent.p2p import rules
from guest_agent.p2p.addresses import (
    Address,
    DmaAddress,
    FabricAddress,
    LinkAddress,
    on_fabric,
    on_link,
    on_pcie,
)
from guest_agent.p2p.errors import AddressError, FaultError, IovaError, RuleError
from guest_agent.p2p.iova import IovaState
from guest_agent.p2p.resv import Reservation, locked
from guest_agent.p2p.rules import Task
from guest_agent.p2p.ual import UalState

PAGE = 4096
TASK = Task("gpu0 driver")


class Space:
    """A page table of pages, above a memory of bytes."""

    def __init__(self, base: int = 0x10000, pages: int = 64, granule: int = PAGE) -> None:
        self.granule_bytes = granule
        self.translates = True
        self.untrusted = False
        self.table: dict[int, tuple[int, bool]] = {}
        self.memory = bytearray(1 << 20)
        self.fail: OSError | None = None
        self._base = base
        self._end = base + pages * granule
        self._taken: list[tuple[int, int]] = []

    def reserve(self, size_bytes: int, limit: int) -> int | None:
        at = self._base
        for start, size in sorted(self._taken):
            if start - at >= size_bytes:
                break
            at = start + size
        if at + size_bytes > self._end or at + size_bytes - 1 > limit:
            return None
        self._taken.append((at, size_bytes))
        return at

    def release(self, iova: int, size_bytes: int) -> None:
        self._taken.remove((iova, size_bytes))

    def taken(self) -> int:
        return len(self._taken)

    def map(self, iova: int, physical: int, size_bytes: int, *, writable: bool) -> None:
        if self.fail is not None:
            raise self.fail
        for page in range(0, size_bytes, self.granule_bytes):
            assert iova + page not in self.table
            self.table[iova + page] = (physical + page, writable)

    def unmap(self, iova: int, size_bytes: int) -> int:
        for page in range(0, size_bytes, self.granule_bytes):
            del self.table[iova + page]
        return size_bytes

    def dma(self, address: Address) -> int:
        """Where a device's access ends up, in physical memory."""
        page, offset = divmod(address.value, self.granule_bytes)
        found = self.table.get(page * self.granule_bytes)
        if found is None:
            raise FaultError(f"{address.user}: nothing at {address}")
        return found[0] + offset


def state(space: Space, physical: int = 0, size: int = 4 * PAGE) -> IovaState:
    made = IovaState(space, "gpu1")
    assert made.try_alloc(physical, size)
    return made


def test_linked_is_not_visible_and_synced_is() -> None:
    space = Space()
    iova = state(space)
    iova.link(0x8000, 0, PAGE)
    iova.link(0x3000, PAGE, 2 * PAGE)
    with pytest.raises(FaultError, match="gpu1"):
        space.dma(iova.address)
    iova.sync(0, 3 * PAGE)
    assert space.dma(iova.address.plus(7)) == 0x8007
    assert space.dma(iova.address.plus(2 * PAGE)) == 0x4000
    iova.destroy(3 * PAGE)
    with pytest.raises(FaultError):
        space.dma(DmaAddress(0x10000, "gpu1"))
    assert not space.table
    assert space.taken() == 0
    assert not iova.in_use


def test_only_the_first_link_may_be_unaligned() -> None:
    space = Space()
    iova = state(space, 0x8010, 2 * PAGE)
    iova.link(0x8010, 0, PAGE - 0x10)
    with pytest.raises(IovaError) as error:
        iova.link(0x9010, PAGE - 0x10, PAGE)
    assert error.value.errno == errno.EIO
    with pytest.raises(IovaError) as error:
        iova.link(0x9000, PAGE, PAGE)  # not at a granule's start, as the first byte is not
    assert error.value.errno == errno.EINVAL
    iova.link(0x20000, PAGE - 0x10, PAGE)
    iova.sync(0, 2 * PAGE)
    assert iova.address.value % PAGE == 0x10
    assert space.dma(iova.address) == 0x8010
    assert space.dma(iova.address.plus(PAGE - 0x10)) == 0x20000
    iova.destroy(2 * PAGE - 0x10)
    assert not space.table


def test_alloc_says_no_where_the_kernel_does() -> None:
    space = Space(pages=4)
    assert not IovaState(space, "d").try_alloc(0, 0)
    assert not IovaState(space, "d").try_alloc(0, 1 << 63)
    assert not IovaState(space, "d").try_alloc(0, 5 * PAGE)
    assert not IovaState(space, "d").try_alloc(1, 4 * PAGE)
    assert not IovaState(space, "d", mask_bits=16).try_alloc(0, PAGE)
    space.translates = False
    assert not IovaState(space, "d").try_alloc(0, PAGE)
    assert space.taken() == 0


def test_what_the_kernel_leaves_to_its_caller_is_refused_with_the_rule() -> None:
    space = Space()
    iova = state(space)
    iova.link(0x8000, 0, PAGE)
    iova.link(0x9000, 2 * PAGE, PAGE)
    iova.sync(0, 4 * PAGE)

    def refused(call: object, *args: int) -> rules.Rule:
        before = dict(space.table)
        with pytest.raises(RuleError) as error:
            call(*args)  # type: ignore[operator]
        assert space.table == before
        return error.value.rule

    assert refused(iova.destroy, 3 * PAGE) is rules.IOVA_DESTROY  # a hole
    assert refused(iova.destroy, PAGE) is rules.IOVA_DESTROY  # a link behind
    assert refused(iova.destroy, 0) is rules.IOVA_FREE
    assert refused(iova.free) is rules.IOVA_FREE
    assert refused(iova.unlink, PAGE, PAGE) is rules.IOVA_LINKED
    assert refused(iova.unlink, 0, 2 * PAGE) is rules.IOVA_LINKED
    assert refused(iova.link, 0, 4 * PAGE, PAGE) is rules.IOVA_WITHIN
    assert refused(iova.try_alloc, 0, PAGE) is rules.IOVA_FREE
    with pytest.raises(IovaError) as error:
        iova.link(0, 2 * PAGE, PAGE)
    assert error.value.errno == errno.EADDRINUSE
    iova.unlink(2 * PAGE, PAGE)
    iova.unlink(0, PAGE)
    iova.free()
    for call in (iova.free, lambda: iova.sync(0, 1), lambda: iova.address):
        with pytest.raises(IovaError):
            call()
    assert iova.try_alloc(0, PAGE)


def test_an_untrusted_device_gets_no_unaligned_mmio() -> None:
    space = Space()
    space.untrusted = True
    iova = state(space, 0x8010)
    with pytest.raises(IovaError) as error:
        iova.link(0x8010, 0, 100)
    assert error.value.errno == errno.EPERM


def test_what_the_iommu_refuses_is_told_with_its_errno() -> None:
    space = Space()
    iova = state(space)
    iova.link(0x8000, 0, PAGE)
    space.fail = OSError(errno.ENOMEM, "no page table")
    with pytest.raises(IovaError, match="no page table") as error:
        iova.sync(0, PAGE)
    assert error.value.errno == errno.ENOMEM
    iova.destroy(PAGE)
    assert space.taken() == 0


class Model(RuleBasedStateMachine):
    """Any sequence of calls: the device reaches what is linked and synced, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.space = Space()
        self.iova = IovaState(self.space, "dev")
        self.linked: dict[int, tuple[int, bool]] = {}  # page → physical, visible

    @precondition(lambda self: not self.iova.in_use)
    @rule(pages=st.integers(1, 8))
    def alloc(self, pages: int) -> None:
        assert self.iova.try_alloc(0, pages * PAGE)

    @precondition(lambda self: self.iova.in_use)
    @rule(page=st.integers(0, 8), count=st.integers(1, 4), physical=st.integers(0, 100))
    def link(self, page: int, count: int, physical: int) -> None:
        fits = (page + count) * PAGE <= self.iova.size_bytes
        free = not any(page + n in self.linked for n in range(count))
        try:
            self.iova.link(physical * PAGE, page * PAGE, count * PAGE)
        except RuleError:
            assert not fits
        except IovaError:
            assert not free
        else:
            assert fits
            assert free
            self.linked |= {page + n: (physical + n, False) for n in range(count)}

    @precondition(lambda self: self.iova.in_use)
    @rule()
    def sync(self) -> None:
        self.iova.sync(0, self.iova.size_bytes)
        self.linked = {page: (physical, True) for page, (physical, _) in self.linked.items()}

    @precondition(lambda self: self.iova.in_use)
    @rule(pages=st.integers(0, 8))
    def destroy(self, pages: int) -> None:
        try:
            self.iova.destroy(pages * PAGE)
        except RuleError:
            assert set(self.linked) != set(range(pages))
        else:
            assert set(self.linked) == set(range(pages))
            self.linked = {}

    @invariant()
    def the_device_reaches_exactly_what_is_synced(self) -> None:
        if not self.iova.in_use:
            assert not self.space.table
            return
        for page in range(self.iova.size_bytes // PAGE):
            physical, visible = self.linked.get(page, (0, False))
            address = self.iova.address.plus(page * PAGE)
            if visible:
                assert self.space.dma(address) == physical * PAGE
            else:
                with pytest.raises(FaultError):
                    self.space.dma(address)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


# --- the fabric


class Fabric:
    name = "fabric0"

    def __init__(self) -> None:
        self.spaces = Space(base=0x40_0000)

    def physical_address(self, owner: str, physical: int) -> int:
        return {"gpu0": 1 << 40, "gpu1": 2 << 40}[owner] + physical


def test_physical_mode_allocates_nothing_and_needs_no_sync() -> None:
    fabric = Fabric()
    ual = UalState(fabric, "gpu1", "gpu0")  # the default within one operating system
    assert ual.try_alloc(TASK, PAGE)
    with pytest.raises(IovaError):
        ual.address()
    ual.link(0x5000, 0, PAGE)
    assert ual.address() == FabricAddress((1 << 40) + 0x5000, "gpu1", "fabric0", physical=True)
    assert ual.address().page_table_entry(55) == 1 << 55 | 1 << 40 | 0x5000
    ual.sync(0, PAGE)
    assert fabric.spaces.taken() == 0
    assert not fabric.spaces.table
    with pytest.raises(RuleError):
        ual.free()
    ual.unlink(0, PAGE)
    with pytest.raises(RuleError):
        ual.unlink(0, PAGE)
    ual.free()
    with pytest.raises(IovaError):
        ual.link(0, 0, PAGE)


def test_virtual_mode_faults_until_it_is_linked_and_synced() -> None:
    fabric = Fabric()
    ual = UalState(fabric, "gpu1", "gpu0", virtual=True)
    assert ual.try_alloc(TASK, 2 * PAGE)
    ual.link(0x5000, 0, PAGE)
    with pytest.raises(FaultError, match="gpu1"):
        fabric.spaces.dma(ual.address())
    ual.sync(0, PAGE)
    assert fabric.spaces.dma(ual.address(3)) == 0x5003
    with pytest.raises(FaultError):
        fabric.spaces.dma(ual.address(PAGE))
    assert not ual.address().physical
    with pytest.raises(RuleError):
        ual.free()
    with pytest.raises(RuleError):
        ual.destroy(2 * PAGE)
    ual.unlink(0, PAGE)
    ual.free()
    assert fabric.spaces.taken() == 0


@pytest.mark.parametrize("virtual", [False, True])
def test_fabric_addresses_are_not_allocated_in_reclaim_or_under_locks(virtual: bool) -> None:
    space, resv = Space(), Reservation("buf0")

    def refused() -> rules.Rule:
        ual = UalState(Fabric(), "gpu1", "gpu0", virtual=virtual)
        iova = IovaState(space, "gpu1")
        assert iova.try_alloc(0, PAGE)  # allowed everywhere
        iova.destroy(0)
        with pytest.raises(RuleError, match="2026-01-29") as error:
            ual.try_alloc(TASK, PAGE)
        return error.value.rule

    with TASK.reclaiming():
        assert refused() is rules.UAL_RECLAIM
    with TASK.notifier_lock():
        assert refused() is rules.UAL_NOTIFIER
    with locked(TASK, resv):
        assert refused() is rules.UAL_RESERVATION
    ual = UalState(Fabric(), "gpu1", "gpu0", virtual=virtual)
    assert ual.try_alloc(TASK, PAGE)
    with TASK.notifier_lock(), locked(TASK, resv):
        ual.link(0, 0, PAGE)  # what was allocated before may be used
        ual.sync(0, PAGE)
    ual.destroy(PAGE)


# --- addresses


def test_addresses_of_one_kind_are_refused_where_another_is_meant() -> None:
    dma = DmaAddress(0x1000, "gpu1")
    fabric = FabricAddress(0x1000, "gpu1", "fabric0", physical=True)
    private = LinkAddress(0x1000, "gpu1", "x01")
    assert on_pcie(dma, "gpu1") == 0x1000
    assert on_fabric(fabric, "gpu1", "fabric0") == 0x1000
    assert on_link(private, "gpu1", "x01") == 0x1000
    wrong: Address
    for wrong in (fabric, private):
        with pytest.raises(AddressError, match="no dma_addr_t"):
            on_pcie(wrong, "gpu1")
    for wrong in (dma, private):
        with pytest.raises(AddressError, match="no fabric address"):
            on_fabric(wrong, "gpu1", "fabric0")
    for wrong in (dma, fabric):
        with pytest.raises(AddressError, match="no link address"):
            on_link(wrong, "gpu1", "x01")
    with pytest.raises(AddressError, match="means nothing to nic0"):
        on_pcie(dma, "nic0")
    with pytest.raises(AddressError, match="for fabric0"):
        on_fabric(fabric, "gpu1", "fabric1")
    with pytest.raises(AddressError, match="for link x01"):
        on_link(private, "gpu1", "x02")


def test_an_address_is_refused_never_cut_off() -> None:
    wide = DmaAddress(1 << 32, "edu")
    with pytest.raises(AddressError) as error:
        on_pcie(wide, "edu", 32)
    assert error.value.errno == errno.ERANGE
    with pytest.raises(AddressError):
        FabricAddress(1 << 55, "gpu1", "fabric0", physical=True).page_table_entry(55)


def test_addresses_are_no_integers() -> None:
    dma: object = DmaAddress(1, "a")
    assert dma != FabricAddress(1, "a", "f", physical=False)
    assert dma != 1
    with pytest.raises(TypeError):
        dma + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        hex(dma)  # type: ignore[arg-type]
