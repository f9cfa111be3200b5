# SPDX-License-Identifier: Apache-2.0
"""Private links between two GPU models that live in two event loops, as in two processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.errors import InputError
from testbed.models import registers as hw
from testbed.models.access import Cause
from testbed.models.link import LinkEnd
from testbed.models.pacing import BusTiming, Timing
from testbed.models.registers import (
    Aperture,
    Command,
    Common,
    Export,
    InterruptCause,
    Link,
    LinkState,
    Opcode,
)
from testbed.models.witness import Event
from testbed.models.witness import Path as Way
from tests.unit.models.gpu_bench import MIB, ROOT, Bench
from tests.unit.models.turns import turn_until

LINK0 = hw.LINK_BASE


class Pair:
    """Two GPUs and the link between them."""

    def __init__(self, folder: Path) -> None:
        socket = folder / "link"
        self.a = Bench("gpu0", links=[LinkEnd(socket, listens=True, peer="gpu1", width=8)])
        self.b = Bench("gpu1", links=[LinkEnd(socket, listens=False, peer="gpu0")])
        self.wait(lambda: self.states() == (LinkState.UP, LinkState.UP))

    def states(self) -> tuple[int, int]:
        return self.a.read(LINK0 + Link.STATE), self.b.read(LINK0 + Link.STATE)

    def wait(self, condition: Callable[[], bool]) -> None:
        turn_until(condition, self.a, self.b)

    def export(self, bench: Bench, mode: int, base: int, size: int) -> None:
        bench.write(LINK0 + Link.EXPORT_MODE, mode)
        bench.write_pair(LINK0 + Link.EXPORT_BASE_LOW, base)
        bench.write_pair(LINK0 + Link.EXPORT_SIZE_LOW, size)
        bench.write(LINK0 + Link.SYNC, 1)
        self.wait(lambda: bench.read(LINK0 + Link.SYNC) == 0)

    def close(self) -> None:
        for bench in (self.a, self.b):
            bench.qemu.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def over(address: int, size: int) -> Command:
    return Command(Opcode.COPY, target=address, target_aperture=Aperture.LINK, size_bytes=size)


def test_nothing_is_exported_at_first(pair: Pair) -> None:
    assert pair.a.read(LINK0 + Link.WIDTH) == 8
    assert pair.a.read_pair(LINK0 + Link.PEER_SIZE_LOW) == 0
    assert pair.a.fail(over(0, 4)) == (Cause.LINK_REFUSED, 0)


def test_a_physical_window(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, MIB, 8192)
    assert pair.a.read_pair(LINK0 + Link.PEER_SIZE_LOW) == 8192
    pair.a.vram.view[:8] = b"straight"
    pair.a.run(over(8192 - 8, 8))
    assert bytes(pair.b.vram.view[MIB + 8184 : MIB + 8192]) == b"straight"
    assert pair.a.gpu.witness.bytes_by(Way.LINK, write=True) == 8
    assert pair.a.gpu.witness.bytes_by(Way.IOMMU, write=True) == 8  # the fence


def test_not_a_byte_beyond_the_window_and_the_exporter_learns_of_it(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, MIB, 8192)
    pair.b.vram.view[MIB + 8192] = 7
    assert pair.a.fail(over(8192 - 4, 8)) == (Cause.LINK_REFUSED, 8192)
    assert pair.b.vram.view[MIB + 8192] == 7
    pair.wait(lambda: pair.b.gpu.witness.count(Event.ACCESS_ERROR) == 1)
    (entry,) = [e for e in pair.b.gpu.witness.trace() if e["what"] == "access_errors"]
    assert (entry["address"], entry["outcome"]) == (8192, "write by gpu0 is not exported")


def test_a_window_is_cut_to_the_memory(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, 15 * MIB, 1 << 40)
    assert pair.a.read_pair(LINK0 + Link.PEER_SIZE_LOW) == MIB


def test_a_virtual_window_and_its_sync(pair: Pair) -> None:
    pair.b.enter(0x1000, 2 * MIB, Aperture.VRAM)
    pair.export(pair.b, Export.VIRTUAL, ROOT, 1 << 30)
    pair.a.vram.view[:4] = b"page"
    pair.a.run(over(0x1000, 4))
    assert bytes(pair.b.vram.view[2 * MIB : 2 * MIB + 4]) == b"page"
    assert pair.a.fail(over(0x2000, 4)) == (Cause.LINK_REFUSED, 0x2000)
    pair.a.write(Common.RESET, 1)
    pair.a.set_up()
    pair.b.enter(0x1000, 3 * MIB, Aperture.VRAM)  # no SYNC: the old page is still in use
    pair.a.run(over(0x1000, 4))
    assert pair.b.vram.view[3 * MIB] == 0
    pair.export(pair.b, Export.VIRTUAL, ROOT, 1 << 30)
    pair.a.run(over(0x1000, 4))
    assert bytes(pair.b.vram.view[3 * MIB : 3 * MIB + 4]) == b"page"


@pytest.mark.parametrize("aperture", [Aperture.SYSTEM, Aperture.LINK])
def test_a_virtual_window_leads_to_video_memory_only(pair: Pair, aperture: int) -> None:
    pair.b.enter(0x1000, 0, aperture)
    pair.export(pair.b, Export.VIRTUAL, ROOT, 1 << 30)
    assert pair.a.fail(over(0x1000, 4)) == (Cause.LINK_REFUSED, 0x1000)


def test_through_the_mmu(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, 0, MIB)
    pair.a.use_mmu()
    pair.a.enter(0x7000, 0x3000, Aperture.LINK)
    pair.a.run(Command(Opcode.SIGNAL, target=0x7000, target_aperture=3, value=5))
    assert pair.b.vram.view[0x3000] == 5


@pytest.mark.parametrize("end", ["a", "b"])
def test_either_end_takes_it_down(pair: Pair, end: str) -> None:
    pair.export(pair.b, Export.PHYSICAL, 0, MIB)
    bench: Bench = getattr(pair, end)
    before = pair.a.qemu.interrupts(3)
    bench.write(LINK0 + Link.CONTROL, 0)
    pair.wait(lambda: pair.states() == (LinkState.DOWN, LinkState.DOWN))
    assert before + pair.a.qemu.interrupts(3) > before
    assert pair.a.read(Common.INTERRUPT_CAUSE) & InterruptCause.LINK
    assert pair.a.fail(over(0, 4)) == (Cause.LINK_DOWN, 0)
    bench.write(LINK0 + Link.CONTROL, 1)
    pair.wait(lambda: pair.states() == (LinkState.UP, LinkState.UP))
    pair.a.write(Common.RESET, 1)
    pair.a.set_up()
    pair.a.run(over(0, 4))


def test_cut_and_mended(pair: Pair) -> None:
    pair.b.gpu.link_to("gpu0").cut(on=True)
    pair.wait(lambda: pair.states() == (LinkState.DOWN, LinkState.DOWN))
    pair.b.gpu.link_to("gpu0").cut(on=False)
    pair.wait(lambda: pair.states() == (LinkState.UP, LinkState.UP))


def test_a_machine_that_dies_takes_it_down(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, 0, MIB)
    pair.b.qemu.unplug()
    pair.wait(lambda: pair.a.read(LINK0 + Link.STATE) == LinkState.DOWN)
    assert pair.a.fail(over(0, 4)) == (Cause.LINK_DOWN, 0)


def test_a_process_that_dies_takes_it_down(pair: Pair) -> None:
    pair.b.gpu.close()
    pair.wait(lambda: pair.a.read(LINK0 + Link.STATE) == LinkState.DOWN)


def test_an_end_that_comes_back(pair: Pair) -> None:
    pair.a.gpu.close()
    pair.wait(lambda: pair.b.read(LINK0 + Link.STATE) == LinkState.DOWN)
    pair.a.qemu.run(pair.a.gpu.open())
    pair.wait(lambda: pair.states() == (LinkState.UP, LinkState.UP))
    pair.export(pair.a, Export.PHYSICAL, 0, MIB)  # a restarted end exports anew


def test_the_peer_s_reset_closes_its_export(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, 0, MIB)
    pair.b.qemu.reset()
    pair.wait(lambda: pair.a.read_pair(LINK0 + Link.PEER_SIZE_LOW) == 0)
    assert pair.a.read(LINK0 + Link.STATE) == LinkState.UP


def test_a_slow_link_takes_its_time(pair: Pair) -> None:

    pair.export(pair.b, Export.PHYSICAL, 0, MIB)
    pair.a.gpu.links[0].timing = Timing(bytes_per_s=10 * MIB, latency_s=0.01)
    begin = time.monotonic()
    pair.a.run(over(0, MIB))
    assert 0.1 <= time.monotonic() - begin < 2.0


def fastest_s(bench: Bench, command: Command) -> float:
    """The fastest of three: what the host does beside costs time too."""
    taken = []
    for _ in range(3):
        begin = time.monotonic()
        bench.run(command)
        taken.append(time.monotonic() - begin)
    return min(taken)


def test_a_narrow_link_is_as_much_slower_and_both_are_restored(pair: Pair) -> None:
    pair.export(pair.b, Export.PHYSICAL, 0, 4 * MIB)
    port = pair.a.gpu.links[0]
    port.timing = Timing(bytes_per_s=100 * MIB)
    wide_s = fastest_s(pair.a, over(0, 4 * MIB))
    port.narrow(2)
    assert pair.a.read(LINK0 + Link.WIDTH) == 2
    assert fastest_s(pair.a, over(0, 4 * MIB)) / wide_s == pytest.approx(4.0, rel=0.2)
    with pytest.raises(InputError, match="1 to 8 lanes"):
        port.narrow(9)
    port.cut(on=True)
    port.restore()
    pair.wait(lambda: pair.states() == (LinkState.UP, LinkState.UP))
    assert (port.width, port.timing) == (8, Timing())


def test_the_better_path_is_measured_as_such_and_waiting_costs_no_cpu_time(pair: Pair) -> None:
    """16 MiB to the peer: over the link, and over PCIe at a quarter of its bandwidth."""
    size = 16 * MIB
    pair.export(pair.b, Export.PHYSICAL, 0, size)
    address = 0x8000_0000
    pair.a.qemu.map(address, pair.a.qemu.memories.add(pair.b.vram))
    pair.a.gpu.links[0].timing = Timing(400 * MIB, 2e-6)
    pair.a.gpu.bus.timing = BusTiming(up={"gpu1.vram": Timing(100 * MIB, 10e-6)})
    pcie = Command(Opcode.COPY, target=address, target_aperture=Aperture.SYSTEM, size_bytes=size)
    by_link_s = fastest_s(pair.a, over(0, size))
    begin = time.process_time()
    by_pcie_s = fastest_s(pair.a, pcie)
    # The bench polls for the fence; a device that spins would use all of the time.
    assert time.process_time() - begin < 3 * by_pcie_s / 2
    assert by_pcie_s == pytest.approx(0.16, rel=0.2)
    assert by_pcie_s / by_link_s == pytest.approx(4.0, rel=0.2)


def test_garbage_on_the_link_s_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    path = tmp_path / "link"
    with Bench("gpu0", links=[LinkEnd(path, listens=True, peer="gpu1")]) as bench:
        for words in (b"nonsense", b"[]", b'{"sequence": 1}', b"{" * 4000, b"1" * 4097):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
                other.connect(str(path))
                other.send(words)
                for _ in range(20):
                    bench.qemu.turn()
                assert bench.read(LINK0 + Link.STATE) == LinkState.DOWN
    assert "Traceback" not in capsys.readouterr().err
