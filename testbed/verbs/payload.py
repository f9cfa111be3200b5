# SPDX-License-Identifier: Apache-2.0
"""The options of `testbed run kselftest`."""

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
    from testbed.topology.plan import RackPlan

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class PayloadWords:
    """What the user said of other people's tests."""

    collection: str | None = None
    devices: tuple[str, ...] = ()
    timeout_s: float | None = None

    def payload(
        self, suites: Sequence[str], kernel: str | None, plan: RackPlan | None
    ) -> Payload | None:
        """What the suite `kselftest` shall run; None if that is not among ``suites``.

        :param kernel: the kernel of the command line; a tree has its selftests in it.
        :param plan: the rack that will boot, if one will.
        :raises InputError: they were not built, there is no such device, or nobody asked for them.
        """
        from testbed.harness.runner import KSELFTEST
        from testbed.payload.collection import DEFAULT_COLLECTION, Payload, find_collection
        from testbed.suites.kselftest import cases

        if KSELFTEST not in suites:
            if self != PayloadWords():
                raise InputError(
                    "--collection, --device and --program-timeout belong to kselftest",
                    hint="testbed run kselftest --kernel-tree DIR",
                )
            return None
        tree = Path(kernel) if kernel and Path(kernel).is_dir() else None
        collection = find_collection(self.collection or DEFAULT_COLLECTION, tree)
        payload = Payload(collection, self.devices, self.timeout_s)
        if plan is not None:
            list(cases(payload, plan))  # wrong words are told before anything boots
        return payload


def payload_options(function: F) -> F:
    """`--collection`, `--device`, `--program-timeout`; the verb gets them as ``words``."""

    @functools.wraps(function)
    def verb(
        *args: Any,
        collection: str | None,
        devices: tuple[str, ...],
        program_timeout: float | None,
        **more: Any,
    ) -> Any:
        return function(*args, words=PayloadWords(collection, devices, program_timeout), **more)

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
            help="kselftest: what each program may take; four times what its collection says, "
            "if not given.",
        ),
    )
    decorated: Any = verb
    for option in reversed(options):
        decorated = option(decorated)
    return cast(F, decorated)
