# SPDX-License-Identifier: Apache-2.0
"""How the models learn of their machine's switches: over QMP, and over QEMU's log."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.models import live_routes, switchyard
from testbed.models.calls import Caller, CallFailed, answer_calls
from testbed.models.change_log import MAX_SCAN_BYTES, ChangeLog
from testbed.models.live_routes import LiveRouter
from testbed.models.memory import SharedMemory
from testbed.models.spec import MachineSpec, MemorySpec
from testbed.models.switchyard import NoTree, Switchyard
from testbed.models.witness import Event, Witness
from tests.contract.fake_monitor import MIB, FakeMachine

PEER = 4 * 64 * MIB  # gpu1's memory
MEMORIES = (
    MemorySpec("gpu0.vram", path=Path("/x"), function="gpu0-vram", bar=2),
    MemorySpec("gpu1.vram", path=Path("/y"), function="gpu1-vram", bar=2),
)
FUNCTIONS = {"gpu0-engine": "gpu0", "gpu1-engine": "gpu1"}
Test = Callable[[FakeMachine, Switchyard], Awaitable[None]]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "qemu.log"
    path.write_text("qemu: begins\n")
    return path


@pytest.fixture
def run(tmp_path: Path, log: Path) -> Callable[[Test], None]:
    """Run a test beside a fake machine."""

    def run_it(test: Test) -> None:
        async def both() -> None:
            socket = tmp_path / "qmp.sock"
            yard = Switchyard(MachineSpec(socket, log), MEMORIES, FUNCTIONS)
            try:
                async with asyncio.timeout(20), FakeMachine(socket, log) as machine:
                    await test(machine, yard)
            finally:
                yard.close()

        asyncio.run(both())

    return run_it


def at(answer: dict[str, Any], address: int) -> dict[str, Any] | None:
    for entry in answer["routes"]:
        if entry["address"] <= address < entry["address"] + entry["size_bytes"]:
            found: dict[str, Any] = entry
            return found
    return None


class TestReading:
    def test_routes_name_the_memory_or_the_model_and_the_switch(self, run: Any) -> None:
        async def test(_: FakeMachine, yard: Switchyard) -> None:
            answer = await yard.routes("gpu0")
            memory, registers = at(answer, PEER), at(answer, PEER + MIB)
            assert memory is not None
            assert registers is not None
            assert (memory["outcome"], memory["memory"]) == ("peer", "gpu1.vram")
            assert memory["why"] == "routed by sw"
            assert (registers["memory"], registers["device"]) == (None, "gpu1")

        run(test)

    def test_acs_is_read_from_configuration_space(self, run: Any) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            machine.acs = {(2, 0): 0x1D}
            entry = at(await yard.routes("gpu0"), PEER)
            assert entry is not None
            assert (entry["outcome"], entry["why"]) == ("upstream", "redirected by sw-port0")
            (port,) = [f for f in await yard.tree() if f["function"] == "sw-port0"]
            assert port["bridge"]["acs"]["request_redirect"]
            assert port["bridge"]["port"] == "downstream"

        run(test)

    def test_nothing_is_asked_of_qemu_before_the_first_question(self, run: Any) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            assert not machine.asked
            await yard.routes("gpu0")
            assert machine.traced == ["pci_cfg_write", "acpi_pci_eject_slot"]

        run(test)

    def test_a_tree_is_read_again_only_for_a_longer_log(self, run: Any, log: Path) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            first = await yard.routes("gpu0")
            await yard.routes("gpu1", first["as_of"])
            assert machine.asked["query-pci"] == 1
            machine.decoding = False
            machine.write_config()
            again = await yard.routes("gpu0", log.stat().st_size)
            assert machine.asked["query-pci"] == 2
            entry = at(again, PEER)
            assert entry is not None
            assert entry["outcome"] == "refused"
            bars = {f["function"]: [bar["bar"] for bar in f["bars"]] for f in await yard.tree()}
            assert (bars["gpu0-vram"], bars["gpu1-vram"]) == ([2], [])

        run(test)

    def test_many_who_ask_at_once_share_one_reading(self, run: Any) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            await asyncio.gather(*(yard.routes(f"gpu{n % 2}") for n in range(20)))
            assert machine.asked["query-pci"] == 1

        run(test)


class TestFailing:
    @pytest.mark.parametrize(
        "command", ["qmp_capabilities", "query-pci", "qom-get", "human-monitor-command"]
    )
    @pytest.mark.parametrize("how", ["hang", "close", "refuse"])
    def test_a_qemu_that_fails_is_an_error_in_time_and_may_recover(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, command: str, how: str
    ) -> None:
        monkeypatch.setattr(switchyard, "READ_TIMEOUT_S", 0.2)

        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            machine.fail = {command: how}
            with pytest.raises(NoTree):
                await yard.routes("gpu0")
            machine.fail = {}
            assert at(await yard.routes("gpu0"), PEER) is not None

        run(test)

    def test_one_that_is_gone(self, tmp_path: Path, log: Path) -> None:
        yard = Switchyard(MachineSpec(tmp_path / "none.sock", log), (), {})
        with pytest.raises(NoTree, match=r"none\.sock"):
            asyncio.run(yard.routes("gpu0"))

    def test_one_that_speaks_no_qmp(self, run: Any) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            machine.greeting = b"HTTP/1.1 400\n"
            with pytest.raises(NoTree, match="no greeting"):
                await yard.routes("gpu0")

        run(test)

    def test_a_window_that_shows_other_devices(self, run: Any) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            machine.shown_at -= 1 << 20
            with pytest.raises(NoTree, match="not in the ECAM window"):
                await yard.routes("gpu0")

        run(test)

    def test_one_that_cannot_trace_is_read_each_time_and_it_is_said_once(
        self, run: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def test(machine: FakeMachine, yard: Switchyard) -> None:
            machine.fail = {"trace-event-set-state": "refuse"}
            for _ in range(3):
                assert (await yard.routes("gpu0", 0))["as_of"] == -1
            assert machine.asked["query-pci"] == 3

        run(test)
        assert capsys.readouterr().err.count("does not log changes") == 1


class FakeCaller(Caller):
    """The supervisor, as a device's process sees it."""

    def __init__(self) -> None:
        self.routes: list[dict[str, Any]] = []
        self.asked = 0
        self.as_of = 0
        self.failing = False

    async def call(self, method: str, params: Any, *, timeout_s: float) -> Any:
        assert method == "routes"
        assert timeout_s <= live_routes.REFRESH_TIMEOUT_S
        self.asked += 1
        if self.failing:
            raise CallFailed("QEMU is gone")
        return {"as_of": params["seen"] if self.as_of >= 0 else -1, "routes": self.routes}


class TestDevice:
    def make(self, log: Path) -> tuple[LiveRouter, FakeCaller, Witness]:
        caller, witness = FakeCaller(), Witness()
        memory = SharedMemory.create(MIB, name="gpu1.vram")
        words = ("pci_cfg_write",)
        router = LiveRouter(caller, ChangeLog(log, words), {memory.name: memory}, witness)
        caller.routes = [
            {
                "address": PEER,
                "size_bytes": MIB,
                "outcome": "peer",
                "memory": "gpu1.vram",
                "device": None,
                "bar": 2,
                "offset": 0,
            }
        ]
        return router, caller, witness

    def routed(self, router: LiveRouter) -> bool:
        async def one() -> bool:
            if router.stale():
                await router.refresh()
            return router.route(PEER, 8).view is not None

        return asyncio.run(one())

    def test_it_asks_at_first_and_after_a_change_only(self, log: Path) -> None:
        router, caller, witness = self.make(log)
        for asked, line in (
            (1, ""),
            (1, ""),
            (1, "vtd_dmar_fault sid 0x301 fault 6\n"),
            (2, "pci_cfg_write sw 02:00.0 @0x14e <- 0x19\n"),
            (2, ""),
            (2, "pci_cfg_"),
            (3, "write sw 02:00.0 @0x4 <- 0x7\n"),
            (3, "more\n"),
        ):
            with log.open("a") as file:
                file.write(line)
            assert self.routed(router)
            assert caller.asked == asked, line
        assert witness.count(Event.ROUTES_READ) == 3
        assert witness.count(Event.ROUTES_UNKNOWN) == 0

    def test_a_flood_in_the_log_is_not_read(self, log: Path) -> None:
        router, caller, _ = self.make(log)
        assert self.routed(router)
        with log.open("ab") as file:
            file.truncate(MAX_SCAN_BYTES * 4)
        assert self.routed(router)
        assert caller.asked == 2

    def test_a_log_that_begins_anew_is_a_change(self, log: Path) -> None:
        router, caller, _ = self.make(log)
        assert self.routed(router)
        log.write_text("")
        assert self.routed(router)
        assert caller.asked == 2

    def test_without_an_answer_each_access_that_goes_up_is_counted(
        self, log: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        router, caller, witness = self.make(log)
        assert self.routed(router)
        with log.open("a") as file:
            file.write("pci_cfg_write sw 02:00.0 @0x14e <- 0x19\n")
        caller.failing = True
        assert not self.routed(router)
        assert not self.routed(router)
        assert caller.asked == 2  # it does not wait for each access
        assert witness.count(Event.ROUTES_UNKNOWN) == 3  # the failure, and two accesses
        monkeypatch.setattr(live_routes, "RETRY_S", 0.0)
        router._retry_s = 0.0
        caller.failing = False
        assert self.routed(router)

    def test_what_is_refused_and_what_nobody_reaches(self, log: Path) -> None:
        router, caller, witness = self.make(log)
        hole = {"address": PEER + MIB, "size_bytes": 4096, "outcome": "refused", "why": "no BAR"}
        edu = {**caller.routes[0], "address": PEER + 2 * MIB, "memory": None}
        caller.routes += [hole, edu]
        assert self.routed(router)
        assert router.route(PEER + MIB, 8).space is not None
        astray = router.route(PEER + 2 * MIB, 8)
        assert astray.view is None
        assert astray.space is None
        assert witness.count(Event.PEER_UNREACHABLE) == 1

    def test_another_machine_is_asked_anew(self, log: Path) -> None:
        router, caller, _ = self.make(log)
        assert self.routed(router)
        router.forget()
        assert self.routed(router)
        assert caller.asked == 2

    def test_without_a_trace_a_reset_or_a_config_write_of_its_own_is_a_change(
        self, log: Path
    ) -> None:
        router, caller, _ = self.make(log)
        assert self.routed(router)
        router.invalidate()
        assert self.routed(router)
        assert caller.asked == 1  # the log would have told
        router.forget()
        caller.as_of = -1
        for asked in (2, 2):
            assert self.routed(router)
            assert caller.asked == asked
        router.invalidate()
        assert self.routed(router)
        assert caller.asked == 3


def test_questions_are_answered_in_any_order_and_end_with_the_other_side() -> None:
    async def answer(method: str, params: Any) -> Any:
        if method == "slow":
            await asyncio.sleep(60)
        if method == "bad":
            raise CallFailed("no")
        return params

    async def test() -> None:
        ours, theirs = socket.socketpair()
        server = asyncio.create_task(answer_calls(theirs, answer))
        caller = Caller(ours)
        with pytest.raises(CallFailed, match="gone"):
            await caller.call("early", {}, timeout_s=1)
        await caller.open()
        reading = asyncio.create_task(caller.serve())
        slow = asyncio.create_task(caller.call("slow", {}, timeout_s=30))
        assert await caller.call("quick", {"a": 1}, timeout_s=5) == {"a": 1}
        with pytest.raises(CallFailed, match="no"):
            await caller.call("bad", {}, timeout_s=5)
        with pytest.raises(CallFailed, match="no answer within"):
            await caller.call("slow", {}, timeout_s=0.05)
        server.cancel()
        with pytest.raises(CallFailed, match="gone"):
            await slow
        await reading

    asyncio.run(test())
