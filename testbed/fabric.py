# SPDX-License-Identifier: Apache-2.0
"""The host's fabric manager: windows through which a node sees the memory of another node's GPU.

A window is an `ivshmem-plain` over the very memory of that GPU, plugged into an empty root port
while the machine runs, and pulled out again. Without one, a node's CPU and its plain PCIe devices
have no address that leads there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from testbed.errors import HostError, InputError, QmpError
from testbed.rack import Rack
from testbed.topology.plan import Role

PULL_TIMEOUT_S: Final = 20.0  # Linux lets 5 s pass in which a button can be pressed once more
_POLL_S: Final = 0.05


@dataclass(frozen=True)
class Window:
    """``memory`` (``NODE/FUNCTION``, as ``two/gpu0.vram``) in root port ``port`` of ``node``."""

    node: str
    port: str
    memory: str
    size_bytes: int

    @property
    def device(self) -> str:
        """QEMU's name for it."""
        return f"window-{self.port}"

    @property
    def backend(self) -> str:
        """QEMU's name for the memory behind it."""
        return f"{self.device}-memory"


def plug(rack: Rack, node: str, port: str, memory: str) -> Window:
    """Plug a window in; the guest finds it on its own, within a second or so.

    :raises InputError: no such node, or no such empty root port. :raises HostError: no such memory.
    :raises QmpError: QEMU refuses, as when a window is there already.
    """
    machine = rack.node(node)
    ports = [f for f in machine.plan.by_role(Role.ROOT_PORT) if f.device == port]
    if not ports or any(f.parent == ports[0].qemu_id for f in machine.plan.functions):
        raise InputError(f"node '{node}' has no empty root port '{port}'")
    place = rack.keeper.call("memory", name=memory)
    window = Window(node, port, memory, place["size_bytes"])
    machine.qmp(
        "object-add",
        **{"qom-type": "memory-backend-file", "id": window.backend},
        **{"mem-path": f"/proc/{rack.keeper.pid}/fd/{place['fd']}"},
        size=window.size_bytes,
        share=True,
    )
    try:
        machine.qmp(
            "device_add",
            driver="ivshmem-plain",
            id=window.device,
            bus=ports[0].qemu_id,
            memdev=window.backend,
            master="on",
        )
    except QmpError:
        machine.qmp("object-del", id=window.backend)
        raise
    return window


def pull(rack: Rack, window: Window, *, timeout_s: float = PULL_TIMEOUT_S) -> float:
    """Pull it out; returns after how many seconds the guest had let go of it.

    :raises HostError: it has not within ``timeout_s``; the window is still there.
    """
    began_s = time.monotonic()
    ask_back(rack, window)
    await_gone(rack, window, timeout_s=timeout_s)
    return time.monotonic() - began_s


def ask_back(rack: Rack, window: Window) -> None:
    """Press the button beside it: a guest that holds it is asked, and may take its time.

    :raises QmpError: there is no such window, or it was asked for already.
    """
    rack.node(window.node).qmp("device_del", id=window.device)


def await_gone(rack: Rack, window: Window, *, timeout_s: float = PULL_TIMEOUT_S) -> None:
    """Wait until a guest has let go of what it was asked for, and take the memory away.

    :raises HostError: it has not within ``timeout_s``; the window is still there.
    """
    machine = rack.node(window.node)
    began_s = time.monotonic()
    while True:
        try:
            machine.qmp("object-del", id=window.backend)
        except QmpError as error:  # it is in use as long as the device is there
            if time.monotonic() - began_s > timeout_s:
                raise HostError(
                    f"node '{window.node}' has not let go of the window at '{window.port}'"
                    f" within {timeout_s:g} s: {error.description}"
                ) from error
            time.sleep(_POLL_S)
        else:
            return
