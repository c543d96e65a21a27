# SPDX-License-Identifier: BSD-3-Clause
"""Receive interrupts: one pollable descriptor for each queue (``rte_eth_dev_rx_intr_*``)."""

from __future__ import annotations

import contextlib
import os
import select

__all__ = ["RxInterrupt"]


class RxInterrupt:
    """An epoll descriptor over a queue's descriptor, itself readable while frames wait.

    Enabling adds the queue to it and disabling takes the queue out, so a frame that is there
    already signals at once and nothing signals while disabled. Being level-triggered it needs no
    acknowledgement: it is readable until the queue has been read empty. epoll descriptors nest
    (epoll(7)), which makes this one fit for select, poll, epoll and asyncio.

    `live` says whether the queue may be received from; while it is not, nothing signals either,
    since whoever woke up could not take the frame. `wake` is a second descriptor to wait for, -1
    for none: that of frames which were read already and wait in the queue.
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
        """Signal no more. Idempotent."""
        self._enabled = False
        self._update()

    def set_live(self, live: bool) -> None:
        """Whether the queue is started; what was enabled stays so until it is again."""
        self._live = live
        self._update()

    def end(self) -> None:
        """Signal for good: whatever the descriptor says, the next burst raises. Idempotent."""
        if not self._end:
            self._end.append(os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            if self._added:
                self._epoll.register(self._end[0], select.EPOLLIN)

    def renew(self) -> None:
        """Undo :meth:`end`. Idempotent."""
        while self._end:
            os.close(self._end.pop())  # which takes it out of the set

    def _update(self) -> None:
        wanted = self._enabled and self._live
        if wanted and not self._added:
            for fd in (*self._fds, *self._end):
                self._epoll.register(fd, select.EPOLLIN)
        elif self._added and not wanted:
            for fd in (*self._fds, *self._end):
                # Gone already when the descriptor behind it was closed.
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
        self._added = wanted

    def close(self) -> None:
        """Close the descriptor. Idempotent; also right in a forked child, whose copy it closes."""
        self._epoll.close()
        self.renew()
