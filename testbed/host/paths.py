# SPDX-License-Identifier: Apache-2.0
"""Where things are kept: cache (can be made again), state (worth keeping), runtime, shipped data.

======== ==================================== ===============================
kind     default                              instead
======== ==================================== ===============================
cache    ``$XDG_CACHE_HOME/testbed``          ``TESTBED_CACHE_DIR``
state    ``$XDG_STATE_HOME/testbed``          ``TESTBED_STATE_DIR``
runtime  ``$XDG_RUNTIME_DIR/testbed``         ``TESTBED_RUNTIME_DIR``
======== ==================================== ===============================

Without a usable ``XDG_RUNTIME_DIR`` the runtime folder is ``/tmp/testbed-UID``: socket paths may
have at most 107 bytes, so it cannot be just anywhere.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from testbed.errors import HostError

_PACKAGE = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """The folder of downloads and products; not created here."""
    chosen = os.environ.get("TESTBED_CACHE_DIR")
    return Path(chosen) if chosen else _home("XDG_CACHE_HOME", ".cache") / "testbed"


def state_dir() -> Path:
    """The folder of what is worth keeping (runs, probe results); not created here."""
    chosen = os.environ.get("TESTBED_STATE_DIR")
    return Path(chosen) if chosen else _home("XDG_STATE_HOME", ".local/state") / "testbed"


def _home(variable: str, default: str) -> Path:
    """A folder of the XDG Base Directory Specification; its default is below the user's own."""
    chosen = os.environ.get(variable, "").strip()
    return Path(chosen) if chosen else Path.home() / default


def runtime_dir() -> Path:
    """The folder of sockets and locks, made with mode 0700 if it is missing.

    :raises HostError: it belongs to someone else, others may enter it, or it cannot be made.
    """
    chosen = os.environ.get("TESTBED_RUNTIME_DIR")
    folder = Path(chosen) if chosen else _default_runtime_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise HostError(f"the runtime folder {folder} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise HostError(
            f"the runtime folder {folder} belongs to someone else",
            hint="remove it, or set TESTBED_RUNTIME_DIR to a short path of your own",
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def _default_runtime_dir() -> Path:
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session:
        folder = Path(session)
        try:
            found = folder.stat()
        except OSError:
            found = None
        if found and found.st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
            return folder / "testbed"
    return Path("/tmp") / f"testbed-{os.getuid()}"  # noqa: S108 (0700 and owner are checked)


def new_run_dir(name: str) -> Path:
    """A fresh name for the folder of a run's logs and products, in the user's state folder."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return state_dir() / "runs" / f"{stamp}-{name}-{os.urandom(2).hex()}"


def data_dir(name: str) -> Path:
    """A folder that comes with the testbed: ``images``, ``topologies`` or ``guest_agent``.

    In a checkout it is at the top of the tree; in an installed wheel below ``testbed/_data``.

    :raises HostError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise HostError(f"this installation of the testbed has no '{name}' folder")
