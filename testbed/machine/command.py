# SPDX-License-Identifier: Apache-2.0
"""The values that pass between the command line's maker and the one who runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

# Names inside a node's runtime folder, which is QEMU's working directory: argv names them
# relatively, so that it is the same on every host and no socket path is too long.
QMP_SOCKET = "qmp.sock"  # the harness's control channel
QMP_USER_SOCKET = "qmp-user.sock"  # `testbed qmp`, while a suite holds the other one
QMP_MODELS_SOCKET = "qmp-models.sock"  # the device models' own, if the node has any
AGENT_SOCKET = "agent.sock"  # forwarded to where the guest's agents are made
SSH_SOCKET = "ssh.sock"  # forwarded to the guest's port 22
CONSOLE_SOCKET = "console.sock"  # the serial console, for a person
MODELS_SPEC = "models.json"  # what the node's device models are
MODELS_SOCKET = "models.sock"  # their control socket
MODELS_READY = "models.ready"  # is there when they may be connected to
LOG_LINK = "log"  # a link to the node's folder of logs, in the run folder
MACHINE_STATE = "machine.state"  # a saved machine's devices, for one that is restored
CONSOLE_LOG = "console.log"  # in LOG_LINK: all that the serial console said
QEMU_LOG = "qemu.log"  # in LOG_LINK: QEMU's own standard output and error


BELLS_READY = "bells.ready"  # is there when the rack's bells may be connected to
BELL_VECTORS = 2  # of each bell


def bell_socket(qemu_id: str) -> str:
    """Where the server of bells waits for QEMU."""
    return f"{qemu_id}.bell"


def vfio_socket(qemu_id: str) -> str:
    """Where a device model waits for QEMU."""
    return f"{qemu_id}.vfu"


class Start(StrEnum):
    """How a machine comes to life."""

    BOOT = "boot"
    SAVE = "save"  # boot, in memory that can be copied
    RESTORE = "restore"  # go on where a saved machine stopped


@dataclass(frozen=True)
class LaunchContext:
    """What the command line must know of this host, as a value.

    ``qemu``         the words that start QEMU (with the tool root: its loader and library path).
    ``environment``  what those words need in their environment.
    ``accelerator``  ``tcg`` or ``kvm``, as probed.
    ``kernel``       bzImage, or an ELF vmlinux with a PVH note.
    ``initrd``       the node's own initial RAM disk.
    ``quick_firmware``  qboot, by a name that this QEMU finds; "" if it may have none.
    ``tsc_khz``      how fast this host's time stamp counter runs; 0 if that is not known.
    ``kernel_args``  words added to the guest kernel's command line after the testbed's own.
    ``console_verbose``  the guest prints its whole log on the console while it boots.
    ``start``        boot; boot to be saved; or restore from MACHINE_STATE, without kernel.
    ``program``      ``kernel`` is no kernel but a test program in its place: it speaks on the
        serial port and ends the machine through ``isa-debug-exit`` (kvm-unit-tests).
    """

    qemu: tuple[str, ...]
    environment: Mapping[str, str]
    accelerator: str
    kernel: Path
    initrd: Path
    quick_firmware: str = ""
    tsc_khz: int = 0
    kernel_args: tuple[str, ...] = ()
    console_verbose: bool = False
    start: Start = Start.BOOT
    program: bool = False


@dataclass(frozen=True)
class MemoryFd:
    """Memory that exists before QEMU does: ``fd`` in QEMU, named after its function.

    ``file``  it is this file's, which can only be read; if "", it is shared memory, new and zero.
    """

    fd: int
    name: str
    size_bytes: int
    file: str = ""


@dataclass(frozen=True)
class NodeCommand:
    """One QEMU, ready to be started in the node's runtime folder."""

    node: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    memory: tuple[MemoryFd, ...] = ()
