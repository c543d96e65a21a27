# SPDX-License-Identifier: BSD-3-Clause
"""The shared pools that this process has mapped, each once: its frames fit all rings of it."""

from __future__ import annotations

import os
import threading
import weakref

from rtap._core.forks import renew_in_child
from rtap._core.mempool import Mempool

__all__ = ["attached", "know"]


class _Known:
    def __init__(self) -> None:
        self._in_child()

    def _in_child(self) -> None:
        self.lock = threading.Lock()
        self.pools: weakref.WeakValueDictionary[tuple[int, int], Mempool]
        self.pools = weakref.WeakValueDictionary()


_known = _Known()
renew_in_child(_known)


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def know(pool: Mempool) -> None:
    """Let :func:`attached` find a pool, if it is a shared one."""
    fd = pool.fd
    if pool.shared and fd is not None:
        with _known.lock:
            _known.pools[_key(fd)] = pool


def attached(fd: int, name: str) -> Mempool:
    """The pool of a descriptor: the one that is mapped, or a new mapping with that name. Raises as
    :meth:`Mempool.attach` does."""
    key = _key(fd)
    with _known.lock:
        pool = _known.pools.get(key)
    if pool is not None:
        try:
            _ = pool.fd
        except ValueError:  # closed meanwhile
            pool = None
    if pool is None:
        pool = Mempool.attach(fd, name=name)
        know(pool)
    return pool
