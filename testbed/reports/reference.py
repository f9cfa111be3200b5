# SPDX-License-Identifier: Apache-2.0
"""The reports' JSON Schema and their field reference, both generated from the models.

``python -m testbed.reports.reference > docs/report-fields.md``
"""

from __future__ import annotations

from typing import Any

from testbed.reports.conditions import CONDITIONS
from testbed.reports.model import Environment, Expectation, Report
from testbed.reports.steps import STEPS, Step
from testbed.topology.schema import json_schema as schema_of
from testbed.topology.schema import section

_HEAD = """\
# Fields of a bug report

Generated from the models by `python -m testbed.reports.reference`; how to write one is in
[reports.md](reports.md). `testbed schema report` prints the same as a JSON Schema.

A number that only the running machine knows is a reference, `${name.field}`: what the step called
`name` (`as:`) saw. `${name.field+0x1000}` adds to it. Every step also sees `errno` and `error`, ""
unless it may fail and did. A device has `${gpu0.bdf}` and the addresses of its functions.
"""
_COMMON = ("as", "may_fail", "expect")


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a report after its template has run."""
    return schema_of(Report, "testbed bug report")


def markdown() -> str:
    """Every key, with its default and meaning."""
    lines = [_HEAD, "## The file", ""]
    lines += section(Report, "the file")
    lines += section(Environment, "environment")
    lines += section(Expectation, "expect")
    lines += ["## Steps", "", "Each may also have `as`, `may_fail` and `expect`.", ""]
    lines += section(Step, "all steps")
    for step in STEPS:
        lines += [
            line
            for line in section(step, step.kind)
            if not line.startswith(tuple(f"| `{key}` |" for key in _COMMON))
        ]
        if step.results:
            words = ", ".join(f"`{word}`" for word in step.results)
            seen = "what the method answers" if step.results == ("*",) else words
            lines += [f"Sees {seen}.", ""]
    lines += ["## Conditions", ""]
    for condition in CONDITIONS:
        lines += section(condition, condition.kind)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201  a generator's output
