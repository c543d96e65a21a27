# SPDX-License-Identifier: BSD-3-Clause
"""The generic device layer: states, argument checks, and the methods people call.

:class:`EthDev` drives one ops table (:mod:`rtap.ethdev.ops`) and knows no driver. A lock serialises
control operations. Bursts take no lock: they go straight to the queue objects, which
keep their own state and refuse a second thread.
"""

from __future__ import annotations

import _thread
import contextlib
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rtap._core.burst import Burst
from rtap._core.mempool import Mempool
from rtap._core.origin import origin
from rtap._core.queue import occupied, refuse
from rtap.errors import DeviceStateError, PoolEmpty
from rtap.ethdev import registry
from rtap.ethdev.control import ALIVE, CLOSED, CONFIGURED, STARTED, STOPPED, UNCONFIGURED
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.loans import EthDevLoans
from rtap.ethdev.ops import EthDevOps, RxQueueOps, TxQueueOps
from rtap.ethdev.states import QUEUES_THERE

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["EthDev"]


class EthDev(EthDevLoans):
    """A network device: queue pairs that hand frames over in bursts, and its control operations.

    Made by :func:`rtap.open`, which returns it started, or by :func:`rtap.probe`, which returns
    it unconfigured. The states and their transitions::

        unconfigured --configure--> configured --start--> started --stop--> stopped
                                        ^                    ^---start---------|
                                        |-----------configure------------------|
        any --close--> closed

    A method called in a state that does not allow it raises DeviceStateError (a RuntimeError).
    Control methods may be called from any thread; a queue is used by one thread at a time.

    After ``os.fork`` a device belongs to the parent: in the child every method but ``close``
    (which does nothing there) raises DeviceStateError, and the child's copies of the descriptors
    are closed, so that the interface still goes away when the parent closes it.
    """

    __slots__ = ("__weakref__", "_origin")

    # Where the program made it, as the end of a sentence.
    _origin: str

    def __init__(self) -> None:
        raise TypeError("devices are made by rtap.open() or rtap.probe()")

    @classmethod
    def _create(
        cls, name: str, make_ops: Callable[[Port], EthDevOps], numbered: bool = False
    ) -> EthDev:
        """A new device over the ops table that `make_ops` returns for its port.

        With `numbered`, `name` is a prefix that gets the lowest free number.
        """
        self = cls.__new__(cls)
        self._state = CLOSED
        self._origin = origin()
        port = Port(self)
        self._init_states(port)
        if numbered:
            self._name, self._port_id = registry.reserve_numbered(name)
        else:
            self._name, self._port_id = name, registry.reserve(name)
        port.id = self.port_id
        try:
            with self._lock:
                self._ops = make_ops(port)
                self._state = UNCONFIGURED
                self._caps = self._ops.dev_infos_get()
                self._tell_app_mac(self.app_mac)
                registry.publish(self.name, self)
                port.event(EthEvent.NEW)
        except BaseException:
            if self._state == UNCONFIGURED:
                self.close()
            registry.release(self.name, self.port_id)
            raise
        return self

    # -- packets

    def rx_burst(self, queue: int, n: int = 64, timeout: float | None = 0) -> Burst:
        """Up to `n` frames that arrived on `queue`, in order; empty when there are none.

        `timeout` is in seconds: 0 does not wait, None waits for ever, without the interpreter
        lock; Ctrl-C ends it. If a frame comes while the pool is empty, the call waits in the same
        way until somebody gives an mbuf back. Raises DeviceGone when the interface was
        deleted, DeviceStateError when the device is not started or another thread is using the
        queue.
        """
        try:
            burst = self._rx[queue]
        except (KeyError, TypeError):
            self._summon("rx_burst", "rx", queue)
            burst = self._rx[queue]
        return burst(n, timeout)

    def tx_burst(self, queue: int, burst: Burst) -> int:
        """Send `burst` on `queue`, from the front; returns how many frames were taken.

        These are consumed and leave the burst: ``burst[0]`` is then the first unsent one. A short
        count is not an error: the kernel has no room at the moment. If the kernel took only a part
        of a super-frame that is split in software, the rest leaves first with the next burst, even
        an empty one. Raises as :meth:`rx_burst`; `sent` of DeviceGone is the number of frames sent
        before.
        """
        try:
            send = self._tx[queue]
        except (KeyError, TypeError):
            self._summon("tx_burst", "tx", queue)
            send = self._tx[queue]
        return send(burst)

    def recv(self, timeout: float | None = None, queue: int = 0) -> bytes:
        """One frame from `queue` as bytes; ``b""`` when none came within `timeout` seconds.

        Waits for ever by default. PoolEmpty when the caller holds all mbufs of the pool.
        """
        wait: float | None = 0
        while True:
            for mbuf in self.rx_burst(queue, 1, wait):
                return bytes(mbuf)
            rxq = self._rxq.get(queue)
            if rxq is not None and rxq.pool.available == 0:
                raise PoolEmpty(f"recv: no free mbuf in the pool of device {self.name}")
            if wait == timeout and timeout is not None:
                return b""
            wait = timeout

    def send(self, frame: Buffer, queue: int = 0) -> bool:
        """Send one frame (any bytes-like object) on `queue`; True when the kernel took it.

        False when there is no room for it now, or the link is down (counted in `oerrors`).
        ValueError for a frame shorter than its header: 14 bytes, on a TUN device 20. OSError when
        the kernel refuses the frame (also counted in `oerrors`); PoolEmpty when the caller holds
        all mbufs of the pool.
        """
        txq = self._txq.get(queue)
        if txq is None or queue in self._aside:
            self._summon("send", "tx", queue)
            txq = self._txq[queue]
        return txq.send(frame, self.pool)

    @property
    def pool(self) -> Mempool:
        """The mempool of the first receive queue. Stays readable after :meth:`close`.

        If :func:`rtap.open` made the pool, the device gets another one, with larger buffers, when
        its MTU outgrows them.
        """
        queues = self._rxq.copy()  # others may be set up or released meanwhile
        if queues:
            return queues[min(queues)].pool
        self._check("pool", CONFIGURED, STARTED, STOPPED)
        raise DeviceStateError(f"pool: device {self.name} needs rx_queue_setup for queue 0")

    def rx_queue(self, queue: int) -> RxQueueOps:
        """The receive queue object itself, for workers and other code that drives it directly."""
        with self._lock:
            self._check("rx_queue", CONFIGURED, STARTED, STOPPED)
            if queue not in self._rxq and not self._borrow(queue):
                raise ValueError(f"rx_queue: queue {queue!r} is not set up")
            return self._rxq[queue]

    def tx_queue(self, queue: int) -> TxQueueOps:
        """The transmit queue object itself, for workers and other code that drives it directly."""
        with self._lock:
            self._check("tx_queue", CONFIGURED, STARTED, STOPPED)
            if queue not in self._txq and not self._borrow(queue):
                raise ValueError(f"tx_queue: queue {queue!r} is not set up")
            return self._txq[queue]

    # -- receive interrupts

    def rx_queue_intr_fd(self, queue: int) -> int:
        """A descriptor that is readable while frames wait on `queue` and its interrupt is enabled.

        For select, poll, epoll and asyncio's ``add_reader``. It is also readable once the interface
        is gone; the next burst then raises DeviceGone. It belongs to the queue: the first call
        makes it, later calls return the same one. It is closed when the queue is released or set up
        anew, or the device closed; stop watching it before that. OSError (EOPNOTSUPP) for a device
        that has nothing to wait for.
        """
        with self._lock:
            self._there("rx_queue_intr_fd", "rx", queue, *QUEUES_THERE)
            return self._ops.rx_queue_intr_fd(queue)

    def rx_queue_intr_enable(self, queue: int) -> None:
        """Let the descriptor of `queue` signal, at once if frames already wait. Idempotent.

        It stays enabled through :meth:`stop` and :meth:`start`; in between nothing signals.
        """
        with self._lock:
            self._there("rx_queue_intr_enable", "rx", queue, *QUEUES_THERE)
            self._ops.rx_queue_intr_enable(queue)

    def rx_queue_intr_disable(self, queue: int) -> None:
        """Stop the descriptor of `queue` from signalling. Idempotent, also when closed."""
        with self._lock:
            if self._state == CLOSED:
                return
            self._there("rx_queue_intr_disable", "rx", queue, *QUEUES_THERE)
            self._ops.rx_queue_intr_disable(queue)

    # -- Python

    def __enter__(self) -> EthDev:
        self._check("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if ALIVE is None:  # after the interpreter's end: the kernel closes the rest
            return
        if getattr(self, "_state", CLOSED) in ALIVE:
            warnings.warn(
                f"unclosed device {self!r}{self._origin}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            # At the interpreter's end threads stay where they are for ever, with their locks:
            # closing would wait for one. The kernel closes the rest in a moment.
            if not sys.is_finalizing():
                self._close_forgotten()

    def _close_forgotten(self) -> None:
        """Close without waiting: this may run anywhere, even in a stage or under some lock."""
        if self._lock.acquire(timeout=0.1):  # the netlink thread holds it for moments
            try:
                refuse(self._queues())
                if not self._ender and not occupied(self._queues()):
                    self.close()
                    return
            finally:
                self._lock.release()
        # A separate thread waits for bursts in progress. Not one of threading's, which take locks.
        with contextlib.suppress(RuntimeError):  # the process ends, and the kernel closes it
            _thread.start_new_thread(self.close, ())

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., EthDev], tuple[Any, ...]]:
        context = sys.modules.get("multiprocessing.context")
        if context is not None and context.get_spawning_popen() is not None:
            # By name: this layer knows nothing of those above it.
            found: tuple[Callable[..., EthDev], tuple[Any, ...]]
            found = import_module("rtap.sharing.spawned").for_child(self)
            return found
        raise TypeError(
            f"{self!r} cannot be copied or pickled: a device has one owner (an argument of a "
            "multiprocessing.Process of the spawn or forkserver context is attached to it)"
        )

    def __repr__(self) -> str:
        text = f"<rtap.EthDev {self.name}"
        if self._state in ALIVE:
            try:
                ifname = self._ops.ifname
            except OSError:
                ifname = "gone"
            except (AttributeError, TypeError):  # at the interpreter's end modules are empty
                ifname = ""
            text += f" ({ifname})" if ifname else ""
        return f"{text} {self._state}>"
