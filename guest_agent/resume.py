# SPDX-License-Identifier: Apache-2.0
"""The end of a boot that is to be saved: wait for the host to say who this is, and become it.

A part of :mod:`guest_agent.listener`. Functions that hold the places of devices which cannot be
saved are let go by the kernel first, and their bridges keep the windows. All of the agent is
loaded. Everything that a rack has of its own (keys, name, entropy, time) arrives as one line of
JSON after the machine was restored, so that a saved machine holds none of it. Then the kernel looks
again at the buses that the line names.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import gc
import json
import mmap
import os
import struct
import sys
import time

WAITING = "testbed: waiting"  # testbed/warm/restore.py looks for both
UNFIT = "testbed: unfit"
IORESOURCE_MEM = 0x200  # include/linux/ioport.h
# include/uapi/linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h; Linux 5.14
SPARED_KIB = 64 << 10  # for the kernel, which must not look for memory meanwhile
HOST_KEY = "/etc/dropbear/host_key"
AUTHORIZED = "/root/.ssh/authorized_keys"

# What a test would load first; and where the host put what it built for this kernel.
KERNEL_MODULES = ("vfio_pci", "vfio_iommu_type1")
SENT_MODULES = "/etc/testbed/modules"
PCI = "/sys/bus/pci/devices"
DISK_DRIVER = "/sys/bus/pci/drivers/nvme"
DISK_CLASS = "0x0108"
SETTLE_S = 5.0
PAUSE_S = 0.01
ROUTER = "/proc/p2p_router"

FORGOTTEN: list[str] = []  # the functions that must be there again


def write(path: str, data: bytes) -> None:
    """One write, as sysfs wants it; a new file is its owner's only."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def forget(functions: list[str]) -> None:
    """Let the kernel drop these functions."""
    for function in functions:
        write(f"{PCI}/{function}/remove", b"1")


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


def read_line(fd: int) -> bytes:
    """All up to a line's end. :raises EOFError: there is none."""
    data = b""
    while not data.endswith(b"\n"):
        part = os.read(fd, 1 << 16)
        if not part:
            raise EOFError("the host went away before it said who this is")
        data += part
    return data


def become(identity: dict[str, object]) -> None:
    """Take on what the host says: entropy first, as keys are exchanged with it."""
    seed = base64.b64decode(str(identity["entropy"]))
    with open("/dev/urandom", "wb", buffering=0) as pool:
        fcntl.ioctl(pool, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(pool, RNDRESEEDCRNG)
    if "random" in sys.modules:
        sys.modules["random"].seed()
    time.clock_settime(time.CLOCK_REALTIME, float(str(identity["time_s"])))
    write("/proc/sys/kernel/hostname", str(identity["name"]).encode())
    write("/etc/hostname", f"{identity['name']}\n".encode())
    write(HOST_KEY, base64.b64decode(str(identity["host_key"])))
    write(AUTHORIZED, f"{identity['client_key']}\n".encode())
    buses = identity["buses"]
    for bus in buses if isinstance(buses, list) else []:
        write(f"/sys/class/pci_bus/0000:{bus:02x}/rescan", b"1")
    if os.path.exists(ROUTER):  # it would wait a moment for more
        write(ROUTER, b"rescan")


def unplaced(functions: list[str]) -> str:
    """The first of these functions that is not there or has a BAR without an address; or ""."""
    for function in functions:
        try:
            with open(f"{PCI}/{function}/resource") as table:
                bars = [line.split() for line in table][:6]
        except FileNotFoundError:
            return f"{function} is not there"
        if any(int(flags, 16) & IORESOURCE_MEM and not int(start, 16) for start, _, flags in bars):
            return f"{function} has a BAR without an address"
    return ""


def be_quick() -> None:
    """Before everyone else: as soon as devices are found, the kernel begins to probe disks."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def be_ordinary() -> None:
    """As any process."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def settle() -> None:
    """Return when disks that have a driver are there, as they are after a boot."""
    be_ordinary()
    if not os.path.isdir(DISK_DRIVER):
        return
    deadline_s = time.monotonic() + SETTLE_S
    for function in FORGOTTEN:
        with open(f"{PCI}/{function}/class") as file:
            if not file.read().startswith(DISK_CLASS):
                continue
        while not has_disk(function) and time.monotonic() < deadline_s:
            time.sleep(PAUSE_S)


def has_disk(function: str) -> bool:
    """The disk behind an NVMe function has a name."""
    try:
        (controller,) = os.listdir(f"{PCI}/{function}/nvme")
        names = os.listdir(f"{PCI}/{function}/nvme/{controller}")
    except (FileNotFoundError, ValueError):
        return False
    return any(name.startswith("nvme") for name in names)


def wait(functions: list[str]) -> None:
    """Get ready to be saved, and say so; returns at once, perhaps in a restored machine."""
    FORGOTTEN[:] = functions
    try:
        forget(functions)
        os.makedirs("/root/.ssh", 0o700, exist_ok=True)
        load_agent()
        load_modules()
        clear_free_memory()
    except Exception as error:
        os.write(1, f"{UNFIT}: {type(error).__name__}: {error}\n".encode())
        raise
    os.write(1, f"{WAITING}\n".encode())


def answer(wire: int) -> str:
    """Read who this is from ``wire`` and become it; why that cannot be, said there too, or ""."""
    try:
        be_quick()
        become(json.loads(read_line(wire)))
        problem = unplaced(FORGOTTEN)
    except (OSError, ValueError, KeyError, EOFError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        os.write(wire, json.dumps({"unfit": problem}).encode() + b"\n")
    return problem
