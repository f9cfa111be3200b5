# SPDX-License-Identifier: Apache-2.0
"""A short stable name for values; apart from what it is used on, which is slow to import."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(*parts: Any) -> str:
    """A hash of some values: pydantic models, bytes, strings, numbers, and lists of them."""
    text = json.dumps(parts, default=_plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(type(value))
    return dump(mode="json")
