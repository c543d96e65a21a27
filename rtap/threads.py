# SPDX-License-Identifier: BSD-3-Clause
"""Threads of the operating system, for what green ones cannot do.

gevent and eventlet replace the standard library's threads by greenlets, which all run in one
thread. ``setns(2)`` in such a thread would move the whole program, and a wait in the kernel would
stop it. rtap refuses to work on them.
"""

from __future__ import annotations

import _thread
import select
import threading
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

__all__ = ["require_native", "start_thread"]


def require_native() -> None:
    """RuntimeError where somebody has replaced the threads, or taken ``select.epoll`` away."""
    start: object = _thread.start_new_thread
    if not isinstance(start, BuiltinFunctionType) or not hasattr(select, "epoll"):
        raise RuntimeError(
            "rtap needs threads of the operating system and select.epoll, and this program has "
            "replaced them (gevent.monkey, eventlet.monkey_patch): leave thread and select "
            "unpatched, or use rtap in a process of its own"
        )


def start_thread(target: Callable[..., object], *args: Any, name: str) -> threading.Thread:
    """A started daemon thread that runs ``target(*args)``. RuntimeError for green threads."""
    require_native()
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread
