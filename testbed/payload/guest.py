# SPDX-License-Identifier: Apache-2.0
"""A collection in a guest: brought there with the libraries that it lacks, and run.

A program's standard output and error come as they are printed, so that what it said before the
machine died is known. It is killed at its deadline, with whatever it started in its folder.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from testbed.errors import CapabilityMissing, LinkLost, TestbedError
from testbed.instruments.interface import Channel, RackNode
from testbed.payload.collection import Collection, Program
from testbed.payload.libraries import linkage, wanted
from testbed.results.ktap_reader import Ending

GUEST_FOLDER = "/run/testbed-payload"
MAX_OUTPUT_BYTES = 4 << 20

_LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_TURN_S = 0.2  # between looks at whether the machine lives
_END_S = 5.0  # between a program's end and the news of it
_SHIP_S = 300.0

# ld.so's own words about a program that it cannot start.
_UNLINKED = re.compile(r"error while loading shared libraries: .+|.*: version `[^']+' not found.*")


class GuestCollection:
    """A collection in the guest of ``node``.

    :param folder: where it goes there.
    :raises TestbedError: LinkLost and its kin if the machine died.
    """

    def __init__(self, node: RackNode, collection: Collection, folder: str = GUEST_FOLDER) -> None:
        self._node = node
        self._collection = collection
        self._folder = f"{folder}/{collection.name}"
        self._own_libraries = f"{folder}/lib"
        self._brought: set[str] = set()
        self._send(collection.archive(), folder)
        self._there = set(self._run(f"ls {_LIBRARIES} {self._own_libraries}").split())

    def check(self, program: Program) -> None:
        """Bring what else the program needs.

        :raises CapabilityMissing: naming what is neither in the guest nor on this host.
        """
        if not program.built:
            raise CapabilityMissing(f"{program.path} was not built")
        path = self._collection.folder / program.path
        needed = program.interpreter or linkage(path).loader
        if needed and not self._has(needed):
            raise CapabilityMissing(f"{program.path} needs {needed}, which the guest lacks")
        if program.interpreter:
            return
        found = wanted(path, lambda name: name in self._there | self._brought)
        if found.missing:
            lacking = ", ".join(f"{name} (for {user})" for name, user in found.missing.items())
            raise CapabilityMissing(
                f"libraries that neither the guest nor this host has: {lacking}",
                hint="link the program statically",
            )
        if found.shipped:
            self._send(_archive(found.shipped), self._own_libraries)
            self._brought |= set(found.shipped)

    def run(
        self,
        program: Program,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> tuple[str, Ending]:
        """Run it to its end: what it printed, and how it ended.

        An :class:`Ending` without a status means that it was killed at its deadline.

        :raises CapabilityMissing: the guest's loader cannot link it.
        :raises Died: the machine died; with what the program had said.
        """
        if self._brought:
            environment = {**environment, "LD_LIBRARY_PATH": self._own_libraries}
        exports = "".join(f"export {k}={shlex.quote(v)}; " for k, v in environment.items())
        words = shlex.join([f"./{program.path}", *arguments])
        command = f"exec 2>&1 </dev/null; cd {self._folder} || exit 126; {exports}{words}; exit $?"
        output = bytearray()
        try:
            channel = self._node.link.open_channel(command)
            with contextlib.closing(channel):
                status = self._follow(channel, output, timeout_s)
                if status is None:
                    self._kill()
        except LinkLost as error:
            raise Died(_text(output), self._node.blame(error)) from error
        text = _text(output)
        if status is None:
            return text, Ending(None, f"it did not end within {timeout_s:g} s")
        if status != 0 and (unlinked := _UNLINKED.search(text)):
            raise CapabilityMissing(f"{program.path} cannot be linked in the guest: {unlinked[0]}")
        return text, Ending(status)

    def _follow(self, channel: Channel, output: bytearray, timeout_s: float) -> int | None:
        """Its exit status, None at the deadline; what it says goes to ``output``."""
        node = self._node
        deadline_s = time.monotonic() + timeout_s
        channel.settimeout(_TURN_S)
        ended_s = 0.0
        while not ended_s:
            try:
                chunk = channel.recv(1 << 16)
                output += chunk[: MAX_OUTPUT_BYTES - len(output)]
                ended_s = 0.0 if chunk else time.monotonic()
            except TimeoutError:
                # What it left running may hold its output open.
                ended_s = time.monotonic() if channel.exit_status_ready() else 0.0
                if not node.alive:
                    raise LinkLost(f"{node.name}: the machine died", node=node.name) from None
            except OSError as error:
                raise LinkLost(f"{node.name}: the link broke ({error})", node=node.name) from error
            if not ended_s and time.monotonic() > deadline_s:
                return None
        while not channel.exit_status_ready():
            if time.monotonic() > ended_s + _END_S:
                raise LinkLost(f"{node.name}: the link closed without a status", node=node.name)
            time.sleep(_TURN_S / 10)
        status = channel.recv_exit_status()
        if status < 0:
            raise LinkLost(f"{node.name}: the link broke", node=node.name)
        return status

    def _kill(self) -> None:
        """Everything that runs in the collection's folder."""
        self._run(
            "for each in /proc/[0-9]*; do"
            f' [ "$(readlink "$each/cwd")" != {self._folder} ] || kill -9 "${{each##*/}}"; done'
        )

    def _has(self, path: str) -> bool:
        return self._node.link.run(f"test -x {shlex.quote(path)}").exit_status == 0

    def _run(self, command: str) -> str:
        return self._node.link.run(command).stdout.decode(errors="replace")

    def _send(self, archive: bytes, folder: str) -> None:
        try:
            sent = self._node.link.run(
                f"mkdir -p {folder} && tar -xf - -C {folder}", stdin=archive, timeout_s=_SHIP_S
            )
        except LinkLost as error:
            raise self._node.blame(error) from error
        if sent.exit_status != 0:
            why = sent.stderr.decode(errors="replace").strip()
            raise TestbedError(f"{self._node.name}: the tests could not be brought there: {why}")


class Died(Exception):
    """The machine died while a program ran: ``said`` before that; ``error`` says of what."""

    def __init__(self, said: str, error: TestbedError) -> None:
        super().__init__(error.message)
        self.said = said
        self.error = error


def _archive(libraries: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in libraries.items():
            tar.add(path, name)
    return buffer.getvalue()


def _text(output: bytes | bytearray) -> str:
    return bytes(output).decode("utf-8", errors="replace")
