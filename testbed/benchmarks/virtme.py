# SPDX-License-Identifier: Apache-2.0
"""virtme-ng beside us: the same kernel, QEMU and accelerator, a command and out again."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from testbed.errors import CapabilityMissing, HostError
from testbed.host import paths
from testbed.host.prepare import Installation

NAME = "virtme-ng"
_INSTALL_TIMEOUT_S = 600
_SBIN = "/usr/sbin:/sbin"


def command(installation: Installation, accelerator: str) -> str:
    """What runs ``true`` in the installation's first kernel; virtme-ng is installed on the way,
    in an environment of its own in the cache.

    :raises CapabilityMissing: the host lacks what virtme-ng calls.
    :raises HostError: it cannot be installed.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"
    missing = [name for name in ("depmod", "busybox") if not shutil.which(name, path=path)]
    if missing:
        hint = "apt-get install kmod busybox-static"
        raise CapabilityMissing(f"virtme-ng needs {' and '.join(missing)}", hint=hint)
    kernel = next(iter(installation.kernels.values()))
    if not list(kernel.source.parent.rglob("9p.ko*")):
        raise CapabilityMissing(
            f"virtme-ng's root is 9p, which kernel {kernel.release} does not have",
            hint="--kernel generic",
        )
    folder = paths.cache_dir().absolute() / "bench" / NAME
    program = folder / "bin" / "vng"
    if not program.exists():
        _install(folder)
    qemu = folder / "qemu"
    lines = [f"export {k}={shlex.quote(v)}" for k, v in installation.qemu.environment.items()]
    qemu.write_text(
        "\n".join(["#!/bin/sh", *lines, f'exec {shlex.join(installation.qemu.words)} "$@"\n'])
    )
    qemu.chmod(0o755)
    words = ["env", f"PATH={program.parent}:{path}", str(program), "--run", str(kernel.source)]
    words += ["--qemu", str(qemu), "--force-9p", "-e", "true"]
    words += [] if accelerator == "kvm" else ["--disable-kvm"]
    return shlex.join(words)


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for words in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", NAME],
    ):
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise HostError(f"virtme-ng cannot be installed: {done.stderr.strip()[-300:]}")
