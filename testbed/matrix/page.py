# SPDX-License-Identifier: Apache-2.0
"""A matrix as one HTML file that needs nothing else: the table, the reasons, each cell's logs."""

from __future__ import annotations

from jinja2 import Environment

from testbed.matrix.records import MatrixRecord
from testbed.matrix.table import grid, reasons, summary, word

_TEMPLATE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{{ r.matrix }}: matrix</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse } th, td { padding: .3em .7em; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top } thead th { border-bottom: 2px solid #888 }
td a { color: inherit; text-decoration: none } code { font-size: 13px }
.PASS { background: #d8f0d8 } .FAIL { background: #f4b8b0; font-weight: bold }
.SKIP { background: #f6eec8 } .LOST { background: #e8c8ee; font-weight: bold }
.ERROR { background: #bfe3ea; font-weight: bold } .scroll { overflow-x: auto }
</style></head><body>
<h1>{{ r.matrix }}</h1>
{% if r.description %}<p>{{ r.description }}</p>{% endif %}
<p>{{ summary }}</p>
<div class="scroll"><table><thead><tr>
{% for name in g.axes + g.suites %}<th>{{ name }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in g.rows %}<tr>{% for value in row.values %}<th scope="row">{{ value }}</th>{% endfor %}
{% for suite in g.suites %}{% set cells = row.cells.get(suite, []) %}{% set said = word(cells) %}
<td class="{{ said[1] or '' }}" title="{{ cells[0].reason if cells else '' }}">
{%- if cells and cells[0].folder %}<a href="#{{ cells[0].name }}">{{ said[0] }}</a>
{%- else %}{{ said[0] }}{% endif %}</td>{% endfor %}
</tr>{% endfor %}
</tbody></table></div>
{% if told %}<h2>Reasons</h2><table><tbody>
{% for cell, reason in told %}<tr><td class="{{ cell.verdict }}">{{ cell.verdict }}</td>
<td>{{ cell.name }}</td><td>{{ reason }}</td></tr>{% endfor %}</tbody></table>{% endif %}
<h2>Cells</h2><div class="scroll"><table><thead><tr><th>cell</th><th>verdict</th><th>tests</th>
<th>seconds</th><th>starts</th><th>where</th><th>logs</th></tr></thead><tbody>
{% for cell in r.cells %}<tr id="{{ cell.name }}"><td>{{ cell.name }}</td>
<td class="{{ cell.verdict }}">{{ cell.verdict }}</td>
<td>{% for v, n in cell.counts.items() %}{{ n }} {{ v | lower }} {% endfor %}</td>
<td>{{ "%.1f" | format(cell.duration_s) }}</td><td>{{ cell.attempts }}</td><td>{{ cell.where }}</td>
<td>{% if cell.folder %}
<a href="{{ cell.folder | urlencode }}/">{{ cell.folder }}</a>{% endif %}</td>
</tr>{% endfor %}</tbody></table></div>
<p>testbed {{ r.tool_version }}, {{ r.started }}, <code>{{ r.command | join(" ") }}</code></p>
</body></html>
"""


def to_html(record: MatrixRecord) -> str:
    """The page; every word of a record is escaped."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(
        r=record,
        g=grid(record),
        word=word,
        told=reasons(record),
        summary=summary(record, "the folder of this page"),
    )
