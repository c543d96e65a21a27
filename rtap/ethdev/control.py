# SPDX-License-Identifier: BSD-3-Clause
"""The control methods of a device: queries, settings, and callbacks.

:class:`rtap.EthDev` inherits them; states, queues and packets are in
:mod:`rtap.ethdev.states` and :mod:`rtap.ethdev.device`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from rtap._core.threads import FairRLock
from rtap.errors import DeviceStateError
from rtap.ethdev.events import EthEvent, EventFn, EventHandle, Port
from rtap.ethdev.ops import DevInfo, EthConf, EthDevOps, Link, RxQueueOps, Stats, TxQueueOps
from rtap.ether import MacAddr, MacLike

if TYPE_CHECKING:
    from rtap._udp.peers import Peers

__all__ = [
    "ALIVE",
    "CLOSED",
    "CONFIGURED",
    "INHERITED",
    "STARTED",
    "STOPPED",
    "UNCONFIGURED",
    "EthDevControl",
    "checked_count",
]


UNCONFIGURED = "unconfigured"
CONFIGURED = "configured"
STARTED = "started"
STOPPED = "stopped"
CLOSED = "closed"
INHERITED = "inherited"

ALIVE = (UNCONFIGURED, CONFIGURED, STARTED, STOPPED)


def checked_count(value: int, what: str, low: int, high: int) -> int:
    """`value` if it is an int of `low` to `high`; TypeError or ValueError names `what`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be {low} to {high}, got {value}")
    return value


class EthDevControl:
    """Base of :class:`rtap.EthDev`."""

    __slots__ = (
        "_allmulticast",
        "_app_mac",
        "_aside",
        "_caps",
        "_conf",
        "_lock",
        "_mac_addrs",
        "_mc_addr_list",
        "_name",
        "_nb_queues",
        "_ops",
        "_port",
        "_port_id",
        "_promiscuous",
        "_rxq",
        "_state",
        "_txq",
    )

    _name: str
    _port_id: int
    _state: str
    _lock: FairRLock
    _port: Port
    _ops: EthDevOps
    _caps: DevInfo
    _conf: EthConf
    _nb_queues: tuple[int, int]
    _rxq: dict[int, RxQueueOps]
    # Numbers of the queue pairs that are set aside for other processes.
    _aside: set[int]
    _txq: dict[int, TxQueueOps]
    _app_mac: MacAddr | None
    _promiscuous: bool
    _allmulticast: bool
    # By index of the driver's table; 0 is the application's own address, as last set.
    _mac_addrs: dict[int, MacAddr]
    _mc_addr_list: tuple[MacAddr, ...]

    def _init_control(self, port: Port) -> None:
        self._port = port
        self._lock = port.lock
        self._conf = EthConf()
        self._nb_queues = (0, 0)
        self._rxq, self._txq = {}, {}
        self._app_mac = None
        self._promiscuous, self._allmulticast = True, False
        self._mac_addrs = {}
        self._mc_addr_list = ()
        self._aside = set()

    def _check(self, operation: str, *states: str) -> None:
        state = self._state
        if state in (states or ALIVE):
            return
        if state == CLOSED:
            raise DeviceStateError(f"{operation}: device {self.name} is closed")
        if state == INHERITED:
            raise DeviceStateError(
                f"{operation}: device {self.name} was opened before fork() by the parent process "
                "and cannot be used in this one"
            )
        raise DeviceStateError(
            f"{operation}: device {self.name} is {state}, expected {' or '.join(states)}"
        )

    @property
    def name(self) -> str:
        """The device's name in this process, "net_rtap0" for instance (see :func:`rtap.device`)."""
        return self._name

    @property
    def port_id(self) -> int:
        """A small number, unique among the open devices of this process; received mbufs carry it
        as `port`."""
        return self._port_id

    @property
    def state(self) -> str:
        """One of "unconfigured", "configured", "started", "stopped", "closed", "inherited"."""
        return self._state

    # -- control

    @property
    def ifname(self) -> str:
        """The kernel interface's present name; empty if the device has none."""
        with self._lock:
            self._check("ifname")
            return self._ops.ifname

    def info(self) -> DevInfo:
        """Names, limits, capabilities, and the present set-up."""
        with self._lock:
            self._check("info")
            info = self._ops.dev_infos_get()
            queues: list[RxQueueOps | TxQueueOps] = [*self._rxq.values(), *self._txq.values()]
            return replace(
                info,
                name=self.name,
                state=self._state,
                nb_rx_queues=self._nb_queues[0],
                nb_tx_queues=self._nb_queues[1],
                engine=queues[0].engine if queues else self._conf.engine,
                engine_reason=queues[0].engine_reason if queues else "",
            )

    def link(self) -> Link:
        """Whether the link is up (interface up and carrier on), as the kernel says now."""
        with self._lock:
            self._check("link")
            return self._ops.link_update()

    def set_link_up(self) -> None:
        """Plug the cable in: carrier on."""
        with self._lock:
            self._check("set_link_up")
            self._ops.dev_set_link_up()

    def set_link_down(self) -> None:
        """Pull the cable: carrier off. Addresses and routes of the interface stay."""
        with self._lock:
            self._check("set_link_down")
            self._ops.dev_set_link_down()

    @property
    def mac(self) -> MacAddr:
        """The kernel interface's Ethernet address; all zero if it has none. Assignable."""
        with self._lock:
            self._check("mac")
            return self._ops.mac_addr_get()

    @mac.setter
    def mac(self, value: MacLike) -> None:
        mac = MacAddr(value)
        if mac.is_multicast or not any(mac.packed):
            raise ValueError(f"mac must be a unicast address, got {mac}")
        with self._lock:
            self._check("mac")
            self._ops.mac_addr_set(mac)
            self._tell_app_mac(self.app_mac)

    @property
    def app_mac(self) -> MacAddr:
        """The address for the application's own frames: the other end of the wire from `mac`.

        Until one is assigned it is derived from `mac`, and different from it. The kernel sends no
        frames to its own address, and finds a duplicate when both ends use the same one.
        """
        with self._lock:
            self._check("app_mac")
            if self._app_mac is not None:
                return self._app_mac
            mac = self._ops.app_mac_get()
            # Somebody else may have changed the interface's address.
            self._tell_app_mac(mac)
            return mac

    @app_mac.setter
    def app_mac(self, value: MacLike) -> None:
        mac = MacAddr(value)
        if mac.is_multicast or not any(mac.packed):
            raise ValueError(f"app_mac must be a unicast address, got {mac}")
        with self._lock:
            self._check("app_mac")
            self._app_mac = mac
            self._tell_app_mac(mac)
            self._port.changed()

    def _tell_app_mac(self, mac: MacAddr) -> None:
        if self._mac_addrs.get(0) != mac and any(mac.packed):
            self._ops.mac_addr_add(mac, 0)
            self._mac_addrs[0] = mac

    @property
    def peers(self) -> Peers:
        """The peers of a UDP device: addresses by number, as ``mbuf.peer`` has them. OSError
        (EOPNOTSUPP) for other devices."""
        with self._lock:
            self._check("peers")
            return self._ops.peers

    @property
    def promiscuous(self) -> bool:
        """Whether frames to anybody are received. Assignable; True in the beginning.

        When False, unicast frames are received only if they are for `app_mac` or an address added
        with :meth:`mac_addr_add`, multicast frames only if subscribed to or `allmulticast` is on,
        broadcasts always. All other frames count in xstats as ``filtered_unicast_packets`` and
        ``filtered_multicast_packets``. ValueError for a TUN device, whose packets have no Ethernet
        addresses.
        """
        self._check("promiscuous")
        return self._promiscuous

    @promiscuous.setter
    def promiscuous(self, on: bool) -> None:
        with self._lock:
            self._check("promiscuous")
            if not on:
                self._tell_app_mac(self.app_mac)
            (self._ops.promiscuous_enable if on else self._ops.promiscuous_disable)()
            self._promiscuous = bool(on)
            self._port.changed()

    @property
    def allmulticast(self) -> bool:
        """Whether frames to any group are received while not promiscuous. Assignable."""
        self._check("allmulticast")
        return self._allmulticast

    @allmulticast.setter
    def allmulticast(self, on: bool) -> None:
        with self._lock:
            self._check("allmulticast")
            (self._ops.allmulticast_enable if on else self._ops.allmulticast_disable)()
            self._allmulticast = bool(on)
            self._port.changed()

    @property
    def mac_addrs(self) -> tuple[MacAddr, ...]:
        """The unicast addresses received while not promiscuous: `app_mac`, then those added."""
        with self._lock:
            self._check("mac_addrs")
            self._tell_app_mac(self.app_mac)
            return tuple(mac for _, mac in sorted(self._mac_addrs.items()))

    def mac_addr_add(self, mac: MacLike) -> None:
        """Receive frames to `mac` too. No effect when it is already in `mac_addrs`.

        ValueError for a group address and when the device's table is full
        (``info().max_mac_addrs``, `app_mac` included).
        """
        mac = MacAddr(mac)
        if mac.is_multicast or not any(mac.packed):
            raise ValueError(f"mac_addr_add takes a unicast address, got {mac}")
        with self._lock:
            self._check("mac_addr_add")
            if mac in self._mac_addrs.values():
                return
            free = (i for i in range(1, self._caps.max_mac_addrs) if i not in self._mac_addrs)
            index = next(free, None)
            if index is None:
                raise ValueError(
                    f"mac_addr_add: device {self.name} has room for {self._caps.max_mac_addrs} "
                    "addresses, all are taken"
                )
            self._ops.mac_addr_add(mac, index)
            self._mac_addrs[index] = mac
            self._port.changed()

    def mac_addr_remove(self, mac: MacLike) -> None:
        """Undo :meth:`mac_addr_add`. ValueError for `app_mac` and for an address that was not
        added."""
        mac = MacAddr(mac)
        with self._lock:
            self._check("mac_addr_remove")
            for index, other in self._mac_addrs.items():
                if index != 0 and other == mac:
                    self._ops.mac_addr_remove(index)
                    del self._mac_addrs[index]
                    self._port.changed()
                    return
            raise ValueError(f"mac_addr_remove: {mac} was not added to device {self.name}")

    @property
    def mc_addr_list(self) -> tuple[MacAddr, ...]:
        """The groups subscribed to. Assigning any iterable of group addresses replaces all."""
        self._check("mc_addr_list")
        return self._mc_addr_list

    @mc_addr_list.setter
    def mc_addr_list(self, groups: Iterable[MacLike]) -> None:
        wanted = tuple(dict.fromkeys(MacAddr(group) for group in groups))
        for mac in wanted:
            if not mac.is_multicast:
                raise ValueError(f"mc_addr_list takes group addresses, got {mac}")
        with self._lock:
            self._check("mc_addr_list")
            self._ops.set_mc_addr_list(wanted)
            self._mc_addr_list = wanted
            self._port.changed()

    @property
    def mtu(self) -> int:
        """Bytes of the longest IP packet. Assignable; ValueError when the buffers are too small."""
        with self._lock:
            self._check("mtu")
            return self._ops.mtu_get()

    @mtu.setter
    def mtu(self, value: int) -> None:
        with self._lock:
            self._check("mtu")
            self._ops.mtu_set(checked_count(value, "mtu", self._caps.min_mtu, self._caps.max_mtu))

    def stats(self) -> Stats:
        """The counters since the last :meth:`stats_reset`. Stopping does not clear them."""
        with self._lock:
            self._check("stats")
            return self._ops.stats_get()

    def stats_reset(self) -> None:
        """Set the counters of :meth:`stats` to zero, and only those."""
        with self._lock:
            self._check("stats_reset")
            self._ops.stats_reset()

    def xstats(self) -> dict[str, int]:
        """The extended statistics since the last :meth:`xstats_reset`, by name.

        ``rx_q0_size_64_packets`` and so on for each queue that is set up; stopping does not clear
        them.
        """
        with self._lock:
            self._check("xstats")
            return self._ops.xstats_get()

    def xstats_names(self) -> list[str]:
        """The names of :meth:`xstats`, in its order."""
        with self._lock:
            self._check("xstats_names")
            return self._ops.xstats_get_names()

    def xstats_reset(self) -> None:
        """Set the extended statistics to zero, and only those."""
        with self._lock:
            self._check("xstats_reset")
            self._ops.xstats_reset()

    # -- events

    def callback_register(self, event: EthEvent, fn: EventFn) -> EventHandle:
        """Call ``fn(dev, event, data)`` whenever `event` happens to this device.

        Callbacks run one after the other on the thread "rtap-events", and may do anything there;
        their exceptions are logged (logger "rtap"). :class:`rtap.EthEvent` says what `data` is.
        They end with the returned handle's ``unregister()``, and with the device.
        """
        self._check("callback_register")
        return self._port.register(event, fn)

    def _event(self, event: EthEvent) -> None:
        """The driver reports an event, under the lock, before callbacks get it."""
        if event is EthEvent.MAC:
            self._tell_app_mac(self.app_mac)
