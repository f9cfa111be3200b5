# SPDX-License-Identifier: Apache-2.0
"""Methods ``fabric.*`` for what an agent cannot know: what a virtual interconnect leads to.

An attach that has to ask the host ends with EAGAIN; the host reads the question, answers it, and
has the attach tried again.
"""

from __future__ import annotations

from guest_agent.kernel_methods import registry
from guest_agent.p2p_device.fabric import Fabrics, address_of, port_of
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

VIRTUAL_PORT = "fabric"


@registry.method("fabric.attach")
def fabric_attach(
    agent: Agent, *, engine: int, owner: str, buffer: str, forwards: bool = True
) -> dict[str, Any]:
    """Attach to a ``buffer`` of another node's GPU by a virtual interconnect.

    What that leads to the host knows, which is asked unless nothing ``forwards`` the question.
    :raises NoPathError: EINVAL: it cannot be asked. :raises AbortedError: EAGAIN: it is asked;
    otherwise its own errno and reason.
    """
    from guest_agent.p2p import interconnect, negotiation, policies, topology  # noqa: PLC0415

    port = port_of(agent, engine)
    near = interconnect.Facts(hops=1)
    devices = {owner: near, port.device: near}
    joined = topology.TableTopology({(owner, port.device): near}, devices)
    kind = interconnect.Kind.VIRTUAL
    ours = interconnect.Offer(kind, port.device, VIRTUAL_PORT)
    theirs = interconnect.Offer(kind, owner, buffer)
    forwarder = port.forwarder if forwards else None
    policy = policies.BEST_QUALITY
    question = (f"{owner}:{buffer}", f"{port.device}:{VIRTUAL_PORT}")
    subject = f"{port.device} on {question[0]}"

    def decide() -> negotiation.Outcome:
        return negotiation.negotiate(joined, [theirs], [ours], policy, forwarder=forwarder)

    events = agent.area(Fabrics).events
    with events.span("attach", subject, port.latest.get(question, 0)) as span:
        port.latest[question] = span.number
        outcome = negotiation.noted(events, subject, decide)
        address = port.given[question]
        span.details["path"] = str(outcome.path)
    return {"path": str(outcome.path), "address": address}


@registry.method("fabric.questions")
def fabric_questions(agent: Agent, *, engine: int) -> dict[str, Any]:
    """What the host is asked: pairs of ends, the owner's first."""
    return {"questions": [list(each) for each in port_of(agent, engine).forwarder.questions]}


@registry.method("fabric.answer")
def fabric_answer(
    agent: Agent,
    *,
    engine: int,
    question: list[str],
    errno: int = 0,
    why: str = "",
    address: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The host's answer: an address of the fabric, or an errno and why."""
    port = port_of(agent, engine)
    if len(question) != 2 or tuple(question) not in port.forwarder.questions:
        raise ParameterError(f"question: {question} was not asked")
    pair = (question[0], question[1])
    if not errno:
        if address is None:
            raise ParameterError("address: an answer without an errno has one")
        address_of(address)
        port.given[pair] = address
    from guest_agent.p2p.report import Refusal  # noqa: PLC0415  seldom

    port.forwarder.questions.remove(pair)
    port.forwarder.answers[pair] = Refusal(errno, why) if errno else None
    said = why if errno else str(address_of(address or {}))
    events = agent.area(Fabrics).events
    port.latest[pair] = events.note(
        "answer", " and ".join(pair), port.latest.get(pair, 0), why=said
    )
    return {}


@registry.method("fabric.forget")
def fabric_forget(agent: Agent, *, engine: int) -> dict[str, Any]:
    """Forget questions and answers: what was given may be taken back any time."""
    port_of(agent, engine).forget()
    return {}
