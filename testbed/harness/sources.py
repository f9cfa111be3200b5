# SPDX-License-Identifier: Apache-2.0
"""Where the racks of a run come from: a topology to boot, or a rack that runs already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from testbed import deploy, rack
from testbed.errors import CapabilityMissing, InputError
from testbed.harness.racks import MAIN
from testbed.instruments.interface import Rack
from testbed.topology.engines import ENGINES
from testbed.topology.model import Topology, with_overrides
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

if TYPE_CHECKING:
    from testbed import bare


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
        self._began: Future[Rack] | None = None

    def begin(self) -> None:
        """Boot the rack under test in the background; the first :meth:`start` takes it."""
        began: Future[Rack] = Future()

        def boot() -> None:
            try:
                began.set_result(self._boot(self.topology, MAIN))
            except BaseException as error:  # raised where it is waited for
                began.set_exception(error)

        self._began = began
        # A daemon: the rack's keeper ends the machines when this process ends.
        threading.Thread(target=boot, name=f"boot {MAIN}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """End what :meth:`begin` began if nobody took it and it runs."""
        began, self._began = self._began, None
        if began is not None and began.done() and began.exception() is None:
            began.result().close()

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> Rack:
        """Boot; LaunchError, LostError."""
        if self._began is not None and topology is self.topology and label == MAIN:
            began, self._began = self._began, None
            return began.result()
        return self._boot(topology, label, disks=disks)

    def _boot(self, topology: Topology, label: str, *, disks: bool = True) -> Rack:
        options = replace(self._options or deploy.StartOptions(), disks=disks)
        return deploy.start(topology, run_dir=self._run_dir / label, options=options, say=self._say)

    def run_program(self, program: Path, label: str, timeout_s: float) -> bare.ProgramEnd:
        """Run a program in the kernel's place, on a machine as the first node's; HostError."""
        from testbed.bare import run_program  # noqa: PLC0415  few runs do that

        return run_program(
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

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> Rack:
        """The rack itself, or a variant of it."""
        if topology is self.topology:
            return self._rack
        return super().start(topology, label, disks=disks)


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
