# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema describes the file that people write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from testbed.topology.schema import DIALECT, MODELS, json_schema
from testbed.topology.validation import keys_of

SCHEMA = json_schema()


def test_it_is_plain_json_of_the_right_dialect() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == DIALECT


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the file", SCHEMA
    yield from SCHEMA["$defs"].items()


def test_every_key_is_described_and_unknown_ones_are_refused() -> None:
    for name, definition in objects():
        assert definition["additionalProperties"] is False, name
        assert definition["description"], name
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}: {key}"


def test_it_has_every_model_with_the_keys_of_the_file() -> None:
    definitions = dict(objects())
    for model in MODELS:
        definition = definitions.get(model.__name__, SCHEMA)
        assert list(definition["properties"]) == list(keys_of(model))


def test_references_lead_somewhere() -> None:
    text = json.dumps(SCHEMA)
    for name in SCHEMA["$defs"]:
        assert f'"#/$defs/{name}"' in text
    assert text.count('"$ref"') == text.count('"$ref": "#/$defs/')


def test_sizes_are_numbers_or_text() -> None:
    kinds = {option["type"] for option in SCHEMA["$defs"]["Gpu"]["properties"]["vram"]["anyOf"]}
    assert kinds == {"integer", "string"}


def test_no_leftovers_of_its_making() -> None:
    assert "x-expected" not in json.dumps(SCHEMA)
