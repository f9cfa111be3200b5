# SPDX-License-Identifier: Apache-2.0
"""The end of a boot that is to be saved: wait on the console for the host to say who this is.

``python3 -ISu …/guest_agent/resume.py [FUNCTION…] </dev/console``, started by init just before the
SSH server. The FUNCTIONs hold the places of devices that cannot be saved; the kernel lets them go
first, and their bridges keep the windows. Everything that a rack has of its own (keys, name,
entropy, time) arrives as one line of base64 after the machine was restored, so that a saved machine
holds none of it. Then the kernel looks again at the buses that the line names.
"""

from __future__ import annotations

import base64
import fcntl
import json
import mmap
import os
import struct
import termios
import time

WAITING = "testbed: waiting"
UNFIT = "testbed: unfit"  # the restored machine is not what a cold boot would have made
IORESOURCE_MEM = 0x200  # include/linux/ioport.h
# include/uapi/linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h; Linux 5.14
SPARED_KIB = 64 << 10  # for the kernel, which must not look for memory meanwhile
HOST_KEY = "/etc/dropbear/host_key"
AUTHORIZED = "/root/.ssh/authorized_keys"


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
        write(f"/sys/bus/pci/devices/{function}/remove", b"1")


def clear_free_memory() -> None:
    """Make the kernel's free pages zero, which need not be saved: it clears each that it lends."""
    with open("/proc/meminfo") as table:
        free = next(int(line.split()[1]) for line in table if line.startswith("MemFree:"))
    size_bytes = (free - SPARED_KIB) << 10
    if size_bytes > 0:
        with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(MADV_POPULATE_WRITE)


def silence(fd: int) -> None:
    """No echo and no editing: the line is secret, and longer than an edited one may be."""
    mode = termios.tcgetattr(fd)
    mode[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON | termios.ISTRIP)
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(fd, termios.TCSANOW, mode)


def read_line(fd: int) -> bytes:
    """All up to a line's end."""
    data = b""
    while not data.endswith(b"\n"):
        data += os.read(fd, 4096)
    return data


def become(identity: dict[str, object]) -> None:
    """Take on what the host says: entropy first, as keys are exchanged with it."""
    seed = base64.b64decode(str(identity["entropy"]))
    with open("/dev/urandom", "wb", buffering=0) as pool:
        fcntl.ioctl(pool, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(pool, RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, float(str(identity["time_s"])))
    write("/proc/sys/kernel/hostname", str(identity["name"]).encode())
    write("/etc/hostname", f"{identity['name']}\n".encode())
    write(HOST_KEY, base64.b64decode(str(identity["host_key"])))
    write(AUTHORIZED, f"{identity['client_key']}\n".encode())
    buses = identity["buses"]
    for bus in buses if isinstance(buses, list) else []:
        write(f"/sys/class/pci_bus/0000:{bus:02x}/rescan", b"1")


def unplaced(functions: list[str]) -> str:
    """The first of these functions that is not there or has a BAR without an address; or ""."""
    for function in functions:
        try:
            with open(f"/sys/bus/pci/devices/{function}/resource") as table:
                bars = [line.split() for line in table][:6]
        except FileNotFoundError:
            return f"{function} is not there"
        if any(int(flags, 16) & IORESOURCE_MEM and not int(start, 16) for start, _, flags in bars):
            return f"{function} has a BAR without an address"
    return ""


def main(functions: list[str]) -> None:
    """Wait, and become."""
    forget(functions)
    os.makedirs("/root/.ssh", 0o700, exist_ok=True)
    clear_free_memory()
    silence(0)
    os.write(1, f"{WAITING}\n".encode())
    become(json.loads(base64.b64decode(read_line(0))))
    if problem := unplaced(functions):
        os.write(1, f"{UNFIT}: {problem}\n".encode())


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
