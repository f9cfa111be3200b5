# SPDX-License-Identifier: Apache-2.0
"""The suites that come with the testbed, by name; to be asked without importing pytest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from testbed.errors import Diagnostic, InputError
from testbed.topology.problem import nearest

# A suite by its name: its modules.
SUITES_DIR = Path(__file__).parent.parent / "suites"
SUITES = {
    "p2p-iommu": ("p2p_iommu.py", "p2p_routes.py"),
    "p2p-kernel": ("p2p_kernel.py", "p2p_oracle.py", "p2p_kernel_life.py"),
    "p2p-negotiation": (
        "p2p_negotiation.py",
        "p2p_negotiation_use.py",
        "p2p_negotiation_life.py",
        "p2p_negotiation_sharing.py",
        "p2p_negotiation_bad.py",
    ),
    "p2p-fabric": (
        "p2p_fabric.py",
        "p2p_fabric_windows.py",
        "p2p_fabric_bells.py",
        "p2p_fabric_forwarded.py",
        "p2p_fabric_loss.py",
    ),
    "p2p-dmabuf": (
        "p2p_dmabuf.py",
        "p2p_dmabuf_life.py",
        "p2p_dmabuf_moves.py",
        "p2p_dmabuf_vfio.py",
        "p2p_dmabuf_loss.py",
    ),
    "p2p-hmm": ("p2p_hmm.py",),
}
# Suites that run what the user brings; `all` does not mean them.
KSELFTEST = "kselftest"
KVM_UNIT_TESTS = "kvm-unit-tests"
PAYLOAD_SUITES = {KSELFTEST: ("kselftest.py",), KVM_UNIT_TESTS: ("kvm_unit_tests.py",)}
DEFAULT_SUITE = "p2p-iommu"
ALL_SUITES = "all"


def begins_with_rack(suites: Sequence[str]) -> bool:
    """Whether tests of these will want the rack, whatever it is: then it may start at once."""
    return DEFAULT_SUITE in (suites or (DEFAULT_SUITE,)) and all(word in SUITES for word in suites)


def suite_paths(word: str) -> list[str]:
    """The modules of a suite, or the file of the user's own. :raises InputError: neither."""
    if word == ALL_SUITES:
        return [path for name in SUITES for path in suite_paths(name)]
    modules = {**SUITES, **PAYLOAD_SUITES}
    if word in modules:
        return [str(SUITES_DIR / module) for module in modules[word]]
    path = word.partition("::")[0]
    if not Path(path).exists():
        known = ", ".join([*modules, ALL_SUITES])
        near = nearest(word, [*modules, ALL_SUITES])
        raise InputError(
            diagnostics=[
                Diagnostic(word, 0, 0, "no such suite or file", f"{known}, or a path", near)
            ]
        )
    return [str(Path(path).resolve()) + word[len(path) :]]
