# SPDX-License-Identifier: Apache-2.0
"""The options of `testbed run kselftest` and `testbed run kvm-unit-tests`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from testbed.errors import InputError

if TYPE_CHECKING:
    from testbed.payload.collection import Payload
    from testbed.payload.multiboot import MachinePrograms
    from testbed.topology.plan import RackPlan

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class PayloadWords:
    """What the user said of other people's tests."""

    collection: str | None = None
    devices: tuple[str, ...] = ()
    timeout_s: float | None = None
    tree: Path | None = None
    programs: tuple[str, ...] = ()

    def payload(
        self, suites: Sequence[str], kernel: str | None, plan: RackPlan | None
    ) -> Payload | MachinePrograms | None:
        """What the suite of other people's tests shall run; None if none is among ``suites``.

        :param kernel: the kernel of the command line; a tree has its selftests in it.
        :param plan: the rack that will boot, if one will.
        :raises InputError: they were not built, there is no such device, or nobody asked for them.
        """
        from testbed.harness.shipped import KSELFTEST, KVM_UNIT_TESTS

        if KSELFTEST in suites and KVM_UNIT_TESTS in suites:
            raise InputError(f"{KSELFTEST} and {KVM_UNIT_TESTS}: one of them in a run")
        if KSELFTEST not in suites and (self.collection or self.devices):
            raise InputError(
                "--collection and --device belong to kselftest",
                hint="testbed run kselftest --kernel-tree DIR",
            )
        if KVM_UNIT_TESTS in suites:
            if self.tree is None:
                raise InputError("whose kvm-unit-tests?", hint="--tree DIR of the checkout")
            from testbed.payload.multiboot import find_programs

            return find_programs(self.tree, self.programs, self.timeout_s)
        if self.tree or self.programs:
            raise InputError(
                "--tree and --program belong to kvm-unit-tests",
                hint="testbed run kvm-unit-tests --tree DIR",
            )
        if KSELFTEST not in suites:
            if self.timeout_s:
                raise InputError("--program-timeout belongs to kselftest and kvm-unit-tests")
            return None
        # Not before: this imports pytest, and a rack's start would wait for that.
        from testbed.payload.collection import DEFAULT_COLLECTION, Payload, find_collection
        from testbed.suites.kselftest import cases

        tree = Path(kernel) if kernel and Path(kernel).is_dir() else None
        collection = find_collection(self.collection or DEFAULT_COLLECTION, tree)
        payload = Payload(collection, self.devices, self.timeout_s)
        if plan is not None:
            list(cases(payload, plan))  # wrong words are told before anything boots
        return payload


def payload_options(function: F) -> F:
    """`--collection` to `--program`; the verb gets them as ``words``."""

    @functools.wraps(function)
    def verb(
        *args: Any,
        collection: str | None,
        devices: tuple[str, ...],
        program_timeout: float | None,
        tree: Path | None,
        programs: tuple[str, ...],
        **more: Any,
    ) -> Any:
        words = PayloadWords(collection, devices, program_timeout, tree, programs)
        return function(*args, words=words, **more)

    options = (
        click.option(
            "--collection",
            metavar="NAME|DIR",
            help="kselftest: which collection of the kernel tree, or the folder of a built one.  "
            "[default: vfio]",
        ),
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="NAME",
            help="kselftest: the device that the programs get; may be given several times.",
        ),
        click.option(
            "--program-timeout",
            type=click.FloatRange(min=0, min_open=True, max=86400),
            metavar="SECONDS",
            help="kselftest, kvm-unit-tests: what each program may take; four times what its "
            "collection says, if not given.",
        ),
        click.option(
            "--tree",
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="kvm-unit-tests: the checkout, built.",
        ),
        click.option(
            "--program",
            "programs",
            multiple=True,
            metavar="NAME",
            help="kvm-unit-tests: which program; may be given several times.  "
            "[default: intel-iommu]",
        ),
    )
    decorated: Any = verb
    for option in reversed(options):
        decorated = option(decorated)
    return cast(F, decorated)
