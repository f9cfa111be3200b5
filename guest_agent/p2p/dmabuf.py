# SPDX-License-Identifier: Apache-2.0
"""dma-bufs in the guest, through the modules ``dmabuf_exporter`` and ``dmabuf_importer``.

Their sources, ``guest_agent/kmod``, say what each command means to the kernel. A step that the
kernel refuses is an answer with its ``errno``, not an error.
"""

from __future__ import annotations

import mmap
import os

from guest_agent import sysfs
from guest_agent.hw.binding import Bindings
from guest_agent.hw.region import Region
from guest_agent.p2p.command_file import ANSWER_BYTES, BOUNCE_OFFSET, ask, open_file, tell
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EXPORTER, IMPORTER = "dmabuf_exporter", "dmabuf_importer"
_PEEK_BYTES = 64


class DmaBufs:
    """Buffers and imports by name, and the functions that the two modules drive meanwhile."""

    def __init__(self) -> None:
        self._bindings = Bindings()
        self._buffers: dict[str, int] = {}
        self._imports: dict[str, int] = {}
        self._views: dict[tuple[str, int, int], Region] = {}

    def bind(self, bdf: str, module: str) -> None:
        """Let a module drive a function until :meth:`unbind`. Raises OSError as Binding does."""
        self._bindings.take(bdf, module)

    def unbind(self, bdf: str) -> None:
        """Give a function back to the driver that had it; ParameterError if it is not ours."""
        if not self._bindings.give_back(bdf):
            raise ParameterError(f"device: {bdf} is bound to neither module")

    def export(self, name: str, words: str, *, by_child: bool = False) -> dict[str, Any]:
        """``export`` of the exporter, under a name.

        :param by_child: by a process that hands the descriptor over and ends.
        """
        self._check_free(name)
        command = f"export {words}"
        if not by_child:
            answer = ask(EXPORTER, command)
            fd = answer.pop("fd", -1)
        else:
            answer, fd = _export_in_child(command)
        if fd >= 0:
            self._buffers[name] = fd
        return answer

    def adopt(self, name: str, fd: int) -> None:
        """Keep a dma-buf that comes from elsewhere, under a name."""
        self._check_free(name)
        self._buffers[name] = fd

    def buffer(self, name: str) -> int:
        """Its descriptor; ParameterError if there is none."""
        if name not in self._buffers:
            raise ParameterError(f"buffer: there is no {name!r}")
        return self._buffers[name]

    def close_buffer(self, name: str) -> None:
        """Close our descriptor; importers may still hold the buffer."""
        os.close(self.buffer(name))
        del self._buffers[name]

    def exporter(self, verb: str, name: str, *words: object) -> dict[str, Any]:
        """``revoke``, ``restore``, ``move``, ``state`` … of a buffer."""
        return ask(EXPORTER, " ".join(map(str, (verb, self.buffer(name), *words))))

    def mmap(self, name: str, size_bytes: int) -> dict[str, Any]:
        """Map the dma-buf itself into this process and read its first bytes."""
        try:
            mapping = mmap.mmap(self.buffer(name), size_bytes)
        except OSError as error:
            return {"errno": error.errno, "hex": ""}
        with mapping:
            return {"errno": 0, "hex": mapping[:_PEEK_BYTES].hex()}

    def importer(self, name: str, command: str) -> list[dict[str, Any]]:
        """A command of an import; it is made by the first."""
        if name not in self._imports:
            self._imports[name] = open_file(IMPORTER)
        return tell(self._imports[name], command)

    def close_import(self, name: str) -> None:
        """Unmap, detach, and forget an import."""
        if name in self._imports:
            os.close(self._imports.pop(name))

    def put(self, name: str, data: bytes) -> None:
        """Write the memory that the importing device copies from."""
        os.pwrite(self._imports[name], data, BOUNCE_OFFSET)

    def get(self, name: str, size_bytes: int) -> bytes:
        """Read the memory that the importing device copies to."""
        return os.pread(self._imports[name], size_bytes, BOUNCE_OFFSET)

    def view(self, bdf: str, bar: int, offset: int) -> Region:
        """A page of a BAR, as this machine's CPU sees it."""
        key = (bdf, bar, offset)
        if key not in self._views:
            path = f"{sysfs.ROOT}/bus/pci/devices/{bdf}/resource{bar}"
            fd = os.open(path, os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
            try:
                self._views[key] = Region(mmap.mmap(fd, mmap.PAGESIZE, offset=offset))
            finally:
                os.close(fd)
        return self._views[key]

    def close(self) -> None:
        """Give everything back, importers first."""
        for view in self._views.values():
            view.close()
        self._views.clear()
        for name in list(self._imports):
            self.close_import(name)
        for name in list(self._buffers):
            self.close_buffer(name)
        self._bindings.close()

    def _check_free(self, name: str) -> None:
        if name in self._buffers:
            raise ParameterError(f"name: there is a buffer {name!r} already")


def _export_in_child(command: str) -> tuple[dict[str, Any], int]:
    import json  # noqa: PLC0415  loaded when needed
    import socket  # noqa: PLC0415

    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if not pid:
            try:
                answer = ask(EXPORTER, command)
                fd = answer.pop("fd", -1)
                socket.send_fds(theirs, [json.dumps(answer).encode()], [fd] * (fd >= 0))
            finally:
                os._exit(0)
        theirs.close()
        data, fds, _, _ = socket.recv_fds(ours, ANSWER_BYTES, 1)
        os.waitpid(pid, 0)
    if not data:
        raise OSError(0, f"{command}: the exporting process died")
    answer = json.loads(data)
    return answer, fds[0] if fds else -1
