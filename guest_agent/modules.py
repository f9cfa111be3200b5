# SPDX-License-Identifier: Apache-2.0
"""Kernel modules: the kernel's own, loaded when something needs them, and those the host sends.

``/usr/lib/modules/RELEASE/closure`` has a line for each of the kernel's own: its name, then what is
to be loaded for it, in order. A module that is built in has nothing after its name; a kernel
without the file has whatever it has.
"""

from __future__ import annotations

import errno
import os

from guest_agent import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.observe.kmsg import KernelLog

FOLDER = "/usr/lib/modules"
LOADED = "/sys/module"
SENT = "/run/testbed-modules"
PROCESSES = "/proc"


class ModuleRefusedError(OSError):
    """The kernel did not take a module; the message is what it logged about it."""


class ModuleBusyError(OSError):
    """The kernel did not let a module go; the message names who holds it."""


def load(name: str) -> None:
    """Load module ``name`` and what it depends on, unless they are there already.

    Raises OSError(ENOENT) if this kernel has no such module, OSError(EIO) if the kernel refused it.
    """
    if is_loaded(name):
        return
    folder = f"{FOLDER}/{os.uname().release}"
    for module in _closure(folder, name):
        if not is_loaded(module):
            said = _run("insmod", f"{folder}/{module}.ko")
            if said is not None:
                raise OSError(errno.EIO, f"the kernel refused the module {module}: {said}")


def is_loaded(name: str) -> bool:
    """It is there, loaded or built in."""
    return os.path.isdir(f"{LOADED}/{name}")


def _closure(folder: str, name: str) -> list[str]:
    try:
        with open(f"{folder}/closure") as lines:
            for line in lines:
                wanted, *order = line.split()
                if wanted == name:
                    return order
    except FileNotFoundError:
        return []
    raise OSError(errno.ENOENT, f"this kernel has no module {name}")


def insert(name: str, data: bytes, parameters: list[str], log: KernelLog) -> list[dict[str, Any]]:
    """Load a module that the host sent, after what it depends on.

    :param parameters: ``name=value`` words.
    :returns: what the kernel logged meanwhile.
    Raises ModuleRefusedError with the kernel's reason: another version, an unknown symbol, or what
    the module's own start returned. OSError(EEXIST): one of this name is there already.
    """
    if is_loaded(name):
        raise OSError(errno.EEXIST, f"module {name} is loaded already")
    for needed in _depends(data):
        load(needed)
    os.makedirs(SENT, exist_ok=True)
    file = f"{SENT}/{name}.ko"
    with open(file, "wb") as stream:
        stream.write(data)
    mark = log.mark()
    try:
        said = _run("insmod", file, *parameters)
    finally:
        os.unlink(file)
    records, _ = log.since(mark)
    if said is not None:
        # What the loader says starts with the module's name; that it is not the kernel's own
        # (taints) is said of every module of ours.
        about = [each["text"] for each in records if name in each["text"]]
        about = [text for text in about if "taint" not in text]
        raise ModuleRefusedError(errno.EIO, "; ".join(about[:5]) or f"module {name}: {said}")
    return records


def remove(name: str) -> None:
    """Unload module ``name``. Raises ModuleBusyError with its holders, OSError(ENOENT)."""
    if not is_loaded(name):
        raise OSError(errno.ENOENT, f"module {name} is not loaded")
    said = _run("rmmod", name)
    if said is not None or is_loaded(name):
        why = ", ".join(holders(name)) or said or "it stays"
        raise ModuleBusyError(errno.EBUSY, f"module {name} does not unload: {why}")


def holders(name: str) -> list[str]:
    """Who keeps a module: other modules, and the processes that have its device file open."""
    found = [f"module {other}" for other in sysfs.names(f"{LOADED}/{name}/holders")]
    for pid in sysfs.names(PROCESSES):
        if not pid.isdigit():
            continue
        try:
            files = sysfs.names(f"{PROCESSES}/{pid}/fd")
            if any(sysfs.link(f"{PROCESSES}/{pid}/fd/{fd}") == f"/dev/{name}" for fd in files):
                found.append(f"process {pid} ({sysfs.read(f'{PROCESSES}/{pid}/comm')})")
        except OSError:
            continue  # it ended meanwhile
    count = sysfs.read_or(f"{LOADED}/{name}/refcnt", "0")
    if not found and count != "0":
        found.append(f"{count} users in the kernel")
    return found


def _depends(data: bytes) -> list[str]:
    _, found, rest = data.partition(b"\0depends=")
    words = rest.partition(b"\0")[0].decode(errors="replace") if found else ""
    return [word.replace("-", "_") for word in words.split(",") if word]


def _run(*words: str) -> str | None:
    """None if the program succeeded, else what it said."""
    # The standard library has no finit_module(2); one process costs less than importing ctypes.
    read_fd, write_fd = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, write_fd, 2)]
        try:
            pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
        finally:
            os.close(write_fd)
        said = b""
        while part := os.read(read_fd, 4096):
            said += part
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(read_fd)
    return said.decode(errors="replace").strip() or "it failed" if status else None
