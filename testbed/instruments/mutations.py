# SPDX-License-Identifier: Apache-2.0
"""Deliberate breaks: how to see a FAIL.

A suite that never failed shows little. Each mutation breaks one thing on the harness's side, in
the one place that suites map and judge through, so that real devices do the wrong thing on a real
machine. ``testbed run --break NAME`` (or ``--testbed-break`` in pytest) must then end in FAIL of
just the requirements that guard what was broken, and a run says in its summary and record which
mutation it ran with.
"""

from __future__ import annotations

from enum import StrEnum

from testbed.errors import Diagnostic, InputError
from testbed.topology.problem import nearest


class Mutation(StrEnum):
    """What is broken on purpose; NONE breaks nothing."""

    NONE = ""
    SKIP_UNMAP = "skip-unmap"
    BAR_ADDRESS = "bar-address"
    READ_WRITE = "read-write"
    WRONG_PAGE = "wrong-page"
    SHORT_MAP = "short-map"
    SWAP_CHUNKS = "swap-chunks"
    MAP_HOLES = "map-holes"
    TRUST_STATUS = "trust-status"
    # Of suite p2p-kernel.
    ELSEWHERE = "elsewhere"
    NO_ROUTER = "no-router"
    NEAR_PAIR = "near-pair"
    WRONG_CPU = "wrong-cpu"
    HIDE_NEAREST = "hide-nearest"
    KEEP_PROVIDER = "keep-provider"
    KEEP_PLUGGED = "keep-plugged"
    # Of suite p2p-dmabuf; so are bar-address, wrong-page, short-map and skip-unmap.
    NO_MISTAKE = "no-mistake"
    NULL_PAGE = "null-page"
    NO_CHECK = "no-check"
    GIVE_PAGES = "give-pages"
    LENGTH_32_BITS = "length-32-bits"
    FIRST_RANGE = "first-range"
    SKIP_REVOKE = "skip-revoke"
    KEEP_OPEN = "keep-open"
    NO_WAIT = "no-wait"
    IGNORE_PIN = "ignore-pin"
    NO_COPY = "no-copy"
    EARLY_FENCE = "early-fence"
    SKIP_FENCE = "skip-fence"
    NO_FAULT = "no-fault"
    FREE_EARLY = "free-early"
    # Of suite p2p-hmm.
    HMM_MIGRATE_ALL = "hmm-migrate-all"
    HMM_NO_CHECK = "hmm-no-check"
    HMM_FAKE_PAGE = "hmm-fake-page"
    HMM_ANY_GROUP = "hmm-any-group"
    HMM_NO_GROUP = "hmm-no-group"
    # Of suite p2p-fabric.
    FABRIC_MAP_PHYSICAL = "fabric-map-physical"
    FABRIC_EXPORT_ALL = "fabric-export-all"
    FABRIC_SKIP_UNLINK = "fabric-skip-unlink"
    FABRIC_EARLY_SYNC = "fabric-early-sync"
    FABRIC_ALWAYS_VIRTUAL = "fabric-always-virtual"
    FABRIC_ANY_CONTEXT = "fabric-any-context"
    FABRIC_ANY_ADDRESS = "fabric-any-address"
    FABRIC_STAY_UP = "fabric-stay-up"
    FABRIC_KEEP_WINDOW = "fabric-keep-window"
    FABRIC_KEEP_MAPPED = "fabric-keep-mapped"
    FABRIC_WRONG_BELL = "fabric-wrong-bell"
    FABRIC_BLIND_ANSWER = "fabric-blind-answer"
    # Of the protocol core in the agent (guest_agent/p2p_device/breaks.py).
    NEGO_FIRST_OFFER = "nego-first-offer"
    NEGO_SWALLOW_ERRNO = "nego-swallow-errno"
    NEGO_NEW_ADDRESS = "nego-new-address"
    NEGO_ONE_KIND = "nego-one-kind"
    NEGO_NO_FALL_BACK = "nego-no-fall-back"
    NEGO_UNASKED_HOST = "nego-unasked-host"
    NEGO_ANY_SCATTER_LIST = "nego-any-scatter-list"
    NEGO_ANY_LINK = "nego-any-link"
    NEGO_TRUST_STATIC = "nego-trust-static"
    NEGO_FORGIVE_LATE = "nego-forgive-late"
    NEGO_BELIEVE_IMPORTER = "nego-believe-importer"
    NEGO_UNMAP_AGAIN = "nego-unmap-again"
    NEGO_DEAD_FENCES = "nego-dead-fences"
    NEGO_SKIP_FENCE = "nego-skip-fence"
    NEGO_STRAND_IMPORTER = "nego-strand-importer"
    NEGO_IGNORE_PIN = "nego-ignore-pin"
    NEGO_HALF_MOVE = "nego-half-move"
    NEGO_KEEP_MAPPING = "nego-keep-mapping"
    NEGO_NO_KEEP_ALIVE = "nego-no-keep-alive"
    NEGO_FAULT_AT_ONCE = "nego-fault-at-once"
    NEGO_PAGE_OVER_PCIE = "nego-page-over-pcie"
    NEGO_FOREIGN_MIGRATES = "nego-foreign-migrates"
    NEGO_MIGRATE_UNSEEN = "nego-migrate-unseen"
    NEGO_ANY_OWNER = "nego-any-owner"
    NEGO_ONE_ADDRESS = "nego-one-address"
    NEGO_ALLOW_CYCLE = "nego-allow-cycle"


DESCRIPTIONS = {
    Mutation.SKIP_UNMAP: "an unmap is not done",
    Mutation.BAR_ADDRESS: "a peer's BAR is not mapped; its bus address is handed out",
    Mutation.READ_WRITE: "a read-only mapping is made writable",
    Mutation.WRONG_PAGE: "a peer's BAR is mapped one page further than asked",
    Mutation.SHORT_MAP: "the last page of a peer's BAR's mapping is left out",
    Mutation.SWAP_CHUNKS: "two pages of a scatter list are exchanged",
    Mutation.MAP_HOLES: "addresses that must be unmapped are mapped",
    Mutation.TRUST_STATUS: "a device's completion status is taken for the arrival of bytes",
    Mutation.ELSEWHERE: "disks read and write other memory of their peer than is judged",
    Mutation.NO_ROUTER: "switches do not route what QEMU's own devices send",
    Mutation.NEAR_PAIR: "a pair of disks below one switch is taken whatever pair was asked for",
    Mutation.WRONG_CPU: "the prediction is made for another processor's host bridge",
    Mutation.HIDE_NEAREST: "the provider that is nearest is not on offer",
    Mutation.KEEP_PROVIDER: "a provider of memory is not unbound",
    Mutation.KEEP_PLUGGED: "a device is not unplugged",
    Mutation.NO_MISTAKE: "exporters that are wrong on purpose are right",
    Mutation.NULL_PAGE: "the exporter lets in who needs the CPU, with a list without pages",
    Mutation.NO_CHECK: "the exporter asks nobody whether there is a path to its importer",
    Mutation.GIVE_PAGES: "a buffer for devices only has pages",
    Mutation.LENGTH_32_BITS: "a buffer's length is cut to 32 bits",
    Mutation.FIRST_RANGE: "of several ranges only the first is exported",
    Mutation.SKIP_REVOKE: "what takes a buffer back is not done",
    Mutation.KEEP_OPEN: "a revoked buffer can be mapped again",
    Mutation.NO_WAIT: "the exporter waits neither for fences nor for unmapping",
    Mutation.IGNORE_PIN: "what is pinned moves all the same",
    Mutation.NO_COPY: "a move leaves the contents behind",
    Mutation.EARLY_FENCE: "a move's fence signals before the copy is made",
    Mutation.SKIP_FENCE: "importers wait for no fence of memory management",
    Mutation.NO_FAULT: "what an importer's device does not find mapped is not mapped for it",
    Mutation.FREE_EARLY: "an exporter that ends frees the memory that importers have",
    Mutation.HMM_MIGRATE_ALL: "other owners' pages are migrated, whatever way leads to them",
    Mutation.HMM_NO_CHECK: "other owners' pages are used by bus address, and no way is looked for",
    Mutation.HMM_FAKE_PAGE: "a device-private page itself is mapped, which is no memory",
    Mutation.HMM_ANY_GROUP: "a device says that it is of the owner's group, and is not",
    Mutation.HMM_NO_GROUP: "the owner's own device does not say whose it is",
    Mutation.FABRIC_MAP_PHYSICAL: "addresses are allocated and mapped in physical mode too",
    Mutation.FABRIC_EXPORT_ALL: "what is allocated on the fabric leads to memory, linked or not",
    Mutation.FABRIC_SKIP_UNLINK: "what is unlinked on the fabric stays linked",
    Mutation.FABRIC_EARLY_SYNC: "each link on the fabric is synced at once",
    Mutation.FABRIC_ALWAYS_VIRTUAL: "virtual mode is the default within one system too",
    Mutation.FABRIC_ANY_CONTEXT: "the core is not told in which context it allocates",
    Mutation.FABRIC_ANY_ADDRESS: "an address of any kind is taken for the fabric's, and cut to fit",
    Mutation.FABRIC_STAY_UP: "links, nodes and GPUs that shall go away stay",
    Mutation.FABRIC_KEEP_WINDOW: "a window is not pulled out",
    Mutation.FABRIC_KEEP_MAPPED: "who lets go of a window keeps what an IOMMU has of it",
    Mutation.FABRIC_WRONG_BELL: "a bell rings with another vector than is asked for",
    Mutation.FABRIC_BLIND_ANSWER: "the host agrees to what it is asked, and asks no owner",
    Mutation.NEGO_FIRST_OFFER: "the importer's first offer wins, whatever the facts say",
    Mutation.NEGO_SWALLOW_ERRNO: "any errno of a candidate is taken for EOPNOTSUPP",
    Mutation.NEGO_NEW_ADDRESS: "an address is not kept from one map to the next",
    Mutation.NEGO_ONE_KIND: "an importer ends the use of others that have another interconnect",
    Mutation.NEGO_NO_FALL_BACK: "what cannot be mapped is not tried another way",
    Mutation.NEGO_UNASKED_HOST: "a virtual interconnect is taken without the host's word",
    Mutation.NEGO_ANY_SCATTER_LIST: "whoever wants a scatter list gets one, wherever it leads",
    Mutation.NEGO_ANY_LINK: "links of one type meet, whatever they are connected to",
    Mutation.NEGO_TRUST_STATIC: "device memory is given to importers that cannot let go of it",
    Mutation.NEGO_FORGIVE_LATE: "an importer that does not unmap is named, and keeps what it has",
    Mutation.NEGO_BELIEVE_IMPORTER: "a mapping that could not be made counts as made",
    Mutation.NEGO_UNMAP_AGAIN: "who unmaps twice is not told",
    Mutation.NEGO_DEAD_FENCES: "the fences of an importer that died never signal",
    Mutation.NEGO_SKIP_FENCE: "nobody waits for fences of memory management",
    Mutation.NEGO_STRAND_IMPORTER: "a buffer moves to where an active importer does not reach it",
    Mutation.NEGO_IGNORE_PIN: "a pin keeps nothing in place",
    Mutation.NEGO_HALF_MOVE: "a list of buffers is moved as far as it goes",
    Mutation.NEGO_KEEP_MAPPING: "what the core unmaps stays in the tables of IOMMU and link",
    Mutation.NEGO_NO_KEEP_ALIVE: "page faults install no keep-alive fence",
    Mutation.NEGO_FAULT_AT_ONCE: "a page fault is served while the copy is under way",
    Mutation.NEGO_PAGE_OVER_PCIE: "a page of another device is never used over a link",
    Mutation.NEGO_FOREIGN_MIGRATES: "a page of another device is migrated though PCIe would do",
    Mutation.NEGO_MIGRATE_UNSEEN: "a page migrates, and devices keep the place where it was",
    Mutation.NEGO_ANY_OWNER: "a device joins an owner group that it is not wholly linked to",
    Mutation.NEGO_ONE_ADDRESS: "all who mirror a page get the address of the first",
    Mutation.NEGO_ALLOW_CYCLE: "operations may wait for one another in a circle",
}


def parse_mutation(name: str) -> Mutation:
    """The mutation called ``name``; "" and "none" break nothing.

    Raises:
        InputError: there is none of that name.
    """
    try:
        return Mutation("" if name == "none" else name)
    except ValueError:
        known, near = ", ".join(DESCRIPTIONS), nearest(name, DESCRIPTIONS)
        raise InputError(
            diagnostics=[Diagnostic("--break", 0, 0, f"unknown mutation '{name}'", known, near)]
        ) from None
