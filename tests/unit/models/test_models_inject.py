# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: which accesses a rule strikes, and what becomes of them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from testbed.errors import InputError
from testbed.models import registers as hw
from testbed.models.access import Cause
from testbed.models.inject import MAX_RULES, Action, Rule, Rules
from testbed.models.memory import SharedMemory
from testbed.models.registers import Aperture, Command, Common, Opcode
from testbed.models.routing import Route
from testbed.models.witness import Event, Path
from tests.unit.models.gpu_bench import FREE, MIB, RAM, Bench


def store(value: int, place: int = FREE) -> Command:
    return Command(Opcode.SIGNAL, target=place, target_aperture=Aperture.SYSTEM, value=value)


def at(bench: Bench, place: int = FREE) -> int:
    return int.from_bytes(bench.ram.view[place - RAM : place - RAM + 8], "little")


def on_data(action: Action, **fields: Any) -> Rule:
    """A rule for accesses to the page at FREE (or what ``fields`` say)."""
    return Rule("r", action, **{"start": FREE, "end": FREE + 4096, **fields})


class TestWhich:
    def strikes(self, rule: Rule, accesses: int = 10) -> list[int]:
        rules = Rules()
        rules.add(rule)
        return [
            n
            for n in range(accesses)
            if rules.judge(Path.IOMMU, n * 16, 16, write=True) is not None
        ]

    @pytest.mark.parametrize(
        ("fields", "struck"),
        [
            ({}, [0]),
            ({"skip": 3}, [3]),
            ({"skip": 3, "count": 2}, [3, 4]),
            ({"count": 0}, list(range(10))),
            ({"count": 0, "start": 33, "end": 65}, [2, 3, 4]),
            ({"count": 0, "write": False}, []),
            ({"count": 0, "path": Path.LINK}, []),
            ({"count": 0, "path": Path.IOMMU, "write": True, "skip": 8}, [8, 9]),
            ({"count": 0, "every": 4}, [3, 7]),
            ({"count": 1, "every": 4, "skip": 1}, [4]),
            ({"count": 0, "least_bytes": 16, "skip": 9}, [9]),
            ({"count": 0, "least_bytes": 17}, []),
        ],
    )
    def test_which(self, fields: dict[str, Any], struck: list[int]) -> None:
        assert self.strikes(Rule("r", Action.DROP, **fields)) == struck

    def test_chance_is_the_same_every_time(self) -> None:
        rule = Rule("r", Action.DROP, count=0, probability=0.3, seed=7)
        first = self.strikes(rule, 1000)
        assert first == self.strikes(rule, 1000)
        assert 200 < len(first) < 400
        other = Rule("r", Action.DROP, count=0, probability=0.3, seed=8)
        assert first != self.strikes(other, 1000)


class TestParse:
    def test_a_rule(self) -> None:
        data = {"name": "n", "action": "delay", "delay_s": 1, "write": True, "path": "link"}
        rule = Rule("n", Action.DELAY, delay_s=1, write=True, path=Path.LINK)
        assert Rule.parse(data) == rule

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ([], "an object"),
            ({"name": "n"}, "''"),
            ({"name": "n", "action": "explode"}, "'explode'"),
            ({"action": "drop"}, "needs a name"),
            ({"name": "n", "action": "drop", "colour": 1}, "no 'colour'"),
            ({"name": "n", "action": "drop", "skip": "1"}, "'skip'"),
            ({"name": "n", "action": "drop", "count": True}, "'count'"),
            ({"name": "n", "action": "drop", "write": "yes"}, "'write'"),
            ({"name": "n", "action": "drop", "path": "magic"}, "'magic'"),
            ({"name": "n", "action": "drop", "every": 0}, "negative"),
            ({"name": "n", "action": "drop", "probability": 0}, "probability"),
            ({"name": "n", "action": "drop", "probability": 1.5}, "probability"),
            ({"name": "n", "action": "drop", "start": 2, "end": 2}, "range"),
            ({"name": "n", "action": "delay"}, "delay_s"),
            ({"name": "n", "action": "delay", "delay_s": 1e9}, "delay_s"),
        ],
    )
    def test_what_is_wrong(self, data: object, words: str) -> None:
        with pytest.raises(InputError, match=words):
            Rule.parse(data)

    def test_not_without_bound(self) -> None:
        rules = Rules()
        for number in range(MAX_RULES):
            rules.add(Rule(str(number), Action.DROP))
        rules.add(Rule("0", Action.POISON))
        with pytest.raises(InputError, match="more than"):
            rules.add(Rule("one more", Action.DROP))
        with pytest.raises(InputError, match="nobody"):
            rules.remove("nobody")

    def test_what_was_disarmed_is_still_known(self) -> None:
        rules = Rules()
        rules.add(Rule("r", Action.DROP, by="test"))
        rules.judge(Path.IOMMU, 0, 16, write=True)
        rules.add(Rule("r", Action.DROP, by="test"))  # anew: its counts begin at 0
        assert [(e["armed"], e["struck"]) for e in rules.history()] == [(False, 1), (True, 0)]
        rules.clear()
        assert [e["armed"] for e in rules.history()] == [False, False]


class TestWhat:
    def test_a_dropped_write_is_lost_without_a_word(self, bench: Bench) -> None:
        bench.gpu.rules.add(on_data(Action.DROP, write=True))
        bench.run(store(1))
        assert at(bench) == 0
        bench.run(store(2))
        assert at(bench) == 2
        assert bench.gpu.witness.count(Event.INJECTED) == 1
        assert bench.gpu.rules.report() == [{"name": "r", "seen": 2, "struck": 1}]

    def test_a_dropped_read_times_out(self, bench: Bench) -> None:
        bench.gpu.rules.add(on_data(Action.DROP, write=False))
        read = Command(Opcode.COPY, source=FREE, source_aperture=1, size_bytes=8)
        assert bench.fail(read) == (Cause.TIMEOUT, FREE)

    @pytest.mark.parametrize("write", [True, False])
    def test_poison(self, bench: Bench, write: bool) -> None:
        bench.gpu.rules.add(on_data(Action.POISON, write=write))
        read = Command(Opcode.COPY, source=FREE, source_aperture=1, size_bytes=8)
        assert bench.fail(store(1) if write else read) == (Cause.POISONED, FREE)
        assert at(bench) == 0

    @pytest.mark.parametrize("write", [True, False])
    def test_corruption_is_one_bit(self, bench: Bench, write: bool) -> None:
        bench.gpu.rules.add(on_data(Action.CORRUPT, write=write, seed=3))
        if write:
            bench.run(store(0x5555))
            seen = at(bench)
        else:
            bench.ram.view[FREE - RAM : FREE - RAM + 8] = (0x5555).to_bytes(8, "little")
            bench.run(Command(Opcode.COPY, source=FREE, source_aperture=1, size_bytes=8))
            seen = int.from_bytes(bench.vram.view[:8], "little")
        assert (seen ^ 0x5555).bit_count() == 1

    def test_delay(self, bench: Bench) -> None:
        bench.gpu.rules.add(on_data(Action.DELAY, delay_s=0.1))
        begin = time.monotonic()
        bench.run(store(1))
        assert time.monotonic() - begin >= 0.1
        assert at(bench) == 1

    def test_a_delayed_write_meets_the_mapping_of_then(self, bench: Bench) -> None:
        bench.gpu.rules.add(on_data(Action.DELAY, delay_s=0.05))
        bench.put(store(1))
        bench.ring()
        bench.qemu.unmap(FREE, 4096)
        bench.qemu.wait(lambda: bench.halted)
        assert at(bench) == 0
        assert bench.qemu.faults == [(FREE, 8, True)]

    def test_reordering_lets_the_next_write_pass(self, bench: Bench) -> None:
        """The fence arrives before the data it stands for: what a driver has to survive."""
        bench.gpu.rules.add(on_data(Action.REORDER, write=True))
        bench.run(store(1), store(2, FREE + 64))
        fence = RAM + 4088
        assert self.writes(bench) == [fence, FREE, FREE + 64, fence]
        assert (at(bench), at(bench, FREE + 64)) == (1, 2)

    def test_what_is_put_back_happens_before_the_engine_rests(self, bench: Bench) -> None:
        bench.gpu.rules.add(on_data(Action.REORDER, write=True))
        bench.put_raw(hw.COMMAND.encode(store(1)))  # without a fence: nothing follows
        bench.ring()
        bench.qemu.wait(lambda: at(bench) == 1)
        assert self.writes(bench) == [FREE]

    def writes(self, bench: Bench) -> list[object]:
        return [e["address"] for e in bench.gpu.witness.trace() if e["what"] == "write"]

    def test_big_copies_are_struck_in_parts(self, bench: Bench) -> None:
        bench.gpu.rules.add(on_data(Action.DROP, write=True, skip=1, end=1 << 60))
        bench.vram.view[: 3 * MIB] = b"\1" * (3 * MIB)
        copy = Command(Opcode.COPY, target=FREE, target_aperture=1, size_bytes=3 * MIB)
        bench.run(copy)
        place = FREE - RAM
        parts = [bench.ram.view[place + n * MIB] for n in range(3)]
        assert parts == [1, 0, 1]

    def test_lost_doorbell_and_interrupt(self, bench: Bench) -> None:
        bench.gpu.doorbells_to_lose = 1
        bench.put(store(1))
        bench.ring()
        bench.qemu.turn()
        assert (at(bench), bench.read(Common.RING_TAIL)) == (0, 0)
        bench.ring()
        bench.qemu.wait(lambda: at(bench) == 1)
        bench.gpu.interrupts_to_lose = 1
        bench.run(Command(Opcode.INTERRUPT))
        assert bench.qemu.interrupts(0) == 0
        bench.run(Command(Opcode.INTERRUPT))
        assert bench.qemu.interrupts(0) == 1
        witness = bench.gpu.witness
        assert witness.count(Event.DOORBELL_LOST) == witness.count(Event.INTERRUPT_LOST) == 1

    def test_a_stuck_engine(self, bench: Bench) -> None:
        bench.gpu.ring.stick(on=True)
        bench.put(store(1))
        bench.ring()
        with pytest.raises(TimeoutError):
            bench.qemu.wait(lambda: at(bench) == 1, timeout_s=0.05)
        bench.gpu.ring.stick(on=False)
        bench.qemu.wait(lambda: at(bench) == 1)


class TestRouting:
    PEER = 0xF_0000_0000

    def test_a_peer_below_the_same_switch(self, bench: Bench) -> None:
        peer = SharedMemory.create(MIB, name="gpu1.vram")
        bench.gpu.router.replace([Route(self.PEER, MIB // 2, peer, MIB // 2)])
        bench.run(store(7, self.PEER + 8))
        assert peer.view[MIB // 2 + 8] == 7
        assert bench.gpu.witness.bytes_by(Path.PEER, write=True) == 8
        assert not bench.qemu.faults
        (entry,) = [e for e in bench.gpu.witness.trace() if e["path"] == "peer"]
        assert (entry["address"], entry["target"]) == (self.PEER + 8, "gpu1.vram")

    def test_a_redirecting_switch_sends_it_up(self, bench: Bench) -> None:
        bench.gpu.router.replace([])
        assert bench.fail(store(7, self.PEER)) == (Cause.REFUSED, self.PEER)
        assert bench.qemu.faults == [(self.PEER, 8, True)]

    def test_what_a_route_hides(self, bench: Bench) -> None:
        """A bus address in a peer's BAR never reaches the IOMMU, whatever is mapped there."""
        mapped = bench.qemu.add_memory(self.PEER, MIB)
        peer = SharedMemory.create(4096, name="gpu1.vram")
        bench.gpu.router.replace([Route(self.PEER + 4096, 4096, peer)])
        fill = Command(
            Opcode.FILL, target=self.PEER, target_aperture=2, size_bytes=3 * 4096, value=1
        )
        bench.run(fill)
        assert (mapped.view[0], mapped.view[4096], mapped.view[8192]) == (1, 0, 1)
        assert (peer.view[0], peer.view[4095 - 7]) == (1, 1)

    @pytest.mark.parametrize(
        ("address", "size", "offset"),
        [(-1, 4, 0), (0, 0, 0), (0, 4097, 0), (0, 4096, 1), (0, 4, -1)],
    )
    def test_routes_that_fit_nothing(self, address: int, size: int, offset: int) -> None:
        peer = SharedMemory.create(4096, name="peer")
        with pytest.raises(InputError, match="route"):
            Route(address, size, peer, offset)

    def test_overlapping_routes(self, bench: Bench) -> None:
        peer = SharedMemory.create(8192, name="peer")
        with pytest.raises(InputError, match="overlap"):
            bench.gpu.router.replace([Route(0, 8192, peer), Route(4096, 4096, peer)])
