# SPDX-License-Identifier: Apache-2.0
"""Fault rules in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import InputError
from testbed.models.inject import Action, Rule
from testbed.models.witness import Path
from testbed.topology.fault_rules import (
    RuleError,
    parse_rule,
    parse_rules,
    rule_data,
    split_rules,
)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("drop", {}),
        ("drop  write nth=3", {"write": True, "skip": 2, "count": 1}),
        ("corrupt min=4K every=100", {"least_bytes": 4096, "every": 100}),
        ("delay read path=link for=2ms", {"write": False, "path": Path.LINK, "delay_s": 0.002}),
        ("poison range=0x1000+64K seed=7", {"start": 0x1000, "end": 0x11000, "seed": 7}),
        ("reorder range=4096..0x2000 probability=0.5", {"start": 4096, "end": 0x2000}),
        ("drop after=5 times=2", {"skip": 5, "count": 2}),
    ],
)
def test_what_words_stand_for(words: str, fields: dict[str, Any]) -> None:
    rule = parse_rule(words, by="test")
    assert rule.name == " ".join(words.split())
    assert rule.action is Action(words.split(maxsplit=1)[0])
    assert rule.count == fields.pop("count", 0)
    assert {name: getattr(rule, name) for name in fields} == fields
    assert Rule.parse(json.loads(json.dumps(rule_data(rule)))) == rule


@pytest.mark.parametrize(
    ("words", "says", "nearest"),
    [
        ("", "no fault", ""),
        ("dorp write", "no fault", "drop"),
        ("drop writ", "nothing about a fault", "write"),
        ("drop nht=3", "nothing about a fault", "nth="),
        ("drop nth", "nothing about a fault", "nth="),
        ("drop read=1", "nothing about a fault", "read"),
        ("drop nth=0", "nth=0", ""),
        ("drop nth=2 every=3", "strikes once", ""),
        ("drop read write", "twice", ""),
        ("drop nth=1 nth=2", "twice", ""),
        ("drop path=lnk", "path=lnk", "link"),
        ("drop range=5", "range=5", ""),
        ("drop range=9..3", "empty range", ""),
        ("drop range=9+0", "empty range", ""),
        ("drop probability=0", "probability=0", ""),
        ("drop probability=nan", "probability=nan", ""),
        ("drop for=1ms", "only a delay", ""),
        ("delay", "how long", ""),
        ("delay for=2m", "unknown unit", "for=2ms"),
        ("delay for=2000s", "too long", ""),
    ],
)
def test_what_is_wrong_is_said(words: str, says: str, nearest: str) -> None:
    with pytest.raises(RuleError, match=says) as caught:
        parse_rule(words, by="test")
    assert caught.value.nearest == nearest


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_rules(["drop", "dorp", "delay"], by="test")
    assert len(caught.value.diagnostics) == 2


def test_a_command_line_holds_several_rules() -> None:
    assert split_rules(["drop", "write", "nth=3 delay", "for=1ms"]) == [
        "drop write nth=3",
        "delay for=1ms",
    ]
    assert split_rules(["write"]) == ["write"]


@given(st.text(max_size=60) | st.from_regex(r"(drop|delay)( [a-z]{2,6}(=[0-9a-zK.+-]{0,6})?){0,4}"))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        rule = parse_rule(text, by="test")
    except RuleError:
        return
    assert Rule.parse(json.loads(json.dumps(rule_data(rule)))) == rule
