# SPDX-License-Identifier: BSD-3-Clause
"""What a forked child does before anything else runs in it.

Whoever held a lock when the child was made may not exist there. So first every lock is made anew
and every device is known to be the parent's, and nothing is let go of: a finalizer that takes an
old lock would hang. Only then are the parent's threads, sockets and devices forgotten.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["forget_in_child", "renew_in_child"]


class _Holder(Protocol):
    def _in_child(self) -> None:
        """Make new locks. Takes none, and drops nothing."""


_holders: weakref.WeakSet[_Holder] = weakref.WeakSet()
_forgetting: list[Callable[[], object]] = []


def renew_in_child(holder: _Holder) -> None:
    """Have ``holder._in_child()`` make new locks in forked children, as long as it lives."""
    _holders.add(holder)


def forget_in_child(fn: Callable[[], object]) -> None:
    """Have ``fn()`` drop what is the parent's, once all locks are new; in the order of calls."""
    _forgetting.append(fn)


def _after_fork() -> None:
    collecting = gc.isenabled()
    gc.disable()
    try:
        for holder in list(_holders):
            holder._in_child()
        for fn in _forgetting:
            fn()
    finally:
        if collecting:
            gc.enable()


os.register_at_fork(after_in_child=_after_fork)
