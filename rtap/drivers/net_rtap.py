# SPDX-License-Identifier: BSD-3-Clause
"""``net_rtap``: the ops table for Linux TAP and TUN interfaces.

The device has its interface from probe on: its first descriptor is that of the first queue.
Stopping lowers the carrier and leaves the interface up, so that addresses and routes survive.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import Any

from rtap._core.mempool import Mempool
from rtap._core.threads import require_native
from rtap._ring import RxQueue, TxQueue
from rtap.control import tun
from rtap.control.attach import netns_of
from rtap.control.netlink import MAX_MTU, MIN_MTU, LinkState
from rtap.control.netns import NetNSLike, open_netns
from rtap.control.tun import TunFeature
from rtap.drivers.descriptors import Descriptors
from rtap.drivers.filter import MAX_MAC_ADDRS
from rtap.drivers.interface import DEFAULT_NB_DESC, MAX_NB_DESC, MAX_QUEUES, InterfaceDriver
from rtap.drivers.observed import Drops, Observer
from rtap.drivers.offloads import (
    RX_CAPA,
    TX_CAPA,
    kernel_offloads,
    lacking,
    max_frame,
    needs_header,
    refused,
    rx_room,
    tun_features,
)
from rtap.drivers.options import NO_OPTIONS, IfaceOptions
from rtap.errors import DeviceGone, DeviceStateError
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import DescLim, DevInfo, EthConf, PortConf, Stats
from rtap.ethdev.registry import register_driver
from rtap.ether import MacAddr
from rtap.flags import RxOffload

__all__ = [
    "DEFAULT_IFNAME",
    "DRIVER",
    "NetRtap",
]

log = logging.getLogger("rtap")

DRIVER = "net_rtap"
DEFAULT_IFNAME = "rtap%d"


class NetRtap(InterfaceDriver):
    """The ops table of one TAP or TUN interface."""

    def __init__(
        self,
        port: Port,
        ifname: str = DEFAULT_IFNAME,
        *,
        mode: str = "tap",
        persist: bool = False,
        netns: NetNSLike = None,
        options: IfaceOptions = NO_OPTIONS,
        vnet_hdr: bool = True,
    ) -> None:
        require_native()
        super().__init__(port)
        self._mode = mode
        self._features = TunFeature(0)
        self._lacked = RxOffload(0)

        self._tap = Descriptors(
            open_netns(netns) if options.fd is None else netns_of(options.fd),
            tun.check_ifname(ifname),
            mode,
            vnet_hdr=vnet_hdr,
            options=options,
        )
        self._control = self._tap.control
        with contextlib.ExitStack() as undo:
            undo.callback(self._control.close)
            undo.callback(self._tap.close)
            if persist:
                self.set_persist(True)
            self._observer = Observer(port, self._control, self)
            undo.callback(self._observer.cancel)
            # The former state of an interface that is half made anew.
            self._lost_state: LinkState | None = None
            self._drops = Drops(self._observer.seen.dropped)
            undo.pop_all()

    # -- the interface, as others change it

    def interface_lost(self) -> None:
        """See :class:`rtap.drivers.observed.Observing`."""
        if self._tap.lost:
            self._port.event(EthEvent.INTR_RMV)
        else:
            log.warning("%s went to where it can no longer be controlled from", self._tap.name)

    def _take_name(self, name: str) -> None:
        self._tap.name = name
        super()._take_name(name)

    def _takes(self, now: LinkState) -> bool:
        return now.carrier

    def _plug(self, now: LinkState) -> None:
        """While the carrier is off nothing is sent, and frames that the kernel drops are not
        missed."""
        super()._plug(now)
        self._drops.turn(now.dropped, started=self._started, plugged=now.carrier)

    def _asked(self) -> RxOffload:
        return kernel_offloads(self._conf)

    def _revive(self) -> None:
        """Make a deleted interface anew, under the existing queues."""
        self._observer.cancel()
        if self._lost_state is None:
            self._lost_state = self._observer.seen
        self._tap.revive(self._lost_state)
        self._features = tun.set_offload(self._tap.first, self._features, self._tap.name)
        self._observer.restart()
        self._drops.restart(self._observer.seen.dropped)
        self._plug(self._observer.seen)
        self._lost_state = None
        self._port.event(EthEvent.RECOVERY_SUCCESS)

    @property
    def _must_revive(self) -> bool:
        return self._lost_state is not None or self._tap.lost

    # -- device

    def set_persist(self, on: bool) -> None:
        """Whether the interface stays when the device is closed."""
        self._tap.set_persist(on)

    @property
    def ifname(self) -> str:
        name = self._tap.name
        if self._tap.present_name() != name:
            self._take_name(self._tap.name)
        return self._tap.name

    def dev_infos_get(self) -> DevInfo:
        queues = MAX_QUEUES if self._tap.multi_queue else 1
        ifname = self.ifname
        link = self._control.get()
        return DevInfo(
            driver_name=DRIVER,
            if_index=link.index,
            min_mtu=MIN_MTU,
            max_mtu=MAX_MTU if self._mode == "tap" else 65535,
            min_rx_bufsize=rx_room(MIN_MTU, mode=self._mode),
            max_rx_pktlen=max_frame(self._mode, MAX_MTU, RX_CAPA),
            max_rx_queues=queues,
            max_tx_queues=queues,
            max_mac_addrs=1 if self._mode == "tun" else MAX_MAC_ADDRS,
            rx_offload_capa=RX_CAPA,
            tx_offload_capa=TX_CAPA,
            rx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            tx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            default_rxportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            default_txportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            ifname=ifname,
            mode=self._mode,
            mtu=link.mtu,
            mac=link.mac,
            persist=self._tap.persist,
            multi_queue=self._tap.multi_queue,
            vnet_hdr=self._tap.vnet_hdr,
            rx_offloads=self._conf.rx_offloads,
            rx_offloads_refused=self._lacked,
            tx_offloads=self._conf.tx_offloads,
            tx_offloads_refused=refused(self._software_gso),
            tx_gro=self._conf.tx_gro,
            rx_gso=self._conf.rx_gso,
        )

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        if nb_rx_queues != nb_tx_queues:
            raise ValueError(
                "queues come in pairs: nb_rx_queues and nb_tx_queues must be equal, got "
                f"{nb_rx_queues} and {nb_tx_queues}"
            )
        features = tun_features(kernel_offloads(conf))
        if needs_header(conf) and self._tap.adopted and not self._tap.vnet_hdr:
            raise ValueError(
                f"offloads need virtio-net headers, and the descriptor of {self._tap.name} that "
                "this device was given was attached without (IFF_VNET_HDR)"
            )
        self._tap.hold()
        self._release_queues()
        self._nb_queues = (0, 0)
        self._software_gso = 0
        if self._must_revive:
            self._revive()
        self._tap.negotiate_header(needs_header(conf))
        self._tap.resize(nb_rx_queues)
        self._features = tun.set_offload(self._tap.first, features, self._tap.name)
        if conf.mtu is not None and conf.mtu != self.mtu_get():
            self._control.set_mtu(conf.mtu)
        self._tell_lacking(lacking(conf.rx_offloads, self._features))
        self._conf = replace(conf, rx_offloads=conf.rx_offloads & ~self._lacked)
        self._nb_queues = (nb_rx_queues, nb_tx_queues)

    def _tell_lacking(self, lacked: RxOffload) -> None:
        """The kernel does not have these offloads; say so when that is news."""
        if lacked & ~self._lacked:
            log.warning(
                "%s: this kernel does not have %s (rx_offloads), it is off",
                self._tap.name,
                lacked.name,
            )
        self._lacked = lacked

    def dev_start(self) -> None:
        if self._must_revive:
            self._revive()
        for q, rxq in self._rxq.items():
            if q not in self._lent:
                rxq.purge()  # before it is detached: the kernel would throw frames away uncounted
                self._tap.attach(q, rxq not in self._deferred)
        self._start_queues()
        try:
            tun.set_carrier(self._tap.first, True, self._tap.name)
            if not self._control.get().up:
                self._control.set_up(True)
            self._started = True
            self._observer.look()
        except BaseException:
            self._started = False
            self._stop_queues()
            raise
        for q, intr in self._intr.items():
            intr.set_live(self._rxq[q] not in self._deferred)

    def dev_stop(self) -> None:
        self._stop_queues()
        self._count_drops()
        self._started = False
        with contextlib.suppress(DeviceGone):
            if self._tap.is_shared():
                self._leave_queues()
            else:
                self.dev_set_link_down()

    def _leave_queues(self) -> None:
        """Detach our queues, so that the kernel sends all frames to the queues of others: the
        carrier is theirs too."""
        for q, rxq in self._rxq.items():
            if self._tap.is_attached(q) and q not in self._lent:
                rxq.purge()  # as in dev_start
                self._tap.attach(q, False)
        self._observer.look()

    def dev_close(self) -> None:
        self._started = False
        stays = True

        def await_gone() -> None:
            if not stays:
                self._tap.await_gone()

        with contextlib.ExitStack() as stack:
            # The last entry runs first; if one fails, the rest is still done.
            stack.callback(self._control.close)
            stack.callback(await_gone)
            stack.callback(self._tap.close)
            for queue in self._queues():
                stack.callback(queue.close)
            for q, rxq in self._rxq.items():
                stack.callback(self._purge_last, q, rxq)
            for intr in self._intr.values():
                stack.callback(intr.close)
            stack.callback(self._observer.cancel)
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()
            # Deleted, or closed by the collector: nothing to wait for.
            with contextlib.suppress(OSError, ValueError):
                self._tap.let_die()
                stays = self._tap.persist or self._tap.adopted

    def _purge_last(self, queue_id: int, rxq: RxQueue) -> None:
        """As in dev_start; frames that wait on a descriptor of another program are left to that."""
        if queue_id == 0 and self._tap.adopted:
            return
        with contextlib.suppress(DeviceStateError):  # in use: its counters have them
            rxq.purge()

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        self._tap.close()
        self._control.close()

    # -- queues

    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> RxQueue:
        return self._rx_queue(
            self._tap.fds[queue_id],
            queue_id,
            nb_desc,
            pool,
            shared=self._tap.adopted,
            **self._rx_terms(),
        )

    def _rx_terms(self) -> dict[str, Any]:
        header = self._tap.vnet_hdr
        return {
            "split": self._conf.rx_gso,
            "vnet_hdr": header,
            "offloads": int(self._conf.rx_offloads & ~RxOffload.SCATTER) if header else 0,
        }

    def _make_tx(self, queue_id: int, nb_desc: int) -> TxQueue:
        txq = self._tx_queue(
            self._tap.fds[queue_id],
            queue_id,
            nb_desc,
            shared=self._tap.adopted,
            **self._tx_terms(),
        )
        txq.set_plugged(self._observer.seen.carrier)
        return txq

    def _tx_terms(self) -> dict[str, Any]:
        return {"vnet_hdr": self._tap.vnet_hdr, "ordered": self._tap.sndbuf is not None}

    def _fds_of(self, queue_id: int) -> tuple[int, int]:
        fd = self._tap.fds[queue_id]
        return fd, fd

    def _steer(self, queue_id: int, on: bool) -> None:
        if not on or not self._tap.multi_queue:
            self._rxq[queue_id].purge()
        self._tap.attach(queue_id, on)

    def _is_live(self, queue_id: int) -> bool:
        return self._tap.is_attached(queue_id)

    def rx_queue_start(self, queue_id: int) -> None:
        rxq = self._rxq[queue_id]
        if not self._tap.multi_queue:
            rxq.purge()
        self._tap.attach(queue_id, True)
        rxq.start()
        if queue_id in self._intr:
            self._intr[queue_id].set_live(True)

    def rx_queue_stop(self, queue_id: int) -> None:
        if queue_id in self._intr:
            self._intr[queue_id].set_live(False)
        rxq = self._rxq[queue_id]
        rxq.stop()
        if self._tap.multi_queue:
            rxq.purge()  # as in dev_start
        self._tap.attach(queue_id, False)

    # -- control

    def dev_set_link_up(self) -> None:
        tun.set_carrier(self._tap.first, True, self._tap.name)
        if self._started and not self._control.get().up:
            self._control.set_up(True)
        self._observer.look()

    def dev_set_link_down(self) -> None:
        for txq in self._txq.values():
            txq.set_plugged(False)
        tun.set_carrier(self._tap.first, False, self._tap.name)
        self._observer.look()

    def mac_addr_set(self, mac: MacAddr) -> None:
        if self._mode == "tun":
            raise ValueError(
                f"mac: {self._tap.name} is a TUN interface and has no Ethernet address"
            )
        super().mac_addr_set(mac)

    # -- the receive filter
    #
    # It works in the queues. The interface's own IFF_PROMISC and IFF_ALLMULTI are left alone: they
    # belong to the kernel's end of the wire, where they say which of our frames the kernel's stack
    # accepts. They do not change what we read. TUNSETTXFILTER is not used either: frames that it
    # drops would look like frames that nobody read.

    def _filter_by(self, **changes: Any) -> None:
        if self._mode == "tun" and not replace(self._filter, **changes).promiscuous:
            raise ValueError(
                f"{self._tap.name} is a TUN interface: IP packets have no Ethernet address to "
                "filter by"
            )
        super()._filter_by(**changes)

    # -- statistics

    def _count_drops(self) -> None:
        with contextlib.suppress(DeviceGone):
            self._drops.count(self._control.get_dropped())

    def stats_get(self) -> Stats:
        self._count_drops()
        stats = super().stats_get()
        stats.imissed = self._drops.missed
        return stats

    def stats_reset(self) -> None:
        self._count_drops()
        super().stats_reset()
        self._drops.missed = 0

    def xstats_get(self) -> dict[str, int]:
        self._count_drops()
        out = super().xstats_get()
        out["purged_packets"] = self._tap.purged
        out["link_down_drops"] = self._drops.unplugged
        return out

    def xstats_reset(self) -> None:
        self._count_drops()
        super().xstats_reset()
        self._drops.unplugged = 0
        self._tap.purged = 0


def _probe(args: DevArgs, port: Port) -> NetRtap:
    named = "iface" in args.args
    ifname = args.take_ifname("iface", DEFAULT_IFNAME)
    persist = args.take_flag("persist")
    options = IfaceOptions.take(args)
    args.finish(("iface=NAME", "persist", *IfaceOptions.KEYS))
    if named and options.fd is not None:
        raise ValueError(
            f"{args.name}: iface={ifname} and fd={options.fd} exclude each other, the descriptor "
            "says which interface it is"
        )
    return NetRtap(port, ifname, persist=persist, options=options)


register_driver(DRIVER, _probe, aliases=("eth_rtap",))
