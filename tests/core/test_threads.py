# SPDX-License-Identifier: BSD-3-Clause
"""The lock of a device is reentrant, and a thread that waits for it gets it next."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from support import Task, eventually

from rtap._core.threads import FairRLock


def waiter(lock: FairRLock, order: list[str]) -> Task[None]:
    """Another thread that waits for the lock, which this thread holds."""

    def take() -> None:
        with lock:
            order.append("waiter")

    def at_the_gate() -> bool:
        free = lock._gate.acquire(blocking=False)
        if free:
            lock._gate.release()
        return not free

    task = Task(take)
    eventually(at_the_gate, "it waits")
    return task


def test_who_waits_comes_next() -> None:
    """A thread that takes the lock again at once comes after a thread that already waits."""
    lock = FairRLock()
    order: list[str] = []
    for _ in range(20):
        with lock:
            task = waiter(lock, order)
        with lock:
            order.append("same")
        task.result(5)
    assert order == ["waiter", "same"] * 20


def test_it_is_reentrant_while_somebody_waits() -> None:
    lock = FairRLock()
    order: list[str] = []
    with lock:
        task = waiter(lock, order)
        with lock:
            order.append("again")
        assert lock.acquire(blocking=False)
        lock.release()
    task.result(5)
    assert order == ["again", "waiter"]


def test_a_wait_can_be_bounded() -> None:
    lock = FairRLock()
    with lock:
        assert not Task(lock.acquire, False).result(5)
        assert not Task(lock.acquire, True, 0.01).result(5)
        task = waiter(lock, [])  # it now waits at the gate
        assert not Task(lock.acquire, False).result(5)
        assert not Task(lock.acquire, True, 0.01).result(5)
    task.result(5)
    assert lock.acquire(timeout=1)
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()


def test_it_tells_whether_it_is_locked() -> None:
    """Also to a condition variable of Python 3.14, which takes no lock that does not."""
    lock = FairRLock()
    assert not lock.locked()
    with lock:
        assert lock.locked()
        assert Task(lock.locked).result(5)
    assert not Task(lock.locked).result(5)
    assert not lock.locked()


def test_a_condition_waits_for_it() -> None:
    lock = FairRLock()
    condition, ready = lock.condition(), []

    def tell() -> None:
        with condition:
            ready.append(True)
            condition.notify_all()

    with lock, condition:
        task = Task(tell)
        assert condition.wait_for(lambda: ready, 5)
        task.result(5)


def test_a_signal_handler_takes_it_while_its_thread_waits() -> None:
    """A signal handler takes the lock in the thread that waits at the gate."""
    lock, heard, inside, go = FairRLock(), [], threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            inside.set()
            go.wait(5)

    def handler(*_: object) -> None:
        go.set()
        with lock:
            heard.append(True)

    before = signal.signal(signal.SIGALRM, handler)
    task = Task(hold)
    try:
        assert inside.wait(5)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        with lock:
            assert heard == [True]
        assert time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    task.result(5)
