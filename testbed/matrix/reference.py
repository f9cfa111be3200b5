# SPDX-License-Identifier: Apache-2.0
"""The matrix file's JSON Schema and its field reference, both generated from the models.

``python -m testbed.matrix.reference > docs/matrix-fields.md``
"""

from __future__ import annotations

from typing import Any

from testbed.matrix.model import Exclusion, Inclusion, Matrix
from testbed.topology.schema import json_schema as schema_of
from testbed.topology.schema import section

_HEAD = """\
# Fields of a matrix file

Generated from the models by `python -m testbed.matrix.reference`; how it is run is in
[matrix.md](matrix.md). `testbed schema matrix` prints the same as a JSON Schema.
"""


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a matrix after its template has run."""
    return schema_of(Matrix, "testbed matrix")


def markdown() -> str:
    """Every key, with its default and meaning."""
    lines = [_HEAD]
    lines += section(Matrix, "the file")
    lines += section(Exclusion, "exclude")
    lines += section(Inclusion, "include")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201  a generator's output
