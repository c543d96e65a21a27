# SPDX-License-Identifier: BSD-3-Clause
"""The states of a device and of its queues, and their transitions.

:class:`rtap.EthDev` inherits these methods. Bursts are ended in three steps: refuse further ones,
wait without the lock until those in progress are over, let the driver do the rest.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterable, Sequence
from enum import IntFlag
from typing import NoReturn

from rtap._core.burst import Burst
from rtap._core.forks import renew_in_child
from rtap._core.mempool import Mempool
from rtap._core.queue import adopt, may_wait, occupied, refuse
from rtap._core.rx_queue import RxQueueBase
from rtap._core.threads import FairRLock
from rtap._core.workers import in_worker
from rtap.errors import DeviceStateError
from rtap.ethdev import registry
from rtap.ethdev.control import (
    CLOSED,
    CONFIGURED,
    INHERITED,
    STARTED,
    STOPPED,
    UNCONFIGURED,
    EthDevControl,
    checked_count,
)
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import EthConf, RxQueueOps, TxQueueOps
from rtap.flags import flag_names

__all__ = ["QUEUES_THERE", "EthDevStates"]

QUEUES_THERE = (CONFIGURED, STARTED, STOPPED)
#: Seconds between checks whether bursts have ended.
OWNER_POLL_S = 0.0005


def _capable(asked: IntFlag, capa: IntFlag, what: str) -> None:
    unknown = int(asked) & ~int(capa)
    if unknown:
        raise ValueError(
            f"{what}: this device cannot do {', '.join(flag_names(unknown, type(asked)))}; "
            f"it can do {', '.join(flag_names(capa, type(asked))) or 'none'}"
        )


class EthDevStates(EthDevControl):
    """Base of :class:`rtap.EthDev`."""

    #: Whether it may start with queues that are not set up.
    _partial = False

    __slots__ = (
        "_deferred",
        "_ender",
        "_ending",
        "_halted",
        "_left",
        "_running",
        "_rx",
        "_tx",
    )

    # Ident of the thread that waits, without the lock, for bursts to end; 0 for none. Other threads
    # that want to change the device's state wait at `_left` for their turn.
    _ender: int
    _left: threading.Condition
    # The device or single queues that already refuse bursts, without the driver's knowledge. They
    # are left behind when a signal handler raises in the wait; the next call goes on from there.
    _halted: bool
    _ending: set[tuple[str, int]]
    # Bound methods by queue number: a burst costs one lookup in Python. Dicts refuse negative
    # numbers at no cost.
    _rx: dict[int, Callable[[int, float | None], Burst]]
    _tx: dict[int, Callable[[Burst], int]]
    # Numbers of the queues that run, and of those that start() leaves alone, by "rx" and "tx".
    _running: dict[str, set[int]]
    _deferred: dict[str, set[int]]

    def _init_states(self, port: Port) -> None:
        self._init_control(port)
        self._rx, self._tx = {}, {}
        self._running = {"rx": set(), "tx": set()}
        self._deferred = {"rx": set(), "tx": set()}
        self._ender, self._left = 0, self._lock.condition()
        self._halted, self._ending = False, set()
        renew_in_child(self)

    # -- ending bursts
    # Nobody waits for a burst to end while holding the lock: a worker may burst, and its stage may
    # query this device.

    def _queues(self) -> list[RxQueueOps | TxQueueOps]:
        return [*self._rxq.values(), *self._txq.values()]

    def _turn(self, operation: str, queues: Iterable[object], nested: bool = False) -> None:
        """Wait until no other thread is ending bursts; then this one may, on `queues`.

        A signal handler that runs while this very thread ends bursts may stop and close (`nested`).
        """
        may_wait(operation, queues)
        while self._ender not in (0, _thread.get_ident()):
            if in_worker():
                raise DeviceStateError(
                    f"{operation}: another thread is stopping device {self._name}, and a stage "
                    "cannot wait for that"
                )
            self._left.wait(0.1)
        if self._ender and not nested:
            raise DeviceStateError(
                f"{operation}: this thread is in the middle of stopping device {self._name}"
            )

    def _end_bursts(self, queues: Sequence[object]) -> None:
        """Make queues refuse bursts, and wait without the lock for those in progress.

        A thread that gets the lock meanwhile may change anything. Signal handlers run.
        """
        refuse(queues)
        before, self._ender = self._ender, _thread.get_ident()
        try:
            while occupied(queues):
                self._left.wait(OWNER_POLL_S)
        finally:
            self._ender = before
            self._left.notify_all()

    def _halt(self) -> None:
        if self._state == STARTED:
            self._state = STOPPED
            self._halted = True
            self._running = {"rx": set(), "tx": set()}
            self._ending.clear()

    def _finish_stop(self) -> None:
        """Do the rest of :meth:`stop`, also of an interrupted one."""
        if not self._halted:
            return
        self._end_bursts(self._queues())
        if self._halted and self._state == STOPPED:
            try:
                self._ops.dev_stop()
            except Exception:
                self._halted = False  # as well as the driver could
                raise
            self._halted = False

    def _finish_queue(self, kind: str, queue: int) -> None:
        """Do the rest of stopping one queue, also of an interrupted stop."""
        if (kind, queue) not in self._ending:
            return
        self._end_bursts([(self._rxq if kind == "rx" else self._txq)[queue]])
        if self._state == STARTED and (kind, queue) in self._ending:
            (self._ops.rx_queue_stop if kind == "rx" else self._ops.tx_queue_stop)(queue)
            self._ending.discard((kind, queue))
            self._port.event(EthEvent.QUEUE_STATE, (kind, queue, False))

    def _stop_queue(self, kind: str, queue: int) -> None:
        operation = f"{kind}_queue_stop"
        with self._lock:
            self._there(operation, kind, queue, STARTED)
            self._turn(operation, [(self._rxq if kind == "rx" else self._txq)[queue]])
            self._there(operation, kind, queue, STARTED)
            if queue in self._running[kind]:
                self._running[kind].discard(queue)
                self._ending.add((kind, queue))
            self._finish_queue(kind, queue)

    def _free(self, operation: str, kind: str, queue: int) -> None:
        """Make sure that nobody uses that queue, if it exists, and that it is not running."""
        there = (self._rxq if kind == "rx" else self._txq).get(queue)
        if there is not None:
            self._turn(operation, [there])
            self._not_running(kind, queue, operation)
            self._finish_queue(kind, queue)
            self._end_bursts([there])

    # -- states

    def configure(
        self, nb_rx_queues: int = 1, nb_tx_queues: int = 1, conf: EthConf | None = None
    ) -> None:
        """Set the number of queues and the offloads; releases all queues set up before.

        Not while started. ValueError, and no change, for counts that the device cannot have or
        pair, and for offloads that it lacks; the message names them.
        """
        conf = EthConf() if conf is None else conf
        if not isinstance(conf, EthConf):
            raise TypeError(f"conf must be an EthConf, got {type(conf).__name__}")
        with self._lock:
            self._check("configure", UNCONFIGURED, CONFIGURED, STOPPED)
            self._may_set_up("configure")
            info = self._caps
            self._queue_count(nb_rx_queues, "nb_rx_queues", info.max_rx_queues)
            self._queue_count(nb_tx_queues, "nb_tx_queues", info.max_tx_queues)
            _capable(conf.rx_offloads, info.rx_offload_capa, "rx_offloads")
            _capable(conf.tx_offloads, info.tx_offload_capa, "tx_offloads")
            if conf.mtu is not None:
                checked_count(conf.mtu, "mtu", info.min_mtu, info.max_mtu)
            self._turn("configure", self._queues())
            self._finish_stop()
            self._end_bursts(self._queues())
            self._check("configure", UNCONFIGURED, CONFIGURED, STOPPED)
            try:
                self._ops.dev_configure(nb_rx_queues, nb_tx_queues, conf)
            except (ValueError, TypeError):
                raise  # refused: all is as it was
            except BaseException:
                self._forget_queues(UNCONFIGURED, 0, 0)
                raise
            self._conf = conf
            self._forget_queues(CONFIGURED, nb_rx_queues, nb_tx_queues)

    def _queue_count(self, n: int, what: str, most: int) -> None:
        if most == 1 and isinstance(n, int) and n > 1 and not self._caps.multi_queue:
            raise ValueError(
                f"{what} must be 1, got {n}: {self._caps.ifname or self._name} is a single-queue "
                "interface, made without multi_queue"
            )
        checked_count(n, what, 1, most)

    def _forget_queues(self, state: str, nb_rx: int, nb_tx: int) -> None:
        self._state = state
        self._halted = False
        self._ending.clear()
        self._nb_queues = (nb_rx, nb_tx)
        self._rxq, self._txq = {}, {}
        self._rx, self._tx = {}, {}
        self._running = {"rx": set(), "tx": set()}
        self._deferred = {"rx": set(), "tx": set()}

    def _drop_rx(self, q: int) -> None:
        if self._rxq.pop(q, None) is not None:
            self._rx.pop(q, None)
            self._ops.rx_queue_release(q)

    def _drop_tx(self, q: int) -> None:
        if self._txq.pop(q, None) is not None:
            self._tx.pop(q, None)
            self._ops.tx_queue_release(q)

    def rx_queue_setup(
        self, queue: int, nb_desc: int, pool: Mempool, *, deferred_start: bool = False
    ) -> None:
        """Set receive queue `queue` up, also anew; its mbufs come from `pool`.

        `nb_desc` is the most frames it takes from the kernel at a time. :meth:`start` does not
        start a queue with `deferred_start`: it receives nothing until :meth:`rx_queue_start`. While
        the device is started, a queue has to be stopped for this, and stays stopped.

        ValueError when the pool's buffers are too small for the MTU and the offloads, with the
        size they need.
        """
        with self._lock:
            self._check("rx_queue_setup", *QUEUES_THERE)
            checked_count(queue, "queue", 0, self._nb_queues[0] - 1)
            self._may_set_up("rx_queue_setup", queue)
            self._not_running("rx", queue, "rx_queue_setup")
            limits = self._caps.rx_desc_lim
            checked_count(nb_desc, "nb_desc", limits.nb_min, limits.nb_max)
            if not isinstance(pool, Mempool):
                raise TypeError(f"pool must be a Mempool, got {type(pool).__name__}")
            self._free("rx_queue_setup", "rx", queue)
            self._check("rx_queue_setup", *QUEUES_THERE)
            rxq = self._ops.rx_queue_setup(queue, nb_desc, pool, bool(deferred_start))
            self._usable(rxq, "rx_queue_setup", "rx_burst")
            adopt(rxq)
            if isinstance(rxq, RxQueueBase):
                rxq.route_ended = self._port.route_ended
            self._rxq[queue] = rxq
            self._rx[queue] = rxq.rx_burst
            self._defer("rx", queue, deferred_start)

    def tx_queue_setup(self, queue: int, nb_desc: int, *, deferred_start: bool = False) -> None:
        """Set transmit queue `queue` up, also anew; it sends up to `nb_desc` frames at a time.

        Everything else is as in :meth:`rx_queue_setup`.
        """
        with self._lock:
            self._check("tx_queue_setup", *QUEUES_THERE)
            checked_count(queue, "queue", 0, self._nb_queues[1] - 1)
            self._may_set_up("tx_queue_setup", queue)
            self._not_running("tx", queue, "tx_queue_setup")
            limits = self._caps.tx_desc_lim
            checked_count(nb_desc, "nb_desc", limits.nb_min, limits.nb_max)
            self._free("tx_queue_setup", "tx", queue)
            self._check("tx_queue_setup", *QUEUES_THERE)
            txq = self._ops.tx_queue_setup(queue, nb_desc, bool(deferred_start))
            self._usable(txq, "tx_queue_setup", "tx_burst", "send")
            adopt(txq)
            self._txq[queue] = txq
            self._tx[queue] = txq.tx_burst
            self._defer("tx", queue, deferred_start)

    def rx_queue_release(self, queue: int) -> None:
        """Release a stopped receive queue and its interrupt descriptor; other queues run on.

        It has to be set up again before the next :meth:`start` of the device.
        """
        with self._lock:
            self._there("rx_queue_release", "rx", queue, *QUEUES_THERE)
            self._may_set_up("rx_queue_release", queue)
            self._not_running("rx", queue, "rx_queue_release")
            self._free("rx_queue_release", "rx", queue)
            self._check("rx_queue_release", *QUEUES_THERE)
            self._drop_rx(queue)

    def tx_queue_release(self, queue: int) -> None:
        """Release a stopped transmit queue; see :meth:`rx_queue_release`."""
        with self._lock:
            self._there("tx_queue_release", "tx", queue, *QUEUES_THERE)
            self._may_set_up("tx_queue_release", queue)
            self._not_running("tx", queue, "tx_queue_release")
            self._free("tx_queue_release", "tx", queue)
            self._check("tx_queue_release", *QUEUES_THERE)
            self._drop_tx(queue)

    def rx_queue_start(self, queue: int) -> None:
        """Let one queue of a started device receive. No effect when it already does.

        It does not get frames from the time when it was stopped: the kernel gave them to others.
        """
        with self._lock:
            self._there("rx_queue_start", "rx", queue, STARTED)
            self._own_queue("rx_queue_start", queue)
            if queue not in self._running["rx"]:
                self._turn("rx_queue_start", ())
                self._finish_queue("rx", queue)
                self._there("rx_queue_start", "rx", queue, STARTED)
                self._ops.rx_queue_start(queue)
                self._running["rx"].add(queue)
                self._port.event(EthEvent.QUEUE_STATE, ("rx", queue, True))

    def rx_queue_stop(self, queue: int) -> None:
        """Stop one receive queue while the others run. No effect when it is already stopped.

        Ends a wait in progress. The kernel sends its frames to the other queues from then on;
        frames that still waited in it are lost. The next :meth:`stop` and :meth:`start` start it
        again, unless its start is deferred.
        """
        self._stop_queue("rx", queue)

    def tx_queue_start(self, queue: int) -> None:
        """Let one queue of a started device send. No effect when it already does."""
        with self._lock:
            self._there("tx_queue_start", "tx", queue, STARTED)
            self._own_queue("tx_queue_start", queue)
            if queue not in self._running["tx"]:
                self._turn("tx_queue_start", ())
                self._finish_queue("tx", queue)
                self._there("tx_queue_start", "tx", queue, STARTED)
                self._ops.tx_queue_start(queue)
                self._running["tx"].add(queue)
                self._port.event(EthEvent.QUEUE_STATE, ("tx", queue, True))

    def tx_queue_stop(self, queue: int) -> None:
        """Stop one transmit queue while the others run. No effect when it is already stopped."""
        self._stop_queue("tx", queue)

    def _may_set_up(self, operation: str, queue: int | None = None) -> None:
        """Raise when other processes depend on the present set-up, of one queue or of all."""
        if queue is None and self._aside:
            raise DeviceStateError(
                f"{operation}: device {self._name} is shared with other processes, close its "
                "rtap.share() first"
            )
        if queue is not None:
            self._own_queue(operation, queue)

    def _own_queue(self, operation: str, queue: int) -> None:
        if queue in self._aside:
            raise DeviceStateError(
                f"{operation}: queue {queue} of device {self._name} is for other processes, which "
                "attach to it (rtap.share)"
            )

    def _usable(self, queue: object, operation: str, *needs: str) -> None:
        """Raise unless the driver returned a usable queue."""
        lacking = [name for name in needs if not callable(getattr(queue, name, None))]
        if lacking:
            raise TypeError(
                f"{operation}: the driver of {self._name} gave {type(queue).__name__}, which has "
                f"no {lacking[0]}()"
            )

    def _defer(self, kind: str, queue: int, deferred: bool) -> None:
        (self._deferred[kind].add if deferred else self._deferred[kind].discard)(queue)

    def _not_running(self, kind: str, queue: int, operation: str) -> None:
        if queue in self._running[kind]:
            raise DeviceStateError(
                f"{operation}: device {self._name}: {kind} queue {queue} is running, call "
                f"{kind}_queue_stop({queue}) first"
            )

    def start(self) -> None:
        """Bring the link up and let bursts begin. Frames queued before are thrown away.

        An interface that was deleted is made anew, with its name, MTU and address. Its IP
        addresses and routes are not restored.

        All queues must be set up; those with a deferred start stay stopped. No effect when already
        started.
        """
        with self._lock:
            self._check("start", CONFIGURED, STARTED, STOPPED)
            if self._state == STARTED:
                return
            self._turn("start", self._queues() if self._halted else ())
            self._finish_stop()
            self._check("start", CONFIGURED, STARTED, STOPPED)
            if self._state == STARTED:
                return
            for what, n, there in (
                ()
                if self._partial
                else (
                    ("rx", self._nb_queues[0], self._rxq.keys()),
                    ("tx", self._nb_queues[1], self._txq.keys()),
                )
            ):
                missing = [str(q) for q in range(n) if q not in there]
                if missing:
                    raise DeviceStateError(
                        f"start: device {self._name} needs {what}_queue_setup for queue "
                        f"{', '.join(missing)}"
                    )
            self._ops.dev_start()
            self._state = STARTED
            self._running = {
                "rx": self._rxq.keys() - self._deferred["rx"],
                "tx": self._txq.keys() - self._deferred["tx"],
            }

    def stop(self) -> None:
        """Take the link down and end bursts, also those that wait in other threads.

        Addresses and routes of the interface stay, and so do the counters. No effect when
        already stopped. Waits for bursts in progress, and for workers to finish their present
        stage. Meanwhile other threads may query the device, and signal handlers run. If one
        raises, the device is stopped, and the next call does the rest.

        DeviceStateError in a stage of a worker, which cannot wait for a worker.
        """
        with self._lock:
            self._check("stop", STARTED, STOPPED)
            if self._state == STARTED or self._halted:
                self._turn("stop", self._queues(), nested=True)
                self._check("stop", STARTED, STOPPED)
                self._halt()
                self._finish_stop()

    def close(self) -> None:
        """Stop and release everything; returns when the interface is gone, unless it persists.

        Idempotent. Bursts, mbufs, views and the pool live on as long as anything refers to them.
        Waits as :meth:`stop` does, and is refused in a stage like it. If a signal handler
        raises meanwhile, the device is stopped, and can be closed again.
        """
        with self._lock:
            if self._state in (CLOSED, INHERITED):
                return
            self._turn("close", self._queues(), nested=True)
            self._halt()
            self._end_bursts(self._queues())
            if self._state in (CLOSED, INHERITED):
                return
            self._state = CLOSED
            self._rx, self._tx = {}, {}
            self._txq = {}
            try:
                self._close_loans()
                self._ops.dev_close()
            finally:
                registry.release(self._name, self._port_id)
                self._port.end()

    def _close_loans(self) -> None:
        """Other processes can use the device no more; does not wait for them."""

    def _in_child(self) -> None:
        """For :mod:`rtap._core.forks`: mark it as the parent's device."""
        self._new_lock()
        if self._state != CLOSED:
            self._state = INHERITED

    def _forked(self) -> None:
        """In a forked child: release the child's copies."""
        if self._state == INHERITED:
            self._rx, self._tx = {}, {}
            self._ops.dev_forked()

    def _new_lock(self) -> None:
        """Make a new lock: threads that held the old one, or waited for bursts, do not exist
        here."""
        self._lock = self._port.lock = FairRLock()
        self._ender, self._left = 0, self._lock.condition()

    # -- a queue by its number

    def _no_queue(self, operation: str, queue: object, n: int, *states: str) -> NoReturn:
        self._check(operation, *(states or (STARTED,)))
        if not isinstance(queue, int) or isinstance(queue, bool):
            raise TypeError(f"{operation}: queue must be an int, got {type(queue).__name__}")
        if 0 <= queue < n:
            self._own_queue(operation, queue)
            raise DeviceStateError(
                f"{operation}: queue {queue} of device {self._name} is not set up"
            )
        raise ValueError(f"{operation}: queue must be 0 to {n - 1}, got {queue}")

    def _there(self, operation: str, kind: str, queue: int, *states: str) -> None:
        """Raise unless the state is one of those and the queue ("rx" or "tx") is set up."""
        self._check(operation, *states)
        queues = self._rxq.keys() if kind == "rx" else self._txq.keys()
        if isinstance(queue, bool) or not isinstance(queue, int) or queue not in queues:
            self._summon(operation, kind, queue, *states)

    def _summon(self, operation: str, kind: str, queue: object, *states: str) -> None:
        """Set up a queue that is not, if that can be done now; else raise."""
        if not self._borrow(queue):
            self._no_queue(operation, queue, self._nb_queues[kind == "tx"], *states)

    def _borrow(self, queue: object) -> bool:
        """Set up a queue pair that another process lends; False when there is none."""
        return False
