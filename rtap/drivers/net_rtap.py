# SPDX-License-Identifier: BSD-3-Clause
"""``net_rtap``: the ops table for Linux TAP and TUN interfaces.

The device exists from probe on: its first descriptor is the first queue's. Stopping lowers the
carrier and leaves the interface up, so that addresses and routes survive.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rtap._core.mempool import Mempool
from rtap._core.threads import require_native
from rtap._ring import RxQueue, TxQueue
from rtap.control import tun
from rtap.control.attach import netns_of
from rtap.control.monitor import Watch, watch
from rtap.control.netlink import MAX_MTU, MIN_MTU, LinkState
from rtap.control.netns import NetNSLike, open_netns
from rtap.control.tun import TunFeature
from rtap.drivers.descriptors import Descriptors
from rtap.drivers.filter import MAX_GROUPS, MAX_MAC_ADDRS, RxFilter
from rtap.drivers.observed import Drops, differences, link_of
from rtap.drivers.offloads import (
    GSO_KINDS,
    RX_CAPA,
    TX_CAPA,
    granted,
    kernel_offloads,
    max_frame,
    needs_header,
    refused,
    rx_room,
    tun_features,
)
from rtap.drivers.options import NO_OPTIONS, IfaceOptions
from rtap.errors import DeviceGone
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.interrupts import RxInterrupt
from rtap.ethdev.ops import DescLim, DevInfo, EthConf, Link, PortConf, Stats
from rtap.ethdev.registry import register_driver
from rtap.ethdev.stats import queue_stats, queue_xstats
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload

__all__ = [
    "DEFAULT_IFNAME",
    "DEFAULT_NB_DESC",
    "DRIVER",
    "NetRtap",
]

log = logging.getLogger("rtap")

DRIVER = "net_rtap"
DEFAULT_IFNAME = "rtap%d"
MAX_QUEUES = 128
MAX_NB_DESC = 32768
DEFAULT_NB_DESC = 64
#: Buffers for the longest frame that a queue has which splits what it reads.
SPLIT_READS = 64
LOCK_SLICE_S = 0.01


class NetRtap:
    """:class:`rtap.ethdev.ops.EthDevOps` for one TAP or TUN interface."""

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
        self._port = port
        self._mode = mode
        self._conf = EthConf()
        self._features = TunFeature(0)
        self._rxq: dict[int, RxQueue] = {}
        self._txq: dict[int, TxQueue] = {}
        self._nb_queues = 0
        self._software_gso = 0
        self._deferred: set[RxQueue | TxQueue] = set()
        self._intr: dict[int, RxInterrupt] = {}
        self._filter = RxFilter()
        self._started = False
        #: Makes a pool with that much data room, where the queues' pool is ours to replace.
        self.new_pool: Callable[[int], Mempool] | None = None

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
            self._watch = self._new_watch()
            undo.callback(self._watch.cancel)
            # As last looked at, see _observe.
            self._seen = self._control.get()
            self._removed = False
            # What an interface was that is half made anew.
            self._lost_state: LinkState | None = None
            self._drops = Drops(self._seen.dropped)
            undo.pop_all()

    # -- the interface, whoever changes it

    def _new_watch(self) -> Watch:
        # Weak: the monitor would keep an object that nobody else has, and its interface with it.
        method = weakref.WeakMethod(self._hint)

        def hint(about: Watch) -> None:
            look = method()
            if look is None:
                about.cancel()
            else:
                look(about)

        return watch(self._control.netns.fd, self._control.index, hint)

    def _hint(self, hint: Watch) -> None:
        """On the netlink thread: something may have happened to the interface."""
        # Whoever cancels the watch may hold the lock, and waits for this thread.
        while not self._port.lock.acquire(timeout=LOCK_SLICE_S):
            if hint.cancelled:
                return
        try:
            if not hint.cancelled:
                self._observe()
        finally:
            self._port.lock.release()

    def _observe(self) -> None:
        """Look at the interface, go along with what has changed, and tell of it."""
        try:
            now = self._control.get()
            if not self._watch.covers(self._control.netns.fd, self._control.index):
                self._watch.cancel()
                self._watch = self._new_watch()
                self._port.event(EthEvent.NETNS)
                now = self._control.get()
        except DeviceGone:
            if not self._removed:
                self._removed = True
                if self._tap.lost:
                    self._port.event(EthEvent.INTR_RMV)
                else:
                    log.warning(
                        "%s went to where it can no longer be controlled from", self._tap.name
                    )
            return
        seen, self._seen = self._seen, now
        if now.name != seen.name:
            self._take_name(now.name)
        if now.mtu != seen.mtu:
            self._fit(now.mtu)
        self._plug(now)
        for event, data in differences(seen, now):
            self._port.event(event, data)

    def _take_name(self, name: str) -> None:
        self._tap.name = name
        for queue in self._queues():
            queue.name = name

    def _plug(self, now: LinkState) -> None:
        """While the carrier is off nothing is sent, and what the kernel drops was not missed."""
        for txq in self._txq.values():
            txq.set_plugged(now.carrier)
        self._drops.turn(now.dropped, started=self._started, plugged=now.carrier)

    def _needs(self, mtu: int) -> int:
        return max_frame(self._mode, mtu, kernel_offloads(self._conf))

    def _fit(self, mtu: int) -> None:
        """Somebody set the MTU: have buffers for it, or say that longer frames will be lost."""
        try:
            self._make_room(mtu)
        except (ValueError, MemoryError) as exc:
            log.warning(
                "the MTU of %s is now %d, and longer frames than its receive buffers hold will be "
                "dropped and counted as errors: %s",
                self._tap.name,
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

    def _revive(self) -> None:
        """Make a deleted interface anew, under the queues there are."""
        self._watch.cancel()
        if self._lost_state is None:
            self._lost_state = self._seen
        self._tap.revive(self._lost_state)
        self._features = tun.set_offload(self._tap.first, self._features, self._tap.name)
        self._watch = self._new_watch()
        self._removed = False
        self._seen = self._control.get()
        self._drops.restart(self._seen.dropped)
        self._plug(self._seen)
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
        self._release_queues()
        self._nb_queues = 0
        self._software_gso = 0
        if self._must_revive:
            self._revive()
        self._tap.negotiate_header(needs_header(conf))
        self._tap.resize(nb_rx_queues)
        self._features = tun.set_offload(self._tap.first, features, self._tap.name)
        if conf.mtu is not None and conf.mtu != self.mtu_get():
            self._control.set_mtu(conf.mtu)
        self._conf = replace(conf, rx_offloads=granted(conf.rx_offloads, self._features))
        self._nb_queues = nb_rx_queues

    def dev_start(self) -> None:
        if self._must_revive:
            self._revive()
        for q, rxq in self._rxq.items():
            rxq.purge()  # before it is detached: the kernel would not count what it throws away
            self._tap.attach(q, rxq not in self._deferred)
        for queue in self._queues():
            if queue not in self._deferred:
                queue.start()
        try:
            tun.set_carrier(self._tap.first, True, self._tap.name)
            if not self._control.get().up:
                self._control.set_up(True)
            self._started = True
            self._observe()
        except BaseException:
            self._started = False
            self._stop_queues()
            raise
        for q, intr in self._intr.items():
            intr.set_live(self._rxq[q] not in self._deferred)

    def _stop_queues(self) -> None:
        for intr in self._intr.values():
            intr.set_live(False)
        for queue in self._queues():
            queue.stop()

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
        """The carrier is that of others, too: have the kernel send their queues all frames."""
        for q, rxq in self._rxq.items():
            if self._tap.is_attached(q):
                rxq.purge()  # as in dev_start
                self._tap.attach(q, False)
        self._observe()

    def dev_close(self) -> None:
        self._started = False
        stays = True

        def await_gone() -> None:
            if not stays:
                self._tap.await_gone()

        with contextlib.ExitStack() as stack:
            # Last entered runs first, and whatever fails, the rest is still done.
            stack.callback(self._control.close)
            stack.callback(await_gone)
            stack.callback(self._tap.close)
            for queue in self._queues():
                stack.callback(queue.close)
            for intr in self._intr.values():
                stack.callback(intr.close)
            stack.callback(self._watch.cancel)
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()
            with contextlib.suppress(OSError):  # deleted: nothing to wait for
                self._tap.let_die()
                stays = self._tap.persist or self._tap.adopted

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        self._tap.close()
        self._control.close()

    # -- queues

    def _queues(self) -> list[RxQueue | TxQueue]:
        return [*self._rxq.values(), *self._txq.values()]

    def _release_queues(self) -> None:
        for q in list(self._rxq):
            self.rx_queue_release(q)
        for q in list(self._txq):
            self.tx_queue_release(q)

    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> RxQueue:
        conf = self._conf
        mtu = self.mtu_get()
        need = self._needs(mtu)
        split = None
        if conf.rx_gso:
            longest = max_frame(self._mode, mtu, RxOffload(0))
            if pool.size * pool.data_room < longest:
                raise ValueError(
                    f"frames of {longest} bytes do not fit into a pool of {pool.size} mbufs of "
                    f"{pool.data_room} bytes"
                )
            pool, split = Mempool(SPLIT_READS, need + 1), pool
        rxq = RxQueue(
            self._tap.fds[queue_id],
            pool,
            name=self.ifname,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            vnet_hdr=self._tap.vnet_hdr,
            max_frame=need,
            scatter=bool(conf.rx_offloads & RxOffload.SCATTER),
            l2=self._mode == "tap",
            offloads=conf.rx_offloads & ~RxOffload.SCATTER if self._tap.vnet_hdr else 0,
            split=split,
            shared=self._tap.adopted,
            engine=conf.engine,
            gil=conf.gil,
        )
        self._filter.apply(rxq)
        if queue_id in self._rxq:
            self.rx_queue_release(queue_id)
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

    def _interrupt(self, queue_id: int) -> RxInterrupt:
        intr = self._intr.get(queue_id)
        if intr is None:
            live = self._started and self._tap.is_attached(queue_id)
            wake = self._rxq[queue_id].wake
            intr = self._intr[queue_id] = RxInterrupt(self._tap.fds[queue_id], live, wake)
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
            self._tap.fds[queue_id],
            name=self.ifname,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            vnet_hdr=self._tap.vnet_hdr,
            l2=self._mode == "tap",
            ordered=self._tap.sndbuf is not None,
            on_refused=self._gso_refused,
            gro=conf.tx_gro,
            gro_udp=bool(conf.tx_offloads & TxOffload.UDP_TSO),
            shared=self._tap.adopted,
            engine=conf.engine,
            gil=conf.gil,
        )
        txq.set_plugged(self._seen.carrier)
        txq.software_gso = self._software_gso
        if queue_id in self._txq:
            self.tx_queue_release(queue_id)
        self._txq[queue_id] = txq
        if deferred_start:
            self._deferred.add(txq)
        return txq

    def _gso_refused(self, kind: int) -> None:
        """In a thread that bursts: the kernel splits no such super-frames."""
        if self._software_gso & kind:
            return
        self._software_gso |= kind
        for txq in list(self._txq.values()):
            txq.software_gso = self._software_gso
        log.warning(
            "%s: the kernel refuses every super-frame of %s, they are split in software from now "
            "on",
            self._tap.name,
            GSO_KINDS[kind],
        )

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
        return link_of(self._control.get())

    def dev_set_link_up(self) -> None:
        tun.set_carrier(self._tap.first, True, self._tap.name)
        if self._started and not self._control.get().up:
            self._control.set_up(True)
        self._observe()

    def dev_set_link_down(self) -> None:
        for txq in self._txq.values():
            txq.set_plugged(False)
        tun.set_carrier(self._tap.first, False, self._tap.name)
        self._observe()

    def mac_addr_get(self) -> MacAddr:
        return self._control.get().mac

    def mac_addr_set(self, mac: MacAddr) -> None:
        if self._mode == "tun":
            raise ValueError(
                f"mac: {self._tap.name} is a TUN interface and has no Ethernet address"
            )
        self._control.set_mac(mac)
        self._observe()

    def mtu_get(self) -> int:
        return self._control.get().mtu

    def mtu_set(self, mtu: int) -> None:
        try:
            self._make_room(mtu)
        except ValueError as exc:
            raise ValueError(
                f"an MTU of {mtu} needs larger receive buffers than {self._tap.name} has: {exc}; "
                "open the device with this mtu, or stop it and set its queues up with another pool"
            ) from None
        self._control.set_mtu(mtu)
        self._observe()

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
                f"{self._tap.name} is a TUN interface: IP packets have no Ethernet address to "
                "filter by"
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
                f"{self._tap.name} can subscribe to at most {MAX_GROUPS} groups, got {len(groups)} "
                "(allmulticast receives all)"
            )
        self._filter_by(groups=tuple(groups))

    # -- statistics

    def _count_drops(self) -> None:
        with contextlib.suppress(DeviceGone):
            self._drops.count(self._control.get().dropped)

    def stats_get(self) -> Stats:
        self._count_drops()
        stats = queue_stats(self._rxq, self._txq, self._nb_queues, self._nb_queues)
        stats.imissed = self._drops.missed
        return stats

    def stats_reset(self) -> None:
        self._count_drops()
        for queue in self._queues():
            queue.reset_counters()
        self._drops.missed = 0

    def xstats_get_names(self) -> list[str]:
        return list(self.xstats_get())

    def xstats_get(self) -> dict[str, int]:
        self._count_drops()
        return queue_xstats(self._rxq, self._txq) | {"link_down_drops": self._drops.unplugged}

    def xstats_reset(self) -> None:
        self._count_drops()
        for queue in self._queues():
            queue.reset_xcounters()
        self._drops.unplugged = 0


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
