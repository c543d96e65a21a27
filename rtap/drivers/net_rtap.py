# SPDX-License-Identifier: BSD-3-Clause
"""``net_rtap``: the ops table for Linux TAP and TUN interfaces.

The device exists from probe on: its first descriptor is the first queue's. Stopping lowers the
carrier and leaves the interface up, so that addresses and routes survive.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rtap._mempool import Mempool
from rtap._ring import RxQueue, TxQueue
from rtap.control import tun
from rtap.control.attach import DYING_S, POLL_S, attach_first
from rtap.control.netlink import MAX_MTU, MIN_MTU, MOVES, Control, find_link
from rtap.control.tun import QueueFlag, TunFeature
from rtap.devargs import DevArgs
from rtap.drivers.filter import MAX_GROUPS, MAX_MAC_ADDRS, RxFilter
from rtap.errors import DeviceGone
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload
from rtap.interrupts import RxInterrupt
from rtap.netns import NetNS, NetNSLike, call_in, open_netns
from rtap.ops import DescLim, DevInfo, EthConf, Link, PortConf, Stats
from rtap.registry import register_driver
from rtap.stats import queue_stats, queue_xstats

__all__ = [
    "DEFAULT_IFNAME",
    "DEFAULT_NB_DESC",
    "DRIVER",
    "NetRtap",
    "needs_header",
    "rx_room",
    "tun_features",
]

DRIVER = "net_rtap"
DEFAULT_IFNAME = "rtap%d"
MAX_QUEUES = 128
MAX_NB_DESC = 32768
DEFAULT_NB_DESC = 64

# An Ethernet header and two VLAN tags.
_L2_MAX = 14 + 2 * 4
# The longest a frame gets with LRO: an IPv6 header, whose length field does not count itself.
_LRO_MAX = 65535 + 40
_LRO = RxOffload.TCP_LRO | RxOffload.UDP_LRO

#: IPV4_CKSUM is free of charge: the kernel never leaves an IPv4 header checksum undone.
_RX_CAPA = RxOffload.CHECKSUM | _LRO | RxOffload.SCATTER
_TX_CAPA = (
    TxOffload.UDP_CKSUM
    | TxOffload.TCP_CKSUM
    | TxOffload.TCP_TSO
    | TxOffload.UDP_TSO
    | TxOffload.MULTI_SEGS
)


def _max_frame(mode: str, mtu: int, offloads: RxOffload) -> int:
    payload = _LRO_MAX if offloads & _LRO else mtu
    return payload + (_L2_MAX if mode == "tap" else 0)


def rx_room(mtu: int = 1500, rx_offloads: RxOffload = RxOffload(0), mode: str = "tap") -> int:
    """Bytes of data room a receive mbuf needs for the longest frame.

    One byte more than the frame, by which a frame that was cut is told from one that just fits.
    """
    return _max_frame(mode, mtu, rx_offloads) + 1


def tun_features(offloads: RxOffload) -> TunFeature:
    """What the kernel may leave undone for these receive offloads; ValueError if inconsistent."""
    wanted = TunFeature(0)
    if offloads & (RxOffload.UDP_CKSUM | RxOffload.TCP_CKSUM):
        wanted |= TunFeature.CSUM
    for lro, cksum, features in (
        (
            RxOffload.TCP_LRO,
            RxOffload.TCP_CKSUM,
            TunFeature.TSO4 | TunFeature.TSO6 | TunFeature.TSO_ECN,
        ),
        (RxOffload.UDP_LRO, RxOffload.UDP_CKSUM, TunFeature.USO4 | TunFeature.USO6),
    ):
        if offloads & lro:
            if not offloads & cksum:
                raise ValueError(
                    f"rx_offloads: {lro.name} needs {cksum.name} too, the kernel hands over large "
                    "frames only with the checksum left to do"
                )
            wanted |= features
    return wanted


def needs_header(conf: EthConf) -> bool:
    """Whether frames must say more than their bytes do."""
    return bool(conf.rx_offloads & ~RxOffload.SCATTER or conf.tx_offloads & ~TxOffload.MULTI_SEGS)


def _rx_offloads(asked: RxOffload, features: TunFeature) -> RxOffload:
    """`asked` without what the kernel refused."""
    return asked if features & TunFeature.USO4 else asked & ~RxOffload.UDP_LRO


class NetRtap:
    """:class:`rtap.ops.EthDevOps` for one TAP or TUN interface."""

    def __init__(
        self,
        port: int,
        ifname: str = DEFAULT_IFNAME,
        *,
        mode: str = "tap",
        persist: bool = False,
        netns: NetNSLike = None,
        sndbuf: int | None = None,
        vnet_hdr: bool = True,
    ) -> None:
        if sndbuf is not None and (not isinstance(sndbuf, int) or sndbuf < 1):
            raise ValueError(f"sndbuf must be None or a number of bytes, got {sndbuf!r}")
        self._port = port
        self._mode = mode
        self._sndbuf = sndbuf
        self._conf = EthConf()
        self._fds: list[int] = []
        self._rxq: dict[int, RxQueue] = {}
        self._txq: dict[int, TxQueue] = {}
        self._nb_queues = 0
        self._deferred: set[RxQueue | TxQueue] = set()
        self._detached: set[int] = set()
        self._intr: dict[int, RxInterrupt] = {}
        self._filter = RxFilter()
        # imissed: drops counted while running, and the kernel's counter when that began; None
        # while what it drops is not our reader's fault.
        self._missed = 0
        self._dropped_from: int | None = None
        self._started = False
        self._kept_alive = False

        ns = open_netns(netns)
        try:
            fd, iface = attach_first(ns, tun.check_ifname(ifname), mode, vnet_hdr)
            self._fds.append(fd)
            self._name = iface.name
            self._flags = iface.flags
            self._prepare(fd)
            link = find_link(ns.fd, iface.name)
            if link is None:
                raise DeviceGone(errno.ENODEV, f"{iface.name} vanished", iface.name)
            self._control = Control(ns, link.index, iface.name, self._relocate, self._strayed)
            if persist:
                self.set_persist(True)
        except BaseException:
            self._close_fds(0)
            ns.close()
            raise

    # -- descriptors

    @property
    def _fd(self) -> int:
        """The first queue's, through which the interface is controlled."""
        if not self._fds:
            raise DeviceGone(errno.EBADF, f"{self._name} was lost while reopening it", self._name)
        return self._fds[0]

    def _prepare(self, fd: int) -> None:
        if self._sndbuf is not None:
            tun.set_sndbuf(fd, self._sndbuf, self._name)

    def _close_fds(self, keep: int) -> None:
        # From the end: closing an earlier one would move the kernel's last queue into its place.
        while len(self._fds) > keep:
            os.close(self._fds.pop())

    def _open_fds(self, n: int) -> None:
        link = self._control.get()
        multi = bool(self._flags & QueueFlag.MULTI_QUEUE)
        vnet_hdr = bool(self._flags & QueueFlag.VNET_HDR)
        before = len(self._fds)
        attach = partial(
            tun.open_queue, link.name, self._mode, multi_queue=multi, vnet_hdr=vnet_hdr
        )
        try:
            while len(self._fds) < n:
                fd, _ = call_in(self._control.netns.fd, attach)
                self._fds.append(fd)
                self._prepare(fd)
            queues = self._control.get().queues
            if queues is not None and queues < n:
                # Renamed or moved meanwhile: these belong to a new interface of the old name.
                raise DeviceGone(errno.ENODEV, f"{link.name} was renamed or moved", link.name)
        except BaseException:
            self._close_fds(before)
            raise

    def _negotiate_header(self, wanted: bool) -> None:
        """Have virtio-net headers on every frame, or not: they cost a tenth of a small one.

        The kernel settles that when an interface's first queue attaches, so the queues are closed
        and the first one opened anew, the interface being kept alive for that moment.
        """
        if wanted == bool(self._flags & QueueFlag.VNET_HDR):
            return
        link = self._control.get()
        multi = bool(self._flags & QueueFlag.MULTI_QUEUE)
        attach = partial(tun.open_queue, link.name, self._mode, multi_queue=multi, vnet_hdr=wanted)
        tun.set_offload(self._fd, TunFeature(0), self._name)
        self._kept_alive = not self.persist
        try:
            self.set_persist(True)
            self._close_fds(0)
            fd, iface = call_in(self._control.netns.fd, attach)
            self._fds.append(fd)
            self._flags = iface.flags
            self._prepare(fd)
            if not link.carrier:
                tun.set_carrier(fd, False, link.name)  # which attaching had raised
        finally:
            self._let_die()
        if wanted and not iface.flags & QueueFlag.VNET_HDR:
            raise OSError(
                errno.EBUSY, f"offloads need {link.name} for themselves, others have queues of it"
            )

    def _let_die(self) -> None:
        """Ends what :meth:`_negotiate_header` did to keep the interface alive without queues."""
        if not self._kept_alive:
            return
        if self._fds:
            self.set_persist(False)
        else:
            with contextlib.suppress(OSError):
                self._control.delete()
        self._kept_alive = False

    def _netns(self) -> NetNS | None:
        """Where the interface is, for the caller to close; None when it is gone or will not say."""
        if not self._fds:
            return None
        try:
            fd = tun.device_netns(self._fd, self._name)
        except (DeviceGone, PermissionError):
            return None
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # Linux before 5.2
                raise
            return None
        try:
            return NetNS.from_fd(fd)
        finally:
            os.close(fd)

    def _strayed(self, ns: NetNS) -> bool:
        """Whether the interface has left that namespace."""
        there = self._netns()
        if there is None:
            return False
        with there:
            return there.inode != ns.inode

    def _relocate(self) -> tuple[NetNS, int] | None:
        """Where the interface is now, asked of its descriptor; None when it is gone."""
        for _ in range(MOVES):
            ns = self._netns()
            if ns is None:
                break
            try:
                link = find_link(ns.fd, self.ifname)
            except OSError:
                link = None
            if link is not None:
                return ns, link.index
            ns.close()  # it was moved or renamed since it was asked
        return None

    # -- device

    def set_persist(self, on: bool) -> None:
        """Whether the interface stays when the device is closed."""
        tun.set_persist(self._fd, on, self._name)

    @property
    def persist(self) -> bool:
        return bool(tun.get_iface(self._fd, self._name).flags & QueueFlag.PERSIST)

    @property
    def ifname(self) -> str:
        name = tun.get_iface(self._fd, self._name).name
        if name != self._name:
            self._name = name
            for queue in self._queues():
                queue.name = name
        return name

    def dev_infos_get(self) -> DevInfo:
        vnet_hdr = bool(self._flags & QueueFlag.VNET_HDR)
        multi = bool(self._flags & QueueFlag.MULTI_QUEUE)
        queues = MAX_QUEUES if multi else 1
        ifname = self.ifname
        link = self._control.get()
        return DevInfo(
            driver_name=DRIVER,
            if_index=link.index,
            min_mtu=MIN_MTU,
            max_mtu=MAX_MTU if self._mode == "tap" else 65535,
            min_rx_bufsize=rx_room(MIN_MTU, mode=self._mode),
            max_rx_pktlen=_max_frame(self._mode, MAX_MTU, _LRO),
            max_rx_queues=queues,
            max_tx_queues=queues,
            max_mac_addrs=1 if self._mode == "tun" else MAX_MAC_ADDRS,
            rx_offload_capa=_RX_CAPA,
            tx_offload_capa=_TX_CAPA,
            rx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            tx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            default_rxportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            default_txportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            ifname=ifname,
            mode=self._mode,
            mtu=link.mtu,
            mac=link.mac,
            persist=self.persist,
            multi_queue=multi,
            vnet_hdr=vnet_hdr,
            rx_offloads=self._conf.rx_offloads,
            tx_offloads=self._conf.tx_offloads,
        )

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        if nb_rx_queues != nb_tx_queues:
            raise ValueError(
                "queues come in pairs: nb_rx_queues and nb_tx_queues must be equal, got "
                f"{nb_rx_queues} and {nb_tx_queues}"
            )
        features = tun_features(conf.rx_offloads)
        self._release_queues()
        self._nb_queues = 0
        for q in sorted(self._detached):
            self._attach(q, True)
        self._negotiate_header(needs_header(conf))
        self._close_fds(nb_rx_queues)
        if len(self._fds) < nb_rx_queues:
            self._open_fds(nb_rx_queues)
        features = tun.set_offload(self._fd, features, self._name)
        if conf.mtu is not None and conf.mtu != self.mtu_get():
            self._control.set_mtu(conf.mtu)
        self._conf = EthConf(
            _rx_offloads(conf.rx_offloads, features),
            conf.tx_offloads,
            conf.mtu,
            conf.engine,
            conf.gil,
        )
        self._nb_queues = nb_rx_queues

    def dev_start(self) -> None:
        for q, rxq in self._rxq.items():
            self._attach(q, rxq not in self._deferred)
            rxq.purge()
        for queue in self._queues():
            if queue not in self._deferred:
                queue.start()
        try:
            tun.set_carrier(self._fd, True, self._name)
            link = self._control.get()
            if not link.up:
                self._control.set_up(True)
        except BaseException:
            self._stop_queues()
            raise
        self._started = True
        for q, intr in self._intr.items():
            intr.set_live(self._rxq[q] not in self._deferred)
        self._dropped_from = link.stats.get("tx_dropped", 0)

    def _stop_queues(self) -> None:
        for intr in self._intr.values():
            intr.set_live(False)
        for queue in self._queues():
            queue.stop()

    def dev_stop(self) -> None:
        self._started = False
        self._stop_queues()
        with contextlib.suppress(DeviceGone):
            self.dev_set_link_down()

    def dev_close(self) -> None:
        self._started = False
        stays = True

        def await_gone() -> None:
            if not stays and not sys.is_finalizing():
                self._await_gone()

        with contextlib.ExitStack() as stack:
            # Last entered runs first, and whatever fails, the rest is still done.
            stack.callback(self._control.close)
            stack.callback(await_gone)
            stack.callback(self._close_fds, 0)
            for queue in self._queues():
                stack.callback(queue.close)
            for intr in self._intr.values():
                stack.callback(intr.close)
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()
            with contextlib.suppress(OSError):  # deleted: nothing to wait for
                self._let_die()
                stays = self.persist

    def _await_gone(self) -> None:
        deadline = time.monotonic() + DYING_S
        while True:
            try:
                if self._control.peek() is None:
                    return
            except RuntimeError:
                return  # the interpreter is exiting and starts no thread any more
            if time.monotonic() > deadline:
                warnings.warn(
                    f"{self._name} outlives its device: another process holds a descriptor of it",
                    ResourceWarning,
                    stacklevel=2,
                )
                return
            time.sleep(POLL_S)

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        self._close_fds(0)
        self._control.close()

    # -- queues

    def _queues(self) -> list[RxQueue | TxQueue]:
        return [*self._rxq.values(), *self._txq.values()]

    def _release_queues(self) -> None:
        for q in list(self._rxq):
            self.rx_queue_release(q)
        for q in list(self._txq):
            self.tx_queue_release(q)

    def _attach(self, queue_id: int, attached: bool) -> None:
        """Have the kernel send frames to a queue, or none.

        The only queue of an interface of the plain kind cannot be detached: what comes for it
        waits, and is missed when there is no more room.
        """
        if attached == (queue_id not in self._detached):
            return
        if self._flags & QueueFlag.MULTI_QUEUE:
            try:
                tun.set_queue_attached(self._fds[queue_id], attached, self._name)
            except OSError:
                tun.get_iface(self._fds[queue_id], self._name)  # says so when that is the reason
                raise
        if attached:
            self._detached.discard(queue_id)
        else:
            self._detached.add(queue_id)

    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> RxQueue:
        conf = self._conf
        rxq = RxQueue(
            self._fds[queue_id],
            pool,
            name=self.ifname,
            queue_id=queue_id,
            port=self._port,
            nb_desc=nb_desc,
            vnet_hdr=bool(self._flags & QueueFlag.VNET_HDR),
            max_frame=_max_frame(self._mode, self.mtu_get(), conf.rx_offloads),
            scatter=bool(conf.rx_offloads & RxOffload.SCATTER),
            l2=self._mode == "tap",
            engine=conf.engine,
            gil=conf.gil,
        )
        self._filter.apply(rxq)
        self._rxq[queue_id] = rxq
        if deferred_start:
            self._deferred.add(rxq)
        return rxq

    def rx_queue_release(self, queue_id: int) -> None:
        intr = self._intr.pop(queue_id, None)
        if intr is not None:
            intr.close()
        rxq = self._rxq.pop(queue_id)
        rxq.close()
        self._deferred.discard(rxq)

    def rx_queue_start(self, queue_id: int) -> None:
        rxq = self._rxq[queue_id]
        if not self._flags & QueueFlag.MULTI_QUEUE:
            rxq.purge()
        self._attach(queue_id, True)
        rxq.start()
        if queue_id in self._intr:
            self._intr[queue_id].set_live(True)

    def rx_queue_stop(self, queue_id: int) -> None:
        if queue_id in self._intr:
            self._intr[queue_id].set_live(False)
        self._rxq[queue_id].stop()
        self._attach(queue_id, False)

    def _interrupt(self, queue_id: int) -> RxInterrupt:
        intr = self._intr.get(queue_id)
        if intr is None:
            live = self._started and queue_id not in self._detached
            intr = self._intr[queue_id] = RxInterrupt(self._fds[queue_id], live)
        return intr

    def rx_queue_intr_fd(self, queue_id: int) -> int:
        return self._interrupt(queue_id).fileno()

    def rx_queue_intr_enable(self, queue_id: int) -> None:
        self._interrupt(queue_id).enable()

    def rx_queue_intr_disable(self, queue_id: int) -> None:
        self._interrupt(queue_id).disable()

    def tx_queue_setup(self, queue_id: int, nb_desc: int, deferred_start: bool) -> TxQueue:
        conf = self._conf
        txq = TxQueue(
            self._fds[queue_id],
            name=self.ifname,
            queue_id=queue_id,
            port=self._port,
            nb_desc=nb_desc,
            vnet_hdr=bool(self._flags & QueueFlag.VNET_HDR),
            l2=self._mode == "tap",
            ordered=self._sndbuf is not None,
            engine=conf.engine,
            gil=conf.gil,
        )
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

    # -- control

    def link_update(self) -> Link:
        link = self._control.get()
        return Link(link_status=link.up and link.carrier)

    def dev_set_link_up(self) -> None:
        tun.set_carrier(self._fd, True, self._name)
        if self._started:
            link = self._control.get()
            if not link.up:
                self._control.set_up(True)
            if self._dropped_from is None:
                self._dropped_from = link.stats.get("tx_dropped", 0)

    def dev_set_link_down(self) -> None:
        # What the kernel drops from here on was not missed, there is no cable.
        self._missed = self._missed_now()
        self._dropped_from = None
        tun.set_carrier(self._fd, False, self._name)

    def mac_addr_get(self) -> MacAddr:
        return self._control.get().mac

    def mac_addr_set(self, mac: MacAddr) -> None:
        if self._mode == "tun":
            raise ValueError(f"mac: {self._name} is a TUN interface and has no Ethernet address")
        self._control.set_mac(mac)

    def mtu_get(self) -> int:
        return self._control.get().mtu

    def mtu_set(self, mtu: int) -> None:
        need = _max_frame(self._mode, mtu, self._conf.rx_offloads) + 1
        for rxq in self._rxq.values():
            slot = rxq.pool.data_room
            room = (rxq.max_frame // slot + 1) * slot
            if room < need:
                raise ValueError(
                    f"an MTU of {mtu} needs receive buffers of {need} bytes, queue "
                    f"{rxq.queue_id} of {self._name} has {room}: open the device with this mtu, "
                    "or stop it and set the queue up with another pool"
                )
        self._control.set_mtu(mtu)

    # -- what is received
    #
    # All of it happens in the queues. The interface's own IFF_PROMISC and IFF_ALLMULTI are left
    # alone: they belong to the kernel's end of the wire, where they say what the kernel's stack
    # accepts from us, and what we read does not depend on them. Nor is TUNSETTXFILTER used: what
    # it drops would look like frames that nobody read.

    def _filter_by(self, **changes: Any) -> None:
        wanted = replace(self._filter, **changes)
        if self._mode == "tun" and not wanted.promiscuous:
            raise ValueError(
                f"{self._name} is a TUN interface: IP packets have no Ethernet address to filter by"
            )
        self._filter = wanted
        for rxq in self._rxq.values():
            wanted.apply(rxq)

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
                f"{self._name} can subscribe to at most {MAX_GROUPS} groups, got {len(groups)} "
                "(allmulticast receives all)"
            )
        self._filter_by(groups=tuple(groups))

    # -- statistics

    def _kernel_drops(self) -> int:
        """Frames the kernel had for us and dropped: the netdev's tx_dropped, not rx_dropped."""
        return self._control.get().stats.get("tx_dropped", 0)

    def _missed_now(self) -> int:
        if self._dropped_from is None:
            return self._missed
        try:
            return self._missed + max(0, self._kernel_drops() - self._dropped_from)
        except DeviceGone:
            return self._missed

    def stats_get(self) -> Stats:
        stats = queue_stats(self._rxq, self._txq, self._nb_queues, self._nb_queues)
        stats.imissed = self._missed_now()
        return stats

    def stats_reset(self) -> None:
        for queue in self._queues():
            queue.reset_counters()
        self._missed = 0
        if self._dropped_from is not None:
            with contextlib.suppress(DeviceGone):
                self._dropped_from = self._kernel_drops()

    def xstats_get_names(self) -> list[str]:
        return list(self.xstats_get())

    def xstats_get(self) -> dict[str, int]:
        return queue_xstats(self._rxq, self._txq)

    def xstats_reset(self) -> None:
        for queue in self._queues():
            queue.reset_xcounters()


def _probe(args: DevArgs, port: int) -> NetRtap:
    ifname = args.take_ifname("iface", DEFAULT_IFNAME)
    persist = args.take_flag("persist")
    args.finish(("iface=NAME", "persist"))
    return NetRtap(port, ifname, persist=persist)


register_driver(DRIVER, _probe, aliases=("eth_rtap",))
