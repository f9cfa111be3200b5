# SPDX-License-Identifier: Apache-2.0
"""What was asked of a run, beside its topology: ``options.json`` in the run folder.

With the resolved topology of the record it is all that the same run takes anywhere else. It only
ever gains optional fields; what an old reader would misunderstand becomes ``/2``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from testbed.errors import Diagnostic, InputError
from testbed.results.record import write_atomically

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = "testbed.options/1"
FILE_NAME = "options.json"
ALL_ENGINES = "all"


@dataclass(frozen=True)
class RunOptions:
    """Words of the command line, as a run or a report was given them.

    ``verb``       ``run`` or ``repro``.
    ``suites``     as the user named them; of ``run``.
    ``keyword``    ``-k``. ``mutation``: ``--break``, "" for none.
    ``policy``     ``--policy``, "" if it was not given.
    ``pristine``   a fresh machine for each test.
    ``engine``     ``all``: one engine after the other; else what it says over the topology, or "".
    ``kernel``, ``iommu_mode``  over a report's topology, or "". A run's topology has them in it.
    """

    verb: str
    suites: tuple[str, ...] = ()
    keyword: str = ""
    mutation: str = ""
    engine: str = ""
    kernel: str = ""
    iommu_mode: str = ""
    policy: str = ""
    pristine: bool = False
    schema: str = SCHEMA
    __pydantic_config__: ClassVar = {"extra": "forbid"}


def write_options(options: RunOptions, folder: Path) -> None:
    """Keep them in the run folder (OSError)."""
    write_atomically(folder / FILE_NAME, json.dumps(asdict(options), indent=1).encode() + b"\n")


def read_options(name: str, content: bytes) -> RunOptions:
    """What :func:`write_options` wrote into a file, now called ``name``.

    :raises InputError: it is no such file, or of another version.
    """
    from pydantic import ValidationError  # noqa: PLC0415  slow, and a run only writes them

    try:
        data = json.loads(content)
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            message = f"options of another version: {schema!r}"
            raise InputError(diagnostics=[Diagnostic(name, 0, 0, message, repr(SCHEMA))])
        return _adapter().validate_json(content)
    except ValidationError as error:
        found = error.errors()
        raise InputError(
            diagnostics=[
                Diagnostic(name, 0, 0, f"{'.'.join(map(str, e['loc']))}: {e['msg']}") for e in found
            ]
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(diagnostics=[Diagnostic(name, 0, 0, f"is no JSON: {error}")]) from error


@cache
def _adapter() -> TypeAdapter[RunOptions]:
    from pydantic import TypeAdapter  # noqa: PLC0415  slow

    return TypeAdapter(RunOptions)
