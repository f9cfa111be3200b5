# SPDX-License-Identifier: Apache-2.0
"""The ``vars:`` block: values for the template, read before the template runs.

The block is taken out of the text by its indentation: the line that starts with ``vars:`` and the
lines after it that are indented, empty, comments, or close a bracket. It is plain YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from testbed.errors import Diagnostic, InputError
from testbed.topology.fields import Variable, shown
from testbed.topology.problem import listing, nearest
from testbed.topology.source import Fault, Source
from testbed.topology.yaml_data import Place, parse, scalar

_BLOCK = re.compile(r"^vars[ \t]*:.*(?:\n(?:[ \t#}\]].*)?)*", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read(source: Source) -> dict[str, Any]:
    """The defaults that the file gives; InputError for anything that is no plain mapping."""
    block = _BLOCK.search(source.text)
    if block is None:
        return {}
    tag = re.search(r"\{[{%#]", block.group())
    if tag:
        message = "'vars' is read before the template runs and cannot use it"
        raise source.error(Fault(block.start() + tag.start(), message, "plain values"))
    parsed = parse(block.group(), floats=True)
    faults = [replace(fault, index=fault.index + block.start()) for fault in parsed.faults]
    if not faults:
        values = parsed.data["vars"]
        places = {path[1:]: place for path, place in parsed.places.items()}
        faults = _faults(values, places, block.start())
    if faults:
        raise source.error(*faults)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _faults(values: Any, places: Mapping[Any, Place], start: int) -> list[Fault]:
    if not isinstance(values, dict):
        index = places[()].value + start
        return [Fault(index, f"'vars' is {shown(values)}", "a mapping, 'name: value'")]
    found = []
    for name, value in values.items():
        place = places[name,]
        if not _NAME.fullmatch(name):
            expected = "a letter or '_', then letters, digits or '_'"
            found.append(Fault(place.key + start, f"'{name}' cannot name a variable", expected))
        elif not Variable.allows(value):
            message = f"'{name}' is {shown(value)}"
            found.append(Fault(place.value + start, message, Variable.expected))
    return found


def override(defaults: Mapping[str, Any], settings: Mapping[str, str], file: str) -> dict[str, Any]:
    """The defaults with ``-s NAME=VALUE`` put in, each of its default's type.

    InputError for names that the file does not have and for values of another type.
    """
    values = dict(defaults)
    found = []
    for name, text in settings.items():
        place = f"-s {name}={text}"
        if name not in defaults:
            known = listing(defaults) if defaults else "no settings: the file has no 'vars:'"
            message = f"{file} has no variable '{name}'"
            found.append(Diagnostic(place, 0, 0, message, known, nearest(name, defaults)))
            continue
        try:
            values[name] = _of_type(defaults[name], text)
        except ValueError as error:
            message = f"'{text}' is not a value of '{name}', which is {shown(defaults[name])}"
            found.append(Diagnostic(place, 0, 0, message, str(error)))
    if found:
        raise InputError(diagnostics=found)
    return values


def _of_type(default: Any, text: str) -> Any:
    """A command line's word as a value like the default; ValueError says what was expected."""
    if any(ord(character) < 0x20 for character in text):
        raise ValueError("text without control characters")
    if isinstance(default, str):
        return text
    value = scalar(text, floats=True)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("true or false")
    elif isinstance(default, int | float):
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole and not (isinstance(default, float) and isinstance(value, float)):
            raise ValueError("a whole number" if isinstance(default, int) else "a number")
    else:
        raise ValueError("no setting: a list is changed in the file")
    return value
