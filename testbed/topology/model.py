# SPDX-License-Identifier: Apache-2.0
"""The topology: what a rack is made of, as frozen values.

They are read from YAML as the user writes it (``gpu: gpu0``, ``vram: 64M``) by the keys' names, and
hold what the rest of the program needs (``name``, ``vram_bytes``). Unknown keys are refused.
Sources: PCI Express Base Specification 6.0 (what may stand below what); QEMU ``docs/pcie.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from testbed.errors import Diagnostic, InputError
from testbed.topology.fields import (
    Address,
    AlsoHolds,
    Bandwidth,
    BarSize,
    DeviceClass,
    DiskSize,
    Entries,
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
from testbed.topology.machine import Iommu, Machine
from testbed.topology.units import MIB, format_duration, format_rate
from testbed.topology.values import Value, key, plain, value

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, ValidationInfo
    from pydantic_core import CoreSchema

# The copy engine of a GPU or NIC that names none.
DEFAULT_ENGINE: Literal["model"] = "model"

# Names that the testbed gives to functions of its own.
NETWORK_NAME = "net0"
IOMMU_NAME = "iommu0"
RESERVED_NAMES = (NETWORK_NAME, IOMMU_NAME)

# In the context of a validation: where files are sought that the topology names.
FOLDER = "folder"

AcsMode = Literal["redirect", "none"]


@value
class _Entry(Value):
    """What all PCIe entries have: a kind, given by the first key, whose value is the name."""

    kind: ClassVar[str]
    name: Name
    address: Address | None = key(
        "Slot and function, `SS.F` in hexadecimal, on the bus the entry stands on "
        "(below a switch: the address of its downstream port). Chosen by the testbed if left out.",
        default=None,
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


@value
class _OnPcie(_Entry):
    """An entry with a PCIe link of its own, upwards."""

    bandwidth_bytes_per_s: Bandwidth | None = key(
        "What its PCIe link carries each way, if transfers of `model` engines are to "
        "be slowed down to it; a way through the tree carries what its narrowest link does.",
        to_text=format_rate,
        name="bandwidth",
        default=None,
    )
    latency_ns: Latency | None = key(
        "What its PCIe link adds to each transfer; a way adds up its links'.",
        to_text=format_duration,
        name="latency",
        default=None,
    )


_FAULTS = (
    "Faults on purpose, from the first command on: rules as `testbed inject` takes them, such as "
    "`drop write nth=3`. Only with engine `model`."
)


def _only_a_model_injects(faults: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    engine = info.data.get("engine")
    if faults and engine not in (None, "model"):
        raise rule_error(f"engine '{engine}' has no faults on purpose", expected="engine: model")
    return faults


ModelsFaults = Annotated[Entries[FaultRule], AlsoHolds(_only_a_model_injects)]


@value
class Gpu(_OnPcie):
    """A GPU: one slot with its video memory, a copy engine and a doorbell page."""

    kind = "gpu"
    name: Name = key("The GPU's name.", name="gpu")
    vram_bytes: BarSize = key("Video memory: the size of its BAR.", name="vram")
    engine: Literal["model", "igb", "edu"] = key(
        "The copy engine. `model`: the testbed's own, in Python. `igb`, `edu`: QEMU's, "
        "fast and slow, as independent witnesses.",
        default=DEFAULT_ENGINE,
    )
    doorbell: Flag = key("One page of registers that a peer rings by writing to it.", default=False)
    faults: ModelsFaults = key(_FAULTS, default=())


@value
class Nic(_OnPcie):
    """A network card, seen as one more device that does DMA."""

    kind = "nic"
    name: Name = key("The NIC's name.", name="nic")
    engine: Literal["model", "igb", "edu"] = key(
        "The device. `model`: the testbed's own, in Python, RDMA-like. `igb`, `edu`: "
        "QEMU's, as independent witnesses.",
        default=DEFAULT_ENGINE,
    )
    faults: ModelsFaults = key(_FAULTS, default=())


@value
class Nvme(_Entry):
    """An NVMe disk; it forgets its contents when the rack goes down."""

    kind = "nvme"
    name: Name = key("The disk's name.", name="nvme")
    size_bytes: DiskSize = key("Capacity of namespace 1.", name="size", default=64 * MIB)
    cmb_bytes: BarSize | None = key(
        "Controller memory buffer: Linux makes it peer-to-peer memory (`p2pmem`).",
        name="cmb",
        default=None,
    )


@value
class Passthrough(_Entry):
    """A real device of the host, handed to the guest with vfio-pci."""

    kind = "passthrough"
    name: Name = key("The device's name in the rack.", name="passthrough")
    host: HostAddress = key("The device's address on the host (`lspci -D`).")


def _beside_the_topology(model: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get(FOLDER)
    return str(folder / model) if folder else model


@value
class OwnDevice(_OnPcie):
    """A device of your own: a Python class (docs/own-device.md), run only with `--trust`."""

    kind = "device"
    name: Name = key("The device's name.", name="device")
    model: Annotated[DeviceClass, AlsoHolds(_beside_the_topology)] = key(
        "The class, as `FILE.py:CLASS`; the file is sought beside the topology's."
    )
    options: Mapping[str, Any] = key("Keyword arguments for the class.", default_factory=dict)
    bars_bytes: BarSize | None = key(
        "Address space above 4 GiB for its 64-bit prefetchable BARs. With `--trust` "
        "the class is asked, and this need not be given.",
        name="bars",
        default=None,
    )
    sha256: Sha256 | None = key(
        "What the file must hold; records say here what it held.", default=None
    )

    faults: Entries[FaultRule] = key(_FAULTS.partition(" Only")[0], default=())

    @property
    def file(self) -> str:
        """The file of the class."""
        return self.model.rpartition(":")[0]


@value
class Bell(_Entry):
    """A card with which nodes interrupt one another: all of a rack are joined."""

    kind = "bell"
    name: Name = key(
        "The card's name. The rack's bells are numbered from 0 as the file has them, "
        "and each has 2 MSI-X vectors; QEMU's `ivshmem-doorbell`.",
        name="bell",
    )


@value
class Switch(_OnPcie):
    """A PCIe switch; each entry below gets a downstream port of its own."""

    kind = "switch"
    name: Name = key("The switch's name.", name="switch")
    acs: AcsMode = key(
        "`redirect`: its downstream ports have ACS, and the kernel makes them send "
        "peer traffic up to the IOMMU. `none`: peers reach one another inside the switch.",
        default="none",
    )
    below: Entries[BelowEntry] = key("What is plugged into it.", default=())

    @property
    def children(self) -> tuple[BelowEntry, ...]:
        """The entries below the switch."""
        return self.below


@value
class RootPort(_OnPcie):
    """A root port: one link out of the root complex."""

    kind = "root_port"
    name: Name = key("The port's name.", name="root_port")
    acs: AcsMode = key(
        "`redirect`: the port has the ACS capability. `none`: it has not.", default="redirect"
    )
    below: Entries[BelowEntry] = key(
        "What is plugged into it: at most one entry.", default=(), json_schema_extra={"maxItems": 1}
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


class _ByKind:
    """Which of several kinds an entry is, its keys tell."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415

        choices = {union_tag(each.kind): handler.generate_schema(each) for each in get_args(source)}
        return core_schema.tagged_union_schema(choices, _tag_of)


_Device = Gpu | Nic | Nvme | Passthrough | OwnDevice | Bell
RootEntry = Annotated[RootPort | _Device, _ByKind()]
BelowEntry = Annotated[Switch | _Device, _ByKind()]
Entry = RootPort | Switch | Gpu | Nic | Nvme | Passthrough | OwnDevice | Bell


@value
class Node(Value):
    """One machine of the rack: one QEMU, one guest kernel."""

    machine: Machine = key("Processor and memory.", default_factory=Machine)
    kernel: KernelName = key(
        "The guest's kernel: `default`, a name from `images/`, or a path.", default="default"
    )
    kernel_args: Entries[KernelWord] = key(
        "Words added to the end of the kernel's command line.", default=()
    )
    iommu: Iommu = key("The virtual IOMMU.", default_factory=Iommu)
    pcie: Entries[RootEntry] = key("What stands on the root bus.", default=())

    def entries(self) -> Iterator[Entry]:
        """Every entry, parents before children."""
        stack: list[Entry] = list(reversed(self.pcie))
        while stack:
            entry = stack.pop()
            yield entry
            stack.extend(reversed(entry.children))


@value
class Link(Value):
    """A private link between two GPUs, beside PCIe."""

    kind: Literal["xgmi", "nvlink", "xelink", "ual"] = key("The link's technology.")
    between: tuple[GpuRef, ...] = key(
        "The two ends, each `node/gpu`.", json_schema_extra={"minItems": 2, "maxItems": 2}
    )
    width: int = key("Number of lanes.", default=16, strict=True, ge=1, le=64)
    bandwidth_bytes_per_s: Bandwidth | None = key(
        "What all lanes together carry each way, if transfers are to be slowed down to it.",
        to_text=format_rate,
        name="bandwidth",
        default=None,
    )
    latency_ns: Latency | None = key(
        "What it adds to each transfer.", to_text=format_duration, name="latency", default=None
    )


@value
class Topology(Value):
    """A rack: nodes, what stands in them, and private links between their GPUs."""

    rack: Name = key("The rack's name; `up --name` gives another.")
    description: str = key("One sentence for people.", default="", strict=True)
    vars: Mapping[Name, VariableValue] = key(
        "Values for the template, each changed with `-s NAME=VALUE`. Plain YAML: read "
        "before the template runs.",
        default_factory=dict,
    )
    nodes: Mapping[Name, Node] = key("The machines, by name.", min_length=1)
    links: Entries[Link] = key("Private links between GPUs.", default=())


def to_data(topology: Topology) -> dict[str, Any]:
    """Plain data in the file's own shape, all defaults filled in; :func:`from_data` reads it."""
    data: dict[str, Any] = plain(topology)
    return data


def from_data(data: Mapping[str, Any], *, folder: Path | None = None) -> Topology:
    """The topology that :func:`to_data` wrote; pydantic.ValidationError if it is none.

    Unlike the loader it runs no template and knows no line numbers: for stored records. Files that
    it names are sought in ``folder``, if one is given.
    """
    from testbed.topology.reading import adapter  # noqa: PLC0415

    topology: Topology = adapter(Topology).validate_python(data, context={FOLDER: folder})
    return topology


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
    from pydantic import ValidationError  # noqa: PLC0415

    from testbed.topology.validation import explain  # noqa: PLC0415

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
