# SPDX-License-Identifier: BSD-3-Clause
"""``net_af_packet``: the ops table for any Ethernet interface, through raw packet sockets.

The interface exists already and stays. The kernel's own stack still receives from it beside
the device. The application is on the kernel's side of the wire, so `mac` is its address too.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from typing import Any

from rtap._core.mempool import Mempool
from rtap._core.threads import require_native
from rtap._ring import RxQueue, TxQueue
from rtap.control.netlink import Control, LinkState, find_link
from rtap.control.netns import NetNSLike, open_netns
from rtap.control.packet import Member, Membership
from rtap.control.tun import check_ifname
from rtap.drivers.filter import MAX_MAC_ADDRS
from rtap.drivers.interface import DEFAULT_NB_DESC, MAX_NB_DESC, MAX_QUEUES, InterfaceDriver
from rtap.drivers.observed import Observer, link_of
from rtap.drivers.offloads import (
    RX_CAPA,
    TX_CAPA,
    max_frame,
    needs_header,
    refused,
    rx_room,
    tun_features,
)
from rtap.drivers.packet_sockets import PacketOptions, PacketSockets
from rtap.errors import DeviceGone
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import DescLim, DevInfo, EthConf, PortConf, Stats
from rtap.ether import MacAddr
from rtap.flags import RxOffload

__all__ = ["DRIVER", "NetAfPacket", "probe"]

DRIVER = "net_af_packet"
_LRO = RxOffload.TCP_LRO | RxOffload.UDP_LRO
_DOWN = ("NOTPRESENT", "DOWN", "LOWERLAYERDOWN")
_UNFINISHED = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM


def _takes_frames(link: LinkState) -> bool:
    """Whether the kernel sends frames. A carrier that has just come on is not enough: until
    the kernel has handled that, a moment later, the queueing discipline loses everything."""
    return link_of(link).link_status and link.operstate not in _DOWN


class NetAfPacket(InterfaceDriver):
    """The ops table of one interface."""

    def __init__(
        self,
        port: Port,
        ifname: str,
        *,
        netns: NetNSLike = None,
        options: PacketOptions | None = None,
    ) -> None:
        require_native()
        super().__init__(port)
        if sys.byteorder != "little":
            raise OSError(
                errno.EOPNOTSUPP,
                f"{DRIVER}: headers of packet sockets have this machine's byte order, rtap reads "
                "little-endian ones",
            )
        self._missed: dict[int, int] = {}
        self._xmissed: dict[int, int] = {}
        self._vnet_hdr = False
        ns = open_netns(netns)
        with contextlib.ExitStack() as undo:
            undo.callback(ns.close)
            link = self._find(ns.fd, ifname)
            self._control = Control(ns, link.index, ifname)
            undo.pop_all()
            undo.callback(self._control.close)
            self._sockets = PacketSockets(self._control, options or PacketOptions())
            undo.callback(self._sockets.close)
            self._observer = Observer(port, self._control, self)
            undo.pop_all()

    @staticmethod
    def _find(netns: int, ifname: str) -> LinkState:
        """The interface of that name. OSError if there is none, or if it is not Ethernet."""
        link = find_link(netns, ifname)
        if link is None:
            raise OSError(errno.ENODEV, f"{DRIVER}: there is no interface {ifname}")
        if not link.ethernet:
            raise OSError(
                errno.EAFNOSUPPORT, f"{DRIVER}: the frames of {ifname} are not Ethernet frames"
            )
        return link

    # -- the interface, as others change it

    def interface_lost(self) -> None:
        """See :class:`rtap.drivers.observed.Observing`."""
        self._sockets.forget_members()
        for rxq in self._rxq.values():
            rxq.lose()
        for intr in self._intr.values():
            intr.end()
        self._port.event(EthEvent.INTR_RMV)

    def _takes(self, now: LinkState) -> bool:
        return _takes_frames(now)

    def _asked(self) -> RxOffload:
        return _LRO  # always: the kernel gives a packet socket frames as it has them

    def _find_again(self) -> None:
        """Change to another interface with the name of the one that is gone."""
        name = self._control.name
        try:
            link = self._find(self._control.netns.fd, name)
        except OSError as exc:
            raise DeviceGone(exc.errno or errno.ENODEV, str(exc.strerror), name) from None
        self._observer.cancel()
        self._control.index = link.index
        self._observer.restart()
        self._fit(link.mtu)
        self._plug(self._observer.seen)
        self._port.event(EthEvent.RECOVERY_SUCCESS)

    # -- device

    def dev_infos_get(self) -> DevInfo:
        link = self._control.get()
        return DevInfo(
            driver_name=DRIVER,
            if_index=link.index,
            min_mtu=link.min_mtu,
            max_mtu=link.max_mtu,
            min_rx_bufsize=rx_room(link.min_mtu),
            max_rx_pktlen=max_frame("tap", link.max_mtu, RX_CAPA),
            max_rx_queues=MAX_QUEUES,
            max_tx_queues=MAX_QUEUES,
            max_mac_addrs=MAX_MAC_ADDRS,
            rx_offload_capa=RX_CAPA,
            tx_offload_capa=TX_CAPA,
            rx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            tx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            default_rxportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            default_txportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            ifname=link.name,
            mode=self._mode,
            mtu=link.mtu,
            mac=link.mac,
            persist=True,
            multi_queue=True,
            vnet_hdr=True,
            rx_offloads=self._conf.rx_offloads,
            tx_offloads=self._conf.tx_offloads,
            tx_offloads_refused=refused(self._software_gso),
            tx_gro=self._conf.tx_gro,
            rx_gso=self._splits,
        )

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        tun_features(conf.rx_offloads)  # refuses contradictory offloads
        self._release_queues()
        self._count_drops()
        self._nb_queues = (0, 0)
        self._software_gso = 0
        self._conf = self._granted(conf)
        self._vnet_hdr = needs_header(self._conf)
        self._sockets.resize(nb_rx_queues, nb_tx_queues, tx_header=self._vnet_hdr)
        if conf.mtu is not None and conf.mtu != self.mtu_get():
            self._control.set_mtu(conf.mtu)
        self._nb_queues = (nb_rx_queues, nb_tx_queues)

    @staticmethod
    def _granted(conf: EthConf) -> EthConf:
        """`conf` with all that it implies: super-frames come in both kinds or in none."""
        if not conf.rx_offloads & _LRO:
            return conf
        return EthConf(
            conf.rx_offloads | _LRO | _UNFINISHED,
            conf.tx_offloads,
            conf.mtu,
            conf.engine,
            conf.gil,
            tx_gro=conf.tx_gro,
        )

    @property
    def _splits(self) -> bool:
        return not self._conf.rx_offloads & _LRO

    def dev_start(self) -> None:
        if self._observer.removed or self._control.peek() is None:
            self._find_again()
        if not self._control.get().up:
            self._control.set_up(True)
        running = [
            q for q, rxq in self._rxq.items() if rxq not in self._deferred or q in self._lent
        ]
        try:
            self._sockets.bind_tx()
            self._sockets.attach(running)
            self._start_queues()
            self._started = True
            self._join()
            self._observer.look()
        except BaseException:
            self.dev_stop()
            raise
        for q, intr in self._intr.items():
            intr.set_live(q in running)

    def dev_stop(self) -> None:
        self._stop_queues()
        self._started = False
        with contextlib.suppress(DeviceGone):
            self._join()
        for q in self._rxq.keys() - self._lent:
            self._detach(q)

    def _detach(self, queue_id: int) -> None:
        """After a receive queue was stopped: let no more frames come for it."""
        if self._sockets.is_attached(queue_id):
            self._sockets.mute(queue_id)
            self._rxq[queue_id].purge()
            self._count_drops()
            self._sockets.detach(queue_id)
            self._rxq[queue_id].renew()
            if queue_id in self._intr:
                self._intr[queue_id].renew()

    def dev_close(self) -> None:
        self._started = False
        with contextlib.ExitStack() as stack:
            # The last entry runs first; if one fails, the rest is still done.
            stack.callback(self._control.close)
            stack.callback(self._sockets.close)
            for queue in self._queues():
                stack.callback(queue.close)
            for intr in self._intr.values():
                stack.callback(intr.close)
            stack.callback(self._observer.cancel)
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        self._sockets.close()
        self._control.close()

    # -- queues

    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> RxQueue:
        return self._rx_queue(
            self._sockets.rx_fd(queue_id),
            queue_id,
            nb_desc,
            pool,
            **self._rx_terms(),
        )

    def _rx_terms(self) -> dict[str, Any]:
        return {
            "split": self._splits,
            "vnet_hdr": True,
            "offloads": int(self._conf.rx_offloads & ~RxOffload.SCATTER),
            "packet": True,
        }

    def _make_tx(self, queue_id: int, nb_desc: int) -> TxQueue:
        txq = self._tx_queue(
            self._sockets.tx_fd(queue_id),
            queue_id,
            nb_desc,
            **self._tx_terms(),
        )
        txq.set_plugged(_takes_frames(self._observer.seen))
        return txq

    def _tx_terms(self) -> dict[str, Any]:
        # Ordered: the send buffer and the queueing discipline end.
        return {"vnet_hdr": self._vnet_hdr, "ordered": True, "packet": True}

    def _fds_of(self, queue_id: int) -> tuple[int, int]:
        return self._sockets.rx_fd(queue_id), self._sockets.tx_fd(queue_id)

    def _steer(self, queue_id: int, on: bool) -> None:
        if on:
            self._sockets.attach([queue_id])
        else:
            self._detach(queue_id)

    def _is_live(self, queue_id: int) -> bool:
        return self._sockets.is_attached(queue_id)

    def rx_queue_start(self, queue_id: int) -> None:
        self._sockets.attach([queue_id])
        self._rxq[queue_id].start()
        if queue_id in self._intr:
            self._intr[queue_id].set_live(True)

    def rx_queue_stop(self, queue_id: int) -> None:
        if queue_id in self._intr:
            self._intr[queue_id].set_live(False)
        self._rxq[queue_id].stop()
        self._detach(queue_id)

    # -- control

    def dev_set_link_up(self) -> None:
        self._control.set_up(True)
        self._observer.look()

    def dev_set_link_down(self) -> None:
        self._control.set_up(False)
        self._observer.look()

    def app_mac_get(self) -> MacAddr:
        return self.mac_addr_get()  # the application is at the kernel's end of the wire

    # -- the receive filter
    #
    # The interface is told which frames to accept. If it accepts others too, on behalf of other
    # programs, the queues sort these out.

    def _filter_by(self, **changes: Any) -> None:
        super()._filter_by(**changes)
        if self._started:
            self._join()

    def _join(self) -> None:
        self._sockets.join(self._wanted() if self._started else set())

    def _wanted(self) -> set[Membership]:
        wanted = self._filter
        if wanted.promiscuous:
            return {Membership(Member.PROMISC)}
        own = self._observer.seen.mac
        members = {
            Membership(Member.UNICAST, bytes(mac))
            for mac in wanted.addresses.values()
            if mac != own
        }
        if wanted.allmulticast:
            return members | {Membership(Member.ALLMULTI)}
        return members | {Membership(Member.MULTICAST, bytes(mac)) for mac in wanted.groups}

    # -- statistics

    def _count_drops(self) -> None:
        for q, drops in self._sockets.take_drops().items():
            self._missed[q] = self._missed.get(q, 0) + drops
            self._xmissed[q] = self._xmissed.get(q, 0) + drops

    def stats_get(self) -> Stats:
        self._count_drops()
        stats = super().stats_get()
        stats.imissed = sum(self._missed.values())
        return stats

    def stats_reset(self) -> None:
        self._count_drops()
        super().stats_reset()
        self._missed.clear()

    def xstats_get(self) -> dict[str, int]:
        self._count_drops()
        missed = {f"rx_q{q}_missed_packets": self._xmissed.get(q, 0) for q in sorted(self._rxq)}
        return super().xstats_get() | missed

    def xstats_reset(self) -> None:
        self._count_drops()
        super().xstats_reset()
        self._xmissed.clear()


def probe(args: DevArgs, port: Port) -> NetAfPacket:
    """Makes a device, see :func:`rtap.register_driver`."""
    if "iface" not in args.args:
        raise ValueError(f"{args.name}: {DRIVER} needs iface=NAME, the interface to work on")
    ifname = args.take_str("iface", "")
    netns = args.take_str("netns", "") or None
    options = PacketOptions.take(args)
    args.finish(("iface=NAME", "netns=NAME", *PacketOptions.KEYS))
    try:
        check_ifname(ifname, pattern=False)
    except ValueError as exc:
        raise ValueError(f"{args.name}: {'iface=' + ifname!r}: {exc}") from None
    return NetAfPacket(port, ifname, netns=netns, options=options)
