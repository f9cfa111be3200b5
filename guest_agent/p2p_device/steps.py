# SPDX-License-Identifier: Apache-2.0
"""What can be done in a room, one step after the other; each answers with what was seen.

A step is ``{"do": "map", "attachment": "a"}``. One call runs a list of them, because a round trip
to an emulated machine costs as much as several steps. A step that is refused ends the list, and
its answer is ``{"refused": {"type", "errno", "message"}}``: an answer, not an error.
"""

from __future__ import annotations

from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p_device.backend import ram_name
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.backend import Backing
    from guest_agent.p2p_device.room import Room

    Step = Callable[..., Any]
    Made = TypeVar("Made", bound=Step)

STEPS: dict[str, Step] = {}


def step(function: Made) -> Made:
    """A step of that name, without the ``_`` before or behind it."""
    STEPS[function.__name__.strip("_")] = function
    return function


def run(room: Room, wanted: list[dict[str, Any]]) -> list[Any]:
    """Run steps until one is refused. :raises ParameterError: a step is none, or lacks a part."""
    answers: list[Any] = []
    for index, each in enumerate(wanted):
        parts = dict(each)
        name = parts.pop("do", None)
        function = STEPS.get(name) if isinstance(name, str) else None
        if function is None:
            raise ParameterError(f"steps[{index}].do: {name!r} is none of {', '.join(STEPS)}")
        try:
            answers.append(function(room, **parts))
        except ParameterError as error:
            raise ParameterError(f"steps[{index}]: {error}") from None
        except OSError as error:
            refused = {"type": type(error).__name__, "errno": error.errno, "message": str(error)}
            answers.append({"refused": refused})
            break
        except TypeError as error:
            raise ParameterError(f"steps[{index}]: {error}") from error
    return answers


def where(backing: Backing) -> dict[str, Any]:
    """A backing for the host."""
    place = {"placement": backing.placement.value, "device": backing.device}
    if backing.placement is Placement.SYSTEM:
        return {**place, "ram": ram_name(backing), "offset": 0}
    return {**place, "offset": backing.offset}


def shown(address: Address) -> dict[str, Any]:
    """An address for the host."""
    port = {"port": address.port} if hasattr(address, "port") else {}
    return {"type": type(address).__name__, "value": address.value, "user": address.user, **port}
