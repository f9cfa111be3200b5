# SPDX-License-Identifier: Apache-2.0
"""A topology file to a Topology: the one way in, and the place where input errors get their lines.

bytes → text (UTF-8) → ``vars:`` and ``-s`` settings → template → YAML with places → model → checks
and a trial placement. Each stage reports all of its faults at once, with line and column of the
user's own file, also where a template's loop has moved the lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from testbed.errors import Diagnostic, InputError
from testbed.topology.document import MOST_FILE_BYTES, read_document
from testbed.topology.model import Topology, from_data
from testbed.topology.placement import attempt
from testbed.topology.problem import Problem, nearest
from testbed.topology.validation import explain

# What may still refuse a topology (each Problem is then shown at its place), or complete it.
Admission = Callable[[Topology], tuple[Topology, tuple[Problem, ...]]]

STDIN = "-"


def load(
    path: str | Path, settings: Mapping[str, str], *, admit: Admission | None = None
) -> Topology:
    """The topology in a file, or on standard input for ``-``; ``settings`` are those of ``-s``.

    :param admit: has a last look at a topology that is right in itself, and may complete it.

    InputError with every fault found.
    """
    content, name, folder = b"", "<stdin>", Path.cwd()
    if str(path) == STDIN:
        content = sys.stdin.buffer.read(MOST_FILE_BYTES + 1)
    else:
        content, name, folder = read(Path(path)), str(path), Path(path).absolute().parent
    return load_bytes(content, name, settings, folder=folder, admit=admit)


def load_text(text: str, name: str, settings: Mapping[str, str]) -> Topology:
    """The topology in ``text``, which errors call ``name``."""
    return load_bytes(text.encode("utf-8", "surrogatepass"), name, settings)


def load_bytes(
    content: bytes,
    name: str,
    settings: Mapping[str, str],
    *,
    folder: Path | None = None,
    admit: Admission | None = None,
) -> Topology:
    """The topology in the bytes of a file called ``name``; ``folder`` is where it stands."""
    document = read_document(content, name, settings)
    try:
        topology = from_data(document.data, folder=folder)
    except ValidationError as error:
        found = explain(error, Topology)
    else:
        found = attempt(topology).problems
        if admit is not None and not found:
            topology, found = admit(topology)
    if found:
        raise document.error(found)
    return topology


def read(path: Path) -> bytes:
    """The file's bytes, up to one more than are allowed; InputError names the nearest file."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        close = ""
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            close = nearest(path.name, (p.name for p in path.parent.glob("*.y*ml")))
        message = (error.strerror or str(error)).lower()
        raise InputError(
            diagnostics=[Diagnostic(str(path), 0, 0, message, nearest=close)]
        ) from None
