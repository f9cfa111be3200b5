# SPDX-License-Identifier: Apache-2.0
"""RAM buffers and the table of methods."""

from __future__ import annotations

import hashlib
import mmap
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from guest_agent.hw import memory
from guest_agent.hw.region import Region
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError, Registry, UnknownMethodError


def test_buffers_live_by_name() -> None:
    buffers = memory.Buffers()
    buffers.alloc("a", 8192)
    assert buffers.get("a").read(0, 8192) == bytes(8192)
    with pytest.raises(ParameterError, match="taken"):
        buffers.alloc("a", 4096)
    with pytest.raises(ParameterError, match="no multiple of 4096"):
        buffers.alloc("b", 4097)
    buffers.free("a")
    with pytest.raises(ParameterError, match="'a'"):
        buffers.get("a")
    buffers.alloc("a", 4096)
    buffers.close()
    with pytest.raises(ParameterError):
        buffers.get("a")


def test_fill_and_checksum_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STEP_BYTES", 1000)
    region = Region(mmap.mmap(-1, 16384))
    memory.fill(region, 100, 9000, 5)
    assert region.read(0, 16384) == bytes(100) + pattern(5, 0, 9000) + bytes(16384 - 9100)
    data = pattern(5, 50, 5000)
    assert memory.checksum(region, 150, 5000) == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "crc32": zlib.crc32(data),
    }


@pytest.mark.parametrize(("offset", "size"), [(0, 8193), (8192, 1), (8000, 193)])
def test_nothing_beyond_the_end(offset: int, size: int) -> None:
    region = Region(mmap.mmap(-1, 8192))
    for action in (
        lambda: region.read(offset, size),
        lambda: region.write(offset, bytes(size)),
        lambda: memory.fill(region, offset, size, 1),
        lambda: memory.checksum(region, offset, size),
    ):
        with pytest.raises(ParameterError, match="beyond the end"):
            action()
    assert region.read(0, 8192) == bytes(8192)


def test_words_are_little_endian_at_their_place() -> None:
    region = Region(mmap.mmap(-1, 4096))
    region.write32(8, 0x01020304)
    region.write64(16, 0x1112131415161718)
    assert region.read(8, 4).hex() == "04030201"
    assert region.read(16, 8).hex() == "1817161514131211"
    region.write(4, bytes.fromhex("0a0b0c0d"))
    assert region.read32(4) == 0x0D0C0B0A


def test_a_closed_region_is_unmapped() -> None:
    mapping = mmap.mmap(-1, 4096)
    region = Region(mapping)
    region.close()
    region.close()
    assert mapping.closed


def _registry() -> Registry:
    registry = Registry()

    @registry.method("a.b")
    def _a_b(first: str, *, size: int, names: list[str] | None = None) -> object:
        return [first, size, names]

    return registry


def test_a_method_gets_its_parameters() -> None:
    registry = _registry()
    assert registry.call("a.b", {"size": 3}, "x") == ["x", 3, None]
    assert registry.call("a.b", {"size": 3, "names": ["y"]}, "x") == ["x", 3, ["y"]]
    assert registry.call("a.b", {"size": 3, "names": None}, "x") == ["x", 3, None]
    assert registry.names() == ["a.b"]


def test_an_area_is_loaded_by_the_first_call_of_one_of_its_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far_methods.py").write_text("raise SystemExit('loaded')")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = _registry()
    registry.area("far", "far_methods")
    registry.call("a.b", {"size": 3}, "x")
    with pytest.raises(SystemExit, match="loaded"):
        registry.call("far.away", {})


def test_only_what_is_in_the_table_can_be_called() -> None:
    for name in ("a.c", "__init__", "call", ""):
        with pytest.raises(UnknownMethodError):
            _registry().call(name, {}, "x")


def test_positional_parameters_cannot_be_given_by_name() -> None:
    with pytest.raises(ParameterError, match="'first': unknown"):
        _registry().call("a.b", {"size": 1, "first": "y"}, "x")


def test_a_table_that_could_not_be_checked_is_refused() -> None:
    registry = _registry()
    with pytest.raises(TypeError, match="two methods"):
        registry.method("a.b")(lambda: None)
    with pytest.raises(TypeError, match="no checkable type"):

        @registry.method("a.c")
        def _a_c(*, what: object) -> None:
            """Never called."""


LOADED = """
import sys
sys.path.append(sys.argv[1])
from guest_agent import resume
resume.load_agent()
before = set(sys.modules)
from guest_agent.hw import memory
buffers = memory.Buffers()
buffers.alloc("a", 1 << 16)
memory.fill(buffers.get("a"), 0, 1 << 16, seed=1)
memory.checksum(buffers.get("a"), 0, 1 << 16)
print(*sorted(set(sys.modules) - before))
"""


def test_a_machine_that_is_saved_has_loaded_what_tests_call() -> None:
    root = str(Path(memory.__file__).parents[2])
    words = [sys.executable, "-I", "-S", "-c", LOADED, root]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.split() == []
