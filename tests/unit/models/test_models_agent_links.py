# SPDX-License-Identifier: Apache-2.0
"""The agent's GPU methods over the links of two GPU models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent.rpc import ParameterError
from testbed.models.link import LinkEnd
from tests.unit.models.agent_rig import MIB
from tests.unit.models.gpu_rig import Gpu, V, at, copy, signal, virtual


class Pair:
    def __init__(self, folder: Path) -> None:
        socket = folder / "link"
        self.a = Gpu("gpu0", (LinkEnd(socket, listens=True, peer="gpu1", width=8),))
        self.b = Gpu("gpu1", (LinkEnd(socket, listens=False, peer="gpu0"),))
        self.settle("up")

    def settle(self, state: str) -> None:
        for _ in range(500):
            self.a.qemu.turn()
            self.b.qemu.turn()
            if all(rig.on("gpu.links")[0]["state"] == state for rig in (self.a, self.b)):
                return
        raise AssertionError(state)

    def export(self, rig: Gpu, mode: str, **more: int) -> None:
        """The peer is another event loop, which must run for it to take note."""
        answer = rig.on("gpu.link_export", link=0, mode=mode, timeout_s=0.0, **more)
        for _ in range(50):
            self.a.qemu.turn()
            self.b.qemu.turn()
        assert not rig.on("gpu.links")[0]["synchronizing"], answer


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.a.close()
    pair.b.close()


def test_a_physical_window_and_its_end(pair: Pair) -> None:
    assert pair.a.on("gpu.links")[0] == {
        "link": 0,
        "state": "up",
        "enabled": True,
        "width": 8,
        "peer_size_bytes": 0,
        "export": "closed",
        "synchronizing": False,
    }
    pair.export(pair.b, "physical", offset=MIB, size_bytes=8192)
    assert pair.a.on("gpu.links")[0]["peer_size_bytes"] == 8192
    pair.a.map(V, 8192, 0, "link")
    pair.a.write(0, b"straight")
    pair.a.do(copy(at("vram", 0), virtual(V + 8184), 8))
    assert pair.b.read(MIB + 8184, 8) == b"straight"
    answer = pair.a.run(copy(at("vram", 0), at("link", 8188, link=0), 8))
    assert answer["status"] == {"cause": "link_refused", "address": 8192}
    pair.b.qemu.turn()
    assert "write by gpu0 is not exported" in str(pair.b.model.witness.trace())
    pair.export(pair.b, "closed")
    answer = pair.a.run(copy(at("vram", 0), at("link", 0, link=0), 8))
    assert answer["status"] == {"cause": "link_refused", "address": 0}


def test_a_virtual_window_is_an_address_space_of_its_own(pair: Pair) -> None:
    space = pair.b.on("gpu.space")["space"]
    pair.b.map(0x3000, 4096, 5 * MIB, space=space)
    pair.export(pair.b, "virtual", space=space, size_bytes=1 << 30)
    pair.a.do(signal(at("link", 0x3008, link=0), 6))
    assert pair.b.read(5 * MIB + 8, 1) == b"\6"
    assert pair.b.run(signal(virtual(0x3008), 6), timeout_s=0.05)["completed"] is False
    pair.export(pair.b, "closed")
    pair.b.on("gpu.drop_space", space=space)
    with pytest.raises(ParameterError, match="space: there is no 1"):
        pair.b.on("gpu.drop_space", space=space)


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_link_goes_down_and_up(pair: Pair, by: str) -> None:
    pair.export(pair.b, "physical", offset=MIB, size_bytes=8192)
    if by == "interrupt":
        pair.a.do({"op": "nop"}, by="interrupt")  # arms
    assert pair.b.on("gpu.link_enable", link=0, on=False)["enabled"] is False
    assert pair.a.on("gpu.link_wait", link=0, state="down", by=by) == {"reached": True}
    answer = pair.a.run(signal(at("link", 0, link=0), 6))
    assert answer["status"] == {"cause": "link_down", "address": 0}
    assert pair.a.on("gpu.link_wait", link=0, state="up", timeout_s=0.02) == {"reached": False}
    pair.b.on("gpu.link_enable", link=0, on=True)
    pair.b.qemu.turn()
    assert pair.a.on("gpu.link_wait", link=0, state="up", by=by) == {"reached": True}
    pair.a.do(signal(at("link", 0, link=0), 6))


# --- wrong parameters
