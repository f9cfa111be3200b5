# SPDX-License-Identifier: Apache-2.0
"""The steps of a bug report, as frozen values: what a reporter did, one verb a step.

Each class names its verb (``kind``, the step's first key), what a step of it has seen (``results``,
for ``${name.field}``), and which of its keys name an earlier step (``refers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from testbed.reports.fields import (
    Address,
    BufferSize,
    ByteSize,
    Device,
    LogWords,
    Method,
    ModuleName,
    NodeName,
    Offset,
    Place,
    Refers,
    Seconds,
    Seed,
    StepName,
    Timeout,
    Value,
    Word32,
    Words,
)
from testbed.topology.fields import Entries, FaultRule, Flag, Name
from testbed.topology.reading import Strict
from testbed.topology.units import MIB

# Of a step that may fail: the error's name (EINVAL), or its class; "" if it went well.
FAILURE = ("errno", "error")
ANY = "*"  # results that only the running machine knows

COPY_BYTES = 4096


class Step(Strict):
    """What all steps have."""

    kind: ClassVar[str]
    results: ClassVar[tuple[str, ...]] = ()
    refers: ClassVar[Refers] = {}

    name: StepName | None = Field(
        None, alias="as", description="A name, by which later steps and conditions call it."
    )
    may_fail: Flag = Field(
        False,
        description="An error is something that was seen (`errno`, `error`), not the end.",
    )
    expect: Mapping[StepName, Value] = Field(
        default_factory=dict,
        description="What the step must have seen, field by field; otherwise it is DIFFERENT.",
    )


class Open(Step):
    """Take devices from their drivers, into one container; their memory and engines can be used."""

    kind = "open"
    results = ("devices",)
    devices: Entries[Device] = Field(alias="open", description="The devices.", min_length=1)
    domain: Literal["kernel", "vfio"] = Field(
        "kernel",
        description="`kernel`: what a kernel driver would have. Where the node's IOMMU is off or "
        "passes through, bus addresses go as they are, and `map` hands out those; else it "
        "translates. `vfio`: always VFIO, which translates whatever the kernel's default is.",
    )


class Close(Step):
    """Give the devices of the container back that this one is in; all their mappings go."""

    kind = "close"
    device: Device = Field(alias="close", description="A device of the container.")


class Buffer(Step):
    """Memory of the guest, zeroed, under a name."""

    kind = "buffer"
    results = ("bus_address", "size")
    buffer: Name = Field(alias="buffer", description="Its name.")
    size_bytes: BufferSize = Field(MIB, alias="size", description="Its size.")
    node: NodeName = Field("", description="The node.")


class Map(Step):
    """Map memory for the devices of the container, as an exporter does for an importer.

    ``dma_address`` is what the importer is told: an IOVA, or with ``raw`` the bus address itself,
    for which nothing is mapped.
    """

    kind = "map"
    results = ("dma_address", "bus_address", "size")
    memory: Place = Field(alias="map", description="The memory.")
    offset: Offset = Field(0, description="From here.")
    size_bytes: BufferSize | None = Field(
        None, alias="size", description="So much; 64K, or what there is, if left out."
    )
    read: Flag = Field(True, description="Devices may read.")
    write: Flag = Field(True, description="Devices may write.")
    raw: Flag = Field(False, description="Map nothing, and hand out the bus address: a mistake.")
    into: Device | None = Field(
        None, description="For the container of this device; needed if there are several."
    )


class Unmap(Step):
    """Take a mapping away."""

    kind = "unmap"
    refers: ClassVar[Refers] = {"unmap": ("map",)}
    mapping: StepName = Field(alias="unmap", description="The step that mapped.")


class Fill(Step):
    """Write a pattern into a memory or onto a disk, as the guest's processor."""

    kind = "fill"
    results = ("seed", "size", "sha256")
    memory: Place = Field(alias="fill", description="The memory or disk.")
    offset: Offset = Field(0, description="From here.")
    size_bytes: ByteSize = Field(COPY_BYTES, alias="size", description="So much.")
    seed: Seed = Field(description="Which pattern; each seed is another.")


class Pattern(Step):
    """The bytes that a `fill` would write, for a `call` that wants them."""

    kind = "pattern"
    results = ("seed", "size", "sha256", "hex")
    seed: Seed = Field(alias="pattern", description="Which pattern.")
    size_bytes: ByteSize = Field(COPY_BYTES, alias="size", description="So much.")


class Checksum(Step):
    """Read a memory or disk, by every witness that can: the guest, and the host or the machine."""

    kind = "checksum"
    results = ("guest", "host", "size")
    memory: Place = Field(alias="checksum", description="The memory or disk.")
    offset: Offset = Field(0, description="From here.")
    size_bytes: ByteSize = Field(COPY_BYTES, alias="size", description="So much.")


class Copy(Step):
    """Let a device's engine copy by bus address, watched for faults and for the paths taken."""

    kind = "copy"
    results = ("completed", "bytes", "faults")
    engine: Device = Field(alias="copy", description="The device whose engine copies.")
    source: Address = Field(alias="from", description="Bus address to read from.")
    target: Address = Field(alias="to", description="Bus address to write to.")
    size_bytes: ByteSize = Field(COPY_BYTES, alias="size", description="So much.")


class Write32(Step):
    """Let a device write four bytes by DMA: a doorbell, a flag. Watched likewise."""

    kind = "write32"
    results = ("completed", "bytes", "faults")
    engine: Device = Field(alias="write32", description="The device that writes.")
    target: Address = Field(alias="to", description="Bus address.")
    value: Word32 = Field(description="What.")


class P2pMem(Step):
    """Allocate 8 KiB of a disk's controller memory, as the kernel's peer-to-peer memory."""

    kind = "p2pmem"
    results = ("bus_address", "size")
    provider: Device = Field(alias="p2pmem", description="The disk with `cmb:`.")


class Transfer(Step):
    """Direct I/O of a disk into peer-to-peer memory, or out of it: the kernel's own p2pdma."""

    kind = "transfer"
    results = ("bytes", "faults", "lines")
    refers: ClassVar[Refers] = {"memory": ("p2pmem",)}
    client: Device = Field(alias="transfer", description="The disk.")
    memory: StepName = Field(description="The step that allocated the memory.")
    write: Flag = Field(False, description="To the disk, not from it.")


class Module(Step):
    """Load a kernel module of the testbed's, built for the guest's kernel."""

    kind = "module"
    module: ModuleName = Field(alias="module", description="Its name.")
    unload: Flag = Field(False, description="Unload it.")
    node: NodeName = Field("", description="The node.")


class Acs(Step):
    """Turn peer-to-peer redirect of a port or switch on or off, as `setpci` does."""

    kind = "acs"
    results = ("ports", "before")
    port: Device = Field(alias="acs", description="A root port, or a switch: its ports.")
    redirect: Flag = Field(description="Requests and completions of peers go up.")


class Config(Step):
    """Read a word of a device's configuration space, or write it first."""

    kind = "config"
    results = ("value",)
    device: Device = Field(alias="config", description="The device.")
    offset: Annotated[int, Field(strict=True, ge=0, lt=4096)] = Field(description="Where.")
    width: Literal[1, 2, 4] = Field(4, description="Bytes.")
    value: Word32 | None = Field(None, description="Write this.")


class Inject(Step):
    """Let something go wrong in a model device: a rule as of `testbed inject`."""

    kind = "inject"
    device: Device = Field(alias="inject", description="The device.")
    rule: FaultRule = Field(description="Such as `drop write nth=2`.")


class Unplug(Step):
    """Pull a device out of its slot, by QEMU's ``device_del``; waits until it has gone."""

    kind = "unplug"
    results = ("gone",)
    device: Device = Field(alias="unplug", description="The device.")
    timeout_s: Timeout = Field(20, alias="timeout", description="Seconds.")


class Exec(Step):
    """Run a command in the guest's shell."""

    kind = "exec"
    results = ("status", "stdout", "stderr", "timed_out")
    command: Words = Field(alias="exec", description="For `sh -c`; references are put in.")
    timeout_s: Timeout = Field(20, alias="timeout", description="Seconds, then it is killed.")
    node: NodeName = Field("", description="The node.")


class Wait(Step):
    """Let time go by, on the host's clock."""

    kind = "wait"
    seconds: Seconds = Field(alias="wait", description="How long.")


class KernelLog(Step):
    """The guest kernel's messages since the step of this kind before, or since the first step."""

    kind = "kernel_log"
    results = ("count", "lines")
    words: LogWords = Field(alias="kernel_log", description="Only lines with this in them.")
    node: NodeName = Field("", description="The node.")


class Call(Step):
    """Any method of the guest's agent, for what has no step of its own."""

    kind = "call"
    results = (ANY,)
    method: Method = Field(alias="call", description="Such as `p2p.map_type`.")
    parameters: Mapping[str, Any] = Field(
        default_factory=dict, alias="with", description="Its parameters, references put in."
    )
    watch: Flag = Field(False, description="It does DMA: watch for faults meanwhile.")
    timeout_s: Timeout = Field(30, alias="timeout", description="Seconds.")
    node: NodeName = Field("", description="The node.")


STEPS: tuple[type[Step], ...] = (
    *(Open, Close, Buffer, Map, Unmap, Fill, Pattern, Checksum, Copy, Write32, P2pMem, Transfer),
    *(Module, Acs, Config, Inject, Unplug, Exec, Wait, KernelLog, Call),
)
STEP_OF = {step.kind: step for step in STEPS}


def _tag_of(value: object) -> str | None:
    if isinstance(value, Step):
        return f"({value.kind})"
    if isinstance(value, dict):
        return next((f"({kind})" for kind in value if kind in STEP_OF), None)
    return None


AnyStep = Annotated[
    Annotated[Open, Tag("(open)")]
    | Annotated[Close, Tag("(close)")]
    | Annotated[Buffer, Tag("(buffer)")]
    | Annotated[Map, Tag("(map)")]
    | Annotated[Unmap, Tag("(unmap)")]
    | Annotated[Fill, Tag("(fill)")]
    | Annotated[Pattern, Tag("(pattern)")]
    | Annotated[Checksum, Tag("(checksum)")]
    | Annotated[Copy, Tag("(copy)")]
    | Annotated[Write32, Tag("(write32)")]
    | Annotated[P2pMem, Tag("(p2pmem)")]
    | Annotated[Transfer, Tag("(transfer)")]
    | Annotated[Module, Tag("(module)")]
    | Annotated[Acs, Tag("(acs)")]
    | Annotated[Config, Tag("(config)")]
    | Annotated[Inject, Tag("(inject)")]
    | Annotated[Unplug, Tag("(unplug)")]
    | Annotated[Exec, Tag("(exec)")]
    | Annotated[Wait, Tag("(wait)")]
    | Annotated[KernelLog, Tag("(kernel_log)")]
    | Annotated[Call, Tag("(call)")],
    Discriminator(_tag_of),
]
