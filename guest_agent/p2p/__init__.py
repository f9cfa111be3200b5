# SPDX-License-Identifier: Apache-2.0
"""Peer-to-peer buffers between devices: a reference implementation of what is being discussed.

How exporters and importers agree on an interconnect, where a buffer's bytes may be, who waits for
whom, which addresses mean what to whom. Everything is decided here in plain Python, needs no
machine, and ends in calls of a :class:`Backend`, whose devices move the bytes or refuse::

    from guest_agent.p2p import *

    core = Core(backend, topology, MonotonicClock(), policy=BEST_QUALITY)
    buffer = core.export(
        "buf0", "gpu0", 1 << 20,
        [Offer(Kind.XGMI, "gpu0", "x01"), Offer(Kind.PCIE, "gpu0"),
         Offer(Kind.SYSTEM, "gpu0", placements=(Placement.SYSTEM,))],
    )

    def give_back(task, attachment):  # called with the lock held, before the bytes move
        for mapping in list(attachment.mappings.values()):
            attachment.unmap(task, mapping)

    task = Task("nic0 driver")
    nic = Importer("nic0", (Offer(Kind.PCIE, "nic0"),), invalidate=give_back)
    attachment = buffer.attach(task, nic)  # negotiates: attachment.path says what was chosen
    with locked(task, buffer.resv):
        mapping = attachment.map(task)  # may be a future mapping: see Mapping
        fence = attachment.submit(task, mapping, "send", nic_send, write=False)
    fence.wait(core.clock)  # a deadline is part of every fence
    print(json.dumps(core.events.as_json()))  # what happened, when, because of what

=====================  =========================================================================
``interconnect``       types of interconnect, offers, facts and the quality of a path;
                       ``topology`` has a machine's facts in tables
``negotiation``        one core function matches two lists; ``policies`` are the proposals,
                       ``report`` has every candidate with the reason why it lost
``buffer``             attach, map, move, revoke; ``attachment``, ``moves``, ``revoke``
``resv``               reservations with KERNEL < WRITE < READ < BOOKKEEP; ``fence``, ``graph``;
                       ``rules`` has the locking rules, each with its source
``iova``, ``ual``      the kernel's IOVA API and its fabric twin; ``addresses`` that do not mix
``hmm``                pages of another device: over the link, over PCIe, or migrated
``odp``, ``churn``     importers with page faults, and what becomes of them under pressure
``events``             what happened, as values
``backend``            what devices have to do
=====================  =========================================================================

Sources are named where they are used: mailing-list discussions and RFCs by subject and date, the
kernel (Linux 7.2 unless said otherwise) by file. Names are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib

# The imports are for type checkers; a test compares them with the table below.
# ruff: noqa: F401
# mypy: implicit-reexport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.p2p.addresses import (
        Address,
        DmaAddress,
        FabricAddress,
        LinkAddress,
        on_fabric,
        on_link,
        on_pcie,
    )
    from guest_agent.p2p.attachment import Attachment, Importer, Mapping
    from guest_agent.p2p.backend import Backend, Backing
    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.churn import Result, Setup, run_churn
    from guest_agent.p2p.clock import Clock, ManualClock, MonotonicClock
    from guest_agent.p2p.core import Core
    from guest_agent.p2p.errors import (
        AbortedError,
        AddressError,
        CycleError,
        FaultError,
        FenceFailedError,
        FenceTimeoutError,
        FutureError,
        GoneError,
        IovaError,
        LockBusyError,
        NoPathError,
        NoRoomError,
        OverdueError,
        P2PError,
        PinnedError,
        ReachError,
        RevokedError,
        RuleError,
        StaleError,
        UnknownKindError,
        UnsupportedError,
    )
    from guest_agent.p2p.events import Event, Recorder
    from guest_agent.p2p.fence import Fence, FenceContext, KeepAlive
    from guest_agent.p2p.graph import Graph, Operation
    from guest_agent.p2p.hmm import Action, Decision, Mirror, OwnerGroups, Page, decide
    from guest_agent.p2p.interconnect import (
        Constraints,
        Facts,
        Kind,
        NoWay,
        Offer,
        Path,
        Placement,
        Quality,
        Topology,
        quality,
        why_worse,
    )
    from guest_agent.p2p.iova import IovaBackend, IovaState
    from guest_agent.p2p.moves import move_all
    from guest_agent.p2p.negotiation import Forwarder, Outcome, negotiate
    from guest_agent.p2p.odp import FaultBudgetError, OnDemand
    from guest_agent.p2p.policies import (
        BEST_QUALITY,
        EXPORTER_PRIORITY,
        MAILING_LIST,
        POLICIES,
        PRIVATE_FIRST,
        Policy,
        policy_of,
    )
    from guest_agent.p2p.report import Candidate, Refusal, Report, Unmatched
    from guest_agent.p2p.resv import Acquire, Reservation, Usage, locked
    from guest_agent.p2p.revoke import enforce, overdue, path_lost
    from guest_agent.p2p.rules import RULES, Rule, Task
    from guest_agent.p2p.topology import Fabric, Link, TableTopology, topology_from
    from guest_agent.p2p.ual import FabricBackend, UalState

_NAMES = {
    "addresses": "Address DmaAddress FabricAddress LinkAddress on_fabric on_link on_pcie",
    "attachment": "Attachment Importer Mapping",
    "backend": "Backend Backing",
    "buffer": "Buffer",
    "churn": "Result Setup run_churn",
    "clock": "Clock ManualClock MonotonicClock",
    "core": "Core",
    "errors": "AbortedError AddressError CycleError FaultError FenceFailedError"
    " FenceTimeoutError FutureError GoneError IovaError LockBusyError NoPathError NoRoomError"
    " OverdueError P2PError PinnedError ReachError RevokedError RuleError StaleError"
    " UnknownKindError UnsupportedError",
    "events": "Event Recorder",
    "fence": "Fence FenceContext KeepAlive",
    "graph": "Graph Operation",
    "hmm": "Action Decision Mirror OwnerGroups Page decide",
    "interconnect": "Constraints Facts Kind NoWay Offer Path Placement Quality Topology quality"
    " why_worse",
    "iova": "IovaBackend IovaState",
    "moves": "move_all",
    "negotiation": "Forwarder Outcome negotiate",
    "odp": "FaultBudgetError OnDemand",
    "policies": "BEST_QUALITY EXPORTER_PRIORITY MAILING_LIST POLICIES PRIVATE_FIRST Policy"
    " policy_of",
    "report": "Candidate Refusal Report Unmatched",
    "resv": "Acquire Reservation Usage locked",
    "revoke": "enforce overdue path_lost",
    "rules": "RULES Rule Task",
    "topology": "Fabric Link TableTopology topology_from",
    "ual": "FabricBackend UalState",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Load a public name with its module: other parts of the agent live in this package too."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"{__name__} has no {name}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
