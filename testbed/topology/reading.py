# SPDX-License-Identifier: Apache-2.0
"""What pydantic is asked to read a topology with. Slow to import."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter


class Strict(BaseModel):
    """A value of a file that is not a topology's: no key that is not known, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Reads values of that class (:mod:`testbed.topology.values`)."""
    return TypeAdapter(kind)
