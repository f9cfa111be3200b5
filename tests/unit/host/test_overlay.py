# SPDX-License-Identifier: Apache-2.0
"""One machine's initial RAM disk, from parts that are only bytes here."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import HostError
from testbed.host import agent, cpio, overlay
from testbed.host.image import GuestImage, GuestPython
from testbed.host.kernel import KernelImage
from testbed.host.keys import RackKeys

from .test_cpio import read


@pytest.fixture
def parts(tmp_path: Path) -> tuple[GuestImage, KernelImage, agent.AgentBundle]:
    for name in ("base", "modules", "agent"):
        (tmp_path / f"{name}.cpio").write_bytes(cpio.archive([cpio.regular(f"/{name}", b"x")]))
    python = GuestPython(tmp_path, Path("python3"), "cpython-313")
    kernel = KernelImage(
        name="k",
        release="1",
        image=tmp_path / "k",
        pvh=True,
        sha256="",
        source=tmp_path / "k",
        config=None,
        modules=tmp_path / "modules.cpio",
        missing=(),
    )
    bundle = agent.AgentBundle("hash", "/opt/x", tmp_path / "agent.cpio")
    return GuestImage(tmp_path / "base.cpio", "key", python), kernel, bundle


def test_all_parts_in_one_file(
    tmp_path: Path, parts: tuple[GuestImage, KernelImage, agent.AgentBundle]
) -> None:
    keys = RackKeys.generate()
    target = tmp_path / "initrd.img"
    overlay.build_initrd(target, parts[0], parts[1], keys=keys, node_name="n0", agent=parts[2])
    assert target.stat().st_mode & 0o777 == 0o600, "it holds the host key"
    files = {name: (mode & 0o777, content) for name, mode, content, *_ in read(target.read_bytes())}
    assert list(files)[:3] == ["base", "modules", "agent"]
    assert files["etc/hostname"] == (0o644, b"n0\n")
    assert files["etc/dropbear/host_key"] == (0o600, keys.host_private)
    assert files["root/.ssh/authorized_keys"][1].decode().strip() == keys.client_public
    assert files["root/.ssh"][0] == 0o700


def test_a_part_that_is_gone_leaves_nothing(
    tmp_path: Path, parts: tuple[GuestImage, KernelImage, agent.AgentBundle]
) -> None:
    parts[1].modules.unlink()
    target = tmp_path / "initrd.img"
    keys = RackKeys.generate()
    with pytest.raises(HostError, match=r"modules\.cpio: No such file"):
        overlay.build_initrd(target, parts[0], parts[1], keys=keys, node_name="n", agent=parts[2])
    assert not target.exists()


def test_the_agents_name_is_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "guest_agent"
    (folder / "hw").mkdir(parents=True)
    (folder / "agent.py").write_text("1")
    (folder / "hw" / "igb.py").write_text("2")
    first = agent.agent_hash(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "agent.py").write_text("not a source")
    (folder / "notes.txt").write_text("not a source")
    assert agent.agent_hash(folder) == first
    (folder / "hw" / "igb.py").write_text("3")
    assert agent.agent_hash(folder) != first
    (folder / "hw" / "igb.py").rename(folder / "hw" / "edu.py")
    assert agent.agent_hash(folder) != first
