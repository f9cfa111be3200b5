# SPDX-License-Identifier: Apache-2.0
"""What was worked out once, as JSON under a hash of all that it depends on.

``CACHE/remembered/KIND-KEY.json``; the oldest are removed. Who recalls something judges whether it
still holds, and can always work it out again: so nothing here is an error.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from testbed.host import product


def file_of(kind: str, key: str, cache: Path) -> Path:
    """Where it is, or will be."""
    return cache / "remembered" / f"{kind}-{key}.json"


def recall(kind: str, key: str, cache: Path) -> Any:
    """The value, or None."""
    return product.read_json(file_of(kind, key, cache))


def remember(kind: str, key: str, cache: Path, value: Any, *, most: int) -> None:
    """Keep a value, and at most so many of its kind. If it cannot be written, it is not."""
    file = file_of(kind, key, cache)
    with contextlib.suppress(OSError):
        product.write_json(file, value, in_order=False)
        kept = sorted(file.parent.glob(f"{kind}-*.json"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-most]:
            old.unlink(missing_ok=True)


def state_of(folder: Path, *, below: bool = False) -> list[tuple[str, int, int, int]]:
    """The files in a folder, in a fixed order: names, modes, sizes and times tell when it was
    changed. Byte code is none of it, and of what cannot be read there is nothing.

    :param below: and in all folders in it.
    """
    state = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = entry.stat()
            if entry.is_file():
                state.append((entry.path, found.st_mode, found.st_size, found.st_mtime_ns))
            elif below and entry.name != "__pycache__":
                state += state_of(Path(entry.path), below=True)
    return sorted(state)
