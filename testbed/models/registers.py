# SPDX-License-Identifier: Apache-2.0
"""The registers, commands and formats of the GPU and NIC models. Declared here, once.

After a change, `python -m testbed.models.registers_document` writes the agent's constants and
the pages in `docs/` anew; a test keeps them in step.
"""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple

from testbed.models.access import Cause
from testbed.models.tables import Access, Code, Item, RecordLayout, Register

VENDOR_ID: Final = 0x1234
GPU_DEVICE_ID: Final = 0xA9E0
GPU_CLASS: Final = 0x030200  # display controller, 3D
NIC_DEVICE_ID: Final = 0xA9E1
NIC_CLASS: Final = 0x020700  # network controller, InfiniBand
REGISTER_BAR: Final = 0
REGISTER_BAR_BYTES: Final = 0x4000
MSIX_VECTORS: Final = 4
MSIX_TABLE_OFFSET: Final = 0x2000
MSIX_PENDING_OFFSET: Final = 0x3000
GPU_IDENTITY: Final = 0x55504756  # "VGPU"
NIC_IDENTITY: Final = 0x434E5256  # "VRNC"
REGISTERS_VERSION: Final = 0x0001_0000
LINK_BASE: Final = 0x800
LINK_STRIDE: Final = 0x40
MAX_LINKS: Final = 16
MAX_RING_ENTRIES: Final = 1 << 16
MAX_FAULT_ENTRIES: Final = 1 << 12
SMALL_PAGE_BYTES: Final = 1 << 12
LARGE_PAGE_BYTES: Final = 1 << 21
VIRTUAL_BITS: Final = 48
ENTRY_ADDRESS_MASK: Final = (1 << 52) - SMALL_PAGE_BYTES
APERTURE_LINK_SHIFT: Final = 4

RO, RW, W1C, WO = Access.RO, Access.RW, Access.W1C, Access.WO


class Common(Register):
    """Registers that the GPU and the NIC have in common: identity, interrupts, command ring."""

    IDENTITY = 0x000, RO, "what it is: 0x55504756 (`VGPU`) or 0x434E5256 (`VRNC`)"
    VERSION = 0x004, RO, "of the register set: major in the high half"
    CONTROL = 0x020, RW, "how the engine runs"
    STATUS = 0x024, RO, "what the engine does"
    RESET = 0x028, WO, "any write: stop the engine, forget ring, error and translations"
    NOTIFIED = 0x02C, RO, "the value last written to DOORBELL_NOTIFY"
    INTERRUPT_CAUSE = 0x030, W1C, "why it interrupts"
    INTERRUPT_ENABLE = 0x034, RW, "which causes interrupt; one that waits fires when enabled"
    RING_BASE_LOW = 0x040, RW, "where the command ring stands"
    RING_BASE_HIGH = 0x044, RW, ""
    RING_APERTURE = 0x048, RW, "in which aperture"
    RING_ENTRIES = 0x04C, RW, "commands in the ring: a power of two, 2 to 65536"
    RING_HEAD = 0x050, RO, "the next command that the engine takes"
    RING_TAIL = 0x054, RO, "the first that is not there yet; set by DOORBELL_TAIL"
    ERROR_CAUSE = 0x060, RO, "why the engine has halted"
    ERROR_COMMAND = 0x064, RO, "index in the ring of the command that failed"
    ERROR_ADDRESS_LOW = 0x068, RO, "the address that failed, on the path it took"
    ERROR_ADDRESS_HIGH = 0x06C, RO, ""
    FAULT_BUFFER_LOW = 0x0A0, RW, "where the fault buffer stands (GPU: video memory, NIC: IOVA)"
    FAULT_BUFFER_HIGH = 0x0A4, RW, ""
    FAULT_ENTRIES = 0x0A8, RW, "its size in records, at most 4096; one is always left free"
    FAULT_PUT = 0x0AC, RO, "where the device writes the next record"
    FAULT_GET = 0x0B0, RW, "the next record that the driver reads"
    FAULT_REPLAY = 0x0B4, WO, "1: try what waits again, 2: fail it"
    FAULT_LOST = 0x0B8, RO, "faults that found the buffer full"
    COMMANDS_DONE = 0x100, RO, "commands completed since the reset"
    PAGE_FAULTS = 0x104, RO, "page faults since the reset"
    COMMANDS_FAILED = 0x108, RO, "commands with KEEP_GOING that failed since the reset"
    DOORBELL_TAIL = 0x1000, WO, "the new tail: rings the engine (a page of its own)"
    DOORBELL_NOTIFY = 0x1004, WO, "raises NOTIFY with any value: for peers to ring"


class Gpu(Register):
    """Registers of the GPU alone."""

    FEATURES = 0x008, RO, "what the device can do"
    LINKS = 0x00C, RO, "how many private links it has"
    VRAM_SIZE_LOW = 0x010, RO, "bytes of video memory"
    VRAM_SIZE_HIGH = 0x014, RO, ""
    MMU_CONTROL = 0x080, RW, "how virtual addresses are translated"
    MMU_ROOT_LOW = 0x088, RW, "offset in video memory of the root page table"
    MMU_ROOT_HIGH = 0x08C, RW, ""
    INVALIDATE_LOW = 0x090, RW, "an address in the page that INVALIDATE forgets"
    INVALIDATE_HIGH = 0x094, RW, ""
    INVALIDATE = 0x098, WO, "1: forget the translation of that page, 2: forget all"


class Link(Register):
    """Registers of link n, at 0x800 + n * 0x40."""

    STATE = 0x00, RO, "is it up"
    CONTROL = 0x04, RW, "1: enabled (as after reset), 0: taken down"
    EXPORT_MODE = 0x08, RW, "what the peer may reach; takes effect with SYNC"
    SYNC = 0x0C, RW, "write 1: the peer learns of the export; reads 1 until it has"
    EXPORT_BASE_LOW = 0x10, RW, "offset of the window, or of the root table"
    EXPORT_BASE_HIGH = 0x14, RW, ""
    EXPORT_SIZE_LOW = 0x18, RW, "bytes of the window (of link addresses, with a table)"
    EXPORT_SIZE_HIGH = 0x1C, RW, ""
    PEER_SIZE_LOW = 0x20, RO, "bytes of link addresses that the peer exports"
    PEER_SIZE_HIGH = 0x24, RO, ""
    WIDTH = 0x28, RO, "lanes"


class Feature(Code):
    """Bits of FEATURES."""

    COPY_2D = 1, "COPY_2D"
    ATOMIC = 2, "ATOMIC_ADD"
    MMU = 4, "virtual addresses"
    REPLAY = 8, "replayable page faults"
    LINK = 16, "has links"


class Control(Code):
    """Bits of CONTROL."""

    ENABLE = 1, "the engine takes commands"


class Status(Code):
    """Bits of STATUS."""

    BUSY = 1, "a command is under way"
    FAULTED = 2, "it waits for FAULT_REPLAY"
    HALTED = 4, "it stopped at an error; only RESET helps"


class InterruptCause(Code):
    """Bits of INTERRUPT_CAUSE and INTERRUPT_ENABLE; bit n fires MSI-X vector n, NOTIFY vector 0."""

    COMMAND = 1, "a command that asked for it is done"
    ERROR = 2, "the engine has halted"
    PAGE_FAULT = 4, "a record is in the fault buffer (or was lost)"
    LINK = 8, "a link changed its state or its peer its export"
    NOTIFY = 16, "DOORBELL_NOTIFY was written"


class Aperture(Code):
    """What kind of address it is: the low four bits; with LINK, the link's number above them."""

    VRAM = 0, "offset in video memory"
    SYSTEM = 1, "bus address (IOVA): switch, then IOMMU"
    PEER = 2, "bus address of a peer's BAR; takes the same way as SYSTEM"
    VIRTUAL = 3, "virtual address: the GPU's page tables"
    LINK = 4, "address that the peer of a link exports"


class MmuControl(Code):
    """Bits of MMU_CONTROL."""

    ENABLE = 1, "translate (otherwise every virtual access fails)"
    REPLAYABLE = 2, "a fault waits for FAULT_REPLAY (otherwise it fails the command)"


class Entry(Code):
    """Bits of a page table entry (64 bits); 12 to 51 are the address of the page or next table."""

    VALID = 1 << 0, "translates"
    WRITABLE = 1 << 1, "may be written"
    LARGE = 1 << 2, "in a table of level 1: a 2 MiB page; otherwise the next table"
    APERTURE = 0xFF << 4, "the page's aperture byte (bits 4 to 11); tables are in video memory"


class FaultCause(Code):
    """Why a translation failed."""

    NOT_VALID = 0, "no valid entry"
    NOT_WRITABLE = 1, "a write to a page that is not writable"
    BAD_ENTRY = 2, "an entry that makes no sense"


class Replay(Code):
    """Values of FAULT_REPLAY."""

    AGAIN = 1, "translate again and go on"
    CANCEL = 2, "fail the command with PAGE_FAULT"


class Export(Code):
    """Values of EXPORT_MODE."""

    CLOSED = 0, "nothing"
    PHYSICAL = 1, "a window of video memory; link address 0 is its first byte"
    VIRTUAL = 2, "what a page table of the exporter translates (format as the MMU's)"


class LinkState(Code):
    """Values of a link's STATE."""

    ABSENT = 0, "there is no such link"
    DOWN = 1, "disabled at an end, cut, or the peer is gone"
    UP = 2, "usable"


class Opcode(Code):
    """What a command does."""

    NOP = 0, "nothing"
    COPY = 1, "`size_bytes` from `source` to `target`"
    COPY_2D = 2, "`rows` rows of `size_bytes`, `source_pitch` and `target_pitch` apart"
    FILL = 3, "`size_bytes` at `target` with the 8 bytes of `value`, again and again"
    ATOMIC_ADD = 4, "add `value` to the integer of `size_bytes` (4 or 8) at `target`"
    SIGNAL = 5, "write the 8 bytes of `value` at `target`"
    WAIT = 6, "go on when the 64-bit integer at `source` is at least `value`"
    INTERRUPT = 7, "raise COMMAND"
    INVALIDATE = 8, "forget the translation of the page at `target`; with size 0, of all"


class CommandFlag(Code):
    """Bits of a command's flags."""

    FENCE = 1, "when done, write `fence_value` (as 64 bits) at `fence_address`"
    INTERRUPT = 2, "when done (and the fence is written), raise COMMAND"
    KEEP_GOING = 4, "if an access fails, count it in COMMANDS_FAILED and take the next command"


class Nic(Register):
    """Registers of the NIC alone. A memory region is described in REGION_*, then committed."""

    ADDRESS = 0x010, RO, "its own number on the network"
    REGIONS = 0x014, RO, "how many memory regions it can hold"
    REGION_INDEX = 0x180, RW, "which region the next COMMIT is about"
    REGION_FLAGS = 0x184, RW, "what it is for; without VALID, COMMIT removes it"
    REGION_BASE_LOW = 0x188, RW, "its first address, as work requests and peers name it"
    REGION_BASE_HIGH = 0x18C, RW, ""
    REGION_SIZE_LOW = 0x190, RW, "its bytes"
    REGION_SIZE_HIGH = 0x194, RW, ""
    REGION_IOVA_LOW = 0x198, RW, "pinned: IOVA of its first byte; on demand: of its table"
    REGION_IOVA_HIGH = 0x19C, RW, ""
    REGION_COMMIT = 0x1A0, WO, "any write: make it so; the key is new each time"
    REGION_KEY = 0x1A4, RO, "the key of the region that was committed last; 0 if it was refused"
    REGION_INVALIDATE = 0x1A8, WO, "forget the table entries of the region with this index"


class RegionFlag(Code):
    """Bits of REGION_FLAGS."""

    VALID = 1, "there is a region"
    LOCAL_WRITE = 2, "the NIC's own reads and writes may write it"
    REMOTE_READ = 4, "peers may read it"
    REMOTE_WRITE = 8, "peers may write it"
    ON_DEMAND = 16, "its pages are looked up in a table of 64-bit entries, one a 4 KiB page"


class RegionEntry(Code):
    """Bits of an on-demand region's table entry; 12 to 63 are the page's IOVA."""

    VALID = 1, "the page is there"
    WRITABLE = 2, "and may be written"


class NicOpcode(Code):
    """What a work request does."""

    NOP = 0, "nothing"
    WRITE = 1, "from the local region to the peer's"
    READ = 2, "from the peer's region to the local one"


U8 = "B"
U16 = "H"
U32 = "I"
U64 = "Q"


class Command(NamedTuple):
    """One command in the ring, 64 bytes."""

    opcode: Annotated[int, Item(U8, "what to do")]
    flags: Annotated[int, Item(U8, "FENCE, INTERRUPT")] = 0
    source_aperture: Annotated[int, Item(U8, "of `source`")] = 0
    target_aperture: Annotated[int, Item(U8, "of `target`")] = 0
    fence_aperture: Annotated[int, Item(U8, "of `fence_address`")] = 0
    reserved: Annotated[int, Item(U8, "0")] = 0
    reserved2: Annotated[int, Item(U16, "0")] = 0
    source: Annotated[int, Item(U64, "address")] = 0
    target: Annotated[int, Item(U64, "address")] = 0
    size_bytes: Annotated[int, Item(U64, "")] = 0
    source_pitch: Annotated[int, Item(U32, "bytes from row to row")] = 0
    target_pitch: Annotated[int, Item(U32, "bytes from row to row")] = 0
    rows: Annotated[int, Item(U32, "")] = 0
    fence_value: Annotated[int, Item(U32, "")] = 0
    value: Annotated[int, Item(U64, "")] = 0
    fence_address: Annotated[int, Item(U64, "")] = 0


class WorkRequest(NamedTuple):
    """One work request of the NIC in its ring, 64 bytes."""

    opcode: Annotated[int, Item(U8, "what to do")]
    flags: Annotated[int, Item(U8, "FENCE, INTERRUPT")] = 0
    peer: Annotated[int, Item(U16, "the peer's number; its own number is loopback")] = 0
    local_key: Annotated[int, Item(U32, "key of the local region")] = 0
    local_address: Annotated[int, Item(U64, "in the local region")] = 0
    remote_address: Annotated[int, Item(U64, "in the peer's region")] = 0
    size_bytes: Annotated[int, Item(U64, "")] = 0
    remote_key: Annotated[int, Item(U32, "key of the peer's region")] = 0
    fence_value: Annotated[int, Item(U32, "")] = 0
    fence_aperture: Annotated[int, Item(U64, "1 (SYSTEM)")] = 0
    reserved: Annotated[int, Item(U64, "0")] = 0
    fence_address: Annotated[int, Item(U64, "")] = 0


class FaultRecord(NamedTuple):
    """One record in the fault buffer, 32 bytes."""

    address: Annotated[int, Item(U64, "virtual (or region) address, down to the byte")]
    command: Annotated[int, Item(U32, "index in the ring; NIC: the region's key")]
    write: Annotated[int, Item(U8, "1 for a write")]
    cause: Annotated[int, Item(U8, "why")]
    reserved: Annotated[int, Item(U16, "0")]
    time_ns: Annotated[int, Item(U64, "the device's clock")]
    reserved2: Annotated[int, Item(U64, "0")]


COMMAND: Final = RecordLayout(Command)
WORK_REQUEST: Final = RecordLayout(WorkRequest)
FAULT_RECORD: Final = RecordLayout(FaultRecord)

GPU_CODES: Final[tuple[type[Code], ...]] = (
    Feature,
    Control,
    Status,
    InterruptCause,
    Aperture,
    MmuControl,
    Entry,
    FaultCause,
    Replay,
    Export,
    LinkState,
    Opcode,
    CommandFlag,
)
NIC_CODES: Final[tuple[type[Code], ...]] = (
    Control,
    Status,
    InterruptCause,
    FaultCause,
    Replay,
    RegionFlag,
    RegionEntry,
    NicOpcode,
    CommandFlag,
)
ERROR_TEXTS: Final = {
    Cause.REFUSED: "the IOMMU refused the address",
    Cause.NO_BUS_MASTER: "bus mastering is off",
    Cause.TIMEOUT: "no completion",
    Cause.POISONED: "the data was marked bad",
    Cause.OUT_OF_RANGE: "outside video memory",
    Cause.LINK_DOWN: "the link is not up",
    Cause.LINK_REFUSED: "the peer does not export that address, or the key does not allow it",
    Cause.PAGE_FAULT: "no translation",
    Cause.BAD_COMMAND: "the command makes no sense",
    Cause.DEVICE_GONE: "the machine is gone",
}
