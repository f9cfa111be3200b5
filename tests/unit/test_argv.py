# SPDX-License-Identifier: Apache-2.0
"""QEMU command lines. What each topology's looks like in full is golden (tests/golden)."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import CapabilityMissing, ExitCode
from testbed.machine.argv import command
from testbed.machine.bells import bells_command, bells_of
from testbed.machine.command import LaunchContext, NodeCommand
from testbed.machine.kernel_words import iommu_words
from testbed.topology.machine import Iommu
from testbed.topology.model import from_data
from testbed.topology.placement import place
from testbed.topology.reading import adapter

CONTEXT = LaunchContext(
    qemu=("ld.so", "--library-path", "lib", "qemu"),
    environment={"QEMU_MODULE_DIR": "modules"},
    accelerator="tcg",
    kernel=Path("KERNEL"),
    initrd=Path("INITRD"),
)


def commanded(context: LaunchContext = CONTEXT, **node: Any) -> NodeCommand:
    topology = from_data({"rack": "r", "nodes": {"h": node}})
    return command(place(topology).nodes["h"], topology.nodes["h"], context)


def values(made: NodeCommand, option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(made.argv) if word == option]


def devices(made: NodeCommand) -> dict[str, dict[str, Any]]:
    parsed = [json.loads(value) for value in values(made, "-device")]
    return {device.get("id", device["driver"]): device for device in parsed}


def kernel_line(made: NodeCommand) -> list[str]:
    return values(made, "-append")[0].split()


def test_starts_with_the_words_that_start_qemu() -> None:
    made = commanded()
    assert made.argv[:4] == CONTEXT.qemu
    assert made.environment == CONTEXT.environment
    assert made.node == "h"


def test_no_path_of_the_host_but_kernel_and_initrd() -> None:
    made = commanded(pcie=[{"gpu": "g", "vram": "1M"}, {"nvme": "n"}])
    words = " ".join(made.argv[len(CONTEXT.qemu) :])
    assert set(re.findall(r"[\w.]*/[\w./-]+", words)) == {
        "/proc/self/cwd/agent.sock-",
        "/proc/self/cwd/ssh.sock-",
        "/proc/self/fd/100",
        "/dev/fdset/101",
        "log/console.log",
    }


def test_vram_and_disks_are_inherited_memory() -> None:
    made = commanded(pcie=[{"gpu": "g", "vram": "1M"}, {"nvme": "n", "size": "64M", "cmb": "16M"}])
    assert [(m.fd, m.name, m.size_bytes) for m in made.memory] == [
        (100, "g.vram", 1 << 20),
        (101, "n", 64 << 20),
    ]
    objects = {o["id"]: o for o in map(json.loads, values(made, "-object"))}
    vram = objects[devices(made)["g-vram"]["memdev"]]
    assert vram == {
        "qom-type": "memory-backend-file",
        "id": "g-vram-memory",
        "mem-path": "/proc/self/fd/100",
        "size": 1 << 20,
        "share": True,
    }
    assert values(made, "-add-fd") == ["fd=101,set=101"]
    drive = json.loads(values(made, "-blockdev")[0])
    assert drive["filename"] == "/dev/fdset/101"
    assert devices(made)["n"]["drive"] == drive["node-name"]
    assert devices(made)["n"]["cmb_size_mb"] == 16


def test_main_memory_is_shared() -> None:
    made = commanded(machine={"memory": "256M", "vcpus": 2, "cpu": "EPYC"})
    ram = json.loads(values(made, "-object")[0])
    assert (ram["qom-type"], ram["size"], ram["share"]) == ("memory-backend-memfd", 256 << 20, True)
    assert (values(made, "-m"), values(made, "-smp")) == (["256M"], ["2"])


def test_an_emulated_processor_does_not_claim_fast_string_copies() -> None:
    assert values(commanded(machine={"cpu": "EPYC"}), "-cpu") == ["EPYC,erms=off,fsrm=off"]
    kvm = commanded(replace(CONTEXT, accelerator="kvm"), machine={"cpu": "EPYC"})
    assert values(kvm, "-cpu") == ["EPYC"]


def test_quick_firmware_comes_with_buses_that_the_kernel_numbers() -> None:
    quick = replace(CONTEXT, quick_firmware="qboot.rom")
    amd = {"kind": "amd"}
    made = {
        "quick": commanded(quick),
        "none there": commanded(CONTEXT),
        "real processor": commanded(replace(quick, accelerator="kvm")),
        "table by bus number": commanded(quick, iommu=amd),
    }
    firmware = {name: values(command, "-bios") for name, command in made.items()}
    assert firmware.pop("quick") == ["qboot.rom"]
    assert set(map(tuple, firmware.values())) == {()}
    words = {name: values(command, "-append")[0].split() for name, command in made.items()}
    assert "pci=hpiosize=0,assign-busses" in words.pop("quick")
    assert all("pci=hpiosize=0" in others for others in words.values())


def test_ports_with_and_without_acs() -> None:
    nic = {"nic": "n", "engine": "edu"}
    made = devices(
        commanded(
            pcie=[
                {"root_port": "a", "below": [{"switch": "s", "below": [nic]}]},
                {
                    "root_port": "b",
                    "acs": "none",
                    "below": [{"switch": "t", "acs": "redirect", "below": [{"nic": "m"}]}],
                },
            ]
        )
    )
    drivers = {name: made[name]["driver"] for name in ("a", "s", "s-port0", "b", "t", "t-port0")}
    assert drivers == {
        "a": "pcie-root-port",
        "s": "x3130-upstream",
        "s-port0": "xio3130-downstream",
        "b": "ioh3420",
        "t": "x3130-upstream",
        "t-port0": "pcie-root-port",
    }


def test_edu_reaches_all_addresses() -> None:
    made = devices(commanded(pcie=[{"nic": "n", "engine": "edu"}]))
    assert made["n"]["dma_mask"] == 0xFFFF_FFFF_FFFF_FFFF


def test_functions_of_one_slot() -> None:
    gpu = {"gpu": "g", "vram": "1M", "engine": "igb", "doorbell": True, "address": "05.0"}
    made = devices(commanded(pcie=[gpu]))
    assert [made[name]["addr"] for name in ("g-vram", "g-engine", "g-doorbell")] == [
        "05.0",
        "05.1",
        "05.2",
    ]
    assert made["g-vram"]["multifunction"] is True
    assert "multifunction" not in made["g-engine"]


def test_a_bell_connects_to_the_rack_s_server() -> None:
    argv = commanded(pcie=[{"bell": "b0", "address": "07.0"}])
    assert devices(argv)["b0"] == {
        "driver": "ivshmem-doorbell",
        "id": "b0",
        "bus": "pcie.0",
        "addr": "07.0",
        "chardev": "b0-wire",
        "vectors": 2,
    }
    assert "socket,id=b0-wire,path=b0.bell" in argv.argv


def test_bells_of_a_rack_have_one_server_and_numbers_in_the_file_s_order() -> None:
    nodes = {name: {"pcie": [{"bell": "left"}, {"bell": "right"}]} for name in ("one", "two")}
    plan = place(from_data({"rack": "r", "nodes": nodes}))
    server = bells_command(plan)
    assert server is not None
    sockets = ("left.bell", "right.bell", "../two/left.bell", "../two/right.bell")
    assert json.loads(server.argv[-1])["sockets"] == list(sockets)
    assert (server.node, server.ready_file) == ("one", "bells.ready")
    assert server.makes == (*sockets, "bells.ready")  # also of a server that was killed
    assert [f"{node}/{f.device}" for node, f in bells_of(plan)][2:] == ["two/left", "two/right"]


def test_a_rack_without_bells_has_no_server() -> None:
    assert bells_command(place(from_data({"rack": "r", "nodes": {"h": {}}}))) is None


def test_passthrough() -> None:
    card = {"passthrough": "card0", "host": "0000:3b:00.0", "address": "06.0"}
    made = devices(commanded(pcie=[card]))
    assert made["card0"] == {
        "driver": "vfio-pci",
        "id": "card0",
        "bus": "pcie.0",
        "addr": "06.0",
        "host": "0000:3b:00.0",
    }


def test_a_device_that_cannot_be_made_is_a_missing_capability() -> None:
    topology = from_data({"rack": "r", "nodes": {"h": {"pcie": [{"nic": "n"}]}}})
    plan = place(topology).nodes["h"]
    functions = [replace(f, kind="marvel") if f.name == "n" else f for f in plan.functions]
    with pytest.raises(CapabilityMissing, match="marvel") as caught:
        command(replace(plan, functions=tuple(functions)), topology.nodes["h"], CONTEXT)
    assert caught.value.exit_code == ExitCode.SKIP


@pytest.mark.parametrize(
    ("iommu", "expected"),
    [
        ({"kind": "intel"}, {"intremap": "on", "caching-mode": True, "aw-bits": 48}),
        (
            {"kind": "intel", "mode": "lazy", "aw_bits": 39},
            {"intremap": "on", "caching-mode": False, "aw-bits": 39},
        ),
        (
            {"kind": "intel", "scalable": True},
            {
                "intremap": "on",
                "caching-mode": True,
                "aw-bits": 48,
                "scalable-mode": True,
                "fsts": True,
            },
        ),
    ],
)
def test_intel_iommu(iommu: dict[str, Any], expected: dict[str, Any]) -> None:
    made = devices(commanded(iommu=iommu))["intel-iommu"]
    assert made == {"driver": "intel-iommu", **expected}


def test_a_device_outside_qemu_needs_caching_mode_even_if_lazy() -> None:
    card = {"passthrough": "card0", "host": "0000:3b:00.0"}
    made = commanded(iommu={"kind": "intel", "mode": "lazy"}, pcie=[card])
    assert devices(made)["intel-iommu"]["caching-mode"] is True


def test_other_iommus() -> None:
    amd = devices(commanded(iommu={"kind": "amd"}))
    assert amd["iommu0"] == {
        "driver": "AMDVI-PCI",
        "id": "iommu0",
        "bus": "pcie.0",
        "addr": "01.0",
    }
    assert amd["amd-iommu"]["pci-id"] == "iommu0"
    virtio = devices(commanded(iommu={"kind": "virtio", "aw_bits": 39}))
    assert virtio["iommu0"]["driver"] == "virtio-iommu-pci"
    assert virtio["iommu0"]["aw-bits"] == 39
    assert not any("iommu" in name for name in devices(commanded(iommu={"kind": "none"})))


@pytest.mark.parametrize(
    ("iommu", "words"),
    [
        ({"kind": "none"}, ""),
        ({"mode": "off"}, "intel_iommu=off"),
        ({"mode": "passthrough"}, "intel_iommu=on,sm_off iommu=pt"),
        ({"mode": "lazy"}, "intel_iommu=on,sm_off iommu.passthrough=0 iommu.strict=0"),
        ({"mode": "strict"}, "intel_iommu=on,sm_off iommu.passthrough=0 iommu.strict=1"),
        ({"scalable": True}, "intel_iommu=on,sm_on iommu.passthrough=0 iommu.strict=1"),
        ({"kind": "amd", "mode": "off"}, "amd_iommu=off"),
        ({"kind": "amd"}, "iommu.passthrough=0 iommu.strict=1"),
        ({"kind": "virtio", "mode": "passthrough"}, "iommu=pt"),
        ({"kind": "virtio", "mode": "off"}, ""),
    ],
)
def test_the_kernel_is_told_what_the_topology_says(iommu: dict[str, Any], words: str) -> None:
    assert " ".join(iommu_words(adapter(Iommu).validate_python(iommu))) == words


def test_the_users_words_come_last() -> None:
    context = replace(CONTEXT, kernel_args=("from=harness",))
    line = kernel_line(commanded(context, kernel_args=["from=topology"]))
    assert line[-2:] == ["from=harness", "from=topology"]
    assert line[:3] == ["console=ttyS0", "panic=-1", "oops=panic"]
    assert "quiet" in line
    assert "quiet" not in kernel_line(commanded(replace(CONTEXT, console_verbose=True)))


def test_speed_ups_are_for_tcg_only() -> None:
    assert "mitigations=off" in kernel_line(commanded())
    kvm = commanded(replace(CONTEXT, accelerator="kvm"))
    assert "mitigations=off" not in kernel_line(kvm)
    assert values(kvm, "-accel") == ["kvm"]


def test_an_emulated_machine_is_told_how_fast_its_clock_runs() -> None:
    told = replace(CONTEXT, tsc_khz=2_596_000)
    assert "tsc_early_khz=2596000" in kernel_line(commanded(told))
    kvm = replace(told, accelerator="kvm")
    for context in (CONTEXT, kvm):
        assert "tsc_early_khz" not in " ".join(kernel_line(commanded(context)))
