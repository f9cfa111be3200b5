# SPDX-License-Identifier: Apache-2.0
"""Which accelerator runs a guest on this host, found out by running one.

``/dev/kvm`` that opens proves little: there are hosts (paravirtual KVM modules, nested ones) where
it opens, a machine can be made, and no guest ever executes an instruction. So the guest's own
kernel is started under it, and has a few seconds to say its first word.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import HostError
from testbed.host import child, paths, product
from testbed.host.digest import digest
from testbed.host.kernel import KernelImage
from testbed.host.toolroot import Qemu

if TYPE_CHECKING:
    from testbed.host.installation import Installation

DEADLINE_S = 4.0
_FIRST_WORDS = b"Linux version"
_LOCK_TIMEOUT_S = 60.0
_REMEMBERED = 16


@dataclass(frozen=True)
class Accelerator:
    """The outcome of the probe. ``why`` explains it to a person."""

    name: str
    why: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Kvm:
    """Where KVM is looked for, and what identifies this boot of this host."""

    device: Path = Path("/dev/kvm")
    boot_id: Path = Path("/proc/sys/kernel/random/boot_id")

    def identity(self) -> list[object]:
        """Changes with a reboot and when the KVM module is loaded again."""
        found = self.device.stat()
        boot_id = self.boot_id.read_text().strip() if self.boot_id.exists() else ""
        return [boot_id, found.st_rdev, found.st_ino, found.st_ctime_ns, os.getuid()]


def chosen(installation: Installation, *, fresh: bool = False) -> str:
    """``kvm`` if a guest really runs under it here, else ``tcg``; never hangs."""
    kernel = next(iter(installation.kernels.values()))
    return probe(installation.qemu, kernel, fresh=fresh).name


def probe(
    qemu: Qemu,
    kernel: KernelImage,
    *,
    kvm: Kvm | None = None,
    memory: Path | None = None,
    deadline_s: float = DEADLINE_S,
    fresh: bool = False,
) -> Accelerator:
    """Which accelerator runs a guest; remembered by boot, KVM device, QEMU and kernel.

    :param memory: the file that remembers; the cache's if None.
    :param fresh: ask again.
    """
    kvm = kvm or Kvm()
    memory = memory or paths.cache_dir() / "probes" / "accelerator.json"
    refusal = _cannot_open(kvm.device)
    if refusal:
        return Accelerator("tcg", refusal)
    key = digest(kvm.identity(), qemu.identity, list(qemu.words), kernel.sha256)
    if not fresh and (found := _remembered(memory, key)):
        return found
    try:
        with product.exclusive(
            memory.with_suffix(".lock"), lambda: None, timeout_s=_LOCK_TIMEOUT_S
        ):
            if not fresh and (found := _remembered(memory, key)):
                return found
            outcome = try_kvm(qemu, kernel, deadline_s)
            _remember(memory, key, outcome)
            return outcome
    except (OSError, HostError) as error:
        return Accelerator("tcg", f"KVM could not be tried: {error}")


def _cannot_open(device: Path) -> str:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {device}"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return ""


def try_kvm(qemu: Qemu, kernel: KernelImage, deadline_s: float) -> Accelerator:
    """Start ``kernel`` under KVM and wait for its first words on the serial port.

    :raises OSError: QEMU cannot be started at all.
    """
    command = [
        *child.DIE_WITH_US,
        *qemu.words,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", "max", "-m", "256M"),
        *("-serial", "stdio", "-monitor", "none", "-kernel", str(kernel.image)),
        *("-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"),
    ]
    began_s = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **qemu.environment},
        start_new_session=True,
    )
    try:
        said, complaint = _listen(process, began_s + deadline_s)
    finally:
        child.end(process)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
    seconds = round(time.monotonic() - began_s, 2)
    if _FIRST_WORDS in said:
        return Accelerator("kvm", f"a guest kernel ran under KVM after {seconds:.1f} s", seconds)
    if complaint:
        return Accelerator("tcg", f"QEMU refuses KVM: {complaint}", seconds)
    return Accelerator(
        "tcg",
        f"/dev/kvm opens, but no guest kernel said a word under it within {deadline_s:g} s",
        seconds,
    )


def _listen(process: subprocess.Popen[bytes], deadline_s: float) -> tuple[bytes, str]:
    """What the guest said until the deadline or the end, and QEMU's last complaint if it ended."""
    assert process.stdout  # noqa: S101 (Popen was given PIPE)
    assert process.stderr  # noqa: S101
    open_streams = {process.stdout: bytearray(), process.stderr: bytearray()}
    heard = dict(open_streams)
    while open_streams and _FIRST_WORDS not in heard[process.stdout]:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return bytes(heard[process.stdout]), ""
        for stream in select.select(list(open_streams), [], [], left_s)[0]:
            chunk = os.read(stream.fileno(), 65536)
            open_streams[stream] += chunk
            if not chunk:
                del open_streams[stream]
    lines = heard[process.stderr].decode(errors="replace").strip().splitlines()
    return bytes(heard[process.stdout]), lines[-1] if lines else "it ended without a word"


def _remembered(memory: Path, key: str) -> Accelerator | None:
    stored: Any = product.read_json(memory)
    found = stored.get(key) if isinstance(stored, dict) else None
    return Accelerator(**found) if isinstance(found, dict) else None


def _remember(memory: Path, key: str, outcome: Accelerator) -> None:
    stored: Any = product.read_json(memory)
    kept = list(stored.items())[-_REMEMBERED:] if isinstance(stored, dict) else []
    product.write_json(memory, {**dict(kept), key: asdict(outcome)})
