# SPDX-License-Identifier: Apache-2.0
"""The topology: what a rack is made of, as frozen values.

The models read the YAML as the user writes it (``gpu: gpu0``, ``vram: 64M``) through aliases, and
hold what the rest of the program needs (``name``, ``vram_bytes``). Unknown keys are refused.
Sources: PCI Express Base Specification 6.0 (what may stand below what); QEMU ``docs/pcie.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from testbed.errors import Diagnostic, InputError
from testbed.topology.fields import (
    Address,
    Bandwidth,
    BarSize,
    DeviceClass,
    DiskSize,
    FaultRule,
    Flag,
    GpuRef,
    HostAddress,
    KernelName,
    KernelWord,
    Latency,
    Name,
    Sha256,
    VariableValue,
    rule_error,
)
from testbed.topology.machine import Entries, Iommu, Machine, Strict
from testbed.topology.units import MIB
from testbed.topology.validation import explain

# The copy engine of a GPU or NIC that names none.
DEFAULT_ENGINE: Literal["model"] = "model"

# Names that the testbed gives to functions of its own.
NETWORK_NAME = "net0"
IOMMU_NAME = "iommu0"
RESERVED_NAMES = (NETWORK_NAME, IOMMU_NAME)

# In the context of a validation: where files are sought that the topology names.
FOLDER = "folder"

AcsMode = Literal["redirect", "none"]


class _Entry(Strict):
    """What all PCIe entries have: a kind, given by the first key, whose value is the name."""

    kind: ClassVar[str]
    name: Name
    address: Address | None = Field(
        None,
        description="Slot and function, `SS.F` in hexadecimal, on the bus the entry stands on "
        "(below a switch: the address of its downstream port). Chosen by the testbed if left out.",
    )

    @property
    def slot_and_function(self) -> tuple[int, int] | None:
        """The explicit address as numbers, or None."""
        if self.address is None:
            return None
        slot, function = self.address.split(".")
        return int(slot, 16), int(function)

    @property
    def children(self) -> tuple[BelowEntry, ...]:
        """The entries below this one; empty for devices."""
        return ()


class _OnPcie(_Entry):
    """An entry with a PCIe link of its own, upwards."""

    bandwidth_bytes_per_s: Bandwidth | None = Field(
        None,
        alias="bandwidth",
        description="What its PCIe link carries each way, if transfers of `model` engines are to "
        "be slowed down to it; a way through the tree carries what its narrowest link does.",
    )
    latency_ns: Latency | None = Field(
        None,
        alias="latency",
        description="What its PCIe link adds to each transfer; a way adds up its links'.",
    )


FaultRules = Entries[FaultRule]
_FAULTS = (
    "Faults on purpose, from the first command on: rules as `testbed inject` takes them, such as "
    "`drop write nth=3`. Only with engine `model`."
)


def _only_a_model_injects(faults: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    engine = info.data.get("engine")
    if faults and engine not in (None, "model"):
        raise rule_error(f"engine '{engine}' has no faults on purpose", expected="engine: model")
    return faults


class Gpu(_OnPcie):
    """A GPU: one slot with its video memory, a copy engine and a doorbell page."""

    kind = "gpu"
    name: Name = Field(alias="gpu", description="The GPU's name.")
    vram_bytes: BarSize = Field(alias="vram", description="Video memory: the size of its BAR.")
    engine: Literal["model", "igb", "edu"] = Field(
        DEFAULT_ENGINE,
        description="The copy engine. `model`: the testbed's own, in Python. `igb`, `edu`: QEMU's, "
        "fast and slow, as independent witnesses.",
    )
    doorbell: Flag = Field(
        False, description="One page of registers that a peer rings by writing to it."
    )
    faults: FaultRules = Field((), description=_FAULTS)

    _check_faults = field_validator("faults")(_only_a_model_injects)


class Nic(_OnPcie):
    """A network card, seen as one more device that does DMA."""

    kind = "nic"
    name: Name = Field(alias="nic", description="The NIC's name.")
    engine: Literal["model", "igb", "edu"] = Field(
        DEFAULT_ENGINE,
        description="The device. `model`: the testbed's own, in Python, RDMA-like. `igb`, `edu`: "
        "QEMU's, as independent witnesses.",
    )
    faults: FaultRules = Field((), description=_FAULTS)

    _check_faults = field_validator("faults")(_only_a_model_injects)


class Nvme(_Entry):
    """An NVMe disk; it forgets its contents when the rack goes down."""

    kind = "nvme"
    name: Name = Field(alias="nvme", description="The disk's name.")
    size_bytes: DiskSize = Field(64 * MIB, alias="size", description="Capacity of namespace 1.")
    cmb_bytes: BarSize | None = Field(
        None,
        alias="cmb",
        description="Controller memory buffer: Linux makes it peer-to-peer memory (`p2pmem`).",
    )


class Passthrough(_Entry):
    """A real device of the host, handed to the guest with vfio-pci."""

    kind = "passthrough"
    name: Name = Field(alias="passthrough", description="The device's name in the rack.")
    host: HostAddress = Field(description="The device's address on the host (`lspci -D`).")


class OwnDevice(_OnPcie):
    """A device of your own: a Python class (docs/own-device.md), run only with `--trust`."""

    kind = "device"
    name: Name = Field(alias="device", description="The device's name.")
    model: DeviceClass = Field(
        description="The class, as `FILE.py:CLASS`; the file is sought beside the topology's."
    )
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="Keyword arguments for the class."
    )
    bars_bytes: BarSize | None = Field(
        None,
        alias="bars",
        description="Address space above 4 GiB for its 64-bit prefetchable BARs. With `--trust` "
        "the class is asked, and this need not be given.",
    )
    sha256: Sha256 | None = Field(
        None, description="What the file must hold; records say here what it held."
    )

    faults: FaultRules = Field((), description=_FAULTS.partition(" Only")[0])

    @field_validator("model")
    @classmethod
    def _beside_the_topology(cls, model: str, info: ValidationInfo) -> str:
        folder = (info.context or {}).get(FOLDER)
        return str(folder / model) if folder else model

    @property
    def file(self) -> str:
        """The file of the class."""
        return self.model.rpartition(":")[0]


class Bell(_Entry):
    """A card with which nodes interrupt one another: all of a rack are joined."""

    kind = "bell"
    name: Name = Field(
        alias="bell",
        description="The card's name. The rack's bells are numbered from 0 as the file has them, "
        "and each has 2 MSI-X vectors; QEMU's `ivshmem-doorbell`.",
    )


class Switch(_OnPcie):
    """A PCIe switch; each entry below gets a downstream port of its own."""

    kind = "switch"
    name: Name = Field(alias="switch", description="The switch's name.")
    acs: AcsMode = Field(
        "none",
        description="`redirect`: its downstream ports have ACS, and the kernel makes them send "
        "peer traffic up to the IOMMU. `none`: peers reach one another inside the switch.",
    )
    below: Entries[BelowEntry] = Field((), description="What is plugged into it.")

    @property
    def children(self) -> tuple[BelowEntry, ...]:
        """The entries below the switch."""
        return self.below


class RootPort(_OnPcie):
    """A root port: one link out of the root complex."""

    kind = "root_port"
    name: Name = Field(alias="root_port", description="The port's name.")
    acs: AcsMode = Field(
        "redirect", description="`redirect`: the port has the ACS capability. `none`: it has not."
    )
    below: Entries[BelowEntry] = Field(
        (),
        description="What is plugged into it: at most one entry.",
        json_schema_extra={"maxItems": 1},
    )

    @property
    def children(self) -> tuple[BelowEntry, ...]:
        """The entry below the port, if there is one."""
        return self.below


DEVICE_KINDS = ("gpu", "nic", "nvme", "passthrough", "device", "bell")
ROOT_KINDS = ("root_port", *DEVICE_KINDS)
BELOW_KINDS = ("switch", *DEVICE_KINDS)
ALL_KINDS = ("root_port", *BELOW_KINDS)


def union_tag(kind: str) -> str:
    """The union's tag of a kind; in an error's place it cannot be taken for a key."""
    return f"({kind})"


def _tag_of(value: object) -> str | None:
    if isinstance(value, _Entry):
        return union_tag(value.kind)
    if isinstance(value, dict):
        return next((union_tag(kind) for kind in ALL_KINDS if kind in value), None)
    return None


_Device = (
    Annotated[Gpu, Tag("(gpu)")]
    | Annotated[Nic, Tag("(nic)")]
    | Annotated[Nvme, Tag("(nvme)")]
    | Annotated[Passthrough, Tag("(passthrough)")]
    | Annotated[OwnDevice, Tag("(device)")]
    | Annotated[Bell, Tag("(bell)")]
)
RootEntry = Annotated[Annotated[RootPort, Tag("(root_port)")] | _Device, Discriminator(_tag_of)]
BelowEntry = Annotated[Annotated[Switch, Tag("(switch)")] | _Device, Discriminator(_tag_of)]
Switch.model_rebuild()
RootPort.model_rebuild()
Entry = RootPort | Switch | Gpu | Nic | Nvme | Passthrough | OwnDevice | Bell


class Node(Strict):
    """One machine of the rack: one QEMU, one guest kernel."""

    machine: Machine = Field(default_factory=Machine, description="Processor and memory.")
    kernel: KernelName = Field(
        "default", description="The guest's kernel: `default`, a name from `images/`, or a path."
    )
    kernel_args: Entries[KernelWord] = Field(
        (), description="Words added to the end of the kernel's command line."
    )
    iommu: Iommu = Field(default_factory=Iommu, description="The virtual IOMMU.")
    pcie: Entries[RootEntry] = Field((), description="What stands on the root bus.")

    def entries(self) -> Iterator[Entry]:
        """Every entry, parents before children."""
        stack: list[Entry] = list(reversed(self.pcie))
        while stack:
            entry = stack.pop()
            yield entry
            stack.extend(reversed(entry.children))


class Link(Strict):
    """A private link between two GPUs, beside PCIe."""

    kind: Literal["xgmi", "nvlink", "xelink", "ual"] = Field(description="The link's technology.")
    between: tuple[GpuRef, ...] = Field(
        description="The two ends, each `node/gpu`.",
        json_schema_extra={"minItems": 2, "maxItems": 2},
    )
    width: int = Field(16, strict=True, ge=1, le=64, description="Number of lanes.")
    bandwidth_bytes_per_s: Bandwidth | None = Field(
        None,
        alias="bandwidth",
        description="What all lanes together carry each way, if transfers are to be slowed down "
        "to it.",
    )
    latency_ns: Latency | None = Field(
        None, alias="latency", description="What it adds to each transfer."
    )


class Topology(Strict):
    """A rack: nodes, what stands in them, and private links between their GPUs."""

    rack: Name = Field(description="The rack's name; `up --name` gives another.")
    description: str = Field("", strict=True, description="One sentence for people.")
    vars: Mapping[Name, VariableValue] = Field(
        default_factory=dict,
        description="Values for the template, each changed with `-s NAME=VALUE`. Plain YAML: read "
        "before the template runs.",
    )
    nodes: Mapping[Name, Node] = Field(min_length=1, description="The machines, by name.")
    links: Entries[Link] = Field((), description="Private links between GPUs.")


def to_data(topology: Topology) -> dict[str, Any]:
    """Plain data in the file's own shape, all defaults filled in; :func:`from_data` reads it."""
    return topology.model_dump(mode="json", by_alias=True, exclude_none=True)


def from_data(data: Mapping[str, Any], *, folder: Path | None = None) -> Topology:
    """The topology that :func:`to_data` wrote; pydantic.ValidationError if it is none.

    Unlike the loader it runs no template and knows no line numbers: for stored records. Files that
    it names are sought in ``folder``, if one is given.
    """
    return Topology.model_validate(data, context={FOLDER: folder})


def _entries_of(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield entry
        yield from _entries_of(entry.get("below", []))


def with_overrides(
    topology: Topology,
    *,
    rack: str | None = None,
    iommu_mode: str | None = None,
    kernel: str | None = None,
    cpu: str | None = None,
    engine: str | None = None,
    vram: str | None = None,
) -> Topology:
    """The topology with some values changed on all nodes, validated again.

    InputError if a value cannot be, for example a mode for a node that has no IOMMU.
    """
    data = to_data(topology)
    if rack is not None:
        data["rack"] = rack
    for node in data["nodes"].values():
        if iommu_mode is not None:
            node["iommu"]["mode"] = iommu_mode
        if kernel is not None:
            node["kernel"] = kernel
        if cpu is not None:
            node["machine"]["cpu"] = cpu
        for entry in _entries_of(node["pcie"]):
            if vram is not None and "gpu" in entry:
                entry["vram"] = vram
        if engine is not None:
            for entry in _entries_of(node["pcie"]):
                if "engine" in entry:
                    entry["engine"] = engine
                    if engine != DEFAULT_ENGINE:
                        entry.pop("faults", None)  # only models go wrong on purpose
    try:
        return from_data(data)
    except ValidationError as error:
        raise InputError(
            diagnostics=[
                Diagnostic(f"rack {topology.rack}", 0, 0, p.message, p.expected, p.nearest)
                for p in explain(error, Topology)
            ]
        ) from None
