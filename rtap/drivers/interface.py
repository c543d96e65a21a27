# SPDX-License-Identifier: BSD-3-Clause
"""Base of the drivers of kernel interfaces: the part that does not depend on the kind of
descriptor.

The queues are those of :mod:`rtap._ring`, on any descriptors that a driver has; the interface is
queried and changed through rtnetlink.
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rtap._core import memfd
from rtap._core.descriptor import Descriptor
from rtap._core.mempool import Mempool
from rtap._ring import STATE_SIZE, RxQueue, TxQueue
from rtap.control.netlink import Control, LinkState
from rtap.drivers.filter import MAX_GROUPS, RxFilter
from rtap.drivers.observed import Observer, link_of
from rtap.drivers.offloads import GSO_KINDS, max_frame
from rtap.drivers.queues import InterruptDriver
from rtap.errors import DeviceGone
from rtap.ethdev.events import Port
from rtap.ethdev.ops import Link, Loan
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload

__all__ = ["DEFAULT_NB_DESC", "MAX_NB_DESC", "MAX_QUEUES", "InterfaceDriver"]

log = logging.getLogger("rtap")

MAX_QUEUES = 128
MAX_NB_DESC = 32768
DEFAULT_NB_DESC = 64
#: The number of buffers for super-frames in a queue that splits them.
SPLIT_READS = 64


class InterfaceDriver(InterruptDriver[RxQueue, TxQueue]):
    """A driver's constructor sets `_control` and `_observer`; observing begins then."""

    _control: Control
    _observer: Observer
    #: "tap" for Ethernet frames, "tun" for IP packets.
    _mode = "tap"

    def __init__(self, port: Port) -> None:
        super().__init__(port)
        self._software_gso = 0
        # Numbers of the queue pairs that other processes have.
        self._lent: set[int] = set()
        self._filter = RxFilter()
        #: Makes a pool with that much data room, if we may replace the queues' pool.
        self.new_pool: Callable[[int], Mempool] | None = None

    @abstractmethod
    def _takes(self, now: LinkState) -> bool:
        """Whether the interface takes frames that are sent to it."""

    def _plug(self, now: LinkState) -> None:
        """Let sent frames through while the link is up."""
        for txq in self._txq.values():
            txq.set_plugged(self._takes(now))

    @abstractmethod
    def _asked(self) -> RxOffload:
        """The receive offloads that decide how long a frame the kernel hands over can be."""

    @abstractmethod
    def _fds_of(self, queue_id: int) -> tuple[int, int]:
        """The descriptors of a pair, to receive from and to send to."""

    @abstractmethod
    def _rx_terms(self) -> dict[str, Any]:
        """Arguments of receive queues that :meth:`_rx_queue` does not know itself."""

    @abstractmethod
    def _tx_terms(self) -> dict[str, Any]:
        """The same for transmit queues."""

    @abstractmethod
    def _steer(self, queue_id: int, on: bool) -> None:
        """Whether the kernel sends frames to a stopped queue, from which others read. When it
        begins, and when it ends, waiting frames are thrown away and counted."""

    # -- the interface, as others change it

    @property
    def ifname(self) -> str:
        return self._control.name

    def interface_changed(self, seen: LinkState, now: LinkState) -> None:
        """See :class:`rtap.drivers.observed.Observing`."""
        if now.name != seen.name:
            self._take_name(now.name)
        if now.mtu != seen.mtu:
            self._fit(now.mtu)
        self._plug(now)

    @property
    def _shown(self) -> str:
        """The interface's last known name, for messages."""
        return self._control.name

    def _take_name(self, name: str) -> None:
        for queue in self._queues():
            queue.name = name

    def _needs(self, mtu: int) -> int:
        return max_frame(self._mode, mtu, self._asked())

    def _fit(self, mtu: int) -> None:
        """Fit the buffers to an MTU that somebody set, or warn that longer frames will be lost."""
        try:
            self._make_room(mtu)
        except (ValueError, MemoryError) as exc:
            log.warning(
                "the MTU of %s is now %d, and longer frames than its receive buffers hold will be "
                "dropped and counted as errors: %s",
                self._shown,
                mtu,
                exc,
            )

    def _make_room(self, mtu: int) -> None:
        need = self._needs(mtu)
        if all(need < rxq.room for rxq in self._rxq.values()):
            return
        pool = self.new_pool(need + 1) if self.new_pool is not None else None
        for rxq in self._rxq.values():
            if need >= rxq.room:
                rxq.resize(need, pool)

    # -- queues

    def _rx_queue(
        self, fd: int, queue_id: int, nb_desc: int, pool: Mempool, *, split: bool, **how: Any
    ) -> RxQueue:
        """A receive queue on `fd`. With `split` it reads super-frames into buffers of its own,
        and hands out frames within the MTU in buffers of `pool`."""
        conf = self._conf
        mtu = self.mtu_get()
        need = self._needs(mtu)
        into = None
        if split:
            longest = max_frame(self._mode, mtu, RxOffload(0))
            if pool.size * pool.data_room < longest:
                raise ValueError(
                    f"frames of {longest} bytes do not fit into a pool of {pool.size} mbufs of "
                    f"{pool.data_room} bytes"
                )
            pool, into = Mempool(SPLIT_READS, need + 1), pool
        rxq = RxQueue(
            fd,
            pool,
            name=self.ifname,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            max_frame=need,
            scatter=bool(conf.rx_offloads & RxOffload.SCATTER),
            l2=self._mode == "tap",
            split=into,
            engine=conf.engine,
            gil=conf.gil,
            **how,
        )
        self._filter.apply(rxq)
        return rxq

    def _tx_queue(self, fd: int, queue_id: int, nb_desc: int, **how: Any) -> TxQueue:
        """A transmit queue on `fd`."""
        conf = self._conf
        txq = TxQueue(
            fd,
            name=self.ifname,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            l2=self._mode == "tap",
            on_refused=self._gso_refused,
            gro=conf.tx_gro,
            gro_udp=bool(conf.tx_offloads & TxOffload.UDP_TSO),
            engine=conf.engine,
            gil=conf.gil,
            **how,
        )
        txq.software_gso = self._software_gso
        return txq

    def _gso_refused(self, kinds: int) -> None:
        """Called in a thread that bursts: the kernel does not split such super-frames."""
        new = [kind for kind in GSO_KINDS if kind & kinds & ~self._software_gso]
        self._software_gso |= kinds
        for txq in list(self._txq.values()):
            txq.software_gso = self._software_gso
        for kind in new:
            log.warning(
                "%s: the kernel refuses every super-frame of %s, they are split in software from "
                "now on",
                self._shown,
                GSO_KINDS[kind],
            )

    def loan_terms(self) -> dict[str, Any]:
        conf = self._conf
        return {
            "driver": self.dev_infos_get().driver_name,
            "ifname": self.ifname,
            "mode": self._mode,
            "mtu": self.mtu_get(),
            "nb_queues": min(self._nb_queues),
            "rx_offloads": int(conf.rx_offloads),
            "tx_offloads": int(conf.tx_offloads),
            "tx_gro": conf.tx_gro,
            "rx_gso": conf.rx_gso,
            "asked": int(self._asked()),
            "plugged": self._takes(self._observer.seen),
            "rx": self._rx_terms(),
            "tx": self._tx_terms(),
            "state_size": STATE_SIZE,
        }

    def queue_lend(self, queue_id: int) -> Loan:
        fds = self._fds_of(queue_id)
        states = [Descriptor.of(memfd.make, "rtap-queue", STATE_SIZE) for _ in range(2)]
        try:
            for queue, state in zip(self._pair(queue_id), states, strict=True):
                queue.lend(state.fileno(), STATE_SIZE)
            self._steer(queue_id, True)
        except BaseException:
            for state in states:
                state.close()
            self._end_loan(queue_id)
            raise
        self._lent.add(queue_id)
        return Loan(*fds, *states)

    def queue_take_back(self, queue_id: int) -> None:
        self._lent.discard(queue_id)
        self._end_loan(queue_id)
        with contextlib.suppress(DeviceGone):
            self._steer(queue_id, False)

    def _pair(self, queue_id: int) -> tuple[RxQueue, TxQueue]:
        return self._rxq[queue_id], self._txq[queue_id]

    def _end_loan(self, queue_id: int) -> None:
        for queue in self._pair(queue_id):
            queue.take_back()

    # -- control

    def link_update(self) -> Link:
        return link_of(self._control.get())

    def mac_addr_get(self) -> MacAddr:
        return self._control.get().mac

    def mac_addr_set(self, mac: MacAddr) -> None:
        self._control.set_mac(mac)
        self._observer.look()

    def mtu_get(self) -> int:
        return self._control.get().mtu

    def _make_room_for(self, mtu: int) -> None:
        """Fit the buffers to an MTU that the program asks for, or ValueError."""
        try:
            self._make_room(mtu)
        except ValueError as exc:
            raise ValueError(
                f"an MTU of {mtu} needs larger receive buffers than {self._shown} has: "
                f"{exc}; open the device with this mtu, or stop it and set its queues up with "
                "another pool"
            ) from None

    def mtu_set(self, mtu: int) -> None:
        self._make_room_for(mtu)
        self._control.set_mtu(mtu)
        self._observer.look()

    # -- the receive filter, which works in the queues

    def _filter_by(self, **changes: Any) -> None:
        self._filter = replace(self._filter, **changes)
        for rxq in self._rxq.values():
            self._filter.apply(rxq)

    def promiscuous_enable(self) -> None:
        self._filter_by(promiscuous=True)

    def promiscuous_disable(self) -> None:
        self._filter_by(promiscuous=False)

    def allmulticast_enable(self) -> None:
        self._filter_by(allmulticast=True)

    def allmulticast_disable(self) -> None:
        self._filter_by(allmulticast=False)

    def mac_addr_add(self, mac: MacAddr, index: int) -> None:
        self._filter_by(addresses={**self._filter.addresses, index: mac})

    def mac_addr_remove(self, index: int) -> None:
        rest = {i: mac for i, mac in self._filter.addresses.items() if i != index}
        self._filter_by(addresses=rest)

    def set_mc_addr_list(self, groups: Sequence[MacAddr]) -> None:
        if len(groups) > MAX_GROUPS:
            raise ValueError(
                f"{self._shown} can subscribe to at most {MAX_GROUPS} groups, got "
                f"{len(groups)} (allmulticast receives all)"
            )
        self._filter_by(groups=tuple(groups))
