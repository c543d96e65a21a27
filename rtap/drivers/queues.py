# SPDX-License-Identifier: BSD-3-Clause
"""A driver's queues by number: kept, released, started, stopped and counted."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Protocol, TypeVar

from rtap._core.mempool import Mempool
from rtap.ethdev.events import Port
from rtap.ethdev.interrupts import RxInterrupt
from rtap.ethdev.ops import EthConf, EthDevOps, RxQueueOps, Stats, TxQueueOps
from rtap.ethdev.stats import queue_stats, queue_xstats

__all__ = [
    "InterruptDriver",
    "NativeQueue",
    "NativeRxQueue",
    "NativeTxQueue",
    "PolledRxQueue",
    "QueueDriver",
]


class NativeQueue(Protocol):
    """The members that this module needs of both kinds of queue; :mod:`rtap._core.queue` has
    most."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def reset_counters(self) -> None: ...
    def xcounters(self) -> dict[str, int]: ...
    def reset_xcounters(self) -> None: ...


class NativeRxQueue(NativeQueue, RxQueueOps, Protocol):
    """A subclass of :class:`rtap._core.rx_queue.RxQueueBase`."""


class PolledRxQueue(NativeRxQueue, Protocol):
    """One that has descriptors to wait on, see :class:`rtap.ethdev.interrupts.RxInterrupt`."""

    @property
    def fd(self) -> int: ...
    @property
    def wake(self) -> int: ...


class NativeTxQueue(NativeQueue, TxQueueOps, Protocol):
    """A subclass of :class:`rtap._core.tx_queue.TxQueueBase`."""

    def set_plugged(self, plugged: bool) -> None: ...


_RX = TypeVar("_RX", bound=NativeRxQueue)
_POLLED = TypeVar("_POLLED", bound=PolledRxQueue)
_TX = TypeVar("_TX", bound=NativeTxQueue)


class QueueDriver(EthDevOps, Generic[_RX, _TX]):
    """Base of a driver; its `_make_rx` and `_make_tx` make the queues."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._conf = EthConf()
        self._nb_queues = (0, 0)
        self._rxq: dict[int, _RX] = {}
        self._txq: dict[int, _TX] = {}
        self._deferred: set[_RX | _TX] = set()

    @abstractmethod
    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> _RX:
        """Make a receive queue, stopped."""

    @abstractmethod
    def _make_tx(self, queue_id: int, nb_desc: int) -> _TX:
        """Make a transmit queue, stopped."""

    def _queues(self) -> list[_RX | _TX]:
        return [*self._rxq.values(), *self._txq.values()]

    def _start_queues(self) -> None:
        for queue in self._queues():
            if queue not in self._deferred:
                queue.start()

    def _stop_queues(self) -> None:
        for queue in self._queues():
            queue.stop()

    def _release_queues(self) -> None:
        for q in list(self._rxq):
            self.rx_queue_release(q)
        for q in list(self._txq):
            self.tx_queue_release(q)

    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> _RX:
        rxq = self._make_rx(queue_id, nb_desc, pool)
        if queue_id in self._rxq:
            self.rx_queue_release(queue_id)
        self._rxq[queue_id] = rxq
        if deferred_start:
            self._deferred.add(rxq)
        return rxq

    def queue_defer(self, queue_id: int, rx: bool, tx: bool) -> None:
        queues: tuple[tuple[_RX | _TX, bool], ...]
        queues = ((self._rxq[queue_id], rx), (self._txq[queue_id], tx))
        for queue, deferred in queues:
            (self._deferred.add if deferred else self._deferred.discard)(queue)

    def rx_queue_release(self, queue_id: int) -> None:
        rxq = self._rxq.pop(queue_id)
        rxq.close()
        self._deferred.discard(rxq)

    def rx_queue_start(self, queue_id: int) -> None:
        self._rxq[queue_id].start()

    def rx_queue_stop(self, queue_id: int) -> None:
        self._rxq[queue_id].stop()

    def tx_queue_setup(self, queue_id: int, nb_desc: int, deferred_start: bool) -> _TX:
        txq = self._make_tx(queue_id, nb_desc)
        if queue_id in self._txq:
            self.tx_queue_release(queue_id)
        self._txq[queue_id] = txq
        if deferred_start:
            self._deferred.add(txq)
        return txq

    def tx_queue_release(self, queue_id: int) -> None:
        txq = self._txq.pop(queue_id)
        txq.close()
        self._deferred.discard(txq)

    def tx_queue_start(self, queue_id: int) -> None:
        self._txq[queue_id].start()

    def tx_queue_stop(self, queue_id: int) -> None:
        self._txq[queue_id].stop()

    def stats_get(self) -> Stats:
        return queue_stats(self._rxq, self._txq, *self._nb_queues)

    def stats_reset(self) -> None:
        for queue in self._queues():
            queue.reset_counters()

    def xstats_get(self) -> dict[str, int]:
        return queue_xstats(self._rxq, self._txq)

    def xstats_reset(self) -> None:
        for queue in self._queues():
            queue.reset_xcounters()


class InterruptDriver(QueueDriver[_POLLED, _TX]):
    """Base of a driver whose receive queues have interrupts. It sets `_started` itself, and says
    when a queue's interrupt becomes live."""

    def __init__(self, port: Port) -> None:
        super().__init__(port)
        self._started = False
        self._intr: dict[int, RxInterrupt] = {}

    @abstractmethod
    def _is_live(self, queue_id: int) -> bool:
        """Whether a receive queue is started, when the device is."""

    def rx_queue_release(self, queue_id: int) -> None:
        intr = self._intr.pop(queue_id, None)
        if intr is not None:
            intr.close()
        super().rx_queue_release(queue_id)

    def _stop_queues(self) -> None:
        for intr in self._intr.values():
            intr.set_live(False)
        super()._stop_queues()

    def _interrupt(self, queue_id: int) -> RxInterrupt:
        intr = self._intr.get(queue_id)
        if intr is None:
            rxq = self._rxq[queue_id]
            intr = RxInterrupt(rxq.fd, self._started and self._is_live(queue_id), rxq.wake)
            self._intr[queue_id] = intr
        return intr

    def rx_queue_intr_fd(self, queue_id: int) -> int:
        return self._interrupt(queue_id).fileno()

    def rx_queue_intr_enable(self, queue_id: int) -> None:
        self._interrupt(queue_id).enable()

    def rx_queue_intr_disable(self, queue_id: int) -> None:
        self._interrupt(queue_id).disable()
