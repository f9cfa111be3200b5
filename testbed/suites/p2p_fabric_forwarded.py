# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``, part five: negotiation that the host forwards between nodes (NEG-08).

A guest offers a virtual interconnect, and does not know what is at its other end. Its core asks;
the host knows the links, and has the owner's node give addresses out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from testbed.errors import LostError
from testbed.harness.racks import LiveRack
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.results.judging import PAGE_BYTES
from testbed.suites.fabric_ways import TARGET, Address, Way
from testbed.suites.p2p_fabric_ground import has_fabric, judge_refusal, refusal, the_fabric

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]
pytestmark = pytest.mark.boots(when=has_fabric)

BUFFER = "buffer0"
Question = list[str]


class Host:
    """Answers the initiator's core for the fabric: it knows who is linked, and who lives."""

    def __init__(self, rack: LiveRack, way: Way) -> None:
        self._rack = rack
        self._fabric = the_fabric(rack)
        self._way = way

    def attach(self, owner: str = "", **more: bool) -> dict[str, Any]:
        """The guest attaches to the owner's buffer; AgentError with errno if it is refused."""
        owner = owner or self._way.owner.name
        answer = self._way.initiator.call("attach", owner=owner, buffer=BUFFER, **more)
        return dict(answer)

    def refusal(self, owner: str = "", **more: bool) -> tuple[str, int | None, str]:
        """How an attach is refused."""
        return refusal(self.attach, owner, **more)

    def ask(self, owner: str = "") -> Question:
        """The guest attaches, and its core has to ask: what it wants to know."""
        kind, code, said = self.refusal(owner)
        if (kind, code) != ("AbortedError", errno.EAGAIN):
            raise Refuted(f"while the host is asked: {kind or 'success'} ({said})")
        questions: list[Question] = self._way.initiator.call("questions")["questions"]
        owner = owner or self._way.owner.name
        wanted = [f"{owner}:{BUFFER}", f"{self._way.initiator.name}:fabric"]
        if questions != [wanted]:
            raise Refuted(f"the host is asked {questions}, not {[wanted]}")
        return questions[0]

    def answer(self, question: Question) -> None:
        """No, with an errno and the reason; or an address, where the owner's buffer now is."""
        owner, user = (end.rpartition(":")[0] for end in question)
        answer: dict[str, Any]
        if self._way.mutation is Mutation.FABRIC_BLIND_ANSWER:
            fabric = {"kind": "fabric", "user": user, "fabric": "ual0", "physical": False}
            answer = {"address": {**fabric, "value": TARGET}}
        elif not self._fabric.joined(owner, user):
            why = f"no link of the fabric joins {owner} and {user}"
            answer = {"errno": errno.EHOSTUNREACH, "why": why}
        else:
            answer = self._ask_owner()
        self._way.initiator.call("answer", question=question, **answer)

    def _ask_owner(self) -> dict[str, Any]:
        node = self._way.owner.node
        if not self._rack.nodes[node].alive:
            return {"errno": errno.EHOSTDOWN, "why": f"node {node} is gone"}
        try:
            state = self._way.alloc(PAGE_BYTES, virtual=True)
            state.link(TARGET, PAGE_BYTES)
            state.sync(0, PAGE_BYTES)
            return {"address": state.address()[0]}
        except LostError as error:
            return {"errno": errno.EHOSTDOWN, "why": f"node {node}: {error.message}"}

    def forget(self) -> None:
        """The guest forgets what it was told."""
        self._way.initiator.call("forget")


@contextmanager
def _host(rack: LiveRack, way: Way) -> Iterator[Host]:
    host = Host(rack, way)
    try:
        yield host
    finally:
        host.forget()


@pytest.mark.requirement("NEG-08")
def test_between_nodes_the_host_s_word_is_needed(
    rack: LiveRack, between: Way, observe: Observer
) -> None:
    """Nobody forwards, the host says no, it says yes: in the last case alone bytes move, each way
    round.
    """
    fabric = the_fabric(rack)
    backwards = fabric.backwards(between)
    try:
        for seed, way in ((110, between), (120, backwards)):
            with _host(rack, way) as host:
                got = host.refusal(forwards=False)
                observe.require(
                    judge_refusal("nobody forwards", got, "NoPathError", "", errno.EINVAL)
                )
                nobody = f"{way.owner.node}/none"
                host.answer(host.ask(nobody))
                got = host.refusal(nobody)
                code = errno.EHOSTUNREACH
                observe.require(judge_refusal("no link", got, "AbortedError", "no link of", code))
                host.answer(host.ask())
                address: Address = host.attach()["address"]
                virtual = way.map(address, PAGE_BYTES)
                observe.require(way.deliver(virtual, TARGET, seed, PAGE_BYTES))
                observe.require(way.fetch(virtual, TARGET, seed + 1, PAGE_BYTES))
    finally:
        backwards.close()
    observe.conclude("nobody asked: EINVAL; no link: EHOSTUNREACH; else an address, and its bytes")
