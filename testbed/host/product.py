# SPDX-License-Identifier: Apache-2.0
"""Products of the set-up: folders that appear finished or not at all and never change again.

A product's name is a hash of all that it was made from, so two set-ups that run at once make the
same thing and a third one finds it. A *pointer* says which product an entry of the manifest led
to, so that a finished set-up asks no mirror.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from testbed.errors import SetupError

LOCK_TIMEOUT_S = 900.0
_POLL_S = 0.1


@contextlib.contextmanager
def exclusive(
    lock_file: Path, waiting: Callable[[], None], *, timeout_s: float = LOCK_TIMEOUT_S
) -> Iterator[None]:
    """Be the only process that builds this; while another one does, ``waiting`` is called.

    ``waiting`` is called every tenth of a second; what it raises ends the wait.

    The kernel releases the lock when its holder dies, however it dies.

    :raises SetupError: the other one did not end within ``timeout_s``.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"another set-up has held {lock_file} for {timeout_s:.0f} s"
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path]:
    """A folder to build in that becomes ``final`` when the block ends well, and else vanishes.

    The caller holds the lock of this kind of product: what another, killed set-up left is removed.

    :raises SetupError: no space, no permission: what the system said, and where.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left_over in final.parent.glob(f".{final.name}.*"):
            remove_tree(left_over)
        partial = final.parent / f".{final.name}.{os.getpid()}"
        partial.mkdir()
        try:
            yield partial
            partial.rename(final)
        except BaseException:
            remove_tree(partial)
            raise
    except OSError as error:
        raise disk_error(error, final) from error


def disk_error(error: OSError, place: Path) -> SetupError:
    """What the system said about a file, as the user's error."""
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or set TESTBED_CACHE_DIR to a folder that has it"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "set TESTBED_CACHE_DIR to a folder that you may write to"
    return SetupError(f"{error.filename or place}: {error.strerror or error}", hint=hint)


def remove_tree(folder: Path) -> None:
    """Remove a folder whatever the modes of what is in it; another process may be at it too."""

    def unlock_and_retry(
        function: Callable[..., object], name: str, error: tuple[Any, BaseException, Any]
    ) -> None:
        reason = error[1]
        if isinstance(reason, FileNotFoundError):
            return
        if not isinstance(reason, PermissionError):
            raise reason
        with contextlib.suppress(FileNotFoundError):
            Path(name).parent.chmod(0o700)
            if function in (os.unlink, os.rmdir):
                function(name)
            else:  # it is a folder that cannot be listed
                Path(name).chmod(0o700)
                shutil.rmtree(name)

    shutil.rmtree(folder, onerror=unlock_and_retry)


def write_json(path: Path, value: Any, *, in_order: bool = True) -> None:
    """Write ``value`` so that a reader sees the old text or the new one, never half of it.

    :param in_order: of its keys; else as the value has them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, sort_keys=in_order) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, or None if there is nothing readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
