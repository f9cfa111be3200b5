# SPDX-License-Identifier: Apache-2.0
"""The topology's JSON Schema and its field reference, both generated from the models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from testbed.topology.fields import EXPECTED_KEY, Size
from testbed.topology.machine import Iommu, Machine
from testbed.topology.model import (
    Bell,
    Gpu,
    Link,
    Nic,
    Node,
    Nvme,
    OwnDevice,
    Passthrough,
    RootPort,
    Switch,
    Topology,
)
from testbed.topology.reading import adapter
from testbed.topology.units import format_size
from testbed.topology.validation import Model, expected_of, is_model, keys_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# The order in which a reader meets them, and what the file calls them.
MODELS = (
    *(Topology, Node, Machine, Iommu, RootPort, Switch),
    *(Gpu, Nic, Nvme, Passthrough, OwnDevice, Bell, Link),
)
_HEADINGS = {
    Topology: "the file",
    Node: "nodes: NAME",
    Machine: "nodes: NAME: machine",
    Iommu: "nodes: NAME: iommu",
    RootPort: "root_port",
    OwnDevice: "device",
    Link: "links",
}


def json_schema(model: Model = Topology, title: str = "testbed topology") -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file after its template has run; of a topology's, if no
    other model is given."""
    document = adapter(model).json_schema(by_alias=True, schema_generator=_Generator)
    return {"$schema": DIALECT, "title": title, **document}


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, with the rules' expectations in the descriptions."""

    schema_dialect = DIALECT

    def generate(self, schema: CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        document: JsonSchemaValue = _tidied(super().generate(schema, mode))
        document.pop("$schema", None)
        return document

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        document = super().dataclass_schema(schema)
        return document | {"description": inspect.cleandoc(schema["cls"].__doc__ or "")}


def _tidied(value: Any) -> Any:
    """Without the titles that repeat the keys; what a rule expects joins the description."""
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy = {
        key: _tidied(item)
        for key, item in value.items()
        if key != EXPECTED_KEY and not (key == "title" and isinstance(item, str))
    }
    alternatives = [value, *value.get("anyOf", ())]
    expected = next((a[EXPECTED_KEY] for a in alternatives if EXPECTED_KEY in a), "")
    if expected and "description" in value:
        tidy["description"] = f"{value['description']} Expected: {expected}."
    return tidy


def reference_markdown() -> str:
    """Every key of a topology file, with its default and meaning, as Markdown."""
    return "\n".join(
        line
        for model in MODELS
        for line in section(model, _HEADINGS.get(model, model.__name__.lower()))
    )


def section(model: Model, heading: str) -> Iterator[str]:
    """One model's part of a field reference, line by line."""
    yield f"### {heading}"
    yield ""
    yield inspect.cleandoc(model.__doc__ or "")  # from Python 3.13 on it comes without indents
    yield ""
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in keys_of(model).items():
        yield f"| `{key}` | {_values(field)} | {_default(field)} | {field.description} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None or is_model(type(default)) or default in ("", (), {}):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    is_size = any(isinstance(rule, Size) for rule in field.metadata)
    return f"`{format_size(default) if is_size else default}`"


def _values(field: FieldInfo) -> str:
    if field.annotation is bool:
        return "true or false"
    return expected_of(field)
