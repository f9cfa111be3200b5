# SPDX-License-Identifier: Apache-2.0
"""A device of someone's own, from `FILE.py:CLASS` to an object; whatever goes wrong has a place.

What is loaded here is code that nobody here has read. It runs with a deadline and a limit on what
it can allocate, and each of its failures becomes one :class:`InputError` that names file and line.
"""

from __future__ import annotations

import hashlib
import resource
import signal
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from testbed.errors import InputError
from testbed.models.device import Device

LOAD_TIMEOUT_S: Final = 10.0
# Its own memory only: what it maps of the guest's and of its peers' does not count.
MOST_DATA_BYTES: Final = 2 << 30


class _TookTooLongError(BaseException):
    """Not an Exception, so that the code that takes too long does not catch it by accident."""


def limit_memory() -> None:
    """From now on this process can have :data:`MOST_DATA_BYTES`; beyond it is a MemoryError."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_DATA_BYTES, MOST_DATA_BYTES))


def make_own(
    name: str,
    kind: str,
    options: Mapping[str, object],
    *,
    sha256: str = "",
    timeout_s: float = LOAD_TIMEOUT_S,
) -> Device:
    """The device that ``kind`` (`FILE.py:CLASS`) names, made with ``options`` as keywords.

    :param sha256: what the file has to hold; "" for whatever it holds.
    :raises InputError: no such file or class, other contents, or its code raises, exits, allocates
        without end or is not done after ``timeout_s``. Call it in the main thread.
    """
    file, _, word = kind.rpartition(":")
    path = Path(file)
    if path.suffix != ".py":
        raise InputError(f"device '{name}': no kind '{kind}'", hint="gpu, nic or FILE.py:CLASS")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"device '{name}': {file}: {error.strerror}") from error
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"device '{name}': {file} is not the file it was (sha256 {sha256})")
    with _named(name, path, timeout_s):
        classes = {
            key: value
            for key, value in vars(_execute(path, content)).items()
            if isinstance(value, type) and issubclass(value, Device) and value is not Device
        }
        if word in classes:
            return classes[word](name, **options)
    known = ", ".join(classes) or "none"
    raise InputError(f"device '{name}': {file} has no device class '{word}'; it has: {known}")


def _execute(path: Path, content: bytes) -> types.ModuleType:
    """Run these very bytes as a module; what stands beside the file can be imported by it."""
    sys.dont_write_bytecode = True  # the user's folder is not ours to write to
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    # Dataclasses and pickle look a class's module up by its name.
    sys.modules.setdefault(path.stem, module)
    exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))  # noqa: S102
    return module


@contextmanager
def _named(name: str, path: Path, timeout_s: float) -> Iterator[None]:
    """Whatever is raised within, as an InputError that says where."""

    def too_long(*_: object) -> NoReturn:
        raise _TookTooLongError

    before = signal.signal(signal.SIGALRM, too_long)
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    except _TookTooLongError as error:
        what = f"is not done loading after {timeout_s:g} s"
        raise InputError(f"device '{name}': {_where(error, path)}: {what}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a model that exits is a broken model
        what = traceback.format_exception_only(error)[-1].strip()
        raise InputError(f"device '{name}': {_where(error, path)}: {what}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left_s)  # someone else's, such as a test's


def _where(error: BaseException, path: Path) -> str:
    """``FILE:LINE`` of the innermost line that is the user's, or of the syntax error."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    folder = path.resolve().parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if folder in Path(frame.filename).resolve().parents:
            return f"{frame.filename}:{frame.lineno}"
    return str(path)


def description(device: Device) -> dict[str, Any]:
    """What placement has to know of a device: identity and BARs, as JSON."""
    return {
        "identity": {"vendor": device.identity.vendor, "device": device.identity.device},
        "bars": [
            {
                "index": bar.index,
                "size_bytes": bar.size_bytes,
                "high": bar.is_64bit and bar.prefetchable,  # its place is above 4 GiB
            }
            for bar in device.bars
        ],
    }
