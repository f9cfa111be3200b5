# SPDX-License-Identifier: Apache-2.0
"""Steps in a room without devices: answers, refusals, what is wrong with a call; breaks."""

from __future__ import annotations

from typing import Any

import pytest

import guest_agent.protocol_methods  # noqa: F401  it registers the steps
from guest_agent.hw.memory import Buffers
from guest_agent.p2p import hmm, moves, negotiation
from guest_agent.p2p_device import breaks
from guest_agent.p2p_device.room import Room
from guest_agent.p2p_device.steps import STEPS, run
from guest_agent.rpc import ParameterError
from testbed.instruments.mutations import Mutation
from testbed.instruments.negotiation_board import PREFIX
from tests.breaks.negotiation_breaks import GUARDS

EMPTY: dict[str, Any] = {"pcie": [], "system": {}, "links": []}


def room() -> Room:
    return Room({}, Buffers(), EMPTY, "best-quality", forwards=True)


def test_a_refusal_is_an_answer_and_ends_the_list() -> None:
    export = {"do": "export", "buffer": "b", "device": "gpu7", "size_bytes": 4096, "offers": []}
    settled, refused = run(room(), [{"do": "settle"}, export, {"do": "settle"}])
    assert settled == {"left": 0}
    assert refused["refused"]["type"] == "OSError"
    assert "gpu7 takes no part" in refused["refused"]["message"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"do": "dance"}, r"steps\[0\]\.do: 'dance' is none of"),
        ({}, r"steps\[0\]\.do: None is none of"),
        ({"do": "map", "attachment": "x"}, "attachment: there is no 'x'"),
        ({"do": "map"}, "attachment"),
        ({"do": "wait", "fence": "f"}, "fence: there is no 'f'"),
        ({"do": "fault", "importer": "i"}, "importer: there is no 'i'"),
        ({"do": "mirror", "name": "p", "device": "gpu0"}, "name: there is no 'p'"),
        ({"do": "settle", "loudly": True}, "loudly"),
    ],
)
def test_what_is_wrong_with_a_step_is_said(step: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        run(room(), [step])


def test_every_step_says_what_it_does() -> None:
    assert len(STEPS) > 30
    assert all(function.__doc__ for function in STEPS.values())


@pytest.mark.parametrize("name", breaks.BREAKS)
def test_a_break_changes_the_core_and_is_mended(name: str) -> None:
    whole = [dict(vars(each)) for each in (negotiation, moves, hmm.Mirror, hmm.OwnerGroups)]
    breaks.apply(name)
    assert breaks._whole
    breaks.mend()
    assert [dict(vars(e)) for e in (negotiation, moves, hmm.Mirror, hmm.OwnerGroups)] == whole


def test_each_break_has_a_test_that_it_must_fail() -> None:
    assert {mutation.removeprefix(PREFIX) for mutation, _, _ in GUARDS} == set(breaks.BREAKS)


def test_each_break_is_a_mutation_and_nothing_else_is_a_break() -> None:
    mutations = {each.removeprefix(PREFIX) for each in Mutation if each.startswith(PREFIX)}
    assert mutations == set(breaks.BREAKS)
    breaks.apply("")
    with pytest.raises(ParameterError, match="'bend' is none of"):
        breaks.apply("bend")
