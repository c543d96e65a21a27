# SPDX-License-Identifier: BSD-3-Clause
"""Queue pairs of a device that are set aside for other processes, and lent to them.

:class:`rtap.EthDev` inherits these methods; :mod:`rtap.sharing` calls them. A pair that is set
aside is stopped here. While it is lent, the kernel sends frames to it, and the pair's counters
show what the other process counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from rtap.errors import DeviceGone, DeviceStateError
from rtap.ethdev.control import ALIVE, STARTED
from rtap.ethdev.events import Port
from rtap.ethdev.ops import Loan
from rtap.ethdev.states import QUEUES_THERE, EthDevStates

__all__ = ["EthDevLoans"]


class EthDevLoans(EthDevStates):
    """Base of :class:`rtap.EthDev`."""

    __slots__ = ("_borrowed", "_on_close", "_was_deferred")

    # Numbers of the pairs that are lent.
    _borrowed: set[int]
    # Called once, under the lock, when the device is closed; does not block.
    _on_close: Callable[[], object] | None
    # ("rx" or "tx", number) of queues whose start was deferred before they were set aside.
    _was_deferred: set[tuple[str, int]]

    def _init_states(self, port: Port) -> None:
        super()._init_states(port)
        self._borrowed = set()
        self._on_close = None
        self._was_deferred = set()

    def _set_aside(self, queues: Iterable[int], on_close: Callable[[], object]) -> None:
        """Stop these pairs and keep them for others, until :meth:`_put_back`; all or none."""
        with self._lock:
            self._check("share", *QUEUES_THERE)
            if self._on_close is not None:
                raise DeviceStateError(f"share: device {self._name} is shared already")
            self._ops.loan_terms()  # refuses, if the driver cannot
            numbers = list(queues)
            for queue in numbers:
                self._there("share", "rx", queue, *QUEUES_THERE)
                self._there("share", "tx", queue, *QUEUES_THERE)
            self._on_close = on_close
            try:
                for queue in numbers:
                    if self._state == STARTED:
                        self.rx_queue_stop(queue)
                        self.tx_queue_stop(queue)
                    self._aside.add(queue)
                    self._rx.pop(queue, None)
                    self._tx.pop(queue, None)
                    self._defer_aside(queue)
            except BaseException:
                self._put_back()
                raise

    def _defer_aside(self, queue: int) -> None:
        """:meth:`start` leaves the pair alone."""
        for kind in ("rx", "tx"):
            if queue in self._deferred[kind]:
                self._was_deferred.add((kind, queue))
            self._deferred[kind].add(queue)
        self._ops.queue_defer(queue, True, True)

    def _put_back(self) -> None:
        """Take all pairs back, and start those that were not deferred. Idempotent."""
        with self._lock:
            self._on_close = None
            aside, self._aside = self._aside, set()
            if self._state not in ALIVE:
                return
            for queue in sorted(self._borrowed):
                self._take_back(queue)
            # Pairs of an interface that is gone stay stopped.
            for queue in sorted(aside):
                deferred = [(kind, queue) in self._was_deferred for kind in ("rx", "tx")]
                self._ops.queue_defer(queue, *deferred)
                for kind, later in zip(("rx", "tx"), deferred, strict=True):
                    if not later:
                        self._deferred[kind].discard(queue)
                self._rx[queue] = self._rxq[queue].rx_burst
                self._tx[queue] = self._txq[queue].tx_burst
                with contextlib.suppress(DeviceGone):
                    if self._state == STARTED and not deferred[0]:
                        self.rx_queue_start(queue)
                    if self._state == STARTED and not deferred[1]:
                        self.tx_queue_start(queue)
            self._was_deferred.clear()

    def _loan_terms(self) -> dict[str, Any]:
        with self._lock:
            self._check("share", *QUEUES_THERE)
            return self._ops.loan_terms()

    def _lend(self, queue: int) -> Loan:
        """Let another process have a pair that was set aside."""
        with self._lock:
            self._check("attach", *QUEUES_THERE)
            loan = self._ops.queue_lend(queue)
            self._borrowed.add(queue)
            return loan

    def _take_back(self, queue: int) -> None:
        """The other process no longer has it. Idempotent, also on a closed device."""
        with self._lock:
            if queue in self._borrowed:
                self._borrowed.discard(queue)
                if self._state in ALIVE:
                    self._ops.queue_take_back(queue)

    def _close_loans(self) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
