# SPDX-License-Identifier: Apache-2.0
"""An error's traceback as an outcome keeps it: what a person can act upon."""

from __future__ import annotations

import traceback
from pathlib import Path

_FRAMES = 6


def details_of(error: BaseException) -> str:
    """The last frames, from the first that is not pytest's."""
    first = error.__traceback__
    while first and first.tb_next and _is_pytests(first.tb_frame.f_code.co_filename):
        first = first.tb_next
    return "".join(traceback.format_exception(type(error), error, first, limit=-_FRAMES))


def _is_pytests(file: str) -> bool:
    return Path(file).parent.name in ("_pytest", "pluggy")
