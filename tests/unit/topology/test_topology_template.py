# SPDX-License-Identifier: Apache-2.0
"""Templates: each rendered character knows where in the file it came from; bounds hold."""

from __future__ import annotations

import time
from typing import Any

import pytest

from testbed.errors import InputError
from testbed.topology.source import Source
from testbed.topology.template import Rendered, render
from testbed.topology.variables import override, read


def rendered(text: str, **variables: Any) -> Rendered:
    return render(Source("file", text), variables)


def origin_of(text: str, word: str, occurrence: int = 0, **variables: Any) -> tuple[int, int]:
    """Line and column in the file of a word of the result."""
    result = rendered(text, **variables)
    index = -1
    for _ in range(occurrence + 1):
        index = result.text.index(word, index + 1)
    return Source("file", text).position(result.source_index(index))


def test_without_tags_nothing_changes() -> None:
    result = rendered("a: 1\nb: }}\n")
    assert result.text == "a: 1\nb: }}\n"
    assert [result.source_index(i) for i in range(10)] == list(range(10))


LOOP = """\
first: 1
{% for i in range(3) %}
- a: {{ i }}  # comment
  name: word{{ i }}
{% endfor %}
last: 2
"""


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_lines_of_a_loop_are_those_of_its_body(turn: int) -> None:
    assert origin_of(LOOP, "- a", turn) == (3, 1)
    assert origin_of(LOOP, "name", turn) == (4, 3)
    assert origin_of(LOOP, "# comment", turn) == (3, 15)
    assert origin_of(LOOP, f"word{turn}") == (4, 9)


def test_text_after_a_loop_is_where_it_was() -> None:
    assert origin_of(LOOP, "last") == (6, 1)


def test_a_value_is_where_its_expression_starts() -> None:
    assert origin_of("a: {{ x }}, b\n", "long value", x="long value") == (1, 4)
    assert origin_of("a: {{ x }}, b\n", "value", x="long value") == (1, 4)
    assert origin_of("a: {{ x }}, b\n", "b", x="long value") == (1, 13)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n  {%- if x %}\n  b: 2\n{%- endif +%}\nWORD: 3\n",
        "a: 1\n{#- gone\n   here -#}\n\n\nb: 1\nWORD: 3\n",
        "{% raw %}{{ not a tag }}\nx{% endraw %} WORD\n",
        "{{ '}}' }} {{ \"{%\" }}\n   {{- x -}}   \n WORD",
    ],
)
def test_white_space_control_and_comments_shift_nothing(text: str) -> None:
    line = text[: text.index("WORD")].count("\n") + 1
    column = text.index("WORD") - text.rfind("\n", 0, text.index("WORD"))
    assert origin_of(text, "WORD", x=True) == (line, column)


def test_marks_leave_the_text_as_jinja_would_make_it() -> None:
    assert rendered(LOOP).text.splitlines() == [
        "first: 1",
        "",
        *[line for i in range(3) for line in (f"- a: {i}  # comment", f"  name: word{i}", "")],
        "last: 2",
    ]


def test_values_are_written_as_yaml() -> None:
    text = "{{ [1, 'a'] }} {{ true }} {{ none }} {{ x }}"
    assert rendered(text, x=("p", 2)).text == '[1, "a"] true null ["p", 2]'


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a\n  {{ x }}", "file:2:6", "'x' is undefined"),
        ("a\n{% for i in y %}{% endfor %}", "file:2:13", "'y' is undefined; expected yy;"),
        ("\n\n{{ 1 / 0 }}", "file:3:1", "division by zero"),
        ("{{ yy.foo }}", "file:1:1", "no attribute 'foo'"),
        ("a {% endfor %}", "file:1:3", "endfor"),
        ("{{ '%1000000000d' % 1 }}", "file:1:1", "formats no text"),
        ("{{ [1] * 100000 }}", "file:1:1", "more than 65536 items"),
        ("{{ 100000 * [1] }}", "file:1:1", "more than 65536 items"),
        ("{{ (2 ** 200) * (2 ** 200) }}", "file:1:1", "too large"),
        ("{{ range(5000) }}", "file:1:1", "a range of more than"),
        ("{{ yy.__class__.__mro__ }}", "file:1:1", "unsafe"),
        ("{{ lipsum() }}", "file:1:1", "only range() can be called"),
        ("{{ lipsum }}", "file:1:4", "'lipsum' is undefined"),
        ("{{ yy | attr('x') }}", "file:1:1", "no filter 'attr'"),
        ("{% for i in [1] recursive %}{{ i }}{% endfor %}", "file:1:1", "recursive"),
        ("{% set x %}text{% endset %}", "file:1:1", "'assignblock' is not allowed"),
        ("{% block a %}{% endblock %}", "file:1:1", "'block' is not allowed"),
    ],
)
def test_faults_have_their_line(text: str, place: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        rendered(text, yy=1)
    (diagnostic,) = caught.value.diagnostics
    assert str(diagnostic).startswith(f"{place}: template: ")
    assert words in str(diagnostic)


def test_bombs_end_soon() -> None:
    bombs = [
        "{% for a in range(4096) %}{% for b in range(4096) %}{% endfor %}{% endfor %}",
        "{% set a = 'x' %}" + "{% set a = a + a %}" * 40,
        "{% set a = [1] %}" + "{% set a = a + a %}" * 40,
        "{{ " + "9 ** " * 20 + "9 }}",
        "{% for c in 'x' * 65536 %}{{ 'y' * 65536 }}{% endfor %}",
    ]
    start_s = time.process_time()
    for bomb in bombs:
        with pytest.raises(InputError):
            rendered(bomb)
    assert time.process_time() - start_s < 10


def test_the_variables_block_ends_where_its_indentation_does() -> None:
    text = "a: 1\nvars:\n  # one\n  x: 1\n\n  y: [2, three]\nnodes: {x: {{ x }}}\n"
    assert read(Source("file", text)) == {"x": 1, "y": (2, "three")}
    assert read(Source("file", "vars: {\n  x: 1.5,\n}\nb: 2\n")) == {"x": 1.5}
    assert read(Source("file", "# vars: {x: 1}\nb:\n  vars: 2\n")) == {}


def test_settings_keep_the_type_of_their_default() -> None:
    defaults = {"n": 1, "on": True, "t": "64M", "f": 0.5}
    settings = {"n": "0x10", "on": "false", "t": "12", "f": "2"}
    changed = override(defaults, settings, "file")
    assert changed == {"n": 16, "on": False, "t": "12", "f": 2}
    assert defaults["n"] == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [("n", "x"), ("n", "1.5"), ("n", "true"), ("on", "1"), ("f", "x"), ("l", "1"), ("t", "a\x02")],
)
def test_settings_of_another_type_are_refused(name: str, text: str) -> None:
    defaults = {"n": 1, "on": True, "t": "64M", "f": 0.5, "l": (1, 2)}
    with pytest.raises(InputError, match=f"-s {name}="):
        override(defaults, {name: text}, "file")
