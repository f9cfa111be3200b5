# SPDX-License-Identifier: Apache-2.0
"""Every error of the peer-to-peer core. Each has the errno that a kernel call would return."""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guest_agent.p2p.report import Report
    from guest_agent.p2p.rules import Rule


def unknown(word: str, what: str, words: Iterable[str]) -> str:
    """The sentence for a word that is none of ``words``, with the nearest of them."""
    import difflib  # noqa: PLC0415  needed for this alone

    known = list(words)
    near = difflib.get_close_matches(word, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{word!r} is no {what} ({', '.join(known)}){hint}"


class P2PError(OSError):
    """The root of the tree. ``errno`` as in the kernel, ``str()`` the sentence alone."""

    code = errno.EINVAL

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(code or self.code, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class RuleError(P2PError):
    """A call in the wrong context. Names the rule and the kernel source that it comes from.

    The kernel warns and goes on (lockdep, WARN_ON) or corrupts its state; here nothing is changed.
    """

    code = errno.EPERM

    def __init__(self, rule: Rule, what: str) -> None:
        super().__init__(f"{what}: {rule.text} ({rule.source})")
        self.rule = rule


class NoPathError(P2PError):
    """No candidate of the two lists is left: EINVAL. ``report`` says why each was lost."""

    code = errno.EINVAL

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class AbortedError(P2PError):
    """A candidate failed with something other than EOPNOTSUPP, which ends the negotiation."""

    def __init__(self, message: str, code: int, report: Report) -> None:
        super().__init__(message, code)
        self.report = report


class UnknownKindError(P2PError):
    """A word that is no type of interconnect; names the nearest one."""


class UnsupportedError(P2PError):
    """What is asked for is not something that this pair can do."""

    code = errno.EOPNOTSUPP


class RevokedError(P2PError):
    """The exporter has taken the memory away."""

    code = errno.ENODEV


class GoneError(P2PError):
    """A device, importer or node is no longer there."""

    code = errno.ENODEV


class PinnedError(P2PError):
    """A pinned buffer does not move."""

    code = errno.EBUSY


class NoRoomError(P2PError):
    """The memory of that placement is used up; names what is pinned there."""

    code = errno.ENOSPC


class ReachError(P2PError):
    """An importer said that it can reach a memory, and cannot; names it."""

    code = errno.EFAULT

    def __init__(self, message: str, importer: str) -> None:
        super().__init__(message)
        self.importer = importer


class FaultError(P2PError):
    """A device used an address that nothing maps for it; names device and address."""

    code = errno.EFAULT


class StaleError(P2PError):
    """A mapping that was unmapped, invalidated or never made is used, or is unmapped twice."""

    code = errno.EINVAL


class OverdueError(P2PError):
    """Importers that did not unmap in time; ``importers`` names them."""

    code = errno.ETIMEDOUT

    def __init__(self, message: str, importers: Sequence[str]) -> None:
        super().__init__(message)
        self.importers = tuple(importers)


class FenceTimeoutError(P2PError):
    """A fence did not signal by the deadline; names the fence and who owes it."""

    code = errno.ETIME


class FenceFailedError(P2PError):
    """The work behind a fence ended with an error."""

    code = errno.EIO


class CycleError(P2PError):
    """An operation would wait for itself; names the way round."""

    code = errno.ELOOP

    def __init__(self, cycle: Sequence[str]) -> None:
        super().__init__("a cycle of operations: " + " → ".join(cycle))
        self.cycle = tuple(cycle)


class FutureError(P2PError):
    """An address of the future is used before its fences have signalled."""

    code = errno.EAGAIN


class LockBusyError(P2PError):
    """A reservation is locked by another task, which is named."""

    code = errno.EBUSY


class AddressError(P2PError, TypeError):
    """An address of one kind, or of one device, is used as that of another."""

    code = errno.EINVAL


class IovaError(P2PError):
    """What a call of the IOVA API returned."""
