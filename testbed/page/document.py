# SPDX-License-Identifier: Apache-2.0
"""Template and values → one HTML file that works from ``file://`` and asks no network.

Values may be a stranger's words. Everything is escaped by the template engine, control characters
and those that turn the direction of text are shown as what they are, and the page's policy
(Content-Security-Policy) allows exactly one style sheet and one script, by their hashes: nothing
else runs or loads, even if something was forgotten here.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from testbed import __version__
from testbed.topology import graph_svg

TEMPLATES = Path(__file__).parent / "templates"

# C0 and C1 controls but tab and newline; marks that turn or isolate the direction of text.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def document(template: str, *, script: str = "", **values: Any) -> str:
    """The text of the file.

    :param template: its name in the folder of templates. It gets ``style``, ``script``, ``policy``
        and ``version`` beside ``values``.
    :param script: the name of its script there, if it has one.
    """
    style, program = _style(), _asset(script) if script else ""
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),  # noqa: S704  (ours)
            script=Markup(program),  # noqa: S704  (ours)
            policy=_policy(style, program),
            version=__version__,
            **values,
        )
    )


def shown(value: object) -> object:
    """What may be put into a page: invisible characters are shown by their number."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    return value


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    # Paper is white, whatever the reader's screen is.
    picture = graph_svg.STYLE.replace("@media (prefers", "@media screen and (prefers")
    return _asset("style.css").replace("/* PICTURE */", f".picture {{\n{picture}\n}}")


def _policy(style: str, script: str) -> str:
    """Nothing but this style sheet and this script; no forms, no frames, no network."""
    scripts = f"script-src '{_hash(script)}'" if script else "script-src 'none'"
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; {scripts}"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
