# SPDX-License-Identifier: Apache-2.0
"""Modules of this project in a running machine: built for its kernel, sent, loaded, unloaded.

They travel over the agent's channel when something wants them, so that no boot pays for them.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

from testbed.errors import AgentError, ModuleError, ModuleStays
from testbed.guest.agent import AgentClient
from testbed.host import built_modules
from testbed.host.progress import Progress

_LOAD_TIMEOUT_S = 60.0
_REFUSALS = {"ModuleRefusedError": ModuleError, "ModuleBusyError": ModuleStays}


class _Node(Protocol):
    @property
    def agent(self) -> AgentClient:
        """Its agent."""

    @property
    def spec(self) -> Any:
        """Its part of the topology; ``kernel`` is read."""


def load(
    node: _Node,
    name: str,
    *,
    parameters: Mapping[str, object] | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Build module ``name`` for the node's kernel if need be, and load it.

    :param keep: it stays when the agent ends; otherwise the agent unloads it then.
    :returns: what the kernel logged meanwhile.
    :raises CapabilityMissing: this kernel cannot have it; names the option or symbol it lacks.
    :raises ModuleBuildError: it does not compile.
    :raises ModuleError: the kernel refused it, with the kernel's reason.
    """
    file = built_modules.module_file(node.spec.kernel, name, progress)
    packed = base64.b64encode(zlib.compress(file.read_bytes(), 6)).decode()
    words = [f"{key}={value}" for key, value in (parameters or {}).items()]
    params = {"name": name, "data": packed, "parameters": words, "keep": keep}
    answer = _call(node, "modules.load", params)
    records: list[dict[str, Any]] = answer["records"]
    return records


def unload(node: _Node, name: str) -> None:
    """Unload module ``name``.

    :raises ModuleStays: names who holds it.
    """
    _call(node, "modules.unload", {"name": name})


def ensure(node: _Node, name: str, *, keep: bool = False, progress: Progress | None = None) -> bool:
    """Load module ``name`` unless it is there; errors as of :func:`load`. Whether it was not."""
    absent = not is_loaded(node, name)
    if absent:
        load(node, name, keep=keep, progress=progress)
    return absent


def is_loaded(node: _Node, name: str) -> bool:
    """Whether the guest's kernel has it."""
    return bool(_call(node, "modules.loaded", {"names": [name]})[name])


def _call(node: _Node, method: str, params: Mapping[str, Any]) -> Any:
    try:
        return node.agent.call(method, _LOAD_TIMEOUT_S, **params)
    except AgentError as error:
        if error.remote_type in _REFUSALS:
            raise _REFUSALS[error.remote_type](error.message) from error
        raise
