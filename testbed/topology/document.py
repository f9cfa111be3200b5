# SPDX-License-Identifier: Apache-2.0
"""A YAML file of ours, as far as it is the same for racks, reports and matrices.

bytes → text (UTF-8) → ``vars:`` and ``-s`` settings → template → YAML with places. What is wrong
with the data is told at its place in the user's own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.errors import InputError
from testbed.topology import variables
from testbed.topology.problem import DataPath, Problem
from testbed.topology.source import Fault, Source, decode
from testbed.topology.template import Rendered, render
from testbed.topology.yaml_data import Parsed, Place, parse

MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """The file's text, to which problems are traced back; ``values`` are those of its ``vars:``."""

    source: Source
    rendered: Rendered
    parsed: Parsed
    values: Mapping[str, Any]

    @property
    def data(self) -> Any:
        """What it says, with the settings in its ``vars``."""
        return self.parsed.data

    def error(self, found: Iterable[Problem]) -> InputError:
        """The problems as one error, each at its place."""
        places, rendered = self.parsed.places, self.rendered
        return self.source.error(*(_located(problem, places, rendered) for problem in found))


def read_document(content: bytes, name: str, settings: Mapping[str, str]) -> Document:
    """The bytes of a file called ``name``; ``settings`` are those of ``-s``.

    :raises InputError: too large, no UTF-8, no such variable, or wrong as template or YAML.
    """
    if len(content) > MOST_FILE_BYTES:
        raise InputError(f"{name}: larger than {MOST_FILE_BYTES} bytes")
    source = decode(name, content)
    values = variables.override(variables.read(source), settings, name)
    rendered = render(source, values)
    parsed = parse(rendered.text)
    if parsed.faults:
        raise source.error(*(_in_file(fault, rendered) for fault in parsed.faults))
    if values and isinstance(parsed.data, dict):
        parsed.data["vars"] = values
    return Document(source, rendered, parsed, values)


def _in_file(fault: Fault, rendered: Rendered) -> Fault:
    """A fault in the rendered text, moved to where that text came from."""
    index = rendered.source_index(fault.index)
    return Fault(index, fault.message, fault.expected, fault.nearest)


def _located(problem: Problem, places: Mapping[DataPath, Place], rendered: Rendered) -> Fault:
    """The problem at its place in the file, or at that of the nearest value around it."""
    path = problem.path
    while path not in places:
        path = path[:-1]
    place = places[path]
    index = place.key if problem.at_key else place.value
    return _in_file(Fault(index, problem.message, problem.expected, problem.nearest), rendered)
