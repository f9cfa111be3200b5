# SPDX-License-Identifier: Apache-2.0
"""YAML: values by the core schema of version 1.2, each with its place."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from testbed.topology import yaml_data
from testbed.topology.yaml_data import parse, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("12", 12),
        ("-3", -3),
        ("0x1f", 31),
        ("0o17", 15),
        ("010", 10),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("0000:3b:00.0", "0000:3b:00.0"),
        ("02.1", "02.1"),
        ("6.12", "6.12"),
        ("1e3", "1e3"),
        ("2024-01-01", "2024-01-01"),
        ("9" * 50, "9" * 50),
    ],
)
def test_plain_words(text: str, value: Any) -> None:
    result = scalar(text)
    assert result == value
    assert type(result) is type(value)


def test_fractions_where_they_are_wanted() -> None:
    assert [scalar(t, floats=True) for t in ("1.5", ".5", "1e3", "2.", "x.5")] == [
        1.5,
        0.5,
        1000.0,
        2.0,
        "x.5",
    ]


def test_quoted_words_stay_text() -> None:
    assert parse('["1", \'true\', "", 1]').data == ["1", "true", "", 1]


def test_places_of_keys_and_values() -> None:
    text = "a: 1\nb:\n  - x: [p, q]\n"
    places = parse(text).places
    assert text[places["a",].key] == "a"
    assert text[places["a",].value] == "1"
    assert text[places["b", 0, "x"].key] == "x"
    assert text[places["b", 0, "x"].value] == "["
    assert text[places["b", 0, "x", 1].value] == "q"


def test_places_count_characters_and_not_bytes() -> None:
    text = "é: 'ü'\nb: x\n"
    assert text[parse(text).places["b",].value] == "x"


def test_an_alias_is_a_copy_in_its_anchors_place() -> None:
    text = "a: &a {x: [1]}\nb: *a\n"
    parsed = parse(text)
    assert parsed.data == {"a": {"x": [1]}, "b": {"x": [1]}}
    assert parsed.data["a"] is not parsed.data["b"]
    assert parsed.places["b", "x", 0] == parsed.places["a", "x", 0]


def test_all_double_keys_are_found_at_once() -> None:
    parsed = parse("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert [fault.message for fault in parsed.faults] == [
        "the key 'a' stands here twice",
        "the key 'c' stands here twice",
    ]


def test_both_parsers_are_told_apart_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without libyaml reads the same data and gives the same errors."""
    texts = ["a: [1, {b: 'c'}]\n", "a: [1", "a: b: c", "&x a: *x", "- é\n- *y", "a: !t b"]
    fast = [parse(text) for text in texts]
    monkeypatch.setattr(yaml_data, "_FAST_LOADER", yaml.SafeLoader)
    assert [parse(text) for text in texts] == fast
