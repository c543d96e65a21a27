# SPDX-License-Identifier: BSD-3-Clause
"""Receive interrupts: one pollable descriptor for each queue (``rte_eth_dev_rx_intr_*``)."""

from __future__ import annotations

import contextlib
import os
import select

__all__ = ["RxInterrupt"]


class RxInterrupt:
    """An epoll descriptor over a queue's descriptor, itself readable while frames wait.

    Enabling adds the queue to it and disabling removes the queue, so a waiting frame
    signals at once, and nothing signals while disabled. It is level-triggered and needs no
    acknowledgement: it is readable until the queue has been read empty. epoll descriptors nest
    (epoll(7)), so this one works with select, poll, epoll and asyncio.

    `live` says whether the queue can receive; while it cannot, nothing signals either,
    since a woken thread could not take the frame. `wake` is a second descriptor to wait for, -1
    for none: it is readable while frames that were already read wait in the queue.
    """

    def __init__(self, fd: int, live: bool, wake: int = -1) -> None:
        self._fds = [fd] if wake < 0 else [fd, wake]
        self._end: list[int] = []
        self._live = live
        self._enabled = False
        self._added = False
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """The descriptor to wait on; belongs to this object."""
        return self._epoll.fileno()

    def enable(self) -> None:
        """Signal from now on. Idempotent."""
        self._enabled = True
        self._update()

    def disable(self) -> None:
        """Stop signalling. Idempotent."""
        self._enabled = False
        self._update()

    def set_live(self, live: bool) -> None:
        """Note whether the queue is started; an enabled interrupt works again when it is."""
        self._live = live
        self._update()

    def end(self) -> None:
        """Signal for good, no matter what the descriptor says: the next burst raises.
        Idempotent."""
        if not self._end:
            self._end.append(os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            if self._added:
                self._epoll.register(self._end[0], select.EPOLLIN)

    def renew(self) -> None:
        """Undo :meth:`end`. Idempotent."""
        while self._end:
            os.close(self._end.pop())  # this removes it from the set

    def _update(self) -> None:
        wanted = self._enabled and self._live
        if wanted and not self._added:
            for fd in (*self._fds, *self._end):
                self._epoll.register(fd, select.EPOLLIN)
        elif self._added and not wanted:
            for fd in (*self._fds, *self._end):
                # Already removed if the descriptor behind it was closed.
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
        self._added = wanted

    def close(self) -> None:
        """Close the descriptor. Idempotent; in a forked child it closes the child's copy."""
        self._epoll.close()
        self.renew()
