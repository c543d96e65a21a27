# SPDX-License-Identifier: BSD-3-Clause
"""``net_null``: a device with nothing behind it, for trying the API and for measuring.

Receiving hands out as many frames of ``size=`` bytes as are asked for, sending frees what it is
given. It needs no privileges and no kernel support. Its frames have no addresses to filter by, and
there is nothing to wait for: they are always there.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NoReturn

from rtap._core.mempool import Mempool
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap.drivers.filter import MAX_MAC_ADDRS
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import DescLim, DevInfo, EthConf, Link, Stats
from rtap.ethdev.registry import register_driver
from rtap.ethdev.stats import queue_stats, queue_xstats
from rtap.ether import MacAddr

__all__ = ["NetNull"]

DRIVER = "net_null"
MAX_QUEUES = 128
MIN_SIZE, MAX_SIZE = 14, 65535


class NetNull:
    """:class:`rtap.ethdev.ops.EthDevOps` for a device that makes frames and frees them."""

    ifname = ""

    def __init__(self, port: Port, name: str, size: int = 64) -> None:
        self._port = port
        self._name = name
        self._size = size
        self._conf = EthConf()
        self._mac = MacAddr(bytes((2, 0, 0, 0, port.id >> 8 & 0xFF, port.id & 0xFF)))
        self._mtu = 1500
        self._up = False
        self._nb_queues = (0, 0)
        self._deferred: set[NullRxQueue | NullTxQueue] = set()
        self._rxq: dict[int, NullRxQueue] = {}
        self._txq: dict[int, NullTxQueue] = {}

    def _queues(self) -> list[NullRxQueue | NullTxQueue]:
        return [*self._rxq.values(), *self._txq.values()]

    def dev_infos_get(self) -> DevInfo:
        return DevInfo(
            driver_name=DRIVER,
            min_rx_bufsize=self._size,
            max_rx_pktlen=MAX_SIZE,
            max_rx_queues=MAX_QUEUES,
            max_tx_queues=MAX_QUEUES,
            rx_desc_lim=DescLim(nb_max=32768),
            tx_desc_lim=DescLim(nb_max=32768),
            mode="tap",
            mtu=self._mtu,
            mac=self._mac,
            max_mac_addrs=MAX_MAC_ADDRS,
            multi_queue=True,
            engine="none",
        )

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        if conf.tx_gro or conf.rx_gso:
            raise ValueError("tx_gro, rx_gso: net_null has no kernel to exchange super-frames with")
        self.dev_close()
        self._nb_queues = (nb_rx_queues, nb_tx_queues)
        self._conf = conf
        if conf.mtu is not None:
            self._mtu = conf.mtu

    def dev_start(self) -> None:
        for queue in self._queues():
            if queue not in self._deferred:
                queue.start()
        self._set_link(True)

    def _set_link(self, up: bool) -> None:
        for txq in self._txq.values():
            txq.set_plugged(up)
        if up != self._up:
            self._up = up
            self._port.event(EthEvent.INTR_LSC, self.link_update())

    def dev_stop(self) -> None:
        self._set_link(False)
        for queue in self._queues():
            queue.stop()

    def dev_close(self) -> None:
        for queue in self._queues():
            queue.close()
        self._rxq.clear()
        self._txq.clear()
        self._deferred.clear()

    def dev_forked(self) -> None:
        pass

    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> NullRxQueue:
        rxq = NullRxQueue(
            pool,
            name=self._name,
            size=self._size,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            gil=self._conf.gil,
        )
        if queue_id in self._rxq:
            self.rx_queue_release(queue_id)
        self._rxq[queue_id] = rxq
        if deferred_start:
            self._deferred.add(rxq)
        return rxq

    def rx_queue_release(self, queue_id: int) -> None:
        rxq = self._rxq.pop(queue_id)
        rxq.close()
        self._deferred.discard(rxq)

    def rx_queue_start(self, queue_id: int) -> None:
        self._rxq[queue_id].start()

    def rx_queue_stop(self, queue_id: int) -> None:
        self._rxq[queue_id].stop()

    def _no_interrupts(self) -> NoReturn:
        raise OSError(
            errno.EOPNOTSUPP,
            f"{self._name} has no receive interrupts: its frames are always there, and there is no "
            "descriptor to wait for",
        )

    def rx_queue_intr_fd(self, queue_id: int) -> int:
        self._no_interrupts()

    def rx_queue_intr_enable(self, queue_id: int) -> None:
        self._no_interrupts()

    def rx_queue_intr_disable(self, queue_id: int) -> None:
        self._no_interrupts()

    def tx_queue_setup(self, queue_id: int, nb_desc: int, deferred_start: bool) -> NullTxQueue:
        txq = NullTxQueue(
            name=self._name,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            gil=self._conf.gil,
        )
        txq.set_plugged(self._up)
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

    def link_update(self) -> Link:
        return Link(link_status=self._up)

    def dev_set_link_up(self) -> None:
        self._set_link(True)

    def dev_set_link_down(self) -> None:
        self._set_link(False)

    def mac_addr_get(self) -> MacAddr:
        return self._mac

    def mac_addr_set(self, mac: MacAddr) -> None:
        self._mac = mac
        self._port.event(EthEvent.MAC, mac)

    def mtu_get(self) -> int:
        return self._mtu

    def mtu_set(self, mtu: int) -> None:
        self._mtu = mtu
        self._port.event(EthEvent.MTU, mtu)

    # Frames without addresses are for whoever asks, whatever is set here.

    def promiscuous_enable(self) -> None:
        pass

    def promiscuous_disable(self) -> None:
        pass

    def allmulticast_enable(self) -> None:
        pass

    def allmulticast_disable(self) -> None:
        pass

    def mac_addr_add(self, mac: MacAddr, index: int) -> None:
        pass

    def mac_addr_remove(self, index: int) -> None:
        pass

    def set_mc_addr_list(self, groups: Sequence[MacAddr]) -> None:
        pass

    def stats_get(self) -> Stats:
        return queue_stats(self._rxq, self._txq, *self._nb_queues)

    def stats_reset(self) -> None:
        for queue in self._queues():
            queue.reset_counters()

    def xstats_get_names(self) -> list[str]:
        return list(self.xstats_get())

    def xstats_get(self) -> dict[str, int]:
        return queue_xstats(self._rxq, self._txq)

    def xstats_reset(self) -> None:
        for queue in self._queues():
            queue.reset_xcounters()


def _probe(args: DevArgs, port: Port) -> NetNull:
    size = args.take_int("size", 64, MIN_SIZE, MAX_SIZE)
    args.finish(("size=BYTES",))
    return NetNull(port, args.name, size)


register_driver(DRIVER, _probe, aliases=("eth_null",))
