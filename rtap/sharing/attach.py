# SPDX-License-Identifier: BSD-3-Clause
"""The side that borrows: :func:`attach` returns a device whose interface another process has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

from rtap._core.mempool import Mempool
from rtap._core.threads import FairRLock
from rtap.drivers.interface import DEFAULT_NB_DESC
from rtap.drivers.open_tap import pool_size, rx_data_room
from rtap.errors import DeviceStateError
from rtap.ethdev.control import STARTED, STOPPED
from rtap.ethdev.device import EthDev
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import EthConf
from rtap.ether import MacAddr
from rtap.flags import RxOffload
from rtap.sharing import places, pools
from rtap.sharing.attached import Attached, Terms, checked_terms
from rtap.sharing.connection import Connection
from rtap.sharing.figures import RELAYED, event_data
from rtap.sharing.wire import Message, MessageError

__all__ = ["AttachedDev", "attach"]

#: Seconds between looks whether the last bursts are over.
OWNER_POLL_S = 0.001


class AttachedDev(EthDev):
    """A device of another process; :func:`attach` makes it.

    Queue pairs have the numbers that they have there. A pair is this process's from its first use
    here, or from :func:`attach` on, until the device is closed. Statistics are those of the whole
    device; settings change it for everybody.
    """

    __slots__ = ("_how", "_set_up")

    _partial = True

    _ops: Attached
    # Arguments of the queues, and the pool for those that are set up later.
    _how: tuple[int, Mempool]
    # Whether attach() is done with what only the owner may do afterwards.
    _set_up: bool

    def _begin(self, conf: EthConf, nb_desc: int, pool: Mempool) -> None:
        self._set_up = False
        self._how = nb_desc, pool
        n = self._ops.terms.nb_queues
        self.configure(n, n, conf)
        self._follow(self._ops.terms)

    @property
    def lock(self) -> FairRLock:
        """See :class:`rtap.sharing.connection.Listener`."""
        return self._lock

    @property
    def pool(self) -> Mempool:
        """The mempool of the first receive queue; before one is used, that of all later ones."""
        return super().pool if self._rxq else self._how[1]

    # -- what only the process that has the device may do

    def _may_set_up(self, operation: str, queue: int | None = None) -> None:
        if self._set_up:
            owner = self._ops._connection.owner
            raise DeviceStateError(
                f"{operation}: device {self._name} is attached, process {owner.pid} has it and "
                "sets it up"
            )

    # -- queue pairs

    def _borrow(self, queue: object) -> bool:
        """Lease a free pair when it is first used."""
        if type(queue) is not int or self._state not in (STARTED, STOPPED):
            return False
        with self._lock:
            if not 0 <= queue < self._nb_queues[0]:
                return False
            if queue not in self._rxq:
                self._lease([queue])
            return True

    def _lease(self, queues: list[int], count: int = 0) -> None:
        """Have these pairs, or so many free ones; DeviceStateError names who has them."""
        with self._lock:
            before, self._set_up = self._set_up, False
            borrowed = self._ops._connection.lease(queues, count)
            try:
                self._ops.lend_to_us(borrowed)
                if borrowed.keys() != set(queues) if queues else len(borrowed) != count:
                    raise MessageError("the other process lent other queues")
                nb_desc, pool = self._how
                for queue in borrowed:
                    self.rx_queue_setup(queue, nb_desc, pool)
                    self.tx_queue_setup(queue, nb_desc)
                    if self._state == STARTED:
                        self.rx_queue_start(queue)
                        self.tx_queue_start(queue)
            except BaseException:
                self._undo(list(borrowed))
                raise
            finally:
                self._set_up = before

    def _undo(self, queues: list[int]) -> None:
        for queue in queues:
            if queue in self._running["rx"]:
                self.rx_queue_stop(queue)
            if queue in self._rxq:
                self.rx_queue_release(queue)
            if queue in self._txq:
                self.tx_queue_release(queue)
            self._ops.give_up(queue)
        with contextlib.suppress(OSError):
            self._ops._connection.give_back(queues)

    @property
    def queues(self) -> tuple[int, ...]:
        """The numbers of the pairs that this process has."""
        return tuple(sorted(self._rxq.copy()))

    # -- news

    def _follow(self, terms: Terms) -> None:
        self._promiscuous, self._allmulticast = terms.promiscuous, terms.allmulticast
        self._mac_addrs = dict(terms.filter.addresses)
        self._mc_addr_list = tuple(terms.filter.groups)

    def _tell_app_mac(self, mac: MacAddr) -> None:
        if self._app_mac is not None:  # assigned here: the other process keeps it
            self._app_mac = None
            self._ops.app_mac_set(mac)
        self._mac_addrs[0] = mac

    def _event(self, event: EthEvent) -> None:
        """What follows from an event has been said before it."""

    def hear(self, message: Message) -> None:
        """See :class:`rtap.sharing.connection.Listener`."""
        if message.kind == "state":
            terms = checked_terms(message.device)
            self._ops.take(terms)
            self._follow(terms)
        elif message.kind == "event":
            event = EthEvent(message.event)
            if event not in RELAYED:
                raise MessageError("there is no such event")
            self._port.event(event, event_data(event, message.data))

    def lost(self) -> None:
        """See :class:`rtap.sharing.connection.Listener`."""
        done = cut = False
        while not done:
            if self._lock.acquire(timeout=OWNER_POLL_S):
                try:
                    if not cut:
                        self._ops.cut_off()
                        self._port.event(EthEvent.INTR_RMV)
                        cut = True
                    done = self._ops.let_go()
                finally:
                    self._lock.release()
            if not done:
                time.sleep(OWNER_POLL_S)


class _Weak:
    """What the connection's thread has of a device: it keeps none alive."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self.lock = port.lock

    def hear(self, message: Message) -> None:
        dev = self._port._dev()
        if isinstance(dev, AttachedDev):
            dev.hear(message)

    def lost(self) -> None:
        dev = self._port._dev()
        if isinstance(dev, AttachedDev):
            dev.lost()


def attach(
    name: str,
    queues: Iterable[int] | int | None = None,
    *,
    pool: Mempool | None = None,
    nb_desc: int = DEFAULT_NB_DESC,
    engine: str = "auto",
    gil: str = "auto",
    key: str = "",
) -> EthDev:
    """A device that another process has and shares (:func:`rtap.share`), started.

    `name` is the name it is shared under, for instance "net_rtap0", or the path of the socket.
    `queues` are the numbers of the queue pairs to have, or how many free ones; with None each pair
    is leased when it is first used. A pair is one process's at a time, until this device is closed
    or the process ends. Bursts, workers, stages and interrupts work as in the process that has the
    device; settings, statistics and events are the device's, for all processes.

    `pool` is for received frames, by default that of the device if it is a shared one, or else a
    new one that fits; `nb_desc`, `engine` and `gil` are as in :func:`rtap.open`. `key` is that of
    the share.

    FileNotFoundError when nobody shares that name; PermissionError when this user may not attach;
    DeviceStateError when a pair is in use, with the process that has it; ValueError for a pair that
    is not shared. When the other process ends, bursts and requests raise DeviceGone.
    """
    numbers, count = _wanted(queues)
    connection = Connection(places.connect(name), name)
    dev: AttachedDev | None = None
    try:
        welcome = connection.welcome(key)
        if welcome.fds and pool is None:
            pool = pools.attached(welcome.fds[0], name)
        welcome.close()
        terms = checked_terms(welcome.device)
        conf = EthConf(
            terms.rx_offloads,
            terms.tx_offloads,
            engine=engine,
            gil=gil,
            tx_gro=terms.tx_gro,
            rx_gso=terms.rx_gso,
        )
        dev = _device(welcome.fields["name"], connection, terms)
        new_pool: Callable[[int], Mempool] | None = None
        if pool is None:
            new_pool = _pools(dev.name, max(1, len(numbers), count))
            pool = new_pool(rx_data_room(terms.mtu, terms.rx_offloads, terms.mode))
        dev._begin(conf, nb_desc, pool)
        if not terms.rx_offloads & RxOffload.SCATTER:
            dev._ops.new_pool = new_pool
        if numbers or count:
            dev._lease(numbers, count)
        dev.start()
        dev._set_up = True
    except BaseException:
        if dev is not None:
            dev.close()
        connection.close()
        raise
    return dev


def _wanted(queues: Iterable[int] | int | None) -> tuple[list[int], int]:
    """The numbers of the pairs to lease at once, and how many of any number."""
    if queues is None:
        return [], 0
    if isinstance(queues, int):
        if isinstance(queues, bool) or not 1 <= queues <= 128:
            raise ValueError(
                f"queues must be 1 to 128, got {queues} (for pair {queues}: [{queues}])"
            )
        return [], queues
    numbers = list(queues)
    for queue in numbers:
        if not isinstance(queue, int) or isinstance(queue, bool):
            raise TypeError(f"queues has numbers of queue pairs, got {type(queue).__name__}")
    if not numbers:
        raise ValueError("queues names no queue pair; None leases them when they are used")
    return numbers, 0


def _pools(name: str, queues: int) -> Callable[[int], Mempool]:
    return lambda room: Mempool(pool_size(room, queues), room, name=name)


def _device(name: str, connection: Connection, terms: Terms) -> AttachedDev:
    def make(port: Port) -> Attached:
        connection.start(_Weak(port))
        return Attached(port, connection, terms)

    places.checked_name(name)
    try:
        dev = AttachedDev._create(name, make)
    except ValueError:  # a device of this process has that name
        dev = AttachedDev._create(f"{name}_", make, numbered=True)
    assert isinstance(dev, AttachedDev)
    return dev
