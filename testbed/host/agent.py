# SPDX-License-Identifier: Apache-2.0
"""The agent's files for a guest: named by their content, byte-compiled once per content.

The guest gets ``/opt/testbed/agent/HASH/guest_agent/``; editing the agent makes another HASH and
another archive, and rebuilds no image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import SetupError
from testbed.host import cpio, product
from testbed.host.digest import digest
from testbed.host.image import GuestPython

BUILDER = 1
PACKAGE = "guest_agent"
GUEST_FOLDER = "/opt/testbed/agent"
_HASH_LENGTH = 16


@dataclass(frozen=True)
class AgentBundle:
    """The agent as it goes into a guest.

    ``hash``    of its sources; the agent says it in its hello.
    ``folder``  in the guest: what has to be on Python's path.
    ``archive`` on the host.
    """

    hash: str
    folder: str
    archive: Path


def sources(folder: Path) -> Iterator[Path]:
    """The files that make the agent, in a fixed order."""
    for path in sorted(folder.rglob("*.py")):
        if "__pycache__" not in path.parts:
            yield path


def agent_hash(folder: Path) -> str:
    """The name of the agent's present content: 16 hexadecimal digits.

    :raises SetupError: the folder holds no agent.
    """
    state = hashlib.sha256()
    found = False
    try:
        for path in sources(folder):
            found = True
            data = path.read_bytes()
            state.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode() + data)
    except OSError as error:
        raise product.disk_error(error, folder) from error
    if not found:
        raise SetupError(f"{folder} holds no agent")
    return state.hexdigest()[:_HASH_LENGTH]


def bundle(folder: Path, python: GuestPython, cache: Path) -> AgentBundle:
    """The agent in ``folder``, ready for guests with this Python.

    :raises SetupError: it is no valid Python; no space.
    """
    name = agent_hash(folder)
    guest_folder = f"{GUEST_FOLDER}/{name}"
    final = cache / "agents" / digest(BUILDER, name, python.tag)
    archive = final / "agent.cpio"
    if not archive.is_file():
        try:
            with product.exclusive(cache / "agents" / "agent.lock", lambda: None):
                if not archive.is_file():
                    with product.building(final) as partial:
                        entries = list(_entries(folder, python, guest_folder, partial / "compiled"))
                        product.remove_tree(partial / "compiled")
                        (partial / "agent.cpio").write_bytes(cpio.archive(entries))
        except OSError as error:
            raise product.disk_error(error, final) from error
    return AgentBundle(name, guest_folder, archive)


def _entries(
    folder: Path, python: GuestPython, guest_folder: str, scratch: Path
) -> Iterator[cpio.Entry]:
    """Sources (tracebacks show them) and byte code that is never checked against them."""
    work = []
    for source in sources(folder):
        below = source.relative_to(folder)
        shown = Path(guest_folder) / PACKAGE / below
        yield cpio.from_file(str(shown), source, 0o644)
        compiled = f"__pycache__/{below.stem}.{python.tag}.pyc"
        work.append((source, str(shown), scratch / below.parent / compiled))
    python.compile(work, optimize=0)
    for _, shown_path, target in work:
        yield cpio.from_file(f"{Path(shown_path).parent}/__pycache__/{target.name}", target)
