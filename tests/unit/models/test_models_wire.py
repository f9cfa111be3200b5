# SPDX-License-Identifier: Apache-2.0
"""The vfio-user messages: sizes as the specification says, and nothing else accepted."""

from __future__ import annotations

import pytest

from testbed.models import wire

# Sizes of the structures in QEMU's hw/vfio-user/protocol.h and linux/vfio.h, without the header.
SIZES = {
    "HEADER": 16,
    "DMA_MAP": 32,
    "DMA_UNMAP": 24,
    "DEVICE_INFO": 16,
    "REGION_INFO": 32,
    "IRQ_INFO": 16,
    "IRQ_SET": 20,
    "REGION_ACCESS": 16,
    "DMA_ACCESS": 16,
    "FEATURE": 8,
}

# What QEMU 11.1.2 sends and expects, recorded from a running one.
QEMU_VERSION = (
    b"\0\0\0\0"
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, '
    b'"write_multiple": true}}\0'
)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sizes(name: str, size: int) -> None:
    assert getattr(wire, name).size_bytes == size


def test_a_value_survives_its_bytes() -> None:
    request = wire.DmaMap(32, 3, 0x1000, 0xFFFF_0000_0000_0000, 0x2000)
    assert wire.DMA_MAP.decode(wire.DMA_MAP.encode(request)) == request


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_wrong_size_is_malformed(size: int) -> None:
    with pytest.raises(wire.Malformed, match=str(size)):
        wire.DMA_MAP.decode(bytes(size))


def test_more_may_follow_where_it_is_allowed() -> None:
    assert wire.IRQ_SET.decode(bytes(21), exact=False) == (0, 0, 0, 0, 0)


def test_qemu_s_version_is_understood() -> None:
    major, minor, capabilities = wire.decode_version(QEMU_VERSION)
    assert (major, minor) == (0, 0)
    assert capabilities == wire.Capabilities(16, 1 << 20, 4096, 65535, write_multiple=True)


def test_our_version_fits_into_qemu_s_buffer() -> None:
    assert len(wire.encode_version(0, 0, wire.OURS)) <= len(QEMU_VERSION)


def test_a_version_without_data_means_the_defaults() -> None:
    assert wire.decode_version(b"\0\0\0\0") == (0, 0, wire.Capabilities())


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        b"nonsense",
        b'{"capabilities": 1}',
        b'{"capabilities": {"max_msg_fds": "many"}}',
        b'{"capabilities": {"max_msg_fds": true}}',
        b'{"capabilities": {"pgsizes": -1}}',
        b'{"capabilities": {"max_data_xfer_size": 0}}',
        b"[" * 4000,
        b"\xff\xfe",
        b"x" * wire.MAX_VERSION_BYTES,
    ],
)
def test_a_bad_version_is_malformed(text: bytes) -> None:
    with pytest.raises(wire.Malformed):
        wire.decode_version(b"\0\0\0\0" + text + b"\0")


def test_capabilities_beyond_ours_are_cut() -> None:
    text = b'{"capabilities": {"max_msg_fds": 1000000, "max_data_xfer_size": 99999999999}}'
    capabilities = wire.decode_version(b"\0\0\0\0" + text)[2]
    assert capabilities.max_message_fds == wire.MAX_MESSAGE_FDS
    assert capabilities.max_transfer_bytes == wire.MAX_TRANSFER_BYTES


def test_coalesced_writes() -> None:
    writes = [
        (wire.RegionAccess(0x10, 0, 4), b"abcd"),
        (wire.RegionAccess(0x1000, 2, 8), b"12345678"),
    ]
    assert wire.decode_write_multi(wire.encode_write_multi(writes)) == writes


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\1" + bytes(7),
        b"\1" + bytes(7) + bytes(23),
        b"\xff" * 8 + bytes(24),
        b"\1" + bytes(7) + bytes(12) + b"\x09\0\0\0" + bytes(8),  # 9 bytes in 8
    ],
)
def test_bad_coalesced_writes(payload: bytes) -> None:
    with pytest.raises(wire.Malformed):
        wire.decode_write_multi(payload)


def test_sparse_areas_are_vfio_s_capability() -> None:
    data = wire.encode_sparse_areas([(0x1000, 0x2000)])
    assert data == (
        b"\1\0\1\0" + bytes(4)  # id 1, version 1, no next
        + b"\1\0\0\0" + bytes(4)  # one area
        + b"\0\x10\0\0\0\0\0\0" + b"\0\x20\0\0\0\0\0\0"
    )  # fmt: skip
