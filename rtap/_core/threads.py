# SPDX-License-Identifier: BSD-3-Clause
"""Threads of the operating system, for work that green threads cannot do, and a fair lock.

gevent and eventlet replace the standard library's threads by greenlets, which all run in one
thread. ``setns(2)`` in such a thread would move the whole program, and a wait in the kernel would
stop it. rtap refuses to work on them.
"""

from __future__ import annotations

import _thread
import select
import threading
import time
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, TypeVar

from rtap._core.origin import origin, serve

__all__ = ["FairRLock", "begin", "call_in_thread", "require_native", "start_thread"]

_T = TypeVar("_T")


def require_native() -> None:
    """RuntimeError where the threads were replaced, or ``select.epoll`` was removed."""
    start: object = _thread.start_new_thread
    if not isinstance(start, BuiltinFunctionType) or not hasattr(select, "epoll"):
        raise RuntimeError(
            "rtap needs threads of the operating system and select.epoll, and this program has "
            "replaced them (gevent.monkey, eventlet.monkey_patch): leave thread and select "
            "unpatched, or use rtap in a process of its own"
        )


def call_in_thread(fn: Callable[[], _T]) -> _T:
    """Run ``fn()`` in a thread of its own; return or raise its outcome. RuntimeError for green
    threads.

    An exception that a signal handler raises meanwhile ends the wait and passes through: the thread
    goes on, and nobody gets its result.
    """
    result: list[_T] = []
    place = origin()
    failure: list[BaseException] = []
    # One wait in C. The waits of threading.Thread are Python code, where an exception in the middle
    # turns into "release unlocked lock".
    running = _thread.allocate_lock()
    running.acquire()

    def body() -> None:
        try:
            serve(place)
            result.append(fn())
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            failure.append(exc)
        finally:
            running.release()

    start_thread(body, name="rtap-call")
    running.acquire()
    if failure:
        try:
            raise failure[0]
        finally:
            failure.clear()  # the traceback refers to this frame: no cycle, please
    return result.pop()  # the thread has the list for a moment more


def begin(thread: threading.Thread) -> None:
    """``thread.start()``, during which a signal handler may raise: its exception passes through.

    The thread may run by then, or soon.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal handlers run here
        thread.start()
        return
    failure: list[BaseException] = []
    starting = _thread.allocate_lock()
    starting.acquire()

    def start() -> None:
        # No code here asks for the current thread: threading would keep a record of it for ever.
        try:
            thread.start()
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            failure.append(exc)
        finally:
            starting.release()

    _thread.start_new_thread(start, ())
    starting.acquire()
    if failure:
        raise failure.pop()


def start_thread(target: Callable[..., object], *args: Any, name: str) -> threading.Thread:
    """A started daemon thread that runs ``target(*args)``, see :func:`begin`. RuntimeError for
    green threads."""
    require_native()
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    begin(thread)
    return thread


class FairRLock:
    """A reentrant lock: a thread that takes it again and again does not keep others out.

    Python wakes a thread that waits for a lock, but does not hand the lock over. A thread that
    calls a device in a loop may take it again before the other one runs, for seconds. Here a thread
    goes through a gate first, and stays in it until it has the lock, so a waiting thread comes
    next.
    """

    # Reentrant as well: a signal handler may run while its own thread waits inside.
    _gate: threading.RLock
    # A threading.RLock, with the methods of one that threading.Condition uses.
    _lock: Any

    def __init__(self) -> None:
        self._gate, self._lock = threading.RLock(), threading.RLock()
        self.release = self._lock.release
        self._is_owned = self._lock._is_owned
        self._release_save = self._lock._release_save

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As :meth:`threading.Lock.acquire`."""
        if self._is_owned():
            return bool(self._lock.acquire())
        until = time.monotonic() + timeout if timeout > 0 else 0.0
        if not self._gate.acquire(blocking, timeout):
            return False
        try:
            if timeout > 0:
                timeout = max(0.0, until - time.monotonic())
            return bool(self._lock.acquire(blocking, timeout))
        finally:
            self._gate.release()

    def __enter__(self) -> bool:
        # As acquire(), for those who ask a device for its figures all the time.
        if self._is_owned():
            return bool(self._lock.acquire())
        with self._gate:
            return bool(self._lock.acquire())

    def __exit__(self, *_: object) -> None:
        self.release()

    def locked(self) -> bool:
        """Whether a thread has it. From Python 3.14 on :class:`threading.Condition` takes no lock
        without this."""
        if self._is_owned():
            return True
        free = bool(self._lock.acquire(blocking=False))
        if free:
            self._lock.release()
        return not free

    def condition(self) -> threading.Condition:
        """A condition variable with this lock under it."""
        lock: Any = self
        return threading.Condition(lock)

    def _acquire_restore(self, state: tuple[int, int]) -> None:
        """For :class:`threading.Condition`: back from its wait."""
        with self._gate:
            self._lock._acquire_restore(state)
