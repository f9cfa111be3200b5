# SPDX-License-Identifier: Apache-2.0
"""Modules of our own in a real guest kernel: built, loaded, asked, unloaded. One rack for all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import deploy
from testbed.errors import AgentError, CapabilityMissing, ModuleError
from testbed.guest import modules
from testbed.host import built_modules, guest_modules, kmod_sources
from testbed.host.prepare import Installation
from testbed.rack_node import RackNode
from testbed.topology import load, model
from testbed.verbs import common
from tests.vm.conftest import Start

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

TOPOLOGY = """\
rack: modules
nodes:
  host0:
    pcie:
      - root_port: rp0
        below:
          - switch: sw0
            below:
              - {nvme: nvme0, size: 16M, cmb: 16M}
              - {nvme: nvme1, size: 16M}
              - {gpu: gpu0, vram: 16M, engine: edu}
      - root_port: rp1
        below:
          - {gpu: gpu1, vram: 16M, engine: edu}
"""


@pytest.fixture(scope="module")
def node(start: Start, cold: deploy.StartOptions) -> RackNode:
    topology = load.load_text(TOPOLOGY, "modules.yaml", {})
    return start(topology, replace(cold, router=False)).node()


@pytest.fixture(scope="module")
def bdf(node: RackNode) -> dict[str, str]:
    return {function.name: function.bdf for function in node.plan.functions}


@pytest.fixture
def probe(node: RackNode) -> Iterator[RackNode]:
    """The node with the module; skips where its kernel cannot have it."""
    try:
        modules.load(node, "p2p_probe")
    except CapabilityMissing as error:
        pytest.skip(error.capability)
    yield node
    modules.unload(node, "p2p_probe")


@pytest.mark.parametrize("name", kmod_sources.names())
def test_a_module_is_compiled_by_our_compiler_alone(name: str, installation: Installation) -> None:
    builder = guest_modules.builder("default")
    module = builder.build(name)
    assert module.release == installation.kernel().release
    data = module.file.read_bytes()
    version = builder.tools.compiler.split()[1].partition("-")[0]
    assert data.count(b"GCC: (") == data.count(b"GCC: (Debian " + version.encode()) > 0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, installation: Installation) -> Path:
    """Debian's headers, image and modules, arranged as a user's own built tree."""
    builder = guest_modules.builder("default")
    folder = tmp_path_factory.mktemp("linux")
    for path in builder.tree.folder.iterdir():
        if path.name == "Makefile":
            (folder / path.name).write_text(path.read_text().replace(str(path.parent), str(folder)))
        elif path.name == "arch":
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            (folder / path.name).symlink_to(path)
    boot = folder / "arch/x86/boot"
    boot.mkdir(exist_ok=True)
    image = installation.kernel().source
    shutil.copy(image, boot / "bzImage")
    shutil.copytree(image.parent / "kernel", folder / "modules")
    return folder


def test_a_tree_of_the_users_boots_and_has_modules_built_in_it(
    tree: Path, installation: Installation, accelerator: str, tmp_path: Path
) -> None:
    word = common.kernel_word(None, None, str(tree))
    (tmp_path / "rack.yaml").write_text("rack: tree\nnodes: {host0: {}}\n")
    topology = model.with_overrides(load.load(tmp_path / "rack.yaml", {}), kernel=word)
    options = deploy.StartOptions(accelerator=accelerator)
    before = {path.name: path.stat().st_mtime_ns for path in tree.iterdir()}
    with deploy.start(topology, run_dir=tmp_path / "run", options=options) as rack:
        modules.load(rack.node(), "p2p_probe")
        assert rack.node().agent.call("modules.loaded", names=["p2p_probe"])["p2p_probe"]
        kernel = rack.node().agent.hello["kernel"]
    assert kernel == guest_modules.builder(str(tree)).tree.release
    assert before == {path.name: path.stat().st_mtime_ns for path in tree.iterdir()}, "untouched"


def test_a_kernel_without_headers_says_so(installation: Installation, tmp_path: Path) -> None:
    bare = shutil.copy(installation.kernel().source, tmp_path / "bzImage")
    with pytest.raises(CapabilityMissing, match="given without a tree"):
        guest_modules.builder(str(bare))


def test_a_module_that_is_built_takes_no_time() -> None:
    guest_modules.builder("default").build("p2p_probe")
    began_s = time.process_time()
    guest_modules.builder("default").build("p2p_probe")
    # 0.03 s; processor time, as the host also runs guests.
    assert time.process_time() - began_s < 0.3


def test_the_kernel_says_how_far_functions_are_apart(probe: RackNode, bdf: dict[str, str]) -> None:
    clients = [bdf[name] for name in ("nvme0", "nvme1", "gpu0.engine", "gpu1.vram")]
    distance = probe.agent.call("p2p.distance", provider=bdf["nvme0"], clients=clients)
    assert [distance[client] for client in clients] == [0, 4, 4, None]
    assert distance["all"] is None


def test_the_kernel_maps_as_it_decides(probe: RackNode, bdf: dict[str, str]) -> None:
    def mapped(provider: str, client: str) -> dict[str, object]:
        answer = probe.agent.call("p2p.map_type", provider=bdf[provider], client=bdf[client])
        assert isinstance(answer, dict)
        return answer

    below_one_switch = mapped("nvme0", "nvme1")
    assert below_one_switch["type"] == "bus"
    assert below_one_switch["address"] == below_one_switch["physical"]
    across = mapped("nvme0", "gpu1.engine")
    assert (across["type"], across["errno"]) == ("refused", 121)  # EREMOTEIO
    both = [bdf["nvme1"], bdf["gpu1.engine"]]
    types = probe.agent.call("p2p.map_types", provider=bdf["nvme0"], clients=both)
    assert [types[client]["type"] for client in both] == ["bus", "refused"]
    with pytest.raises(AgentError) as caught:
        mapped("gpu0.vram", "nvme1")
    assert caught.value.errno == 6, "it offers no memory yet"
    probe.agent.call("p2p.provide", device=bdf["gpu0.vram"], bar=2)
    assert mapped("gpu0.vram", "nvme1")["type"] == "bus"
    probe.agent.call("p2p.release", device=bdf["gpu0.vram"])
    with pytest.raises(AgentError):
        mapped("gpu0.vram", "nvme1")


def test_the_kernel_takes_the_nearest_provider(probe: RackNode, bdf: dict[str, str]) -> None:
    def nearest(*clients: str) -> str | None:
        answer = probe.agent.call("p2p.find", clients=[bdf[client] for client in clients])
        provider = answer["provider"]
        return next((name for name in bdf if bdf[name] == provider), provider)

    for gpu in ("gpu0.vram", "gpu1.vram"):
        probe.agent.call("p2p.provide", device=bdf[gpu], bar=2)
        probe.agent.call("p2p.publish", provider=bdf[gpu])
    # Two functions of one slot are nearer than what a switch leads to (nvme0 is published too).
    assert nearest("gpu0.engine") == "gpu0.vram"
    assert nearest("gpu0.engine", "gpu1.engine") is None
    probe.agent.call("p2p.publish", provider=bdf["gpu0.vram"], publish=False)
    assert nearest("gpu0.engine") == "nvme0"
    for gpu in ("gpu0.vram", "gpu1.vram"):
        probe.agent.call("p2p.release", device=bdf[gpu])


def test_what_vfio_owns_is_left_alone(probe: RackNode, bdf: dict[str, str]) -> None:
    device = bdf["gpu1.vram"]
    group = [bdf["gpu1.vram"], bdf["gpu1.engine"]]
    container = probe.agent.call("vfio.open", devices=group)["container"]
    try:
        with pytest.raises(AgentError) as caught:
            probe.agent.call("p2p.map_type", provider=bdf["nvme0"], client=device)
        assert caught.value.errno == 16
    finally:
        probe.agent.call("vfio.close", container=container)
    answer = probe.agent.call("p2p.map_type", provider=bdf["nvme0"], client=device)
    assert answer["type"] == "refused"


def test_a_module_that_is_held_does_not_unload(node: RackNode) -> None:
    modules.load(node, "p2p_probe")
    node.link.run("sh -c 'sleep 60 </dev/p2p_probe' >/dev/null 2>&1 & echo $! >/run/holder")
    with pytest.raises(ModuleError, match=r"does not unload: process \d+ \("):
        modules.unload(node, "p2p_probe")
    node.link.run("kill $(cat /run/holder) $(pidof sleep)")
    deadline = time.monotonic() + 20
    while True:
        try:
            modules.unload(node, "p2p_probe")
            break
        except ModuleError:
            assert time.monotonic() < deadline


def test_a_module_for_another_kernel_is_refused_with_its_reason(
    node: RackNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = guest_modules.builder("default").build("p2p_probe")
    other = tmp_path / "p2p_probe.ko"
    other.write_bytes(
        real.file.read_bytes().replace(b"vermagic=" + real.release.encode()[:1], b"vermagic=9")
    )

    monkeypatch.setattr(built_modules, "module_file", lambda *_: other)
    with pytest.raises(ModuleError, match="version magic"):
        modules.load(node, "p2p_probe")


def test_an_agent_that_ends_takes_its_modules_along(node: RackNode) -> None:
    modules.load(node, "p2p_probe")
    node.restart_agent()
    deadline = time.monotonic() + 20
    while node.agent.call("modules.loaded", names=["p2p_probe"])["p2p_probe"]:
        assert time.monotonic() < deadline
