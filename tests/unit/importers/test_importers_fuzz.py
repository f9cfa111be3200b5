# SPDX-License-Identifier: Apache-2.0
"""Whatever is in a file, an import ends with a topology or with one clear error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.errors import InputError
from testbed.topology import load
from testbed.topology.importers.convert import READERS, Options, convert_bytes

DATA = Path(__file__).parents[2] / "data" / "import"
SAMPLES = {
    path.name: path.read_bytes()
    for path in sorted(DATA.iterdir())
    if path.suffix in (".txt", ".xml")
}
# Small pieces of every format, to be put where they do not belong.
PIECES = (
    b"00:01.0 PCI bridge: X\n\tBus: primary=00, secondary=01, subordinate=ff, sec-latency=0\n",
    b"ffff:ff:1f.7 VGA compatible controller [0300]: N [10de:ffff]\n",
    b"\tRegion 0: Memory at 0 (64-bit, prefetchable) [size=999999T]\n",
    b"00: " + b"ff " * 15 + b"ff\n",
    b"f0: " + b"00 " * 15 + b"00\n",
    b"-[0000:00]-+-00.0-[01-ff]----00.0\n",
    b"           \\-01.0-[01]--\n",
    b"\tGPU0\tGPU1\n",
    b"GPU0\t X \tNV0\n",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    b"<pci busid='0000:00:00.0'>",
    b"<object type='Bridge' pci_busid='0000:00:00.0' pci_type='0604 [0000:0000]'>",
    b"</object>",
    b"count='99999999999999999999999999'",
    b"{{ 9 ** 99 }}{% for %}",
    b"\x00\x1b[2J\xff\xfe",
    b"9" * 5000,
)
MESSAGE = re.compile(r"(a-file\.txt(:[0-9]+:[0-9]+)?): \S[^\n]*")


def _one_end(form: str, content: bytes) -> None:
    """The import gives what the loader takes, or one line that says what is wrong."""
    message = ""
    try:
        result = convert_bytes(form, "a-file.txt", content, Options())
    except InputError as error:
        message = str(error)
    else:
        assert load.load_text(result.text, "again", {}) == result.topology
    if message:
        assert MESSAGE.fullmatch(message)
        assert message.isprintable()
        assert len(message) < 600


few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize("form", READERS)
@few
@given(content=st.binary(max_size=400))
def test_any_bytes(form: str, content: bytes) -> None:
    _one_end(form, content)


@pytest.mark.parametrize("form", READERS)
@few
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_pieces_of_all_formats(form: str, pieces: list[bytes]) -> None:
    _one_end(form, b"".join(pieces))


@pytest.mark.parametrize("name", SAMPLES)
@few
@given(data=st.data())
def test_damaged_files(name: str, data: st.DataObject) -> None:
    content = SAMPLES[name]
    form = data.draw(st.sampled_from(_readers_of(name)))
    for _ in range(data.draw(st.integers(1, 4))):
        content = data.draw(st.sampled_from(DAMAGES))(content, data.draw)
    _one_end(form, content)


def _readers_of(name: str) -> list[str]:
    """Mostly the format of the file, and sometimes another."""
    own = {"lspci": "lspci", "nccl": "nccl", "rccl": "nccl", "lstopo": "hwloc", "topo-m": "nvidia"}
    form = next(form for word, form in own.items() if word in name)
    return [form, form, form, *READERS]


Draw = Callable[[st.SearchStrategy[int]], int]


def _place(content: bytes, draw: Draw) -> int:
    return draw(st.integers(0, max(0, len(content) - 1)))


def _truncated(content: bytes, draw: Draw) -> bytes:
    return content[: _place(content, draw)]


def _without_a_slice(content: bytes, draw: Draw) -> bytes:
    start = _place(content, draw)
    return content[:start] + content[start + draw(st.integers(1, 400)) :]


def _a_slice_twice(content: bytes, draw: Draw) -> bytes:
    start = _place(content, draw)
    end = start + draw(st.integers(1, 2000))
    return content[:end] + content[start:end] + content[end:]


def _a_piece_in_it(content: bytes, draw: Draw) -> bytes:
    start = _place(content, draw)
    return content[:start] + PIECES[draw(st.integers(0, len(PIECES) - 1))] + content[start:]


def _a_byte_changed(content: bytes, draw: Draw) -> bytes:
    start = _place(content, draw)
    return content[:start] + bytes([draw(st.integers(0, 255))]) + content[start + 1 :]


def _a_number_changed(content: bytes, draw: Draw) -> bytes:
    numbers = list(re.finditer(rb"[0-9a-f]{2}\b", content))
    if not numbers:
        return content
    match = numbers[draw(st.integers(0, len(numbers) - 1))]
    return content[: match.start()] + b"%02x" % draw(st.integers(0, 255)) + content[match.end() :]


def _a_line_elsewhere(content: bytes, draw: Draw) -> bytes:
    lines = content.split(b"\n")
    line = lines.pop(draw(st.integers(0, len(lines) - 1)))
    lines.insert(draw(st.integers(0, len(lines))), line)
    return b"\n".join(lines)


DAMAGES = (
    _truncated,
    _without_a_slice,
    _a_slice_twice,
    _a_piece_in_it,
    _a_byte_changed,
    _a_number_changed,
    _a_line_elsewhere,
)
