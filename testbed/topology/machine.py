# SPDX-License-Identifier: Apache-2.0
"""A node's processor, memory and IOMMU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from testbed.topology.fields import AlsoHolds, CpuModel, Flag, MemorySize, rule_error
from testbed.topology.units import GIB
from testbed.topology.values import Value, key, value

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, ValidationInfo
    from pydantic_core import CoreSchema

IommuKind = Literal["none", "intel", "amd", "virtio"]
IommuMode = Literal["off", "passthrough", "lazy", "strict"]


@value
class Machine(Value):
    """The node's processor and memory."""

    cpu: CpuModel = key(
        "QEMU's name for the CPU model. Linux allows peer-to-peer DMA through the host "
        "bridge of an AMD EPYC and not through that of `max`.",
        default="max",
    )
    vcpus: int = key("Virtual CPUs.", default=1, strict=True, ge=1, le=64)
    memory_bytes: MemorySize = key("Main memory.", name="memory", default=GIB)


def _needs_iommu(mode: IommuMode, info: ValidationInfo) -> IommuMode:
    if info.data.get("kind") == "none" and mode != "off":
        raise rule_error(f"mode '{mode}' needs an IOMMU", expected="off, or another kind")
    return mode


def _is_intel(scalable: bool, info: ValidationInfo) -> bool:
    kind = info.data.get("kind", "intel")
    if scalable and kind != "intel":
        raise rule_error(f"kind '{kind}' has no scalable mode", expected="kind intel")
    return scalable


def _is_settable(aw_bits: int, info: ValidationInfo) -> int:
    kind = info.data.get("kind", "intel")
    if aw_bits != 48 and kind not in ("intel", "virtio"):
        raise rule_error(f"kind '{kind}' has a fixed width", expected="48")
    return aw_bits


def _with_mode(data: Any) -> Any:
    if isinstance(data, dict) and "mode" not in data and data.get("kind") == "none":
        return {**data, "mode": "off"}
    return data


@value
class Iommu(Value):
    """The virtual IOMMU, and how the guest's kernel uses it."""

    kind: IommuKind = key(
        "Which IOMMU QEMU emulates: `intel` (VT-d), `amd`, `virtio`, `none`.", default="intel"
    )
    mode: Annotated[IommuMode, AlsoHolds(_needs_iommu)] = key(
        "What the guest's kernel is told. `off`: do not use it. `passthrough`: "
        "identity domains. `lazy`: translate, invalidate in batches (but at once on kind "
        "`amd`, and where `intel` meets `model` engines or passed-through devices). `strict`: "
        "translate, invalidate at once. The default is `strict`, and `off` for kind `none`.",
        default="strict",
    )
    scalable: Annotated[Flag, AlsoHolds(_is_intel)] = key(
        "VT-d scalable mode with first-stage tables (kind `intel` only); faults have "
        "other reason codes.",
        default=False,
    )
    aw_bits: Annotated[Literal[39, 48], AlsoHolds(_is_settable)] = key(
        "Width of an I/O virtual address (kinds `intel` and `virtio`).", default=48
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.no_info_before_validator_function(_with_mode, handler(source))
