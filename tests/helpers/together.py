# SPDX-License-Identifier: BSD-3-Clause
"""Jobs that run at the same time, each in a thread, and errors that they may raise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from support import Task, settle

from rtap import Mempool

THREADS = 6


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Runs jobs at the same time, each in a thread; returns their results."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait(60)
        return job()

    tasks = [Task(run, job) for job in jobs]
    return [task.result(120) for task in tasks]


def in_threads(job: Callable[[int], Any], n: int = THREADS) -> list[Any]:
    return together(*(lambda i=i: job(i) for i in range(n)))


@contextlib.contextmanager
def may_raise(*errors: type[Exception], says: str = "") -> Iterator[None]:
    try:
        yield
    except errors as exc:
        if says not in str(exc):
            raise


def tolerant(call: Callable[[], Any], *errors: type[Exception]) -> None:
    with contextlib.suppress(*errors):
        call()


def empty_after() -> Iterator[Mempool]:
    """A pool for a test. Afterwards all its slots must be free, whatever the threads did."""
    mempool = Mempool(512, 256)
    yield mempool
    assert settle(mempool) == 0
    mempool.close()
