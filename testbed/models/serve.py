# SPDX-License-Identifier: Apache-2.0
"""`python -m testbed.models.serve`: the model process of one rack node.

It reads one line of JSON from its standard input (:mod:`testbed.models.spec`), opens every socket,
and says ``{"ready": true}`` on its standard output. From then on QEMU may connect. It ends at
SIGTERM, or when its standard input ends (a pipe that its owner holds), and leaves no socket behind.
All else goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from testbed.errors import HostError, InputError, TestbedError
from testbed.models.control import Control, ControlServer
from testbed.models.device import Device
from testbed.models.gpu import GpuModel
from testbed.models.memory import MemoryCache, SharedMemory
from testbed.models.nic import NicModel
from testbed.models.server import Listener
from testbed.models.spec import DeviceSpec, MemorySpec, ServeSpec, parse

MAX_SPEC_BYTES: Final = 4 << 20
TRUST: Final = "--trust"


def _open_memory(spec: MemorySpec) -> SharedMemory:
    path = spec.path or Path(f"/proc/self/fd/{spec.fd}")
    try:
        return SharedMemory.open(path, name=spec.name)
    except OSError as error:
        raise HostError(
            f"memory '{spec.name}' ({path}): {error.strerror or error}",
            hint="it has to be a memfd that was made with MFD_ALLOW_SEALING",
        ) from error


def _load_class(name: str, kind: str) -> type[Device]:
    """The class that a kind of the form FILE.py:CLASS names."""
    file, _, word = kind.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"device_{name}", file)
    if not file.endswith(".py") or spec is None or spec.loader is None:
        raise InputError(f"device '{name}': no kind '{kind}'", hint="gpu, nic or FILE.py:CLASS")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"device '{name}': {file}: {type(error).__name__}: {error}") from error
    found = getattr(module, word, None)
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise InputError(f"device '{name}': {file} has no device class '{word}'")
    return found


def make_device(spec: DeviceSpec, memories: Mapping[str, SharedMemory], *, trusted: bool) -> Device:
    """The device that ``spec`` describes. InputError if it describes none.

    Code that is not the testbed's own is loaded only if ``trusted``.
    """
    if spec.kind == "gpu":
        if spec.memory not in memories:
            raise InputError(f"device '{spec.name}': a gpu needs its memory")
        return GpuModel(spec.name, memories[spec.memory], spec.links)
    if spec.kind == "nic":
        return NicModel(spec.name, address=spec.address, socket=spec.wire, peers=dict(spec.peers))
    if not trusted:
        raise InputError(f"device '{spec.name}': '{spec.kind}' is code of your own", hint=TRUST)
    cls = _load_class(spec.name, spec.kind)
    try:
        return cls(spec.name, **spec.options)
    except Exception as error:
        raise InputError(f"device '{spec.name}': {type(error).__name__}: {error}") from error


class ModelProcess:
    """All devices of one process, and their sockets."""

    def __init__(self, spec: ServeSpec, *, trusted: bool = False) -> None:
        """HostError if a memory cannot be opened, InputError if a device cannot be made."""
        cache = MemoryCache()
        memories = {item.name: cache.add(_open_memory(item)) for item in spec.memories}
        self.listeners = {
            item.name: Listener(make_device(item, memories, trusted=trusted), item.socket, cache)
            for item in spec.devices
        }
        self._control = ControlServer(spec.control, Control(self.listeners, memories))

    async def open(self) -> None:
        """Open every socket. HostError, with all closed again, if one cannot be."""
        try:
            for listener in self.listeners.values():
                await listener.device.open()
                listener.open()
            await self._control.open()
        except OSError as error:
            self.close()
            raise HostError(f"a socket could not be opened: {error}") from error

    def close(self) -> None:
        """Close and remove every socket."""
        self._control.close()
        for listener in self.listeners.values():
            listener.close()
            listener.device.close()


async def serve(spec: ServeSpec, stop_fd: int, *, trusted: bool) -> None:
    """Serve until ``stop_fd`` reaches its end, or SIGTERM or SIGINT comes."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    process = ModelProcess(spec, trusted=trusted)
    await process.open()

    def owner_spoke() -> None:
        if not os.read(stop_fd, 4096):
            loop.remove_reader(stop_fd)
            stop.set()

    with contextlib.suppress(PermissionError):  # a file: it has no end to wait for
        loop.add_reader(stop_fd, owner_spoke)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    try:
        await stop.wait()
    finally:
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


def main(arguments: list[str]) -> int:
    """Exit code as :class:`testbed.errors.ExitCode`; one line on standard error says why."""
    try:
        if set(arguments) - {TRUST}:
            raise InputError(f"the only argument is {TRUST}")
        try:
            data: object = json.loads(_read_line(0))
        except (ValueError, RecursionError) as error:
            raise InputError(f"the specification is no JSON: {error}") from error
        asyncio.run(serve(parse(data), 0, trusted=TRUST in arguments))
    except TestbedError as error:
        hint = f" ({error.hint})" if error.hint else ""
        sys.stderr.write(f"models: {error}{hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
