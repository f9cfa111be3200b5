# SPDX-License-Identifier: Apache-2.0
"""Devices of the user's own, before their rack boots: trusted or refused, and what they need.

Their code never runs in this process. A child (:mod:`testbed.models.describe`) makes the device
once and says what BARs it has; that and the file's digest are written into the topology, so that
everything after this stage, and every record, knows them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import HostError, InputError
from testbed.topology.checks import entries_with_places
from testbed.topology.model import OwnDevice, Topology, from_data, to_data
from testbed.topology.placement import attempt, refusal
from testbed.topology.problem import DataPath, Problem, nearest
from testbed.topology.units import MIB, format_size, power_of_two_at_least

if TYPE_CHECKING:
    from testbed.topology.load import Admission

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from testbed.models.describe import main; sys.exit(main())"
)
# To import the file and make the device; the child keeps to it and says where the time went.
LOADING_TIMEOUT_S = 10.0
GRACE_S = 10.0
TOO_LATE = "Timeout ("  # how Python's faulthandler begins when it ends a process
# All of a node's BARs below 4 GiB share 1004 MiB with the chipset and with other devices.
MOST_LOW_BYTES = 512 * MIB


def admission(*, trust: bool) -> Admission:
    """For :func:`testbed.topology.load.load`: refuse devices of the user's own, or examine them.

    Without ``trust`` nothing of their files is read.
    """
    return functools.partial(_admit, trust=trust)


def admit(topology: Topology, *, trust: bool) -> Topology:
    """The topology with what its own devices need filled in.

    :raises InputError: there are some and they are not trusted, or cannot be made; by name, as the
        topology's file is not known here any more.
    """
    admitted, problems = _admit(topology, trust=trust)
    if problems:
        raise refusal(topology, problems)
    return admitted


def summary(topology: Topology) -> dict[str, Any]:
    """Whose code runs in this rack, for its record: by ``node/device`` class, file and digest."""
    return {
        f"{name}/{entry.name}": {"model": entry.model, "sha256": entry.sha256}
        for name, node in topology.nodes.items()
        for entry in node.entries()
        if isinstance(entry, OwnDevice)
    }


def _admit(topology: Topology, *, trust: bool) -> tuple[Topology, tuple[Problem, ...]]:
    own = list(_own_devices(topology))
    if not own:
        return topology, ()
    if not trust:
        return topology, tuple(_untrusted(entry, path) for entry, path in own)
    data = to_data(topology)
    problems: list[Problem] = []
    low: dict[str, int] = {}
    for entry, path in own:
        try:
            digest = _digest(entry)
            seen = _describe(entry.name, entry.model, json.dumps(dict(entry.options)), digest)
        except (InputError, OSError) as error:
            problems.append(_problem(entry, path, error))
            continue
        high_bytes = sum(bar["size_bytes"] for bar in seen["bars"] if bar["high"])
        node = str(path[1])
        low[node] = low.get(node, 0) + sum(b["size_bytes"] for b in seen["bars"] if not b["high"])
        if low[node] > MOST_LOW_BYTES:
            problems.append(_too_low(entry, path, low[node]))
        found = _at(data, path)
        found["sha256"] = digest
        if high_bytes:
            found["bars"] = power_of_two_at_least(max(high_bytes, MIB))
    if problems:
        return topology, tuple(problems)
    completed = from_data(data)
    return completed, attempt(completed).problems


def _own_devices(topology: Topology) -> Iterator[tuple[OwnDevice, DataPath]]:
    for name, node in topology.nodes.items():
        for entry, path in entries_with_places(node.pcie, ("nodes", name, "pcie")):
            if isinstance(entry, OwnDevice):
                yield entry, path


def _at(data: Any, path: DataPath) -> dict[str, Any]:
    for part in path:
        data = data[part]
    found: dict[str, Any] = data
    return found


def _untrusted(entry: OwnDevice, path: DataPath) -> Problem:
    message = f"device '{entry.name}' is code of your own ({entry.file}), which is not trusted"
    wanted = "--trust (in pytest --testbed-trust), if you know what is in it"
    return Problem((*path, "model"), message, wanted)


def _digest(entry: OwnDevice) -> str:
    digest = hashlib.sha256(Path(entry.file).read_bytes()).hexdigest()
    if entry.sha256 not in (None, digest):
        raise InputError(f"{entry.file} is another file: its sha256 is {digest}")
    return digest


def _problem(entry: OwnDevice, path: DataPath, error: InputError | OSError) -> Problem:
    place = (*path, "model")
    if isinstance(error, InputError):
        return Problem(place, error.message)
    file = Path(entry.file)
    message = f"{file}: {(error.strerror or str(error)).lower()}"
    near = ""
    if isinstance(error, FileNotFoundError) and file.parent.is_dir():
        near = nearest(file.name, (p.name for p in file.parent.glob("*.py")))
    return Problem(place, message, nearest=near)


def _too_low(entry: OwnDevice, path: DataPath, size_bytes: int) -> Problem:
    return Problem(
        (*path, "model"),
        f"with '{entry.name}' the node's own devices have {format_size(size_bytes)} of BARs that"
        " stand below 4 GiB",
        f"at most {format_size(MOST_LOW_BYTES)}; is_64bit and prefetchable BARs stand above",
    )


@functools.lru_cache(maxsize=64)
def _describe(name: str, model: str, options: str, sha256: str) -> dict[str, Any]:
    """What the class says that it is; asked once of each class, content and options.

    :raises InputError: it cannot be made. :raises HostError: the child could not be started.
    """
    question = {
        "name": name,
        "kind": model,
        "options": json.loads(options),
        "sha256": sha256,
        "timeout_s": LOADING_TIMEOUT_S,
    }
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", LAUNCHER, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # whatever it starts ends with it
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise HostError(f"cannot start Python: {error.strerror}") from error
    try:
        said, words = child.communicate(json.dumps(question), timeout=LOADING_TIMEOUT_S + GRACE_S)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"device '{name}': {model} is not done loading after {LOADING_TIMEOUT_S:g} s"
        ) from None
    finally:
        if child.returncode is None:  # not waited for, so that the number is still its group's
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    try:
        answer = json.loads(said)
    except ValueError:
        where = _last_place(words, Path(model).parent) or model
        what = "is not done loading" if TOO_LATE in words else _end(child.returncode)
        raise InputError(f"device '{name}': {where}: {what}") from None
    if "error" in answer:
        raise InputError(answer["error"])
    found: dict[str, Any] = answer["device"]
    return found


def _last_place(words: str, folder: Path) -> str:
    """``FILE:LINE`` out of a trace on standard error, or ""."""
    for file, line in re.findall(r'File "([^"\n]+)", line (\d+)', words):
        if folder in Path(file).parents:
            return f"{file}:{line}"
    return ""


def _end(status: int) -> str:
    how = f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return f"its process {how} while it was loaded"
