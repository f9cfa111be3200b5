# SPDX-License-Identifier: Apache-2.0
"""Writes what follows from the register tables: the agent's constants and a page a device.

`python -m testbed.models.registers_document` writes all of them anew; a test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from testbed.models import registers as hw
from testbed.models.tables import Code, RecordLayout, Register

ROOT = Path(__file__).resolve().parents[2]
_CONSTANTS = (
    "VENDOR_ID", "GPU_DEVICE_ID", "NIC_DEVICE_ID", "REGISTER_BAR", "REGISTER_BAR_BYTES",
    "GPU_IDENTITY", "NIC_IDENTITY", "REGISTERS_VERSION", "LINK_BASE", "LINK_STRIDE",
    "MAX_RING_ENTRIES",
)  # fmt: skip
_REGISTERS: tuple[type[Register], ...] = (hw.Common, hw.Gpu, hw.Link, hw.Nic)
_RECORDS: tuple[RecordLayout[Any], ...] = (hw.COMMAND, hw.WORK_REQUEST, hw.FAULT_RECORD)

GPU_TEXT = """\
# The GPU model

A PCI function (`1234:a9e0`, class 0302) with one register BAR. Its video memory is function 0 of
the same slot (`ivshmem-plain`, BAR2), so that every other device can reach it; the GPU itself
reaches it by offset (aperture `VRAM`). Interrupts: MSI-X, 4 vectors.

To make it work: enable memory and bus mastering; write the ring's place and size, then 1 to
`CONTROL`; put commands of 64 bytes into the ring; write the index behind the last one to
`DOORBELL_TAIL`. Commands run one after the other. A command with the flag `FENCE` writes its
`fence_value` when all its bytes are where they belong. A command that fails halts the engine:
`STATUS` says so, `ERROR_*` say why, and `RESET` forgets ring, tables and error.

Page faults: with `REPLAYABLE` set, an access without translation writes a record into the fault
buffer, interrupts (vector 2) and waits; the driver mends its tables, moves `FAULT_GET`, and writes
`FAULT_REPLAY`. Valid translations are kept until they are invalidated, also when the table changes.

Links: each end chooses with `EXPORT_*` what its peer may reach, and `SYNC` makes it so: from then
on not one byte else, and no translation from before, is reachable, however the peer asks. A link
address counts from 0. Disabling either end, or the end of either machine, takes the link down.

`ATOMIC_ADD` is atomic among the devices of one rack node, not towards the guest's CPUs.
"""

NIC_TEXT = """\
# The NIC model

A PCI function (`1234:a9e1`, class 0207) with one register BAR and MSI-X, 4 vectors. It moves bytes
between memory regions: its own, and those of other NICs of the rack. Ring, fences, errors,
doorbells and the fault buffer (here at an IOVA) work as in the GPU model; ring and fences are in
system memory.

A region is described in `REGION_*` and committed: `REGION_KEY` is its key, new each time. Work
requests and peers name a region by its key and addresses from `REGION_BASE` on; the region's flags
say what they may do. A *pinned* region is one range of IOVAs. An *on-demand* region has a table of
64-bit entries, one for each 4 KiB page; an entry that is not valid is a page fault: a record is
written, vector 2 fires, and whoever wanted the page waits until the driver has repaired the entry
and writes `FAULT_REPLAY`. Entries are kept until `REGION_INVALIDATE`.

A peer's request is carried out by the peer's own DMA behind its own IOMMU; if that refuses, the
request fails here, with the cause. `peer` equal to the NIC's own `ADDRESS` is loopback.
"""


def constants_module() -> str:
    """The text of `guest_agent/hw/model_registers.py`."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        '"""Registers, commands and formats of the GPU and NIC models: numbers for their drivers.',
        "",
        "Written by `python -m testbed.models.registers_document`; what they mean is in",
        "`docs/gpu-model.md` and `docs/nic-model.md`.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        *(f"{name} = {_hex(getattr(hw, name))}" for name in _CONSTANTS),
    ]
    for table in _REGISTERS:
        prefix = "" if table is hw.Common else f"{_upper(table.__name__)}_"
        lines += ["", *(f"{prefix}{register.name} = {_hex(register)}" for register in table)]
    for codes in _unique(hw.GPU_CODES + hw.NIC_CODES):
        prefix = _upper(codes.__name__)
        lines += ["", *(f"{prefix}_{code.name} = {_hex(code)}" for code in codes)]
    lines.append("")
    for number, text in hw.ERROR_TEXTS.items():
        lines.append(f"CAUSE_{number.name} = {_hex(number)}  # {text}")
    lines.append("")
    for layout in _RECORDS:
        name = _upper(layout.name)
        lines.append(f'{name}_FORM = "{layout.form}"')
        lines.append(f"{name}_BYTES = {layout.size_bytes}")
        lines += [f"{name}_{field.upper()}_AT = {at}" for field, at in layout.offsets().items()]
    return "\n".join(lines) + "\n"


def _hex(number: int) -> str:
    return f"0x{number:X}"


def gpu_page() -> str:
    """The text of `docs/gpu-model.md`."""
    return "\n".join(
        [
            GPU_TEXT,
            *_register_table("Registers (BAR0)", (*hw.Common, *hw.Gpu)),
            *_register_table("Registers of link n, at 0x800 + n · 0x40", hw.Link),
            *_record_table("A command", hw.COMMAND),
            *_record_table("A fault record", hw.FAULT_RECORD),
            *_code_tables(hw.GPU_CODES),
            *_error_table(),
        ]
    )


def nic_page() -> str:
    """The text of `docs/nic-model.md`."""
    return "\n".join(
        [
            NIC_TEXT,
            *_register_table("Registers (BAR0)", (*hw.Common, *hw.Nic)),
            *_record_table("A work request", hw.WORK_REQUEST),
            *_record_table("A fault record", hw.FAULT_RECORD),
            *_code_tables(hw.NIC_CODES),
            *_error_table(),
        ]
    )


def documents() -> dict[Path, str]:
    """Every file that follows from the tables, by its path in the repository."""
    return {
        Path("guest_agent/hw/model_registers.py"): constants_module(),
        Path("docs/gpu-model.md"): gpu_page(),
        Path("docs/nic-model.md"): nic_page(),
    }


def _upper(name: str) -> str:
    """``RegionFlag`` → ``REGION_FLAG``."""
    return "".join(f"_{c}" if c.isupper() and n else c for n, c in enumerate(name)).upper()


def _unique(tables: Iterable[type[Code]]) -> list[type[Code]]:
    return list(dict.fromkeys(tables))


def _register_table(title: str, registers: Iterable[Register]) -> list[str]:
    lines = [f"## {title}", "", "| at | name | access | what |", "|---|---|---|---|"]
    for register in sorted(registers):
        text = register.text or "″"
        lines.append(f"| {register:#05x} | `{register.name}` | {register.access} | {text} |")
    return [*lines, ""]


def _record_table(title: str, layout: RecordLayout[Any]) -> list[str]:
    sizes = {"B": 1, "H": 2, "I": 4, "Q": 8}
    lines = [f"## {title}: {layout.size_bytes} bytes", ""]
    lines += ["| at | bytes | field | what |", "|---|---|---|---|"]
    for name, at in layout.offsets().items():
        item = layout.items[name]
        lines.append(f"| {at} | {sizes[item.code]} | `{name}` | {item.text} |")
    return [*lines, ""]


def _code_tables(tables: Iterable[type[Code]]) -> list[str]:
    lines = []
    for codes in tables:
        title = (codes.__doc__ or "").split("\n")[0].rstrip(".")
        lines += [f"## {title}", "", "| value | name | what |", "|---|---|---|"]
        lines += [f"| {_number(code)} | `{code.name}` | {code.text} |" for code in codes]
        lines.append("")
    return lines


def _number(value: int) -> str:
    return str(value) if value < 64 else f"{value:#x}"


def _error_table() -> list[str]:
    lines = ["## Values of ERROR_CAUSE", "", "| value | name | what |", "|---|---|---|"]
    lines += [f"| {cause:d} | `{cause.name}` | {text} |" for cause, text in hw.ERROR_TEXTS.items()]
    return [*lines, ""]


def main() -> int:
    """Write them all."""
    for path, text in documents().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text)
        sys.stderr.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
