# SPDX-License-Identifier: Apache-2.0
"""Which driver a kind of device has; it is loaded when its first device is opened."""

from __future__ import annotations

from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.hw.engine import Engine


def engine_class(kind: str) -> type[Engine]:
    """The driver of that kind. :raises ParameterError: there is none."""
    if kind == "edu":
        from guest_agent.hw.edu import Edu  # noqa: PLC0415  one is enough

        return Edu
    if kind == "igb":
        from guest_agent.hw.igb import Igb  # noqa: PLC0415  one is enough

        return Igb
    if kind in ("model", "model-nic"):
        from guest_agent.hw.model import Model, ModelNic  # noqa: PLC0415  one is enough

        return Model if kind == "model" else ModelNic
    raise ParameterError(f"kind: {kind!r} is none of edu, igb, model, model-nic")
