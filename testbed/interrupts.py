# SPDX-License-Identifier: Apache-2.0
"""Asked to end, by whichever signal: the process unwinds, so that racks and files go away.

A signal's exception is raised wherever the interpreter is. Where it happens to be in a callback of
the garbage collector or of the import system, Python prints the exception and goes on as if nobody
had asked (Python documentation, :func:`sys.unraisablehook`). Then it is asked again.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time

TYPE_CHECKING = False  # typing's, without the rest of it
if TYPE_CHECKING:
    from typing import NoReturn

# After it, the callback that swallowed the exception has ended.
_AGAIN_AFTER_S = 0.01


_came: list[int] = []  # the signals, in order


def heed() -> None:
    """From here on SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, which is never lost.

    One that our caller has us ignore stays ignored (``nohup``, a script's ``&``).
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _swallowed


def _interrupt(number: int, _frame: object) -> NoReturn:
    _came.append(number)
    raise KeyboardInterrupt


def _swallowed(what: sys.UnraisableHookArgs) -> None:
    if issubclass(what.exc_type, KeyboardInterrupt):
        _thread.start_new_thread(_ask_again, ())
    else:
        sys.__unraisablehook__(what)


def _ask_again() -> None:
    time.sleep(_AGAIN_AFTER_S)
    os.kill(os.getpid(), _came[-1] if _came else signal.SIGINT)
