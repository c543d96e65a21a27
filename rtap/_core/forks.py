# SPDX-License-Identifier: BSD-3-Clause
"""The first steps of a forked child, before any other code runs in it.

The thread that held a lock at the fork may not exist in the child. So the child first makes every
lock anew and marks every device as the parent's. It releases nothing before that, since a finalizer
that takes an old lock would hang. Only then does it forget the parent's threads, sockets and
devices.
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
    """Have ``fn()`` drop the parent's state once all locks are new, in the order of calls."""
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
