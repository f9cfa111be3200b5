# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, in one tree, each with an exit code and a hint.

::

    TestbedError                    128  the testbed's own fault (ERROR); aborts a `git bisect run`
    ├── InputError                    2  bad input: nothing was started
    │   ├── RackNameInUse             2
    │   └── NoSuchRack                2
    ├── HostError                   128  this machine cannot, or set-up is not done
    │   ├── SetupError              128  the tool root, image or kernel could not be made
    │   │   ├── MirrorError         128  the package mirror does not answer
    │   │   └── ModuleBuildError    128  a kernel module of ours does not compile, with the reasons
    │   └── LaunchError             128  QEMU did not start: exit status, command line, its words
    ├── LostError                     3  the machine or the link died (LOST), with the console tail
    │   ├── GuestPanic                3
    │   ├── NoHello                   3  it runs, but the agent never answered
    │   └── LinkLost                  3  QEMU ended, a closed channel, a missed deadline, garbage
    ├── DeviceLost                  128  one device's model died; the machine and the others go on
    ├── AgentError                  128  a call failed in the guest: remote type, errno, where
    ├── ModuleError                 128  the guest's kernel refuses a module, or keeps it: why
    ├── QmpError                    128  QEMU refused a command: its error class and description
    ├── CapabilityMissing           125  cannot be shown here (SKIP), naming the capability
    └── Interrupted                 130  Ctrl-C

FAIL (exit 1) is a verdict, not an exception: see :mod:`testbed.results.verdicts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """What the process answers; chosen so that `git bisect run` does the right thing."""

    PASS = 0
    FAIL = 1
    BAD_INPUT = 2
    LOST = 3
    SKIP = 125
    ERROR = 128
    INTERRUPTED = 130


class Diagnostic(NamedTuple):
    """One thing that is wrong with an input, and where.

    ``line`` and ``column`` count from 1; 0 means that the place is not known.
    """

    file: str
    line: int
    column: int
    message: str
    expected: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        place = self.file
        if self.line:
            place += f":{self.line}:{self.column}"
        text = f"{place}: {self.message}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.nearest:
            text += f"; did you mean '{self.nearest}'?"
        return text


class TestbedError(Exception):
    """The root: the testbed's own fault unless a subclass says otherwise."""

    __test__ = False  # pytest: not a test class
    exit_code: ExitCode = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class InputError(TestbedError):
    """Something that the user gave is wrong; all the faults of one stage, at once."""

    exit_code = ExitCode.BAD_INPUT

    def __init__(
        self,
        message: str = "",
        *,
        diagnostics: Sequence[Diagnostic] = (),
        hint: str = "",
    ) -> None:
        self.diagnostics = tuple(diagnostics)
        text = "\n".join([*([message] if message else []), *map(str, self.diagnostics)])
        super().__init__(text, hint=hint)


class RackNameInUse(InputError):
    """A rack of that name runs already."""


class NoSuchRack(InputError):
    """No rack (or node) of that name runs."""


class HostError(TestbedError):
    """This machine cannot do what was asked, or is not set up."""


class SetupError(HostError):
    """The tool root, the guest image or a kernel could not be made."""


class MirrorError(SetupError):
    """The package mirror does not answer, or answers with something else."""


class ModuleBuildError(SetupError):
    """A kernel module of the testbed does not compile for a kernel; the compiler's first words."""


class LaunchError(HostError):
    """QEMU ended before its control socket answered."""

    def __init__(
        self,
        message: str,
        *,
        node: str,
        exit_status: int | None,
        command: Sequence[str],
        output: str,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.node = node
        self.exit_status = exit_status
        self.command = tuple(command)
        self.output = output

    def __str__(self) -> str:
        tail = self.output.strip()
        return self.message + (f"\n--- what it said\n{tail}" if tail else "")


class LostError(TestbedError):
    """The machine or the link to it died: neither PASS nor FAIL."""

    exit_code = ExitCode.LOST

    def __init__(
        self,
        message: str,
        *,
        node: str,
        console_tail: str = "",
        exit_status: int | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.node = node
        self.console_tail = console_tail
        self.exit_status = exit_status

    def __str__(self) -> str:
        tail = self.console_tail.rstrip()
        return self.message + (f"\n--- last lines of {self.node}'s console\n{tail}" if tail else "")


class GuestPanic(LostError):
    """The guest kernel panicked."""


class NoHello(LostError):
    """The machine runs, but its agent did not answer in time."""


class RackGone(LostError):
    """The rack's keeper ended, and so everything of the rack: by `down`, or it was killed."""


class LinkLost(LostError):
    """QEMU ended, the channel closed, a call passed its deadline, or the guest sent garbage."""


class DeviceLost(TestbedError):
    """One device is no more: its model died. The machine and its other devices go on."""

    def __init__(self, message: str, *, node: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.node = node


class AgentError(TestbedError):
    """A call failed inside the guest; the machine is fine.

    ``remote_type`` is the exception's class there, ``errno`` the system's number or None,
    ``where`` the agent's function and line.
    """

    def __init__(
        self, message: str, *, remote_type: str, errno: int | None = None, where: str = ""
    ) -> None:
        super().__init__(message)
        self.remote_type = remote_type
        self.errno = errno
        self.where = where

    def __str__(self) -> str:
        return f"{self.remote_type}: {self.message}" + (f" (at {self.where})" if self.where else "")


class ModuleError(TestbedError):
    """The guest's kernel refuses to load a module, or to let it go; it says why."""


class ModuleStays(ModuleError):
    """It does not let it go: the machine is not as it was, and never will be."""


class QmpError(TestbedError):
    """QEMU refused a command; the machine is fine. ``error_class`` and ``description`` are its."""

    def __init__(self, message: str, *, error_class: str, description: str) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.description = description


class CapabilityMissing(TestbedError):
    """What was asked cannot be shown here: a SKIP that names the missing capability."""

    exit_code = ExitCode.SKIP

    def __init__(self, capability: str, *, hint: str = "") -> None:
        super().__init__(capability, hint=hint)
        self.capability = capability


class Interrupted(TestbedError):
    """The user pressed Ctrl-C, or the process was asked to end."""

    exit_code = ExitCode.INTERRUPTED
