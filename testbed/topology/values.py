# SPDX-License-Identifier: Apache-2.0
"""What a topology is made of: frozen values, whose fields say what the file may hold.

They are plain dataclasses, for a rack that was started before is started again without pydantic,
whose import costs as much processor time as starting the rack's devices. Where a file is read,
pydantic makes them (:mod:`testbed.topology.reading`) by what :func:`key` says of each field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, dataclass_transform

_T = TypeVar("_T")

_CLASS = "@class"  # no key of a topology has such a name
_CLASSES: dict[str, Any] = {}


def key(
    meaning: str,
    *,
    name: str = "",
    default: Any = MISSING,
    default_factory: Any = MISSING,
    to_text: Callable[[Any], str] | None = None,
    **limits: Any,
) -> Any:
    """A key of the file.

    :param meaning: for people, in the reference. :param name: the file's word for it, if it is not
        the field's. :param to_text: writes the value as the file has it, if JSON cannot.
    :param limits: of ``pydantic.Field``, such as ``ge``.
    """
    metadata = {"description": meaning, "to_text": to_text, **limits}
    if name:
        metadata["alias"] = name
    return field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(key,))
def value(cls: type[_T]) -> type[_T]:
    """Make a class such a value: no key that is not known, and nothing changes."""
    _CLASSES[cls.__name__] = cls
    return dataclass(frozen=True, kw_only=True)(cls)


class Value:
    """What all of them are."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


def plain(found: Any) -> Any:
    """A value as JSON, in the file's words and without keys that have none."""
    if isinstance(found, Value):
        data = {}
        for each in _fields(found):
            part = getattr(found, each.name)
            if part is not None:
                to_text = each.metadata["to_text"]
                data[each.metadata.get("alias", each.name)] = (
                    to_text(part) if to_text else plain(part)
                )
        return data
    if isinstance(found, Mapping):
        return {name: plain(part) for name, part in found.items()}
    return [plain(part) for part in found] if isinstance(found, list | tuple) else found


def kept(found: Any) -> Any:
    """A value as JSON, for :func:`taken_back`: quick, and only for this very code to read."""
    if isinstance(found, Value):
        parts = {each.name: kept(getattr(found, each.name)) for each in _fields(found)}
        return {_CLASS: type(found).__name__} | parts
    if isinstance(found, Mapping):
        return {name: kept(part) for name, part in found.items()}
    return [kept(part) for part in found] if isinstance(found, tuple) else found


def taken_back(data: Any) -> Any:
    """The value that :func:`kept` wrote, unchecked: who kept it, knew that it was right."""
    if isinstance(data, list):
        return tuple(taken_back(part) for part in data)
    if not isinstance(data, dict):
        return data
    parts = {name: taken_back(part) for name, part in data.items()}
    return _CLASSES[parts.pop(_CLASS)](**parts) if _CLASS in parts else parts


def _fields(found: Value) -> tuple[Field[Any], ...]:
    return fields(found)  # type: ignore[arg-type]
