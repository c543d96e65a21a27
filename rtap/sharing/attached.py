# SPDX-License-Identifier: BSD-3-Clause
"""The side that borrows: :func:`attach` returns a device whose interface another process has.

The queues are this process's own, on descriptors that the other one passed on; what concerns the
interface, the other one is asked to do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from rtap._core.mempool import Mempool
from rtap._core.queue import occupied
from rtap._core.threads import FairRLock
from rtap._ring import STATE_SIZE, RxQueue, TxQueue
from rtap.control import tun
from rtap.control.netlink import LinkState
from rtap.drivers.filter import RxFilter
from rtap.drivers.interface import DEFAULT_NB_DESC, InterfaceDriver
from rtap.drivers.open_tap import pool_size, rx_data_room
from rtap.errors import DeviceStateError
from rtap.ethdev.control import STARTED, STOPPED
from rtap.ethdev.device import EthDev
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import DevInfo, EthConf, Link, Stats
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload
from rtap.sharing import places, pools
from rtap.sharing.connection import Borrowed, Connection
from rtap.sharing.figures import RELAYED, event_data, from_json
from rtap.sharing.share import XSTATS_MANY
from rtap.sharing.wire import Message, MessageError

__all__ = ["AttachedDev", "attach"]

#: Seconds between looks whether the last bursts are over.
OWNER_POLL_S = 0.001


@dataclass(frozen=True)
class Terms:
    """What the process that has the device says of it."""

    driver: str
    ifname: str
    mode: str
    mtu: int
    nb_queues: int
    rx_offloads: RxOffload
    tx_offloads: TxOffload
    tx_gro: bool
    rx_gso: bool
    asked: RxOffload
    plugged: bool
    state_size: int
    app_mac: MacAddr
    promiscuous: bool
    allmulticast: bool
    #: Arguments of the queues.
    rx: dict[str, Any]
    tx: dict[str, Any]
    mac_addrs: dict[str, Any]
    mc_addr_list: list[Any]

    @property
    def filter(self) -> RxFilter:
        return RxFilter(
            self.promiscuous,
            self.allmulticast,
            {int(index): MacAddr(mac) for index, mac in self.mac_addrs.items()},
            tuple(MacAddr(mac) for mac in self.mc_addr_list),
        )


_QUEUE_ARGUMENTS: dict[str, type] = {
    "split": bool,
    "vnet_hdr": bool,
    "packet": bool,
    "ordered": bool,
    "offloads": int,
}


def _fits_queue(name: str, value: Any) -> bool:
    kind: Any = _QUEUE_ARGUMENTS.get(name)
    return type(value) is kind and int(value) >= 0


def checked_terms(device: dict[str, Any]) -> Terms:
    """MessageError when they cannot be those of a device."""
    terms = from_json(Terms, device)
    if not all(_fits_queue(*item) for item in (*terms.rx.items(), *terms.tx.items())):
        raise MessageError("the arguments of queues are others")
    if terms.mode not in ("tap", "tun") or not 1 <= terms.nb_queues <= 128:
        raise MessageError("it is no device")
    try:
        _ = terms.filter
    except (TypeError, ValueError, AttributeError) as exc:
        raise MessageError(f"the addresses are none: {exc}") from None
    if terms.state_size != STATE_SIZE:
        raise MessageError("the other process has another version of rtap")
    return terms


class Attached(InterfaceDriver):
    """The ops table of a device that another process has."""

    def __init__(self, port: Port, connection: Connection, terms: Terms) -> None:
        super().__init__(port)
        self._connection = connection
        self._files: dict[int, Borrowed] = {}
        self._closed = False
        self.take(terms)

    def take(self, terms: Terms) -> None:
        """Follow a change of the device."""
        self.terms = terms
        self._mode = terms.mode
        self._filter = terms.filter
        self._take_name(terms.ifname)
        for rxq in self._rxq.values():
            self._filter.apply(rxq)
        for txq in self._txq.values():
            txq.set_plugged(terms.plugged)
        self._fit(terms.mtu)

    def _ask(self, name: str, *args: Any) -> Any:
        return self._connection.call(name, *args)

    def _change(self, name: str, *args: Any) -> None:
        """Ask for a change of the device; our queues follow before this returns."""
        self._ask(name, *args)
        state = self._connection.latest_state()
        if state is not None:
            self.take(checked_terms(state.device))

    # -- for the base class

    @property
    def ifname(self) -> str:
        return self.terms.ifname

    @property
    def _shown(self) -> str:
        return self.terms.ifname

    def _asked(self) -> RxOffload:
        return self.terms.asked

    def _takes(self, now: LinkState) -> bool:
        return self.terms.plugged

    def _is_live(self, queue_id: int) -> bool:
        return queue_id in self._rxq

    def _fds_of(self, queue_id: int) -> tuple[int, int]:
        files = self._files[queue_id]
        return files.rx.fileno(), files.tx.fileno()

    def _rx_terms(self) -> dict[str, Any]:
        return {"split": False, **self.terms.rx, "shared": True}

    def _tx_terms(self) -> dict[str, Any]:
        return {**self.terms.tx, "shared": True}

    def _steer(self, queue_id: int, on: bool) -> None:
        """The process that has the device does that."""

    def loan_terms(self) -> NoReturn:
        self._refuse("is attached: the process that has it shares it")

    # -- queues

    def lend_to_us(self, borrowed: dict[int, Borrowed]) -> None:
        """Queues on these descriptors can be set up."""
        self._files.update(borrowed)
        for files in borrowed.values():
            self._check_files(files)

    def _check_files(self, files: Borrowed) -> None:
        if self.terms.driver == "net_rtap":
            for descriptor in (files.rx, files.tx):
                tun.get_iface(descriptor.fileno(), self.terms.ifname)
            return
        for descriptor in (files.rx, files.tx):
            with socket.socket(fileno=os.dup(descriptor.fileno())) as sock:
                if sock.family != socket.AF_PACKET:
                    raise MessageError("the descriptors are no packet sockets")

    def give_up(self, queue_id: int) -> None:
        """Close the descriptors of a pair that is not set up."""
        files = self._files.pop(queue_id, None)
        if files is not None:
            files.close()

    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> RxQueue:
        files = self._files[queue_id]
        return self._rx_queue(
            files.rx.fileno(),
            queue_id,
            nb_desc,
            pool,
            state_fd=files.rx_state.fileno(),
            **self._rx_terms(),
        )

    def _make_tx(self, queue_id: int, nb_desc: int) -> TxQueue:
        files = self._files[queue_id]
        txq = self._tx_queue(
            files.tx.fileno(),
            queue_id,
            nb_desc,
            state_fd=files.tx_state.fileno(),
            **self._tx_terms(),
        )
        txq.set_plugged(self.terms.plugged)
        return txq

    # -- device

    def dev_infos_get(self) -> DevInfo:
        info = from_json(DevInfo, self._ask("info"))
        return replace(info, rx_gso=self.terms.rx_gso, tx_gro=self.terms.tx_gro)

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        self._conf = conf
        self._nb_queues = (nb_rx_queues, nb_tx_queues)

    def dev_start(self) -> None:
        self._start_queues()
        self._started = True
        for intr in self._intr.values():
            intr.set_live(True)

    def dev_stop(self) -> None:
        self._stop_queues()
        self._started = False

    def dev_close(self) -> None:
        self._started = False
        self._closed = True
        with contextlib.ExitStack() as stack:
            # The last entry runs first; if one fails, the rest is still done.
            stack.callback(self._connection.close)
            for files in self._files.values():
                stack.callback(files.close)
            for queue in self._queues():
                stack.callback(queue.close)
            for intr in self._intr.values():
                stack.callback(intr.close)
            self._files.clear()
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        for files in self._files.values():
            files.close()
        self._connection.forget()

    def cut_off(self) -> None:
        """The other process is gone: bursts raise, and the descriptors are closed when the last is
        over, so that the interface can go."""
        for queue in self._queues():
            queue.cut_off()
        for intr in self._intr.values():
            intr.end()

    def let_go(self) -> bool:
        """Close the descriptors if no burst is in progress any more; whether that is done."""
        if self._closed:
            return True
        if occupied(self._queues()):
            return False
        for queue in self._queues():
            queue.renew()
        for files in self._files.values():
            files.close()
        return True

    # -- control

    def link_update(self) -> Link:
        return from_json(Link, self._ask("link"))

    def dev_set_link_up(self) -> None:
        self._change("set_link_up")

    def dev_set_link_down(self) -> None:
        self._change("set_link_down")

    def mac_addr_get(self) -> MacAddr:
        return self._ask_mac("mac")

    def mac_addr_set(self, mac: MacAddr) -> None:
        self._change("set_mac", str(mac))

    def app_mac_get(self) -> MacAddr:
        return self._ask_mac("app_mac")

    def _ask_mac(self, name: str) -> MacAddr:
        try:
            return MacAddr(self._ask(name))
        except TypeError as exc:
            raise MessageError(f"{name}: {exc}") from None

    def mtu_get(self) -> int:
        mtu = self._ask("mtu")
        if type(mtu) is not int:
            raise MessageError("the MTU is no number")
        return mtu

    def mtu_set(self, mtu: int) -> None:
        self._make_room_for(mtu)
        self._change("set_mtu", mtu)

    # -- the receive filter: it is the device's, and comes back as news

    def app_mac_set(self, mac: MacAddr) -> None:
        self._change("set_app_mac", str(mac))

    def promiscuous_enable(self) -> None:
        self._change("set_promiscuous", True)

    def promiscuous_disable(self) -> None:
        self._change("set_promiscuous", False)

    def allmulticast_enable(self) -> None:
        self._change("set_allmulticast", True)

    def allmulticast_disable(self) -> None:
        self._change("set_allmulticast", False)

    def mac_addr_add(self, mac: MacAddr, index: int) -> None:
        self._change("mac_addr_add", str(mac))

    def mac_addr_remove(self, index: int) -> None:
        self._change("mac_addr_remove", str(self._filter.addresses[index]))

    def set_mc_addr_list(self, groups: Sequence[MacAddr]) -> None:
        self._change("set_mc_addr_list", [str(group) for group in groups])

    # -- statistics: those of the whole device

    def stats_get(self) -> Stats:
        return from_json(Stats, self._ask("stats"))

    def stats_reset(self) -> None:
        self._ask("stats_reset")

    def xstats_get(self) -> dict[str, int]:
        found: dict[str, int] = {}
        while True:
            part = self._ask("xstats", len(found))
            if not isinstance(part, dict) or not all(type(n) is int for n in part.values()):
                raise MessageError("the statistics are no numbers")
            found.update(part)
            if len(part) < XSTATS_MANY:
                return found

    def xstats_reset(self) -> None:
        self._ask("xstats_reset")


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
