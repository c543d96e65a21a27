# SPDX-License-Identifier: BSD-3-Clause
"""Where a program made an object, for the warning when it forgets to close it.

tracemalloc tells more of a warning's ``source``, but only when it runs. So every object that holds
something of the kernel's remembers one line of the program.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

__all__ = ["origin", "serve"]

_thread = threading.local()


def _is_ours(module: object) -> bool:
    """Whether that is a module of this package, or one between it and the start of a thread. The
    commands of rtap are programs like others."""
    if not isinstance(module, str):
        return False
    package, _, rest = module.partition(".")
    return module == "threading" or (package == "rtap" and rest.partition(".")[0] != "cli")


def origin() -> str:
    """The end of a sentence, ", made at FILE:LINE": where the program has called rtap; "" when
    nobody knows.

    In a thread of :func:`~rtap._core.threads.call_in_thread`, where the program has called that.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_globals.get("__name__")):
        frame = frame.f_back
    if frame is None:
        return getattr(_thread, "origin", "")
    return f", made at {frame.f_code.co_filename}:{frame.f_lineno}"


def serve(place: str) -> None:
    """This thread does something for a program that is at `place`, see :func:`origin`."""
    _thread.origin = place
