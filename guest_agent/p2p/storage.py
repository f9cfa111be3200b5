# SPDX-License-Identifier: Apache-2.0
"""Memory that is freed when the last of its users lets go of it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.p2p.backend import Backend, Backing


class Storage:
    """One backing and the number of its users: the buffer, mappings, a copy under way."""

    def __init__(self, backend: Backend, backing: Backing) -> None:
        self._backend = backend
        self.backing = backing
        self._users = 1

    def take(self) -> Storage:
        """One user more; returns itself."""
        self._users += 1
        return self

    def drop(self) -> None:
        """One user less; the last one frees the memory."""
        self._users -= 1
        if self._users == 0:
            self._backend.free(self.backing)
