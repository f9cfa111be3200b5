# SPDX-License-Identifier: Apache-2.0
"""What a keeper owns: its children, their shared memory, the runtime folder.

Part of the keeper's process (:mod:`testbed.machine.keeper`), so standard library only, and no
pathlib: its import would be a tenth of the keeper's start.
"""
# ruff: noqa: PTH104, PTH106, PTH108, PTH118, PTH208

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import time

TYPE_CHECKING = False  # typing's, without the rest of it
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from testbed.machine.nursery import Nursling

GONE_PREFIX = ".gone-"  # a runtime folder on its way out has this name
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


class CallError(Exception):
    """A call that cannot be done; the fields go to the client as they are."""

    def __init__(self, kind: str, message: str, **fields: object) -> None:
        super().__init__(message)
        self.fields: dict[str, object] = {"kind": kind, "message": message, **fields}


class Process:
    """One child: what it is and what became of it. ``pid`` is 0 before it was started."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.pid = 0
        self.exit_status: int | None = None
        self.started_s = 0.0
        self.ended_s = 0.0

    @property
    def running(self) -> bool:
        """It was started and has not been reaped."""
        return self.pid != 0 and self.exit_status is None

    def status(self) -> dict[str, object]:
        """As a client sees it."""
        state = "running" if self.running else "ended" if self.pid else "waiting"
        return {
            "name": self.name,
            "kind": self.spec["kind"],
            "state": state,
            "pid": self.pid,
            "exit_status": self.exit_status,
            "started_s": self.started_s,
            "ended_s": self.ended_s,
        }

    def start(self, memory: dict[str, tuple[int, int]], nursling: Nursling | None = None) -> None:
        """Fork and exec; returns when the new program runs. ``nursling`` may become it instead.

        :raises CallError: it could not be executed.
        """
        if self.spec["ready"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.spec["ready"])  # an earlier run's would be taken for this one's
        if nursling is not None and "nursed" in self.spec and nursling.begin(self.spec, memory):
            self.pid = nursling.pid
            self.exit_status = None
            self.started_s = time.time()
            return
        keeper = os.getpid()
        reader, writer = os.pipe()  # closed by a successful exec, else it says what went wrong
        pid = os.fork()
        if pid == 0:
            _become(self.spec, memory, keeper, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            complaint = pipe.read()
        self.pid = pid
        self.exit_status = None
        self.started_s = time.time()
        if complaint:
            os.waitpid(pid, 0)
            self.exit_status, self.ended_s = 127, time.time()
            text = complaint.decode(errors="replace")
            raise CallError("launch", text, process=self.name, exit_status=None)

    def signal(self, number: int) -> None:
        """To the process and whatever it started: it leads a process group of its own."""
        if self.running:
            os.killpg(self.pid, number)

    def reap(self) -> bool:
        """Take note if it ended; true if that is new."""
        if not self.running or not os.waitid(
            os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            return False
        self.signal(signal.SIGKILL)  # children it left behind, while its group's number is ours
        self.exit_status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.ended_s = time.time()
        return True


def _become(
    spec: dict[str, Any], memory: dict[str, tuple[int, int]], keeper: int, complaint: int
) -> NoReturn:
    """In the child: turn into the program, or write what failed to ``complaint`` and end."""
    try:
        become_child(keeper)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, exec keeps that
            signal.signal(number, signal.SIG_DFL)
        os.chdir(spec["folder"])
        log = os.open(spec["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        wanted = {0: null, 1: log, 2: log}
        wanted |= {int(fd): memory[name][0] for fd, name in spec["memory"]}
        complaint = descriptors_in_place(wanted, complaint)
        program = spec["argv"][0]
        try:
            os.execvpe(program, spec["argv"], spec["environment"])  # noqa: S606 (as meant)
        except OSError as error:  # its own name is the last place on PATH
            raise OSError(error.errno, error.strerror, program) from error
    except OSError as error:
        os.write(complaint, f"{error.filename}: {error.strerror}".encode())
    finally:
        os._exit(127)


def become_child(keeper: int) -> None:
    """A session of its own, no core files, and an end with the keeper's.

    :raises OSError: the kernel refused it.
    """
    os.setsid()
    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != keeper:  # it died before the line above could take effect
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def above(fd: int, last: int = 9) -> int:
    """A copy of a descriptor with a number above ``last``, closed by exec."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, last + 1)


def descriptors_in_place(wanted: dict[int, int], other: int = -1) -> int:
    """Have each source of ``wanted`` (target → source) at its target, and nothing else open.

    Targets stay open in a program that is executed.

    :param other: one more that stays; :returns: where it is now, closed by exec.
    """
    # Sources are moved above all targets first, so that no dup2 overwrites a later source.
    last = max(wanted)
    if other >= 0:
        other = above(other, last)
    moved = {fd: above(source, last) for fd, source in wanted.items()}
    for fd, source in moved.items():
        os.dup2(source, fd, inheritable=True)
    close_fds({*wanted, other})
    return other


def close_fds(keep: set[int]) -> None:
    """Close all descriptors but these."""
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) not in keep:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(int(entry))


def make_memory(name: str, size_bytes: int) -> int:
    """Shared memory of a fixed size; QEMU and the host map the same pages (memfd_create(2))."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def open_memory(_name: str, path: str) -> int:
    """A file of memory that its users can only read, or copy."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def remove_tree(folder: str) -> None:
    """Remove a folder and all in it; what is gone already, or goes meanwhile, is fine."""
    with contextlib.suppress(FileNotFoundError):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)
        os.rmdir(folder)


def remove_runtime_folder(folder: str) -> None:
    """Remove a rack's folder, whose lock the caller holds.

    It gets another name first: the rack's own name is free in one step, and whoever takes it
    cannot meet a half-removed folder.
    """
    parent, name = os.path.split(folder)
    gone = os.path.join(parent, f"{GONE_PREFIX}{name}-{os.urandom(4).hex()}")
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    remove_tree(gone)
