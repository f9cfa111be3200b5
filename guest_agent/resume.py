# SPDX-License-Identifier: Apache-2.0
"""The end of a boot that is to be saved: wait for the host to say who this is, and become it.

A part of :mod:`guest_agent.listener`. In the restored machine its devices are as after a reset: so
no driver has one when it is saved, and their settings are kept, and given back after.
All of the agent is loaded, and the first agent of the restored machine waits for its connection. It
says hello as soon as its devices are in place. Everything that a rack has of its own (keys, name,
entropy, time) arrives behind that, so that a saved machine holds none of it: in one message, after
its length in SIZE_DIGITS decimal digits. Calls wait for it, and for the drivers of disks.
"""

from __future__ import annotations

import _socket
import binascii
import contextlib
import fcntl
import gc
import mmap
import os
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_agent.agent import Agent
    from guest_agent.hw.config_state import Kept

SIZE_DIGITS = 6  # testbed/warm/restore.py writes them
WAITING = "testbed: waiting"  # testbed/warm/restore.py looks for both
UNFIT = "testbed: unfit"
# include/uapi/linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h; Linux 5.14
SPARED_KIB = 64 << 10  # for the kernel, which must not look for memory meanwhile
HOST_KEY = "/etc/dropbear/host_key"
AUTHORIZED = "/root/.ssh/authorized_keys"
RANDOM = "/dev/urandom"
HOST_NAME = "/proc/sys/kernel/hostname"
NAME_FILE = "/etc/hostname"
DISKS_FILE = "/etc/testbed/disks"  # guest_agent/hw/storage.py reads it

# What a test would load first; and where the host put what it built for this kernel.
KERNEL_MODULES = ("vfio_pci", "vfio_iommu_type1")
SENT_MODULES = "/etc/testbed/modules"
PCI = "/sys/bus/pci"
DISK_DRIVER = "nvme"
DISKS, WITHOUT_DISKS = b"disks", b"without_disks"
SETTLE_S = 5.0
PAUSE_S = 0.01

_own: dict[str, int] = {}  # files for what this machine has of its own, empty and open
_kept: list[Kept] = []  # by function that is as after a reset in the restored machine
_drivers: list[tuple[str, str]] = []  # functions that had one


def write(path: str, data: bytes) -> None:
    """One write, as sysfs wants it; a new file is its owner's only."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def release(functions: Sequence[str]) -> None:
    """Take these functions from their drivers, and keep their settings."""
    from guest_agent.hw.config_state import Kept  # noqa: PLC0415  after load_agent

    for function in functions:
        with contextlib.suppress(FileNotFoundError):  # most have none
            driver = os.path.basename(os.readlink(f"{PCI}/devices/{function}/driver"))
            write(f"{PCI}/drivers/{driver}/unbind", function.encode())
            _drivers.append((function, driver))
    _kept.extend(Kept(function) for function in functions)


def open_own() -> None:
    """Make room for what a machine has of its own; to find a file takes a restored one long."""
    for path in (RANDOM, HOST_NAME, NAME_FILE, HOST_KEY, AUTHORIZED, DISKS_FILE):
        _own[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def connect_once() -> None:
    """Have the kernel make its network's secrets, and then patch the code that looks for them.

    It does so at the first connection (include/linux/once.h).
    """
    listener, wire = _socket.socket(), _socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    wire.connect(listener.getsockname())
    wire.close()
    listener.close()


def clear_free_memory() -> None:
    """Make the kernel's free pages zero, which need not be saved: it clears each that it lends."""
    with open("/proc/meminfo") as table:
        free = next(int(line.split()[1]) for line in table if line.startswith("MemFree:"))
    size_bytes = (free - SPARED_KIB) << 10
    if size_bytes > 0:
        with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(MADV_POPULATE_WRITE)


def load_agent() -> None:
    """Import all of the agent; no rack's first call then waits for it."""
    package = __file__.rpartition("/")[0]
    above = package.rpartition("/")[0]
    for folder, _, files in os.walk(package):
        for file in files:
            name = f"{folder}/{file}".removeprefix(f"{above}/")
            if name.endswith(".py") and not name.endswith("__.py"):
                # One that cannot be imported says so to who calls it.
                with contextlib.suppress(Exception):
                    __import__(name.removesuffix(".py").replace("/", "."))
    # What is never looked at again by the collector is not copied for each agent.
    gc.collect()
    gc.freeze()


def load_modules() -> None:
    """The kernel's modules that racks want; one that it refuses is asked for again, and says so."""
    from guest_agent import modules  # noqa: PLC0415  after load_agent
    from guest_agent.observe.kmsg import KernelLog  # noqa: PLC0415

    for name in KERNEL_MODULES:
        with contextlib.suppress(OSError):
            modules.load(name)
    log = KernelLog()
    for file in sorted(os.listdir(SENT_MODULES)):
        with open(f"{SENT_MODULES}/{file}", "rb") as stream:
            modules.insert(file.removesuffix(".ko"), stream.read(), [], log)
    log.close()


def read_message(fd: int) -> list[bytes]:
    """The words of the message, and nothing after it. :raises EOFError: there is none."""
    return _read(fd, int(_read(fd, SIZE_DIGITS))).split(b" ")


def _read(fd: int, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        part = os.read(fd, size_bytes - len(data))
        if not part:
            raise EOFError("the host went away before it said who this is")
        data += part
    return data


def become(words: list[bytes]) -> None:
    """Take on what the host says, entropy first.

    :param words: entropy (base64), the time in seconds, the name, the host's private key (base64),
        the public key of who may log in, which alone has spaces, and whether disks are wanted.
    :raises ValueError: it is no such message. :raises OSError: the kernel refused something.
    """
    entropy, time_s, name, host_key, *client_key, disks = words
    if disks not in (DISKS, WITHOUT_DISKS):
        raise ValueError(f"{disks!r} says nothing of disks")
    seed = binascii.a2b_base64(entropy)
    fcntl.ioctl(_own[RANDOM], RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
    fcntl.ioctl(_own[RANDOM], RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, float(time_s))
    os.write(_own[HOST_NAME], name)
    os.write(_own[NAME_FILE], name + b"\n")
    os.write(_own[HOST_KEY], binascii.a2b_base64(host_key))
    os.write(_own[AUTHORIZED], b" ".join(client_key) + b"\n")
    os.write(_own[DISKS_FILE], disks)


def let_go() -> None:
    """In a process that puts nothing in place, or has done so."""
    for each in _kept:
        each.close()
    _kept.clear()
    for fd in _own.values():
        os.close(fd)
    _own.clear()


def reseed() -> None:
    """In each process that was saved: its random numbers are no other machine's from now on."""
    if "random" in sys.modules:
        sys.modules["random"].seed()


def settle(wire: int) -> None:
    """All that need not be before the hello; returns when disks are there, as after a boot, unless
    the host says that nobody will look at them: then they stay without a driver.

    :raises EOFError: the host went away. :raises ValueError, OSError: as :func:`become`.
    """
    words = read_message(wire)
    become(words)
    let_go()
    reseed()
    if words[-1] == WITHOUT_DISKS:
        _drivers[:] = [each for each in _drivers if each[1] != DISK_DRIVER]
    for function, driver in _drivers:
        with contextlib.suppress(OSError):  # as in a boot, where its driver does not want it
            write(f"{PCI}/drivers/{driver}/bind", function.encode())
    deadline_s = time.monotonic() + SETTLE_S
    for function, driver in _drivers:
        while driver == DISK_DRIVER and not has_disk(function) and time.monotonic() < deadline_s:
            time.sleep(PAUSE_S)


def has_disk(function: str) -> bool:
    """The disk behind an NVMe function has a name."""
    try:
        (controller,) = os.listdir(f"{PCI}/devices/{function}/nvme")
        names = os.listdir(f"{PCI}/devices/{function}/nvme/{controller}")
    except (FileNotFoundError, ValueError):
        return False
    return any(name.startswith("nvme") for name in names)


def get_ready(functions: Sequence[str]) -> None:
    """Have all done that a restored machine need not do.

    :param functions: addresses of those that will be as after a reset.
    :raises Exception: it cannot be; the console says so.
    """
    try:
        os.makedirs("/root/.ssh", 0o700, exist_ok=True)
        load_agent()
        load_modules()
        open_own()
        connect_once()
        release(functions)
        clear_free_memory()
    except Exception as error:
        os.write(1, f"{UNFIT}: {type(error).__name__}: {error}\n".encode())
        raise


def first_agent() -> Agent:
    """The agent, which has read the hundreds of lines that a kernel says while it boots."""
    from guest_agent.agent import Agent  # noqa: PLC0415  after load_agent

    agent = Agent()
    with contextlib.suppress(OSError):  # a call that wants it meets that again
        agent.read_log()
    return agent


def wait() -> None:
    """Say that this machine may be saved; what follows is the restored one."""
    os.write(1, f"{WAITING}\n".encode())


def answer(wire: int) -> str:
    """Put the devices in place; why that cannot be, said over ``wire``, or ""."""
    try:
        problem = next(filter(None, (each.give_back() for each in _kept)), "")
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        import json  # noqa: PLC0415  slow, and there already

        os.write(wire, json.dumps({"unfit": problem}).encode() + b"\n")
    return problem
