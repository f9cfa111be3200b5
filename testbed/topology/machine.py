# SPDX-License-Identifier: Apache-2.0
"""A node's processor, memory and IOMMU; and what all models of a topology have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from testbed.topology.fields import CpuModel, Flag, MemorySize, rule_error
from testbed.topology.units import GIB

IommuKind = Literal["none", "intel", "amd", "virtio"]
IommuMode = Literal["off", "passthrough", "lazy", "strict"]

_T = TypeVar("_T")
# A list; a key with nothing after it is an empty one, as a template may leave it.
Entries = Annotated[tuple[_T, ...], BeforeValidator(lambda value: () if value is None else value)]


class Strict(BaseModel):
    """What a topology is made of: no key that is not known, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(Strict):
    """The node's processor and memory."""

    cpu: CpuModel = Field(
        "max",
        description="QEMU's name for the CPU model. Linux allows peer-to-peer DMA through the host "
        "bridge of an AMD EPYC and not through that of `max`.",
    )
    vcpus: int = Field(1, strict=True, ge=1, le=64, description="Virtual CPUs.")
    memory_bytes: MemorySize = Field(GIB, alias="memory", description="Main memory.")


class Iommu(Strict):
    """The virtual IOMMU, and how the guest's kernel uses it."""

    kind: IommuKind = Field(
        "intel", description="Which IOMMU QEMU emulates: `intel` (VT-d), `amd`, `virtio`, `none`."
    )
    mode: IommuMode = Field(
        "strict",
        description="What the guest's kernel is told. `off`: do not use it. `passthrough`: "
        "identity domains. `lazy`: translate, invalidate in batches (but at once on kind "
        "`amd`, and where `intel` meets `model` engines or passed-through devices). `strict`: "
        "translate, invalidate at once. The default is `strict`, and `off` for kind `none`.",
    )
    scalable: Flag = Field(
        False,
        description="VT-d scalable mode with first-stage tables (kind `intel` only); faults have "
        "other reason codes.",
    )
    aw_bits: Literal[39, 48] = Field(
        48, description="Width of an I/O virtual address (kinds `intel` and `virtio`)."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_mode(cls, data: Any) -> Any:
        if isinstance(data, dict) and "mode" not in data and data.get("kind") == "none":
            return {**data, "mode": "off"}
        return data

    @field_validator("mode")
    @classmethod
    def _mode_needs_iommu(cls, mode: IommuMode, info: ValidationInfo) -> IommuMode:
        if info.data.get("kind") == "none" and mode != "off":
            raise rule_error(f"mode '{mode}' needs an IOMMU", expected="off, or another kind")
        return mode

    @field_validator("scalable")
    @classmethod
    def _scalable_is_intel(cls, scalable: bool, info: ValidationInfo) -> bool:
        kind = info.data.get("kind", "intel")
        if scalable and kind != "intel":
            raise rule_error(f"kind '{kind}' has no scalable mode", expected="kind intel")
        return scalable

    @field_validator("aw_bits")
    @classmethod
    def _width_is_settable(cls, aw_bits: int, info: ValidationInfo) -> int:
        kind = info.data.get("kind", "intel")
        if aw_bits != 48 and kind not in ("intel", "virtio"):
            raise rule_error(f"kind '{kind}' has a fixed width", expected="48")
        return aw_bits
