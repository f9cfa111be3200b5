# SPDX-License-Identifier: Apache-2.0
"""A machine's way up and down: who won the race at its start, what it died of, how it was stopped.

:class:`Watch` is the one place that says of a machine that ended *why*: QEMU never came up
(:class:`LaunchError`), the guest kernel panicked (:class:`GuestPanic`), it runs but never became
ready (:class:`NoHello`), or it went away (:class:`LinkLost`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import (
    GuestPanic,
    LaunchError,
    LinkLost,
    LostError,
    NoHello,
    TestbedError,
)
from testbed.machine.client import Exit, Keeper
from testbed.machine.command import NodeCommand
from testbed.machine.console import Console, read_tail

if TYPE_CHECKING:
    from testbed.machine.qmp import Qmp

PAUSE_S = 0.02
SETTLE_S = 1.0  # between a machine's death and the last trace of it: exit status, panic text
FULL_BYTES = 1 << 20  # less free disk than this explains a log that stopped


class Watch:
    """One machine's console and process, watched from its start on.

    ``exit_of``   how QEMU ended, None while it runs; :meth:`Keeper.exit_of` for that node.
    ``qemu_log``  what QEMU itself said.

    Its owner sets ``control_answered`` when QMP has answered (from then on QEMU did start, and its
    end is the machine's), and ``hello_seen`` when the agent has said hello.
    """

    def __init__(
        self,
        command: NodeCommand,
        *,
        console: Console,
        qemu_log: Path,
        exit_of: Callable[[], Exit | None],
    ) -> None:
        self.command = command
        self.node = command.node
        self.console = console
        self.control_answered = False
        self.hello_seen = False
        self._qemu_log = qemu_log
        self._exit_of = exit_of

    def check(self) -> None:
        """Return if the machine lives.

        :raises GuestPanic: the console shows a panic, whatever became of QEMU.
        :raises LaunchError: QEMU ended before QMP answered; with status, command line and words.
        :raises LinkLost: QEMU ended later.
        """
        ended = self._exit_of()
        self.console.poll()  # after the question, so that its last words are in
        if self.console.panic:
            raise self._panic()
        if ended is None:
            return
        if not self.control_answered:
            raise LaunchError(
                f"{self.node}: QEMU {ended} before its control socket answered",
                node=self.node,
                exit_status=ended.status,
                command=self.command.argv,
                output=read_tail(self._qemu_log) or self.console.tail(),
            )
        raise LinkLost(
            f"{self.node}: QEMU {ended}",
            node=self.node,
            console_tail=self.console.tail(),
            exit_status=ended.status,
            hint=self._hint(),
        )

    def _panic(self) -> GuestPanic:
        """Wait a moment for the rest of the trace; with panic=-1 QEMU's end is the end of it."""
        deadline_s = time.monotonic() + SETTLE_S
        while (ended := self._exit_of()) is None and time.monotonic() < deadline_s:
            time.sleep(PAUSE_S)
        self.console.poll()
        first = f" ({self.console.oops})" if self.console.oops else ""
        return GuestPanic(
            f"{self.node}: the guest kernel panicked: {self.console.panic}{first}",
            node=self.node,
            console_tail=self.console.trace(),
            exit_status=None if ended is None else ended.status,
        )

    def _hint(self) -> str:
        if self.console.oops:
            return f"the guest kernel said: {self.console.oops}"
        try:
            if shutil.disk_usage(self._qemu_log.parent).free < FULL_BYTES:
                return f"the disk that holds {self._qemu_log.parent} is full"
        except OSError:
            pass
        words = read_tail(self._qemu_log).strip()
        return f"QEMU said: {words.splitlines()[-1]}" if words else ""

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the guest's init says on the console that it is ready.

        :raises NoHello: it did not within ``timeout_s``; or what :meth:`check` raises.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.check()
            if self.console.ready:
                return
            if time.monotonic() > deadline_s:
                raise self._no_hello(f"the guest was not ready within {timeout_s:g} s")
            time.sleep(PAUSE_S)

    def _no_hello(self, what: str) -> NoHello:
        self.console.poll()
        said = f": the guest said: {self.console.complaint}" if self.console.complaint else ""
        return NoHello(
            f"{self.node}: {what}{said}",
            node=self.node,
            console_tail=self.console.tail(),
            hint=self._hint(),
        )

    def blame(self, error: LinkLost) -> TestbedError:
        """The error to raise instead of a broken link's: what the machine died of, if it did.

        Of a machine that lives and whose agent was never heard: :class:`NoHello`.
        """
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            try:
                self.check()
            except (LostError, LaunchError) as death:
                return death
            if time.monotonic() > deadline_s:
                break
            time.sleep(PAUSE_S)
        if not self.hello_seen:
            return self._no_hello(error.message.removeprefix(f"{self.node}: "))
        return LinkLost(
            error.message,
            node=self.node,
            console_tail=error.console_tail or self.console.tail(),
            hint=error.hint or self._hint(),
        )


class StoppedBy(StrEnum):
    """Which step of :func:`stop_machine` ended the machine."""

    ALREADY = "already"
    AGENT = "agent"
    ACPI = "acpi"
    QUIT = "quit"
    KILL = "kill"


@dataclass(frozen=True)
class StopDeadlines:
    """How long each step may take; a step of 0 s is left out."""

    agent_s: float = 5.0
    acpi_s: float = 3.0
    quit_s: float = 3.0
    kill_s: float = 10.0


def stop_machine(
    keeper: Keeper,
    node: str,
    *,
    agent: Callable[[float], object] | None = None,
    qmp: Qmp | None = None,
    deadlines: StopDeadlines = StopDeadlines(),
) -> StoppedBy:
    """End one machine as gently as it lets us: agent, then ACPI, then QMP ``quit``, then SIGKILL.

    ``agent``  asks the guest to power off, within the seconds it is given; the machine may go
               away under it.

    :raises LinkLost: QEMU is still there after SIGKILL.
    :raises LostError: the keeper is gone, and the machine with it.
    """
    if keeper.exit_of(node) is not None:
        return StoppedBy.ALREADY
    steps: list[tuple[StoppedBy, float, Callable[[float], object]]] = []
    if agent is not None:
        steps.append((StoppedBy.AGENT, deadlines.agent_s, agent))
    if qmp is not None:
        # The first presses the machine's power button; a guest may take no notice.
        steps.append((StoppedBy.ACPI, deadlines.acpi_s, _command(qmp, "system_powerdown")))
        steps.append((StoppedBy.QUIT, deadlines.quit_s, _command(qmp, "quit")))
    steps.append((StoppedBy.KILL, deadlines.kill_s, lambda _timeout_s: keeper.kill(node)))
    for name, timeout_s, act in steps:
        if timeout_s > 0 and _try(keeper, node, act, timeout_s):
            return name
    raise LinkLost(f"{node}: QEMU did not end within {deadlines.kill_s:g} s of SIGKILL", node=node)


def _command(qmp: Qmp, command: str) -> Callable[[float], object]:
    return lambda timeout_s: qmp.execute(command, timeout_s=timeout_s)


def _try(keeper: Keeper, node: str, act: Callable[[float], object], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    left_s = timeout_s
    try:
        act(timeout_s)
        left_s = deadline_s - time.monotonic()
    except LinkLost:  # perhaps because it worked
        left_s = min(deadline_s - time.monotonic(), SETTLE_S)
    except TestbedError:
        left_s = 0.0
    return keeper.wait_exit(node, left_s) is not None
