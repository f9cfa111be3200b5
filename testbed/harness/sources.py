# SPDX-License-Identifier: Apache-2.0
"""Where the racks of a run come from: a topology to boot, or a rack that runs already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from testbed import bare, deploy, rack
from testbed.errors import CapabilityMissing, InputError
from testbed.instruments.interface import Rack
from testbed.topology.engines import ENGINES
from testbed.topology.model import Topology, with_overrides
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan


class TopologySource:
    """Boots racks of its own; each keeps its logs in a folder of ``run_dir``."""

    restartable = True

    def __init__(
        self,
        topology: Topology,
        run_dir: Path,
        *,
        options: deploy.StartOptions | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.topology = topology
        self.plan: RackPlan = place(topology)
        self._run_dir = run_dir
        self._options = options
        self._say = say

    def start(self, topology: Topology, label: str) -> Rack:
        """Boot; LaunchError, LostError."""
        return deploy.start(
            topology, run_dir=self._run_dir / label, options=self._options, say=self._say
        )

    def run_program(self, program: Path, label: str, timeout_s: float) -> bare.ProgramEnd:
        """Run a program in the kernel's place, on a machine as the first node's; HostError."""
        return bare.run_program(
            self.topology,
            program,
            run_dir=self._run_dir / label,
            timeout_s=timeout_s,
            options=self._options,
            say=self._say,
        )


class RunningSource(TopologySource):
    """The rack that an earlier command started; it is left running. Variants are booted."""

    restartable = False

    def __init__(
        self, name: str, run_dir: Path, *, options: deploy.StartOptions | None = None
    ) -> None:
        self._rack = rack.attach(name)
        super().__init__(self._rack.topology, run_dir, options=options)

    def start(self, topology: Topology, label: str) -> Rack:
        """The rack itself, or a variant of it."""
        if topology is self.topology:
            return self._rack
        return super().start(topology, label)


def engine_sources(
    topology: Topology, run_dir: Path, options: deploy.StartOptions
) -> dict[str, TopologySource | CapabilityMissing]:
    """The same rack with each engine, or why it cannot be; each in a folder of its own."""
    sources: dict[str, TopologySource | CapabilityMissing] = {}
    for engine in ENGINES:
        try:
            other = with_overrides(topology, engine=engine)
            sources[engine] = TopologySource(other, run_dir / engine, options=options)
        except InputError as error:  # igb is not for more than 14 ports
            sources[engine] = CapabilityMissing(f"a rack with {engine} engines: {error}")
    return sources
