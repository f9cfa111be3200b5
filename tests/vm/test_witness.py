# SPDX-License-Identifier: Apache-2.0
"""Model devices in a real machine: faults on purpose are seen as such, and pace can be measured."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

from testbed.deploy import StartOptions
from testbed.instruments.bench import Bench
from testbed.instruments.devices import find_device, model_devices
from testbed.models import registers as hw
from testbed.models.registers import Aperture, Command, CommandFlag, Common, Export, Link
from testbed.rack import Rack
from testbed.results.verdicts import Verdict
from testbed.topology.load import load_bytes
from testbed.topology.plan import Role
from tests.vm.conftest import Start
from tests.vm.runs import BorrowingSource, Ran, run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

MIB = 1 << 20
PASS, FAIL, SKIP, LOST, ERROR = Verdict
RACK = b"""
rack: witness
nodes:
  host0:
    machine: {memory: 512M}
    pcie:
      - root_port: rp0
        below:
          - switch: sw0
            acs: redirect
            below:
              - {gpu: gpu0, vram: 32M, engine: model}
              - {gpu: gpu1, vram: 32M, engine: model, bandwidth: 100MB/s, latency: 2us}
      - root_port: rp1
        below: [{gpu: gpu2, vram: 16M, engine: model, faults: [corrupt write min=4K times=1]}]
links:
  - {kind: xgmi, between: [host0/gpu0, host0/gpu1], bandwidth: 400MB/s, latency: 500ns}
"""

# Someone's own tests. Each copies from GPU to GPU and judges it; each fault must be seen.
OWN = """
    import time
    import pytest
    from testbed.instruments.cases import Pair
    from testbed.suites.ground import PEER_OFFSET, Ground
    from testbed.suites.p2p_fixtures import shared_bench
    from testbed.instruments.observer import Refuted

    pytest_plugins = ["testbed.suites.p2p_fixtures"]
    SIZE = 16 << 10

    @pytest.fixture(autouse=True)
    def impatient(monkeypatch):
        # By the guest's clock, which runs up to three times as fast while this host is busy.
        monkeypatch.setattr("testbed.instruments.bench.COPY_TIMEOUT_S", 3.0)

    def deliver(ground, observe):
        mine = ground.fill_local(1, SIZE)
        ground.fill_peer(2, SIZE)
        mapping = ground.mapper.map(ground.peer, PEER_OFFSET, SIZE)
        observe.require(ground.deliver_to_peer(ground.map_local(), mapping.iova, mine))

    def test_honest(ground, observe):
        deliver(ground, observe)

    @pytest.mark.parametrize("rule", [
        "drop write min=4K",
        "drop read min=4K",
        "corrupt write min=4K",
        "corrupt read min=4K probability=1 seed=9",
        "poison read min=4K",
        "poison write min=4K",
    ], ids=lambda rule: rule.replace(" ", "-"))
    def test_struck(rule, ground, faults, observe):
        faults.arm("gpu0", rule)
        try:
            deliver(ground, observe)
        finally:
            observe.note(f"struck {faults.struck('gpu0')}")

    def test_delayed(ground, faults, witness, observe):
        faults.arm("gpu0", "delay write min=4K for=300ms")
        begin = time.monotonic()
        with witness("gpu0") as watch:
            deliver(ground, observe)
        assert time.monotonic() - begin >= 0.3
        assert watch.seen.events["injected"] == 1
        assert watch.seen.written_bytes("iommu") >= SIZE

    def test_stuck(ground, faults, observe):
        faults.stick("gpu0")
        deliver(ground, observe)

    def test_lost_doorbell(ground, faults, observe):
        faults.lose("gpu0", "doorbell")
        deliver(ground, observe)

    @pytest.mark.parametrize("lost", [0, 1])
    def test_interrupt(lost, ground, faults, observe):
        agent, bdf = ground.bench.node.agent, ground.engine.function.bdf
        agent.call("irq.arm", device=bdf, kind="msix", vector=0)
        faults.lose("gpu0", "interrupt", lost)
        deliver(ground, observe)
        if not agent.call("irq.wait", device=bdf, vector=0, timeout_s=3.0)["count"]:
            raise Refuted("the interrupt never came")

    @pytest.mark.parametrize("turn", [1, 2])
    def test_rule_of_the_topology(turn, rack, mutation, observe):
        plan = rack.nodes["host0"].plan
        functions = [plan.function(n) for n in ("gpu2.engine", "gpu2.vram", "gpu0.vram")]
        bench = shared_bench(rack, "host0", mutation)
        try:
            deliver(Ground.of(bench, Pair("host0", *functions, path="")), observe)
        finally:
            bench.clean()

    def test_honest_again(ground, observe):
        deliver(ground, observe)
"""


@pytest.fixture(scope="module")
def rack(start: Start, cold: StartOptions) -> Rack:
    return start(load_bytes(RACK, "rack.yaml", {}), cold)


@pytest.fixture(scope="module")
def result(rack: Rack, cold: StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("own")
    module = folder / "test_own_faults.py"
    module.write_text(textwrap.dedent(OWN))
    return run(module, BorrowingSource(rack, folder, cold), folder)


def test_every_fault_is_a_fail_and_what_is_whole_passes(result: Ran) -> None:
    said = [(o.title, o.verdict, o.reason) for o in result.outcomes]
    verdicts: dict[str, list[Verdict]] = {}
    for outcome in result.outcomes:
        verdicts.setdefault(outcome.test.partition("[")[0], []).append(outcome.verdict)
    assert verdicts == {
        "honest": [PASS],
        "struck": [FAIL] * 6,
        "delayed": [PASS],
        "stuck": [FAIL],
        "lost_doorbell": [FAIL],
        "interrupt": [PASS, FAIL],
        "rule_of_the_topology": [FAIL, PASS],
        "honest_again": [PASS],
    }, said
    for outcome in result.outcomes:
        if outcome.test.startswith("struck"):
            assert "struck 1" in [str(e) for e in outcome.evidence], outcome.test
        if outcome.test.startswith(("stuck", "lost_doorbell")):
            assert outcome.duration_s < 10.0, "the copy's deadline, and no other"


def test_the_record_says_what_was_injected_by_whom(result: Ran, rack: Rack) -> None:
    devices = {d.device: d for d in result.record.devices}
    assert set(devices) == {"gpu0", "gpu1", "gpu2"}
    assert {(r.by, r.struck) for r in devices["gpu0"].rules} == {("test", 1)}
    assert {a.what for a in devices["gpu0"].actions} == {
        "engine stuck",
        "1 doorbell to be lost",
        "1 interrupt to be lost",
    }
    (rule,) = devices["gpu2"].rules
    assert (rule.name, rule.by, rule.struck) == ("corrupt write min=4K times=1", "topology", 1)
    assert devices["gpu0"].counters["events"]["interrupts_lost"] == 1
    assert devices["gpu0"].counters["iommu"]["written_bytes"] > 0
    assert [d.rules() for d in model_devices(rack.nodes) if d.name != "gpu2"] == [[], []]


def test_the_command_line_sees_and_injects(rack: Rack) -> None:
    def testbed(*words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "testbed.cli", *words, "--format", "json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return json.loads(done.stdout) if done.returncode == 0 else (done.returncode, done.stderr)

    listed = testbed("devices", rack.name)
    assert listed["format"] == "testbed.devices/1"
    assert [(d["device"], d["connected"], d["lost"]) for d in listed["devices"]] == [
        ("gpu0", True, None),
        ("gpu1", True, None),
        ("gpu2", True, None),
    ]
    told = testbed("inject", f"{rack.name}/gpu1", "drop", "write", "nth=3", "poison", "path=link")
    armed = [rule["name"] for rule in told["rules"] if rule["armed"]]
    assert armed == ["drop write nth=3", "poison path=link"]
    find_device(rack.nodes, "gpu1").restore()
    status, said = testbed("inject", f"{rack.name}/host0/gpuu1", "drop")
    assert (status, "did you mean 'host0/gpu1'?" in said) == (2, True)
    seen = testbed("witness", f"{rack.name}/host0/gpu0", "--after", "1")
    assert seen["format"] == "testbed.witness/1"
    assert {"read", "write", "commands"} <= {entry["what"] for entry in seen["entries"]}


class Driver:
    """gpu0's ring, in its own video memory, driven from outside: for commands over links."""

    RING_AT = 24 * MIB
    FENCE_AT = 25 * MIB

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench = bench
        self._plan = bench.node.plan
        self.name = name
        self._tail = 0

    def write(self, register: int, value: int) -> None:
        bdf = self._plan.function(f"{self.name}.engine").bdf
        self._bench.node.agent.call(
            "memory.write",
            target={"bar": bdf, "index": hw.REGISTER_BAR},
            offset=register,
            hex=value.to_bytes(4, "little").hex(),
        )

    def set_up(self) -> None:
        self.write(Common.RESET, 1)
        self.write(Common.RING_BASE_LOW, self.RING_AT)
        self.write(Common.RING_APERTURE, Aperture.VRAM)
        self.write(Common.RING_ENTRIES, 16)
        self.write(Common.CONTROL, 1)

    def copy_s(self, target: int, aperture: int, size_bytes: int) -> float:
        """Copy from the start of video memory; from the ring's bell to the fence, in seconds."""
        command = Command(
            hw.Opcode.COPY,
            flags=CommandFlag.FENCE,
            target=target,
            target_aperture=aperture,
            size_bytes=size_bytes,
            fence_address=self.FENCE_AT,
            fence_value=self._tail + 1,
        )
        with self._bench.node.host_memory(f"{self.name}.vram") as view:
            at = self.RING_AT + self._tail * hw.COMMAND.size_bytes
            view[at : at + hw.COMMAND.size_bytes] = hw.COMMAND.encode(command)
            self._tail += 1
            begin = time.monotonic()
            self.write(Common.DOORBELL_TAIL, self._tail)
            while view[self.FENCE_AT] != self._tail:
                assert time.monotonic() < begin + 10, "no fence"
                time.sleep(0.0005)
            return time.monotonic() - begin


def test_the_link_is_measurably_the_better_path(rack: Rack) -> None:
    """16 MiB to the peer by a link of 400 MB/s, and by PCIe of 100 MB/s: neither is faster than was
    declared, and the better one is better. How exact they are is measured by `testbed bench`, not
    on a machine that may be busy.
    """
    size = 16 * MIB
    node = rack.node()
    names = ("gpu0", "gpu1")
    functions = [f for f in node.plan.by_role(Role.VRAM, Role.ENGINE) if f.device in names]
    bench = Bench.open(node, functions)
    try:
        for name in names:  # opened, and so enabled, by its driver
            bench.engine(node.plan.function(f"{name}.engine"))
        peer = Driver(bench, "gpu1")
        peer.write(hw.LINK_BASE + Link.EXPORT_MODE, Export.PHYSICAL)
        peer.write(hw.LINK_BASE + Link.EXPORT_SIZE_LOW, size)
        peer.write(hw.LINK_BASE + Link.SYNC, 1)
        driver = Driver(bench, "gpu0")
        driver.set_up()
        iova = bench.mapper.map(bench.vram(node.plan.function("gpu1.vram")), 0, size).iova
        gpu0 = find_device(rack.nodes, "gpu0")
        with gpu0.watch() as by_link:
            link_s = min(driver.copy_s(0, Aperture.LINK, size) for _ in range(3))
        with gpu0.watch() as by_pcie:
            pcie_s = min(driver.copy_s(iova, Aperture.SYSTEM, size) for _ in range(2))
        assert by_link.seen.written_bytes("link") == 3 * size
        assert by_pcie.seen.written_bytes("iommu") == 2 * size
        assert link_s > 0.95 * size / 400e6
        assert pcie_s > 0.95 * size / 100e6
        assert pcie_s > 1.5 * link_s
    finally:
        bench.close()
