# SPDX-License-Identifier: Apache-2.0
"""Where things were on the host of a run: ``places.json`` in its folder.

Logs and command lines are full of such paths. The file says which parts of them mean nothing to
anyone else, so that a bundle can leave them out wherever it is made; it is in no bundle itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from testbed.errors import HostError
from testbed.host import paths

FILE_NAME = "places.json"
_SOURCE = Path(__file__).resolve().parents[2]


def places(run_dir: Path) -> dict[str, str]:
    """Absolute paths by what they are."""
    return {
        "RUN": str(run_dir.absolute()),
        "CACHE": str(paths.cache_dir().absolute()),
        "STATE": str(paths.state_dir().absolute()),
        "RUNTIME": str(paths.runtime_dir().absolute()),
        "TESTBED": str(_SOURCE),
        "CWD": str(Path.cwd()),
        "HOME": str(Path("~").expanduser()),
    }


def write_places(run_dir: Path) -> None:
    """Keep them.

    :raises HostError: the file cannot be written.
    """
    file = run_dir / FILE_NAME
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            json.dump(places(run_dir), opened, indent=1)
    except OSError as error:
        raise HostError(f"cannot write {file}: {error.strerror}") from error


def read_places(run_dir: Path) -> Mapping[str, str]:
    """What :func:`write_places` wrote; those of this host for a run that kept none."""
    try:
        data = json.loads((run_dir / FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return places(run_dir)
    return {str(name): str(path) for name, path in data.items()}
