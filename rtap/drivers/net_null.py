# SPDX-License-Identifier: BSD-3-Clause
"""``net_null``: a device with nothing behind it, for trying the API and for measuring.

Receiving hands out as many frames of ``size=`` bytes as asked for, sending frees the frames.
It needs no privileges and no kernel support. Its frames have no addresses to filter by, and
there is nothing to wait for: frames are always there.
"""

from __future__ import annotations

from rtap._core.mempool import Mempool
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap.drivers.filter import MAX_MAC_ADDRS
from rtap.drivers.queues import QueueDriver
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import DescLim, DevInfo, EthConf, Link
from rtap.ethdev.registry import register_driver
from rtap.ether import MacAddr

__all__ = ["NetNull"]

DRIVER = "net_null"
MAX_QUEUES = 128
MIN_SIZE, MAX_SIZE = 14, 65535


class NetNull(QueueDriver[NullRxQueue, NullTxQueue]):
    """The ops table of a device that makes frames and frees them."""

    def __init__(self, port: Port, name: str, size: int = 64) -> None:
        super().__init__(port)
        self._name = name
        self._size = size
        self._mac = MacAddr(bytes((2, 0, 0, 0, port.id >> 8 & 0xFF, port.id & 0xFF)))
        self._mtu = 1500
        self._up = False

    def dev_infos_get(self) -> DevInfo:
        return DevInfo(
            driver_name=DRIVER,
            name=self._name,
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
        self._release_queues()
        self._nb_queues = (nb_rx_queues, nb_tx_queues)
        self._conf = conf
        if conf.mtu is not None:
            self._mtu = conf.mtu

    def dev_start(self) -> None:
        self._start_queues()
        self._set_link(True)

    def _set_link(self, up: bool) -> None:
        for txq in self._txq.values():
            txq.set_plugged(up)
        if up != self._up:
            self._up = up
            self._port.event(EthEvent.INTR_LSC, self.link_update())

    def dev_stop(self) -> None:
        self._set_link(False)
        self._stop_queues()

    def dev_close(self) -> None:
        self._release_queues()

    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> NullRxQueue:
        return NullRxQueue(
            pool,
            name=self._name,
            size=self._size,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            gil=self._conf.gil,
        )

    def _make_tx(self, queue_id: int, nb_desc: int) -> NullTxQueue:
        txq = NullTxQueue(
            name=self._name,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            gil=self._conf.gil,
        )
        txq.set_plugged(self._up)
        return txq

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


def _probe(args: DevArgs, port: Port) -> NetNull:
    size = args.take_int("size", 64, MIN_SIZE, MAX_SIZE)
    args.finish(("size=BYTES",))
    return NetNull(port, args.name, size)


register_driver(DRIVER, _probe, aliases=("eth_null",))
