# SPDX-License-Identifier: Apache-2.0
"""Racks that start, are reached, and die in every way: each death has its name."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import deploy
from testbed.deploy import StartOptions
from testbed.errors import (
    AgentError,
    GuestPanic,
    LaunchError,
    LinkLost,
    NoHello,
    QmpError,
    RackNameInUse,
)
from testbed.host.prepare import Installation
from testbed.machine.lifecycle import StopDeadlines
from testbed.rack import Rack, attach
from testbed.rack_node import RackNode
from testbed.topology.compare import compare
from testbed.topology.plan import MODEL_KINDS, Function, NodePlan

from .conftest import shipped

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

# Others boot elsewhere: minimal below, quad-gpu and partial-mesh for their suites.
SHIPPED = ["two-root-ports", "dgx-8gpu", "nested-switches"]


def test_the_guest_sees_what_was_placed(rack: Rack) -> None:
    node = rack.node()
    assert compare(node.plan, node.agent.call("pci.tree")["devices"]) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_topology_boots_as_placed_and_its_end_is_that_of_every_model(
    name: str, cold: StartOptions, tmp_path: Path
) -> None:
    with deploy.start(shipped(name), run_dir=tmp_path, options=cold) as running:
        node = running.node()
        assert compare(node.plan, node.agent.call("pci.tree")["devices"]) == []
        files = {path.name for path in tmp_path.iterdir()}
        models = node.models.call("devices")
        assert {each["device"] for each in models} == {f.device for f in served(node.plan)}
        assert all(each["connected"] for each in models)
    assert {"topology.json", "plan.json", "commands.json", "versions.json"} <= files
    deadline_s = time.monotonic() + 5
    while any(Path(f"/proc/{each['pid']}/exe").exists() for each in models):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def served(plan: NodePlan) -> list[Function]:
    """What models are, in processes of their own."""
    return [function for function in plan.functions if function.kind in MODEL_KINDS]


def test_the_link_runs_commands_and_keeps_their_ends_apart(rack: Rack) -> None:
    done = rack.node().link.run("cat; echo oops >&2; exit 7", stdin=b"\x00bytes\xff")
    assert (done.exit_status, done.stdout, done.stderr) == (7, b"\x00bytes\xff", b"oops\n")


def test_a_command_past_its_deadline_is_lost_and_the_link_goes_on(rack: Rack) -> None:
    link = rack.node().link
    with pytest.raises(LinkLost, match="did not end within"):
        link.run("sleep 60", timeout_s=0.5)
    assert link.run("echo on").stdout == b"on\n"


def test_qmp_answers_and_refuses(rack: Rack) -> None:
    assert rack.node().qmp("query-status")["status"] == "running"
    with pytest.raises(QmpError):
        rack.node().qmp("no-such-command")


def test_an_agent_error_leaves_the_machine_fine(rack: Rack) -> None:
    with pytest.raises(AgentError):
        rack.node().agent.call("no.such.method")
    assert rack.node().agent.call("system.info")["machine"] == "x86_64"


def test_an_agent_that_is_killed_mid_call_is_lost_and_can_be_started_again(rack: Rack) -> None:
    node = rack.node()
    victim = node.agent.hello["pid"]
    killer = threading.Timer(0.5, lambda: node.link.run(f"kill -9 {victim}"))
    node.link.run("true")
    node.agent.call("memory.alloc", name="big", size_bytes=64 << 20)
    killer.start()

    def keep_busy() -> None:
        for seed in range(100):
            node.agent.call(
                "memory.fill", target={"ram": "big"}, offset=0, size_bytes=64 << 20, seed=seed
            )

    with pytest.raises(LinkLost, match="channel closed"):
        keep_busy()
    killer.join()
    node.restart_agent()
    assert node.agent.call("system.info")["machine"] == "x86_64"


def test_a_name_in_use_is_refused_and_starts_nothing(
    rack: Rack, cold: StartOptions, tmp_path: Path
) -> None:
    options = replace(cold, name=rack.name, unique=False)
    with pytest.raises(RackNameInUse, match="shared"):
        deploy.start(shipped("minimal"), run_dir=tmp_path, options=options)
    assert rack.alive


def test_a_kernel_that_panics_is_named_with_its_last_words(
    cold: StartOptions, tmp_path: Path
) -> None:
    options = replace(cold, kernel_args=("rdinit=/no/such/init", "root=/dev/null"))
    with pytest.raises(GuestPanic, match="panicked") as caught:
        deploy.start(shipped("minimal"), run_dir=tmp_path, options=options)
    assert "Kernel panic - not syncing" in caught.value.console_tail


def test_a_kernel_that_never_says_hello(cold: StartOptions, tmp_path: Path) -> None:
    words = ("rdinit=/usr/bin/busybox", "--", "sleep", "1000")
    options = replace(cold, kernel_args=words, timeout_s=15)
    began_s = time.monotonic()
    with pytest.raises(NoHello, match="not ready within 15 s"):
        deploy.start(shipped("minimal"), run_dir=tmp_path, options=options)
    assert time.monotonic() - began_s < 25


def test_a_qemu_that_exits_at_once(
    installation: Installation, cold: StartOptions, tmp_path: Path
) -> None:
    words = (*installation.qemu.words, "-no-such-option")
    broken = replace(installation, qemu=replace(installation.qemu, words=words))
    options = replace(cold, installation=broken)
    with pytest.raises(LaunchError, match="invalid option") as caught:
        deploy.start(shipped("minimal"), run_dir=tmp_path, options=options)
    assert caught.value.exit_status == 1
    assert "-no-such-option" in caught.value.command


def call_for_ever(node: RackNode) -> None:
    while True:
        node.agent.call("system.info", 20)


def test_a_panic_and_a_killed_qemu_in_the_middle_of_calls(
    warm: StartOptions, tmp_path: Path
) -> None:
    with deploy.start(shipped("minimal"), run_dir=tmp_path / "a", options=warm) as one:
        node = one.node()
        node.link.open_channel("sleep 0.3; echo c >/proc/sysrq-trigger")
        with pytest.raises(GuestPanic, match="sysrq triggered crash"):
            call_for_ever(node)
        assert not one.alive
    with deploy.start(shipped("minimal"), run_dir=tmp_path / "b", options=warm) as two:
        node = two.node()
        assert node.agent.call("system.info")
        two.keeper.kill(node.name)
        with pytest.raises(LinkLost) as caught:
            node.agent.call("system.info", 20)
        assert caught.value.exit_status == -signal.SIGKILL


def test_a_detached_rack_is_found_again_and_ends_gently(warm: StartOptions, tmp_path: Path) -> None:
    options = replace(warm, name="later", detach=True)
    with deploy.start(shipped("minimal"), run_dir=tmp_path, options=options) as first:
        first.close()
    found = attach("later")
    assert found.node().agent.call("system.info")["machine"] == "x86_64"
    with found.node().host_memory("gpu0.vram") as memory:
        memory[0:4] = b"seen"
    assert found.stop(StopDeadlines()) == {"host0": "agent"}
