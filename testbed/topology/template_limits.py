# SPDX-License-Identifier: Apache-2.0
"""What a topology's template may do: Jinja2's sandbox, and bounds on time and memory.

The sandbox keeps a template away from Python's internals, but lets it count to infinity and build
strings of any size. Here a template is made of a listed set of constructs, without macros, imports
or method calls; each arithmetic result and each loop is bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import StrictUndefined, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from testbed.topology.problem import listing

MOST_OUTPUT_CHARACTERS = 1 << 20
MOST_RANGE = 4096
MOST_LOOP_STEPS = 100_000
MOST_ITEMS = 65_536  # of one string or list
MOST_BITS = 256  # of one integer
MOST_SECONDS = 5.0

_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign)
_EXPRESSIONS = (
    *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
    *(nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Operand, nodes.Concat, nodes.CondExpr),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Keyword),
)
_CALLS = ("range",)
_FILTERS = frozenset(
    (
        *("abs", "count", "d", "default", "first", "int", "last", "length", "list", "lower", "max"),
        *("min", "reverse", "round", "sort", "string", "sum", "trim", "unique", "upper"),
    )
)
_TICK = "_testbed_tick"


class Environment(SandboxedEnvironment):
    """A sandbox for one rendering: it counts what the template uses up."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=as_yaml, **options
        )
        self.globals.clear()
        self.globals["range"] = bounded_range
        self.globals[_TICK] = self._tick
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self._steps = 0
        self._deadline_s = time.monotonic() + MOST_SECONDS

    def _tick(self) -> str:
        """One step of a loop; runs inside each loop's body."""
        self._steps += 1
        if self._steps > MOST_LOOP_STEPS:
            raise SecurityError(f"more than {MOST_LOOP_STEPS} loop steps")
        self.check_time()
        return ""

    def check_time(self) -> None:
        """SecurityError once the rendering has taken too long."""
        if time.monotonic() > self._deadline_s:
            raise SecurityError(f"the template runs for more than {MOST_SECONDS:g} s")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation whose operands and result stay small."""
        self.check_time()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("'%' formats no text here; use '~' to join values")
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise SecurityError("'**' with a large operand")
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MOST_BITS:
            raise SecurityError("a number that is too large")
        if isinstance(result, str | list | tuple):
            _check_length(len(result))
        return result


def as_yaml(value: Any) -> Any:
    """An expression's value as YAML writes it; text goes in as it is."""
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return value if is_plain or isinstance(value, StrictUndefined) else json.dumps(value)


def bounded_range(*bounds: int) -> range:
    """Python's ``range`` of at most :data:`MOST_RANGE` numbers."""
    numbers = range(*bounds)
    if len(numbers) > MOST_RANGE:
        raise SecurityError(f"a range of more than {MOST_RANGE} numbers")
    return numbers


def restrict(template: nodes.Template) -> None:
    """Check and arm a parsed template in place; TemplateSyntaxError names what is not allowed."""
    _restrict(template)


def _restrict(node: nodes.Node) -> None:
    if isinstance(node, nodes.Call):
        _check_call(node)
    elif isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        message = f"there is no filter '{node.name}' here; expected {listing(sorted(_FILTERS))}"
        raise TemplateSyntaxError(message, node.lineno)
    elif isinstance(node, nodes.For) and node.recursive:
        raise TemplateSyntaxError("a recursive loop is not allowed", node.lineno)
    elif not isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
        what = type(node).__name__.lower()
        raise TemplateSyntaxError(f"'{what}' is not allowed in a topology", node.lineno)
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _bounded(value))
        elif isinstance(value, list):
            setattr(node, name, [_bounded(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.For):
        tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.Output([tick], lineno=node.lineno))


def _bounded(node: nodes.Node) -> nodes.Node:
    """The restricted node; ``a ~ b`` becomes an addition, which is bounded."""
    _restrict(node)
    if not isinstance(node, nodes.Concat):
        return node
    texts = [_as_text(part) for part in node.nodes]
    joined = texts[0]
    for text in texts[1:]:
        joined = nodes.Add(joined, text, lineno=node.lineno)
    return joined


def _as_text(node: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, "string", [], [], None, None, lineno=node.lineno)


def _check_call(node: nodes.Call) -> None:
    if not (isinstance(node.node, nodes.Name) and node.node.name in _CALLS):
        raise TemplateSyntaxError(f"only {listing(_CALLS)}() can be called here", node.lineno)


def _is_small(value: Any) -> bool:
    return isinstance(value, int) and abs(value) <= MOST_BITS


def _check_repeat(value: Any, times: Any) -> None:
    if isinstance(value, Sequence) and isinstance(times, int):
        _check_length(len(value) * times)


def _check_length(length: int) -> None:
    if length > MOST_ITEMS:
        raise SecurityError(f"a text or list of more than {MOST_ITEMS} items")


def bounded_output(chunks: Iterable[str]) -> str:
    """The template's output, given up as soon as it is too long."""
    parts: list[str] = []
    length = 0
    for chunk in chunks:
        length += len(chunk)
        if length > MOST_OUTPUT_CHARACTERS:
            raise SecurityError(f"the result is longer than {MOST_OUTPUT_CHARACTERS} characters")
        parts.append(chunk)
    return "".join(parts)
