# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from testbed.models.witness import Path
from testbed.verbs.devices import WITNESSED, _kinds

ACCESS = {"what": "write", "path": "peer"}
EVENT = {"what": "dma_maps", "path": ""}


def test_every_path_can_be_asked_for() -> None:
    assert {*Path} <= {*WITNESSED}


def test_what_an_entry_is_called() -> None:
    assert _kinds(ACCESS) == {"accesses", "writes", "peer"}
    assert _kinds(EVENT) == {"events"}
    assert _kinds(ACCESS) | _kinds(EVENT) <= {*WITNESSED}
