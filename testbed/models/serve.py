# SPDX-License-Identifier: Apache-2.0
"""`python -m testbed.models.serve SPECIFICATION.json`: the device models of one rack node.

It reads what to serve (:mod:`testbed.models.spec`), starts a process for each device
(:mod:`testbed.models.supervisor`), and when every socket is open says ``{"ready": true, "pids":
{device: N}}`` on its standard output. From then on QEMU may connect. It ends at SIGTERM and leaves
no socket behind. Should a device's process die, ``{"lost": device, "status": N}`` follows. All else
goes to standard error.

With ``-`` the specification is the first line of standard input, whose end (a pipe that the owner
holds) is then its end too.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from testbed.errors import HostError, InputError, TestbedError
from testbed.machine.pci_tree import CHANGE_EVENTS
from testbed.models import control
from testbed.models.calls import Caller
from testbed.models.change_log import ChangeLog
from testbed.models.control import Control
from testbed.models.device import Device
from testbed.models.gpu import GpuModel
from testbed.models.listener import Listener
from testbed.models.live_routes import LiveRouter
from testbed.models.memory import MemoryCache, SharedMemory
from testbed.models.nic import NicModel
from testbed.models.spec import DeviceSpec, MachineSpec, MemorySpec, ServeSpec, parse
from testbed.models.supervisor import Lifeline, supervise
from testbed.models.switchyard import Switchyard

MAX_SPEC_BYTES: Final = 4 << 20
TRUST: Final = "--trust"
STDIN: Final = "-"


def _open_memory(spec: MemorySpec) -> SharedMemory:
    path = spec.path or Path(f"/proc/self/fd/{spec.fd}")
    try:
        return SharedMemory.open(path, name=spec.name)
    except OSError as error:
        raise HostError(
            f"memory '{spec.name}' ({path}): {error.strerror or error}",
            hint="it has to be a memfd that was made with MFD_ALLOW_SEALING",
        ) from error


def make_device(spec: DeviceSpec, memories: Mapping[str, SharedMemory], *, trusted: bool) -> Device:
    """The device that ``spec`` describes. InputError if it describes none.

    Code that is not the testbed's own is loaded only if ``trusted``.
    """
    if spec.kind == "gpu":
        if spec.memory not in memories:
            raise InputError(f"device '{spec.name}': a gpu needs its memory")
        return GpuModel(spec.name, memories[spec.memory], spec.links, msi=spec.msi)
    if spec.kind == "nic":
        peers = dict(spec.peers)
        return NicModel(
            spec.name, address=spec.address, socket=spec.wire, peers=peers, msi=spec.msi
        )
    if not trusted:
        raise InputError(f"device '{spec.name}': '{spec.kind}' is code of your own", hint=TRUST)
    from testbed.models.loading import make_own  # noqa: PLC0415  the built-in ones do without

    return make_own(spec.name, spec.kind, spec.options, sha256=spec.sha256)


class ModelProcess:
    """One device, and its sockets."""

    def __init__(
        self,
        spec: DeviceSpec,
        memories: Sequence[MemorySpec],
        lifeline: Lifeline,
        *,
        trusted: bool = False,
        routes: tuple[MachineSpec, Caller] | None = None,
    ) -> None:
        """``lifeline`` hears of each connection and its end. ``routes``: the machine whose
        switches route for the device, and who knows them. HostError if a memory cannot be opened,
        InputError if the device cannot be made.
        """
        cache = MemoryCache()
        opened = {item.name: cache.add(_open_memory(item)) for item in memories}
        device = make_device(spec, opened, trusted=trusted)
        device.bus.timing = spec.bus_timing
        for rule in spec.faults:
            device.rules.add(rule)
        if routes is not None:
            machine, caller = routes
            log = ChangeLog(machine.log, CHANGE_EVENTS)
            device.bus.router = LiveRouter(caller, log, opened, device.witness)
        self._listener = Listener(
            device, spec.socket, cache, lifeline.connection, lifeline.progress
        )
        self.control = Control({spec.name: self._listener})

    async def open(self) -> None:
        """Open every socket. HostError, with all closed again, if one cannot be."""
        try:
            await self._listener.device.open()
            self._listener.open()
        except OSError as error:
            self.close()
            raise HostError(f"a socket could not be opened: {error}") from error

    def close(self) -> None:
        """Close and remove every socket."""
        self._listener.close()
        self._listener.device.close()


async def serve(process: ModelProcess, lifeline: Lifeline, caller: Caller) -> None:
    """Serve until SIGTERM comes or the supervisor is gone."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    await caller.open()
    await process.open()
    loop.add_reader(lifeline.socket, stop.set)  # it says nothing: this is its end
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # Ctrl-C reaches the whole process group; the supervisor passes on what it means.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    tasks = [
        loop.create_task(control.serve(lifeline.calls, process.control)),
        loop.create_task(caller.serve()),
    ]
    gc.collect()
    gc.freeze()  # what is there now stays: the collector need not look at it after each command
    lifeline.ready()
    try:
        await stop.wait()
    finally:
        for task in tasks:
            task.cancel()
        process.close()


def _read_line(fd: int) -> bytes:
    """One line, byte for byte no further, as what follows is the owner's life."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(fd, 1)
        if not part or len(line) > MAX_SPEC_BYTES:
            raise InputError("the specification is one line of JSON on standard input")
        line += part
    return bytes(line)


def _attempt(action: Callable[[], int]) -> int:
    """Its exit code, or that of the error it ends in, with one line on standard error."""
    try:
        return action()
    except TestbedError as error:
        hint = f" ({error.hint})" if error.hint else ""
        sys.stderr.write(f"models: {error}{hint}\n")
        return int(error.exit_code)


def _read_spec(word: str) -> ServeSpec:
    try:
        text = _read_line(0) if word == STDIN else Path(word).read_bytes()
        data: object = json.loads(text)
    except OSError as error:
        raise InputError(f"{word}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the specification is no JSON: {error}") from error
    return parse(data)


def _child(spec: ServeSpec, device: DeviceSpec, *, trusted: bool) -> Callable[[Lifeline], int]:
    def serve_it(lifeline: Lifeline) -> int:
        if device.is_own:
            from testbed.models.loading import limit_memory  # noqa: PLC0415  likewise

            limit_memory()
        caller = Caller(lifeline.questions)
        process = ModelProcess(
            device,
            spec.memories,
            lifeline,
            trusted=trusted,
            routes=(spec.machine, caller) if spec.machine else None,
        )
        asyncio.run(serve(process, lifeline, caller))
        return 0

    return lambda lifeline: _attempt(lambda: serve_it(lifeline))


def _switchyard(spec: ServeSpec) -> Switchyard | None:
    if spec.machine is None:
        return None
    functions = {device.function: device.name for device in spec.devices if device.function}
    return Switchyard(spec.machine, spec.memories, functions)


def _run(arguments: list[str]) -> int:
    words = [word for word in arguments if word != TRUST]
    if len(words) != 1 or words[0].startswith("--"):
        raise InputError(f"arguments: [{TRUST}] SPECIFICATION.json, or {STDIN}")
    spec = _read_spec(words[0])
    trusted = TRUST in arguments
    gc.collect()
    gc.freeze()  # shared with the children, as long as nobody touches it
    return supervise(
        {device.name: _child(spec, device, trusted=trusted) for device in spec.devices},
        control=spec.control,
        ready=spec.ready,
        owner_fd=0 if words[0] == STDIN else -1,
        switchyard=_switchyard(spec),
    )


def main(arguments: list[str]) -> int:
    """Exit code as :class:`testbed.errors.ExitCode`; one line on standard error says why."""
    return _attempt(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
