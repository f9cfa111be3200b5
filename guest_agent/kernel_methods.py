# SPDX-License-Identifier: Apache-2.0
"""The agent's methods around kernel modules that the host builds, and the table of all methods."""

from __future__ import annotations

from guest_agent.rpc import ParameterError, Registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypeVar

    from guest_agent.hw.vfio import VfioContainer
    from guest_agent.observe.kmsg import KernelLog
    from guest_agent.p2p.probe import Probe

    class Closeable(Protocol):
        """Something that is given back when the agent ends."""

        def close(self) -> None:
            """Give it back."""

    A = TypeVar("A", bound=Closeable)


# ruff: noqa: PLC0415  as in guest_agent/agent.py

registry = Registry()


class KernelMethods:
    """Modules that were sent, and what is asked through them; a part of the agent."""

    def __init__(self) -> None:
        self._inserted: list[str] = []
        self._areas: dict[type, Closeable] = {}
        self._probe_made: Probe | None = None

    @property
    def _log(self) -> KernelLog:
        raise NotImplementedError

    def vfio(self, number: int) -> VfioContainer:
        """The container of that number; the agent has them."""
        raise NotImplementedError

    @property
    def _probe(self) -> Probe:
        if self._probe_made is None:
            from guest_agent.p2p.probe import Probe

            self._probe_made = Probe()
        return self._probe_made

    def area(self, kind: type[A]) -> A:
        """What an area of methods holds: made when first wanted, given back at the agent's end."""
        held = self._areas.get(kind)
        if not isinstance(held, kind):
            held = self._areas[kind] = kind()
        return held

    def end_area(self, kind: type[A]) -> None:
        """Give back what it holds now; it begins anew when it is next wanted."""
        held = self._areas.pop(kind, None)
        if held is not None:
            held.close()

    def release_kernel(self) -> None:
        """Give the providers back and unload what was inserted, last first."""
        while self._areas:
            self._areas.popitem()[1].close()
        if self._probe_made is not None:
            self._probe_made.close()
            self._probe_made = None
        if self._inserted:
            from guest_agent import modules

            while self._inserted:
                name = self._inserted.pop()
                if modules.is_loaded(name):
                    modules.remove(name)

    @registry.method("modules.load")
    def _modules_load(
        self, *, name: str, data: str, parameters: list[str] | None = None, keep: bool = False
    ) -> dict[str, Any]:
        """``data``: zlib, then base64. ``keep``: it stays when this agent ends."""
        import binascii
        import zlib

        from guest_agent import modules

        if not name.isidentifier():
            raise ParameterError(f"name: {name!r} is no module's name")
        try:
            module = zlib.decompress(binascii.a2b_base64(data))
        except (ValueError, zlib.error) as error:
            raise ParameterError(f"data: {error}") from None
        records = modules.insert(name, module, parameters or [], self._log)
        if not keep:
            self._inserted.append(name)
        return {"records": records}

    @registry.method("modules.unload")
    def _modules_unload(self, *, name: str) -> dict[str, Any]:
        from guest_agent import modules

        modules.remove(name)
        if name in self._inserted:
            self._inserted.remove(name)
        return {}

    @registry.method("modules.loaded")
    def _modules_loaded(self, *, names: list[str]) -> dict[str, bool]:
        from guest_agent import modules

        return {name: modules.is_loaded(name) for name in names}

    @registry.method("p2p.provide")
    def _p2p_provide(
        self, *, device: str, bar: int, size_bytes: int = 0, offset: int = 0
    ) -> dict[str, int]:
        return {"start": self._probe.provide(device, bar, size_bytes, offset)}

    @registry.method("p2p.release")
    def _p2p_release(self, *, device: str) -> dict[str, Any]:
        self._probe.release(device)
        return {}

    @registry.method("p2p.distance")
    def _p2p_distance(self, *, provider: str, clients: list[str]) -> dict[str, int | None]:
        return self._probe.distance(provider, clients)

    @registry.method("p2p.publish")
    def _p2p_publish(self, *, provider: str, publish: bool = True) -> dict[str, Any]:
        self._probe.publish(provider, publish)
        return {}

    @registry.method("p2p.find")
    def _p2p_find(self, *, clients: list[str]) -> dict[str, str | None]:
        return {"provider": self._probe.find(clients)}

    @registry.method("p2p.map_type")
    def _p2p_map_type(
        self, *, provider: str, client: str, size_bytes: int = 4096
    ) -> dict[str, Any]:
        return self._probe.map_type(provider, client, size_bytes)

    @registry.method("p2p.map_types")
    def _p2p_map_types(
        self, *, provider: str, clients: list[str], size_bytes: int = 4096
    ) -> dict[str, dict[str, Any]]:
        return self._probe.map_types(provider, clients, size_bytes)

    @registry.method("p2p.router")
    def _p2p_router(self, *, rescan: bool = False) -> dict[str, Any]:
        from guest_agent.p2p import router

        if rescan:
            router.rescan()
        return router.state()

    @registry.method("p2p.route")
    def _p2p_route(self, *, container: int) -> dict[str, Any]:
        from guest_agent.p2p import router

        return router.route(self.vfio(container))
