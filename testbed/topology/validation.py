# SPDX-License-Identifier: Apache-2.0
"""Pydantic's errors in the words of a topology file: found, expected, and perhaps meant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from testbed.topology.fields import RULE_ERROR, FaultWords, Quantity, Size, Text, Variable, shown
from testbed.topology.problem import DataPath, Problem, listing, nearest
from testbed.topology.values import Value

Location = tuple[str | int, ...]

# A class of pydantic's, or one of :mod:`testbed.topology.values`; mypy calls them unhashable.
Model = Any

# What pydantic puts at the end of a location to say that it means the key.
_KEY_MARK = "[key]"

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping, 'key: value'",
    "dataclass_type": "a mapping, 'key: value'",
    "model_type": "a mapping, 'key: value'",
}


def explain(
    error: ValidationError, root: Model, *, whole: str = "the topology"
) -> tuple[Problem, ...]:
    """Each of pydantic's errors about ``root`` as a Problem, in pydantic's order.

    :param whole: what messages call the file.
    """
    return tuple(_explain(details, root, whole) for details in error.errors(include_url=False))


def _explain(details: ErrorDetails, root: Model, whole: str) -> Problem:
    kind, location, value = details["type"], details["loc"], details["input"]
    context: dict[str, Any] = details.get("ctx", {})
    path = tuple(part for part in location if part != _KEY_MARK and not _is_union_tag(part))
    if kind == RULE_ERROR:
        at_key = location[-1] == _KEY_MARK
        return Problem(path, context["said"], context["expected"], context["nearest"], at_key)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _no_entry(path, value, _union_kinds(_field_at(root, location)), whole)
    if kind == "missing":
        field = _field_at(root, location)
        owner = _owner(location, value, whole)
        return Problem(path[:-1], f"{owner} lacks '{path[-1]}'", expected_of(field, short=True))
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        keys = keys_of(_model_at(root, location[:-1]))
        message = f"unknown key '{path[-1]}'"
        return Problem(path, message, listing(keys), nearest(path[-1], keys), at_key=True)
    return _wrong_value(path, details, root, whole)


def _wrong_value(path: DataPath, details: ErrorDetails, root: Model, whole: str) -> Problem:
    value = details["input"]
    context: dict[str, Any] = details.get("ctx", {})
    if details["type"] == "literal_error":
        field = _field_at(root, details["loc"])
        choices = _choices(field.annotation)
        return Problem(path, _is(path, value, whole), listing(choices), nearest(value, choices))
    if "min_length" in context:
        return Problem(path, f"'{path[-1]}' is empty", "at least one entry")
    if "max_length" in context:
        return Problem(path, f"'{path[-1]}' is too long", f"at most {context['max_length']}")
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    limits = [f"{words} {context[name]}" for name, words in bounds.items() if name in context]
    expected = limits[0] if limits else _EXPECTED.get(details["type"], details["msg"])
    return Problem(path, _is(path, value, whole), expected)


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, also of one that may be left out (``Literal[...] | None``)."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for member in get_args(annotation) for choice in _choices(member)]


def _is(path: DataPath, value: object, whole: str) -> str:
    if not path:
        return f"{whole} is {shown(value)}"
    last = path[-1]
    subject = f"'{last}'" if isinstance(last, str) else f"an entry of '{path[-2]}'"
    return f"{subject} is {shown(value)}"


def _owner(location: Location, value: object, whole: str) -> str:
    """What lacks something: ``gpu 'gpu0'``, ``'links'``, or the file itself."""
    if len(location) < 2:
        return whole
    before = location[-2]
    if _is_union_tag(before) and isinstance(value, dict):
        kind = str(before).strip("()")
        return f"{kind} {shown(value.get(kind))}"
    return f"an entry of '{location[-3]}'" if isinstance(before, int) else f"'{before}'"


def _no_entry(path: DataPath, value: object, kinds: list[str], whole: str) -> Problem:
    """An entry (of ``pcie`` or ``below``) that is none, or stands where its kind cannot."""
    where = "on the root bus" if path[-2] == "pcie" else "below a port or switch"
    if not isinstance(value, dict):
        return Problem(path, _is(path, value, whole), f"a mapping with one of {listing(kinds)}")
    for kind in ("root_port", "switch"):
        if kind in value:
            message = f"{kind} {shown(value[kind])} cannot stand {where}"
            return Problem((*path, kind), message, listing(kinds))
    first = next(iter(value), "")
    message = f"an entry without a kind ('{first}' is none)" if first else "an empty entry"
    place = (*path, first) if first else path
    return Problem(place, message, listing(kinds), nearest(first, kinds), at_key=True)


def _is_union_tag(part: str | int) -> bool:
    """Whether a part of a location is the tag of a union (``(gpu)``) and no key of the data."""
    return isinstance(part, str) and part.startswith("(")


def _model_at(root: Model, location: Location) -> Model:
    return _descend(root, location)[0]


def _field_at(root: Model, location: Location) -> FieldInfo:
    field = _descend(root, location)[1]
    if field is None:
        raise LookupError(f"no field at {location}")
    return field


def _descend(root: Model, location: Location) -> tuple[Model, FieldInfo | None]:
    """The model that a location leads into, and the last field on the way."""
    model, field, is_mapping_key = root, None, False
    for part in location:
        if isinstance(part, int) or is_mapping_key:
            is_mapping_key = False
        elif _is_union_tag(part) and field is not None:
            model = next(m for m in _models_in(field.annotation) if f"({m.kind})" == part)
        elif part in (keys := keys_of(model)):
            field = keys[part]
            nested = _models_in(field.annotation)
            model = nested[0] if len(nested) == 1 else model
            is_mapping_key = get_origin(field.annotation) is Mapping
        else:
            return model, None
    return model, field


def _models_in(annotation: Any) -> list[Any]:
    """The models that an annotation is made of: ``tuple[A | B, ...]`` gives A and B."""
    if isinstance(annotation, type) and is_model(annotation):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _union_kinds(field: FieldInfo) -> list[str]:
    return [model.kind for model in _models_in(field.annotation)]


def is_model(kind: type) -> bool:
    """Whether a class is one."""
    return issubclass(kind, BaseModel | Value)


@functools.cache
def keys_of(model: Model) -> Mapping[str, FieldInfo]:
    """The fields of a Model by the keys that the file uses for them."""
    if issubclass(model, BaseModel):
        found = model.model_fields
    else:
        hints = get_type_hints(model, include_extras=True)
        found = {
            field.name: FieldInfo.from_annotated_attribute(hints[field.name], field)
            for field in dataclasses.fields(model)
        }
    return {field.alias or name: field for name, field in found.items()}


def expected_of(field: FieldInfo, *, short: bool = False) -> str:
    """What a field wants: its rule's words (``short``: its name), its choices, or ""."""
    for rule in (*field.metadata, *_rules_in(field.annotation)):
        if isinstance(rule, Text):
            return rule.what if short else rule.expected
        if isinstance(rule, Size | Quantity | FaultWords | Variable):
            return rule.expected
    return listing(_choices(field.annotation))


def _rules_in(annotation: Any) -> list[Any]:
    """What stands in ``Annotated[...]`` within a union such as ``Address | None``."""
    if get_origin(annotation) not in (Union, UnionType):
        return []
    return [rule for member in get_args(annotation) for rule in getattr(member, "__metadata__", ())]
