# SPDX-License-Identifier: Apache-2.0
"""A measurement as a picture: one small diagram for each series, bars where there is no size. Pure.

SVG by a template: a plotting library would be fifty times what this takes to install.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 34, 40
COLUMNS = 2
BAR = 18
_MOST_BARS = 40
_BARS = (
    "seconds",
    "speed",
    "requirements_s",
    "cpu_s",
    "share",
    "per_rack",
    "ratio_to_first",
    "of_wanted",
)

_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{{ width }}" height="{{ height }}"
 viewBox="0 0 {{ width }} {{ height }}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="#fff"/>
<text x="12" y="20" font-size="14" font-weight="bold">{{ title }}</text>
{% for line in caption %}<text x="12" y="{{ 36 + 14 * loop.index0 }}" fill="#555">{{ line }}</text>
{% endfor %}
{% for c in curves %}<g transform="translate({{ c.left }},{{ c.top }})">
<text x="{{ c.x0 }}" y="20" font-weight="bold">{{ c.name }}</text>
{% for tick in c.y_ticks %}<line x1="{{ c.x0 }}" x2="{{ c.x1 }}" y1="{{ tick.at }}"
 y2="{{ tick.at }}" stroke="#ddd"/><text x="{{ c.x0 - 6 }}" y="{{ tick.at + 4 }}"
 text-anchor="end">{{ tick.text }}</text>
{% endfor %}
{% for tick in c.x_ticks %}<text x="{{ tick.at }}" y="{{ c.y0 + 16 }}" text-anchor="middle">\
{{ tick.text }}</text>{% endfor %}
<text x="{{ (c.x0 + c.x1) / 2 }}" y="{{ c.y0 + 32 }}" text-anchor="middle" fill="#555">\
{{ c.x_name }}</text>
<polyline points="{{ c.line }}" fill="none" stroke="#1f5fa8" stroke-width="2"/>
{% for dot in c.dots %}<circle cx="{{ dot.x }}" cy="{{ dot.y }}" r="3" fill="#1f5fa8"/>{% endfor %}
</g>
{% endfor %}
{% for b in bars %}<g transform="translate(0,{{ b.top }})">
<text x="12" y="14" font-weight="bold">{{ b.name }}</text>
{% for row in b.rows %}<text x="230" y="{{ row.y + 12 }}" text-anchor="end">{{ row.name }}</text>
<rect x="238" y="{{ row.y }}" width="{{ row.width }}" height="14" fill="#1f5fa8"/>
<text x="{{ 244 + row.width }}" y="{{ row.y + 12 }}">{{ row.text }}</text>{% endfor %}
</g>
{% endfor %}
</svg>
"""


@dataclass(frozen=True)
class _Tick:
    at: float
    text: str


def svg(what: str, result: Mapping[str, Any]) -> str:
    """The picture of what `testbed bench WHAT` printed, with the machine below the title."""
    machine = result.get("machine", {})
    memory = _number(machine.get("memory_bytes", 0) / (1 << 30))
    caption = [
        f"{machine.get('cpu', '')}, {machine.get('cpus', '?')} processors, {memory} GiB",
        " · ".join(
            str(each)
            for each in (result.get("accelerator"), result.get("qemu"), f"in {result.get('unit')}")
            if each
        ),
    ]
    top = 44 + 14 * len(caption)
    points = result.get("points", [])
    names = (
        [name for name in points[0] if name != "x" and _is_series(points, name)] if points else []
    )
    curves = [
        _curve(name, str(result.get("x", "")), [(p["x"], p[name]) for p in points if name in p])
        | {"left": WIDTH * (at % COLUMNS), "top": top + HEIGHT * (at // COLUMNS)}
        for at, name in enumerate(names)
    ]
    top += HEIGHT * math.ceil(len(names) / COLUMNS)
    bars = []
    for name in _BARS:
        values = result.get(name)
        if isinstance(values, Mapping) and values:
            bars.append(_bars(name, values, top))
            top += 30 + BAR * len(bars[-1]["rows"])
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(
        title=f"testbed bench {what}",
        caption=caption,
        curves=curves,
        bars=bars,
        width=WIDTH * COLUMNS,
        height=top + 12,
    )


def _is_series(points: list[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(point.get(name), int | float) for point in points)


def _curve(name: str, x_name: str, points: list[tuple[float, float]]) -> dict[str, Any]:
    x0, x1, y0, y1 = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    least, most = math.log(points[0][0]), math.log(points[-1][0])
    top = _round_up(max(y for _, y in points))
    lowest = min(y for _, y in points)
    bottom = -_round_up(-lowest) if lowest < 0 else 0.0  # noise may be larger than what is there

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - least) / (most - least) if most > least else 0.5
        height = (y - bottom) / (top - bottom)
        return round(x0 + share * (x1 - x0), 1), round(y0 - height * (y0 - y1), 1)

    placed = [place(x, y) for x, y in points]
    return {
        "name": name.replace("_", " "),
        "x_name": f"{x_name} (logarithmic)",
        **{"x0": x0, "x1": x1, "y0": y0},
        "x_ticks": [_Tick(place(x, 0)[0], _number(x)) for x, _ in points],
        "y_ticks": [
            _Tick(place(points[0][0], y)[1], _number(y))
            for y in (bottom + (top - bottom) * n / 4 for n in range(5))
        ],
        "line": " ".join(f"{x},{y}" for x, y in placed),
        "dots": [{"x": x, "y": y} for x, y in placed],
    }


def _bars(name: str, values: Mapping[str, Any], top: float) -> dict[str, Any]:
    numbers = {
        key: float(value["median"] if isinstance(value, Mapping) else value)
        for key, value in values.items()
    }
    shown = dict(list(numbers.items())[:_MOST_BARS])
    most = max(shown.values()) or 1
    rows = [
        {
            "name": key,
            "y": 22 + BAR * at,
            "width": round(380 * value / most, 1),
            "text": _number(value),
        }
        for at, (key, value) in enumerate(shown.items())
    ]
    return {"name": name.replace("_", " "), "rows": rows, "top": top}


def _round_up(value: float) -> float:
    """1, 2 or 5 times a power of ten, not below ``value``."""
    if value <= 0:
        return 1.0
    power: float = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
