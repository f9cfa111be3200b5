# SPDX-License-Identifier: Apache-2.0
"""Devices of the user's own: refused unless trusted, examined in a child, each fault named."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed import cli, deploy
from testbed.errors import ExitCode, InputError
from testbed.machine import models, own_devices
from testbed.models.loading import make_own
from testbed.topology.load import load
from testbed.topology.model import OwnDevice, Topology, from_data, to_data, with_overrides
from testbed.topology.placement import place
from testbed.topology.plan import NodePlan, Role
from testbed.topology.units import GIB, MIB
from tests.contract.own_cards import FIRST_LINE, write_card, write_topology


def admitted(path: Path, *, trust: bool = True) -> Topology:
    return load(path, {}, admit=own_devices.admission(trust=trust))


def refused(path: Path, *, trust: bool = True) -> str:
    with pytest.raises(InputError) as error:
        admitted(path, trust=trust)
    return str(error.value)


def own(topology: Topology) -> OwnDevice:
    (entry,) = (e for e in topology.nodes["host0"].entries() if isinstance(e, OwnDevice))
    return entry


class TestTrust:
    def test_without_it_nothing_of_the_file_is_run_and_the_place_is_named(
        self, tmp_path: Path
    ) -> None:
        card = write_card(tmp_path, "leaves_a_trace")
        path = write_topology(tmp_path, "device: card0, model: leaves_a_trace.py:Card")
        said = refused(path, trust=False)
        assert said.startswith(f"{path}:5:32: device 'card0' is code of your own ({card})")
        assert "--trust" in said
        assert not (tmp_path / "trace").exists()
        admitted(path)
        assert (tmp_path / "trace").exists()  # which shows that the line above could fail

    def test_without_it_the_file_is_not_even_looked_for(self, tmp_path: Path) -> None:
        path = write_topology(tmp_path, "device: card0, model: nowhere/missing.py:Card")
        assert "not trusted" in refused(path, trust=False)

    def test_all_devices_are_named_at_once(self, tmp_path: Path) -> None:
        path = write_topology(
            tmp_path, "device: a, model: a.py:Card", "gpu: g, vram: 1M", "device: b, model: b.py:C"
        )
        assert [line.split(": ")[0] for line in refused(path, trust=False).splitlines()] == [
            f"{path}:5:28",
            f"{path}:7:28",
        ]

    def test_a_rack_without_such_devices_needs_none(self, tmp_path: Path) -> None:
        admitted(write_topology(tmp_path, "gpu: g, vram: 1M"), trust=False)

    def test_whoever_starts_a_rack_has_to_say_so_again(self, tmp_path: Path) -> None:
        write_card(tmp_path, "good")
        topology = admitted(write_topology(tmp_path, "device: card0, model: good.py:Card"))
        with pytest.raises(InputError, match=r"^rack own, node host0: device 'card0'.*not trusted"):
            deploy.start(topology, run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("verb", [["up"], ["run", "-t"], ["bench", "boot", "-t"]])
    def test_the_verbs_refuse_with_bad_input(
        self, tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_topology(tmp_path, "device: card0, model: good.py:Card")
        with pytest.raises(SystemExit) as end:
            cli.main([*verb, str(path)])
        assert end.value.code == ExitCode.BAD_INPUT
        assert f"{path}:5:32: device 'card0'" in capsys.readouterr().err

    def test_looking_at_a_topology_needs_none(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_topology(tmp_path, "device: card0, model: missing.py:Card, bars: 64M")
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", str(path)])
        assert end.value.code == 0
        assert "card0  your own missing.py:Card" in capsys.readouterr().out


class TestWhatIsLearned:
    def test_the_record_holds_path_and_digest_and_is_enough_to_place_it_again(
        self, tmp_path: Path
    ) -> None:
        card = write_card(tmp_path, "large")
        path = write_topology(tmp_path, "device: card0, model: large.py:Card")
        topology = admitted(path)
        digest = hashlib.sha256(card.read_bytes()).hexdigest()
        model = f"{card}:Card"
        assert own(topology).model == model
        assert own_devices.summary(topology) == {"host0/card0": {"model": model, "sha256": digest}}
        card.unlink()
        assert place(from_data(json.loads(json.dumps(to_data(topology))))) == place(topology)
        assert own(with_overrides(topology, iommu_mode="lazy")) == own(topology)

    def test_high_bars_widen_the_window(self, tmp_path: Path) -> None:
        for name in ("good", "large"):
            write_card(tmp_path, name)
        entries = [f"device: card{n}, model: large.py:Card" for n in range(4)]
        topology = admitted(write_topology(tmp_path, *entries))
        assert place(topology).nodes["host0"].pci_hole64_bytes == 64 * GIB
        small = admitted(write_topology(tmp_path, "device: card0, model: good.py:Card"))
        assert own(small).bars_bytes is None

    def test_a_declared_size_that_is_too_small_is_corrected(self, tmp_path: Path) -> None:
        write_card(tmp_path, "large")
        path = write_topology(tmp_path, "device: card0, model: large.py:Card, bars: 1M")
        assert own(admitted(path)).bars_bytes == 8 * GIB
        assert own(load(path, {})).bars_bytes == MIB

    def test_what_it_prints_is_no_answer(self, tmp_path: Path) -> None:
        write_card(tmp_path, "talks")
        admitted(write_topology(tmp_path, "device: card0, model: talks.py:Card"))

    def test_it_may_import_what_stands_beside_it(self, tmp_path: Path) -> None:
        for name in ("good", "imports"):
            write_card(tmp_path, name)
        admitted(write_topology(tmp_path, "device: card0, model: imports.py:Card"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["good.py", "imports.py", "rack.yaml"]

    def test_it_is_served_as_trusted_with_options_and_digest(self, tmp_path: Path) -> None:
        write_card(tmp_path, "good")
        entry = "device: card0, model: good.py:Card, options: {depth: 4}"
        plan = place(admitted(write_topology(tmp_path, entry)))
        node: NodePlan = plan.nodes["host0"]
        (device,) = models.models_spec(plan, node)["devices"]
        assert device["options"] == {"depth": 4}
        assert len(device["sha256"]) == 64
        assert "--trust" in models.models_command(plan, node).argv
        assert [f.name for f in node.by_role(Role.DEVICE)] == ["card0"]


FAULTS = [
    ("raises", f"raises.py:{FIRST_LINE + 6}: ValueError: no such depth"),
    ("raises_at_import", f"raises_at_import.py:{FIRST_LINE}: ZeroDivisionError"),
    ("syntax", f"syntax.py:{FIRST_LINE}: SyntaxError"),
    ("exits", f"exits.py:{FIRST_LINE}: SystemExit: 3"),
    ("exits_at_once", "exits_at_once.py:Card: its process exited with 3 while it was loaded"),
    ("crashes", f"crashes.py:{FIRST_LINE}: its process died of SIGSEGV while it was loaded"),
    ("allocates", f"allocates.py:{FIRST_LINE}: MemoryError"),
    ("low", "1G of BARs that stand below 4 GiB; expected at most 512M"),
]


class TestFaults:
    @pytest.mark.parametrize(("name", "words"), FAULTS, ids=[name for name, _ in FAULTS])
    def test_code_that_does_wrong(self, tmp_path: Path, name: str, words: str) -> None:
        write_card(tmp_path, name)
        path = write_topology(tmp_path, f"device: card0, model: {name}.py:Card")
        said = refused(path)
        assert said.startswith(f"{path}:5:32: ")
        assert words in said
        assert "Traceback" not in said

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            ("model: good.py:Crad", "good.py has no device class 'Crad'; it has: Card"),
            ("model: goods.py:Card", "no such file or directory; did you mean 'good.py'?"),
            ("model: good.py:Card, options: {deep: 1}", "unexpected keyword argument 'deep'"),
            ("model: good.py:Card, options: {name: x}", "multiple values for argument 'name'"),
            (f"model: good.py:Card, sha256: {'0' * 64}", "is another file: its sha256 is "),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, entry: str, words: str) -> None:
        write_card(tmp_path, "good")
        said = refused(write_topology(tmp_path, f"device: card0, {entry}"))
        assert words in said

    def test_a_class_that_hangs_is_given_up_where_it_hangs(self, tmp_path: Path) -> None:
        card = write_card(tmp_path, "hangs")
        with pytest.raises(InputError, match=rf"hangs\.py:{FIRST_LINE}: is not done loading"):
            make_own("card0", f"{card}:Card", {}, timeout_s=0.2)

    def test_so_is_one_that_lets_no_signal_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_card(tmp_path, "hangs_for_good")
        monkeypatch.setattr(own_devices, "LOADING_TIMEOUT_S", 0.2)
        said = refused(write_topology(tmp_path, "device: card0, model: hangs_for_good.py:Card"))
        assert f"hangs_for_good.py:{FIRST_LINE + 1}: is not done loading" in said

    def test_a_file_that_changed_since_is_not_run(self, tmp_path: Path) -> None:
        card = write_card(tmp_path, "good")
        with pytest.raises(InputError, match="is not the file it was"):
            make_own("card0", f"{card}:Card", {}, sha256="0" * 64)


def test_what_a_card_started_while_it_was_loaded_ends_with_that(tmp_path: Path) -> None:
    card = tmp_path / "starts.py"
    card.write_text(
        "import subprocess\nfrom pathlib import Path\n"
        "from testbed.models.config import Bar, Identity\n"
        "from testbed.models.device import Device\n"
        f"child = subprocess.Popen(['sleep', '600'])\nPath({str(tmp_path / 'pid')!r})"
        ".write_text(str(child.pid))\n"
        "class Card(Device):\n    identity = Identity(1, 2, 3)\n    bars = (Bar(0, 16),)\n"
    )
    admitted(write_topology(tmp_path, "device: card0, model: starts.py:Card"))
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    # It was killed; but it may still be on its way out, and whose child it is now may not have
    # fetched its status.
    deadline_s = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline_s


def test_loading_the_harness_does_not_load_the_models() -> None:
    code = "import sys, testbed.deploy; print('testbed.models.device' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
