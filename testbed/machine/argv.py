# SPDX-License-Identifier: Apache-2.0
"""One node's QEMU command line, from its placement: the only place that knows QEMU's words.

Pure: what must be known of the host comes in as a :class:`~testbed.machine.command.LaunchContext`.
Devices and objects are written as JSON, in which no value can be taken for an option. Paths are
relative to the node's runtime folder, QEMU's working directory. Written for QEMU 11.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from testbed.errors import CapabilityMissing
from testbed.machine import saving
from testbed.machine.command import (
    AGENT_SOCKET,
    BELL_VECTORS,
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    LOG_LINK,
    QMP_MODELS_SOCKET,
    QMP_SOCKET,
    QMP_USER_SOCKET,
    SSH_SOCKET,
    LaunchContext,
    MemoryFd,
    NodeCommand,
    Start,
    bell_socket,
    vfio_socket,
)
from testbed.machine.firmware import quick_firmware
from testbed.machine.kernel_words import kernel_words
from testbed.topology.machine import Iommu
from testbed.topology.model import Node
from testbed.topology.plan import MODEL_KINDS, Function, NodePlan, Role
from testbed.topology.units import MIB

ROOT_BUS = "pcie.0"

# QEMU wants an absolute path for a forwarded socket: this one leads to its working directory.
OWN_FOLDER = "/proc/self/cwd"

# What listens in the guest (guest_agent/listener.py).
FORWARDED = {AGENT_SOCKET: 1022, SSH_SOCKET: 22}

# edu drops the upper bits of its DMA addresses unless told otherwise (QEMU hw/misc/edu.c).
ALL_ADDRESS_BITS = (1 << 64) - 1

_KINDS_OUTSIDE_QEMU = (*MODEL_KINDS, "vfio")

# A model that is silent for that long is lost to QEMU. One that waits for its turn on a busy host
# is not.
MODEL_TIMEOUT_MS = 30_000

# Emulated, `rep movsb` is a loop of single bytes. Without the promise that it is fast, the kernel
# copies and clears memory by words; nothing else depends on these two.
TCG_CPU_FLAGS = ",erms=off,fsrm=off"

Properties = dict[str, Any]


def command(plan: NodePlan, node: Node, context: LaunchContext) -> NodeCommand:
    """The QEMU command of one node, and the shared memory that it inherits.

    CapabilityMissing for a device that this testbed cannot make yet.
    """
    argv = [
        *context.qemu,
        *_machine(plan, node, context),
        *_channels(plan),
        *_iommu(plan, node.iommu),
    ]
    for function in plan.functions:
        argv += _function(function, node)
    if context.start is Start.RESTORE:
        argv += saving.RESTORE_WORDS
    elif context.program:
        argv += _program(context)
    else:
        argv += [
            *("-kernel", str(context.kernel)),
            *("-initrd", str(context.initrd)),
            *("-append", " ".join(kernel_words(node, context))),
        ]
    memory = _memory(plan)
    if context.start is not Start.BOOT:
        memory += (saving.ram(node),)
    environment = dict(context.environment)
    if context.start is Start.RESTORE:
        environment |= saving.RESTORE_ENVIRONMENT
    return NodeCommand(plan.name, tuple(argv), environment, memory)


def _program(context: LaunchContext) -> list[str]:
    """What kvm-unit-tests wants of a machine (its ``x86/run``): QEMU ends with 2 * status + 1."""
    return [
        *_device("pc-testdev", {}),
        *_device("isa-debug-exit", {"iobase": 0xF4, "iosize": 4}),
        *("-kernel", str(context.kernel)),
    ]


def _memory(plan: NodePlan) -> tuple[MemoryFd, ...]:
    return tuple(
        MemoryFd(f.memory_fd, f.name, f.vram_size_bytes or int(f.options["size_bytes"]))
        for f in plan.functions
        if f.memory_fd
    )


def _machine(plan: NodePlan, node: Node, context: LaunchContext) -> list[str]:
    machine = node.machine
    # Nodes that are alike but for their names are one saved machine.
    name = "saved" if context.start is Start.SAVE else plan.name
    # Shared, so that a device model in another process can reach it too (vfio-user).
    ram: Properties = {"id": "ram0", "size": machine.memory_bytes, "share": True}
    backend = "memory-backend-memfd"
    if context.start is not Start.BOOT:
        backend = "memory-backend-file"
        ram["mem-path"] = f"/proc/self/fd/{saving.RAM_FD}"
    if context.start is Start.RESTORE:
        # The saved file, of which QEMU writes copies: what is only read is shared with all machines
        # restored from it. Models cannot map that, and send messages for the guest's memory.
        ram |= {"share": False, "readonly": True, "rom": "off"}
    firmware = quick_firmware(node, context)
    return [
        *("-name", f"guest={name},process=qemu-system-x86"),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",  # a panic or a reboot ends QEMU, and the harness sees it at once
        *("-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        # Interrupt remapping needs the split interrupt controller.
        *("-machine", "q35,kernel-irqchip=split,memory-backend=ram0,sata=off,smbus=off,usb=off"),
        *(("-bios", firmware) if firmware else ()),
        *("-accel", context.accelerator),
        *("-cpu", machine.cpu + (TCG_CPU_FLAGS if context.accelerator == "tcg" else "")),
        *("-smp", str(machine.vcpus)),
        *("-m", f"{machine.memory_bytes // MIB}M"),
        *_object(backend, ram),
        *("-global", f"q35-pcihost.pci-hole64-size={plan.pci_hole64_bytes}"),
    ]


def _channels(plan: NodePlan) -> list[str]:
    """Control, console and network: unix sockets only, so that no port can be taken twice."""
    console_log = f"{LOG_LINK}/{CONSOLE_LOG}"
    network = {
        "type": "user",
        "id": "net0",
        "restrict": True,
        "ipv6": False,
        "hostfwd": [
            {"str": f"unix:{OWN_FOLDER}/{socket}-:{port}"} for socket, port in FORWARDED.items()
        ],
    }
    monitors = [QMP_SOCKET, QMP_USER_SOCKET]
    has_models = any(function.kind in MODEL_KINDS for function in plan.functions)
    if has_models:
        monitors.append(QMP_MODELS_SOCKET)
    return [
        *(word for name in monitors for word in ("-qmp", f"unix:{name},server=on,wait=off")),
        "-chardev",
        f"socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,logfile={console_log}",
        *("-serial", "chardev:console"),
        *("-netdev", _json(network)),
    ]


def _iommu(plan: NodePlan, iommu: Iommu) -> list[str]:
    """The IOMMUs that are part of the chipset; virtio's and AMD's are PCI functions too."""
    if iommu.kind != "intel":
        return []
    # Devices outside QEMU see the guest's mappings only if the guest announces each of them
    # (caching mode). Linux then invalidates at once too, so that there would be no lazy mode.
    is_outside = any(f.kind in _KINDS_OUTSIDE_QEMU for f in plan.functions)
    properties: Properties = {
        "intremap": "on",
        "caching-mode": is_outside or iommu.mode != "lazy",
        "aw-bits": iommu.aw_bits,
    }
    if iommu.scalable:
        properties |= {"scalable-mode": True, "fsts": True}  # first-stage translation
    return _device("intel-iommu", properties)


def _function(function: Function, node: Node) -> list[str]:
    make = _MAKERS.get((function.role, function.kind))
    if make is None:
        raise CapabilityMissing(
            f"a device of kind '{function.kind}' ('{function.name}')",
            hint="choose another engine in the topology, such as igb or edu",
        )
    return make(function, node)


def _root_port(function: Function, _: Node) -> list[str]:
    # ioh3420 is QEMU's root port without an ACS capability.
    driver = "pcie-root-port" if function.acs else "ioh3420"
    return _device(driver, _place(function) | _port(function))


def _upstream(function: Function, _: Node) -> list[str]:
    return _device("x3130-upstream", _place(function))


def _downstream(function: Function, _: Node) -> list[str]:
    # QEMU's xio3130 has no ACS. pcie-root-port has, and works in the same place: the guest sees a
    # port of type "root port" below the switch, which Linux treats as it does a downstream port.
    driver = "pcie-root-port" if function.acs else "xio3130-downstream"
    return _device(driver, _place(function) | _port(function))


def _vram(function: Function, _: Node) -> list[str]:
    memory: Properties = {
        "id": f"{function.qemu_id}-memory",
        "mem-path": f"/proc/self/fd/{function.memory_fd}",
        "size": function.vram_size_bytes,
        "share": True,
    }
    return [
        *_object("memory-backend-file", memory),
        *_device("ivshmem-plain", _place(function) | {"memdev": memory["id"], "master": "on"}),
    ]


def _igb(function: Function, _: Node) -> list[str]:
    return _device("igb", _place(function) | {"romfile": ""})


def _edu(function: Function, _: Node) -> list[str]:
    return _device("edu", _place(function) | {"dma_mask": ALL_ADDRESS_BITS})


def _model(function: Function, _: Node) -> list[str]:
    """A device served from outside (:mod:`testbed.machine.models`), which waits at its socket."""
    socket = {"type": "unix", "path": vfio_socket(function.qemu_id)}
    more = {"socket": socket, "x-msg-timeout": MODEL_TIMEOUT_MS}
    return _device("vfio-user-pci", _place(function) | more)


def _nvme(function: Function, _: Node) -> list[str]:
    """A disk over inherited memory: it holds data, and is gone with QEMU and its keeper."""
    fd_set = function.memory_fd
    drive = f"{function.qemu_id}-drive"
    properties = _place(function) | {"serial": function.name, "drive": drive}
    if function.options["cmb_bytes"]:
        properties["cmb_size_mb"] = int(function.options["cmb_bytes"]) // MIB
    return [
        *("-add-fd", f"fd={fd_set},set={fd_set}"),
        "-blockdev",
        _json({"driver": "file", "node-name": drive, "filename": f"/dev/fdset/{fd_set}"}),
        *_device("nvme", properties),
    ]


def _passthrough(function: Function, _: Node) -> list[str]:
    return _device("vfio-pci", _place(function) | {"host": function.options["host"]})


def _bell(function: Function, _: Node) -> list[str]:
    """Interrupts from other nodes; the rack's server (:mod:`testbed.machine.bells`) is there."""
    wire = f"{function.qemu_id}-wire"
    return [
        *("-chardev", f"socket,id={wire},path={bell_socket(function.qemu_id)}"),
        *_device("ivshmem-doorbell", _place(function) | {"chardev": wire, "vectors": BELL_VECTORS}),
    ]


def _network(function: Function, _: Node) -> list[str]:
    # No option ROM and no I/O ports: nothing boots from it, and I/O space is scarce. A restored
    # guest has nobody to tell that it has moved: its network is QEMU's own.
    more: Properties = {"netdev": "net0", "romfile": "", "disable-legacy": "on"}
    more |= {"guest_announce": False}
    return _device("virtio-net-pci", _place(function) | more)


def _virtio_iommu(function: Function, node: Node) -> list[str]:
    return _device("virtio-iommu-pci", _place(function) | {"aw-bits": node.iommu.aw_bits})


def _amd_iommu(function: Function, _: Node) -> list[str]:
    # The PCI function has a device of its own, so that its address can be chosen.
    place = _place(function)
    more = {"pci-id": function.qemu_id, "intremap": "on", "xtsup": True, "dma-remap": True}
    return [*_device("AMDVI-PCI", place), *_device("amd-iommu", more)]


_MAKERS: Mapping[tuple[Role, str], Callable[[Function, Node], list[str]]] = {
    (Role.ROOT_PORT, "port"): _root_port,
    (Role.SWITCH_UPSTREAM, "port"): _upstream,
    (Role.SWITCH_DOWNSTREAM, "port"): _downstream,
    (Role.VRAM, "ivshmem"): _vram,
    (Role.ENGINE, "model"): _model,
    (Role.ENGINE, "model-nic"): _model,
    (Role.DEVICE, "own"): _model,
    (Role.ENGINE, "igb"): _igb,
    (Role.ENGINE, "edu"): _edu,
    (Role.DOORBELL, "edu"): _edu,
    (Role.NVME, "nvme"): _nvme,
    (Role.PASSTHROUGH, "vfio"): _passthrough,
    (Role.BELL, "bell"): _bell,
    (Role.NETWORK, "virtio-net"): _network,
    (Role.IOMMU, "virtio-iommu"): _virtio_iommu,
    (Role.IOMMU, "amd-iommu"): _amd_iommu,
}


def _place(function: Function) -> Properties:
    """Identifier and address: what every PCI device has."""
    properties: Properties = {
        "id": function.qemu_id,
        "bus": function.parent or ROOT_BUS,
        "addr": f"{function.slot:02x}.{function.number:x}",
    }
    if function.multifunction and function.number == 0:
        properties["multifunction"] = True
    return properties


def _port(function: Function) -> Properties:
    """A port's slot number: chassis and slot together are unique in the machine."""
    return {"chassis": function.chassis, "slot": 0, "port": function.port}


def _device(driver: str, properties: Properties) -> list[str]:
    return ["-device", _json({"driver": driver} | properties)]


def _object(kind: str, properties: Properties) -> list[str]:
    return ["-object", _json({"qom-type": kind} | properties)]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
