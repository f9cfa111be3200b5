# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-negotiation``: which interconnect an attachment gets, by whose rule and word (NEG).

The protocol core runs in the guest's agent (guest_agent/p2p) on the rack's model devices. No kernel
has merged these protocols; what is shown is that each decision ends in bytes that a device moved by
that path, as the model's own count of its paths says, or in a refusal by a device.
"""

from __future__ import annotations

import errno
from itertools import combinations, permutations, product

import pytest

from testbed.errors import CapabilityMissing
from testbed.instruments.negotiation_board import NegotiationBoard, Offer, do
from testbed.instruments.negotiation_rules import POLICIES, expected
from testbed.instruments.observer import Observer
from testbed.suites.negotiation_fixtures import has_node
from testbed.suites.negotiation_steps import (
    MINE,
    SIZE,
    attach,
    deliver,
    ensure,
    export,
)

pytest_plugins = ["testbed.suites.negotiation_fixtures"]
pytestmark = [pytest.mark.boots(when=has_node), pytest.mark.without_disks]


@pytest.mark.requirement("NEG-01")
def test_the_core_matches_and_the_exporter_decides_among_equals(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Both offer two ways of equal quality; the order of the exporter's list is what counts."""
    exporter, importer = board.gpus[:2]
    for first, second in (("pcie", "scatter-list"), ("scatter-list", "pcie")):
        buffer = f"by-{first}"
        _, path, _ = board.run(
            export(board, buffer, exporter, first, second),
            attach(board, buffer, importer, "scatter-list", "pcie", name=buffer),
            do("map", attachment=buffer),
        )
        ensure(path["kind"] == first, f"the exporter lists {first} first, chosen: {path['kind']}")
        deliver(board, observe, buffer, path, seed=MINE + len(first))
    observe.conclude("of equals the exporter's first was taken, and carried the bytes")


@pytest.mark.requirement("NEG-01")
@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_chooses_by_its_own_rule(
    board: NegotiationBoard, observe: Observer, policy: str
) -> None:
    """Link, PCIe and RAM, listed by each side fastest first and last: what each proposal says."""
    if not board.links:
        raise CapabilityMissing("two GPU models with a private link")
    (exporter, _), (importer, _) = board.links[0]["ends"]
    board.call("rules", policy=policy)
    fast, slow = ("link", "pcie", "system"), ("system", "pcie", "link")
    seen = []
    for round_, (mine, theirs) in enumerate(product((fast, slow), repeat=2)):
        name = f"b{round_}"
        ours, wanted = board.gpu_offers(exporter, *mine), board.gpu_offers(importer, *theirs)
        right = expected(policy, ours, wanted, board.facts())
        _, path, _, _ = board.run(
            export(board, name, exporter, *mine),
            attach(board, name, importer, *theirs, name=name),
            do("settle"),
            do("map", attachment=name),
        )
        ensure(path["kind"] == right.kind, f"{mine} and {theirs}: {path['kind']}, {right.kind} is")
        deliver(board, observe, name, path, seed=MINE + round_)
        seen.append(path["kind"])
    observe.conclude(f"{policy}: {', '.join(seen)}, as its rule says")


@pytest.mark.requirement("NEG-02")
def test_of_several_ways_the_best_is_taken_every_time(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Two NICs on different paths stand for one with two functions: the models have one each.

    Which is taken is judged by the rule of the policy in force: one that ranks paths takes the
    better one whatever the order, one that does not the first that the importer lists.
    """
    exporter = board.gpus[0]
    nics = next(
        (
            pair
            for pair in combinations(board.nics, 2)
            if board.way(exporter, pair[0]) != board.way(exporter, pair[1])
        ),
        None,
    )
    if nics is None:
        raise CapabilityMissing("two NIC models on different paths, as in partial-mesh")
    ours = board.gpu_offers(exporter, "pcie")
    ways: list[Offer] = [{"kind": "pcie", "device": nic} for nic in nics]
    chosen = set()
    for round_, offers in enumerate((ways, ways[::-1], ways)):
        name = f"nic{round_}"
        right = expected(board.policy, ours, offers, board.facts()).importer["device"]
        _, path, _ = board.run(
            export(board, name, exporter, "pcie"),
            do("attach", buffer=name, importer=name, offers=offers),
            do("map", attachment=name),
        )
        ensure(path["device"] == right, f"of {offers} {path['device']}; {right} is right")
        chosen.add(path["device"])
        deliver(board, observe, name, path, seed=MINE + round_)
    lost = {
        line.partition(": ")[2]
        for event in board.events()
        if event["kind"] == "negotiate"
        for line in event["details"]["lost"]
        if line.startswith("pcie ")
    }
    observe.note("two NICs stand for one NIC with two functions")
    if board.policy != "exporter-priority":
        ensure(len(chosen) == 1, f"equal offers, different choices: {sorted(chosen)}")
        ensure(len(lost) == 1 and "lists" not in "".join(lost), f"not for a fact: {sorted(lost)}")
    observe.conclude(f"{' or '.join(sorted(chosen))} three times: {'; '.join(sorted(lost))}")


@pytest.mark.requirement("NEG-04")
def test_what_each_errno_means(board: NegotiationBoard, observe: Observer) -> None:
    """Nothing in common: EINVAL. EOPNOTSUPP: the next. Anything else: the end."""
    exporter, importer = board.gpus[:2]
    none = board.refused(
        export(board, "b", exporter, "pcie"), attach(board, "b", importer, "scatter-list")
    )
    ensure(none["errno"] == errno.EINVAL, f"no common type: {none}")
    _, _, path, _ = board.run(
        do("say", kind="pcie", device=importer, errno=errno.EOPNOTSUPP),
        export(board, "c", exporter, "pcie", "scatter-list"),
        attach(board, "c", importer, "pcie", "scatter-list"),
        do("map", attachment=importer),
    )
    ensure(path["kind"] == "scatter-list", f"after EOPNOTSUPP it is {path['kind']}")
    deliver(board, observe, importer, path)
    ended = board.refused(
        do("say", kind="pcie", device=importer, errno=errno.ENOMEM),
        export(board, "d", exporter, "pcie", "scatter-list"),
        attach(board, "d", importer, "pcie", "scatter-list", name="third"),
    )
    ensure(ended["errno"] == errno.ENOMEM, f"ENOMEM of a candidate: {ended}")
    observe.conclude("EINVAL, the next candidate with its bytes, and ENOMEM ended it")


@pytest.mark.requirement("NEG-08")
def test_a_virtual_interconnect_needs_the_host_s_word(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Nobody forwards: not supported; the host says no: refused; it says yes: it works."""
    if not board.links:
        raise CapabilityMissing("two GPU models with a private link")
    (exporter, port), (importer, _) = board.links[0]["ends"]
    ours: list[Offer] = [{"kind": "virtual", "device": exporter, "port": "v0"}]
    theirs: list[Offer] = [{"kind": "virtual", "device": importer, "port": "v0"}]
    wish = do("attach", buffer="b", importer=importer, offers=theirs)
    board.run(do("export", buffer="b", device=exporter, size_bytes=SIZE, offers=ours))
    board.call("rules", forwards=False)
    refused = board.refused(wish)
    ensure(refused["errno"] == errno.EINVAL, f"nobody forwards: {refused}")
    for says in (errno.EHOSTUNREACH, 0):
        board.call("rules", forwards=True)
        asked = board.refused(wish)
        ensure(asked["errno"] == errno.EAGAIN, f"while the host is asked: {asked}")
        ((question),) = board.run(do("questions"))[0]
        if says:
            answer = {"errno": says, "why": "the host knows of no such fabric"}
        else:
            # The fabric manager on the host: it knows which real link the port stands for.
            numbers = {
                f"{device}:v0": number
                for (device, name), number in board.link_numbers.items()
                if name == port
            }
            answer = {"links": numbers}
        board.run(do("answer", question=question, **answer))
        if says:
            denied = board.refused(wish)
            ensure(denied["errno"] == says, f"the host says no: {denied}")
    path, _ = board.run(wish, do("map", attachment=importer))
    deliver(board, observe, importer, path)
    observe.conclude("nobody asked: EINVAL; the host's no: its errno; its yes: bytes by the link")


@pytest.mark.requirement("NEG-10")
def test_a_peer_s_scatter_list_needs_acceptance_and_a_distance(
    board: NegotiationBoard, observe: Observer
) -> None:
    """The RFC of 2026-02: an importer that does not accept peer-to-peer is refused; one that does
    moves bytes.
    """
    pairs = [pair for pair in permutations(board.gpus, 2) if board.way(*pair)["host_bridge"]]
    if not pairs:
        raise CapabilityMissing("two GPU models that meet at the host bridge")
    exporter, importer = pairs[0]
    needs = {"kind": "scatter-list", "device": exporter, "requires_p2p": True}
    takes = {"kind": "scatter-list", "device": importer}
    wish = do("attach", buffer="b", importer=importer, offers=[takes])
    board.run(do("export", buffer="b", device=exporter, size_bytes=SIZE, offers=[needs]))
    refused = board.refused(
        do("attach", buffer="b", importer="no", offers=[{**takes, "accepts_p2p": False}])
    )
    ensure(refused["errno"] == errno.EINVAL, f"not accepted: {refused}")
    # As on a host bridge that Linux does not let peers through.
    board.call("rules", topology=board.facts(trusted=False))
    far = board.refused(wish)
    ensure(far["errno"] == errno.EINVAL, f"no peer-to-peer distance: {far}")
    board.call("rules", topology=board.facts())
    path, _ = board.run(wish, do("map", attachment=importer))
    deliver(board, observe, importer, path)
    reasons = [
        line
        for event in board.events()
        if event["kind"] == "negotiate" and event["error"]
        for line in event["details"]["lost"]
    ]
    ensure(any("accepts no peer-to-peer" in line for line in reasons), f"reasons: {reasons}")
    ensure(any("distance -1" in line for line in reasons), f"reasons: {reasons}")
    observe.conclude(f"{'; '.join(reasons)}; accepted and near, it carried the bytes")


@pytest.mark.requirement("NEG-11")
def test_every_candidate_has_the_reason_why_it_lost(
    board: NegotiationBoard, observe: Observer
) -> None:
    """Link before PCIe before RAM by facts alone, though listed the other way round; or, if the
    policy in force does not go by facts, what its rule says.
    """
    if not board.links:
        raise CapabilityMissing("two GPU models with a private link")
    (exporter, _), (importer, _) = board.links[0]["ends"]
    backwards = ("system", "pcie", "link")
    _, path, _, _ = board.run(
        export(board, "b", exporter, *backwards),
        attach(board, "b", importer, *backwards),
        do("settle"),
        do("map", attachment=importer),
    )
    lists = [board.gpu_offers(device, *backwards) for device in (exporter, importer)]
    right = expected(board.policy, lists[0], lists[1], board.facts()).kind
    ensure(path["kind"] == right, f"chosen: {path}, though {right} is right")
    deliver(board, observe, importer, path)
    event = next(event for event in board.events() if event["kind"] == "negotiate")
    lost = event["details"]["lost"]
    for kind in {"system", "pcie", board.links[0]["kind"]} - {right}:
        own = [line for line in lost if line.startswith(f"{kind} ") and ": " in line]
        ensure(bool(own), f"{kind} lost without a reason: {lost}")
        observe.note(own[0])
    observe.conclude(f"{event['details']['chosen']}; the others: {'; '.join(lost)}")
