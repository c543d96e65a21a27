# SPDX-License-Identifier: BSD-3-Clause
"""``net_udp``: the ops table of a UDP socket. Its frames are the payloads of datagrams.

Super-frames that are sent are split into datagrams of equal size, which enter the kernel
together; datagrams that the kernel has put together are handed out one by one.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
from typing import TYPE_CHECKING

from rtap._core.mempool import Mempool
from rtap._core.threads import require_native
from rtap._udp.peers import Peers
from rtap._udp.queues import UdpRxQueue, UdpTxQueue
from rtap.control import udp
from rtap.control.netns import NetNSLike, call_in, open_netns
from rtap.control.udp import Address, UdpOptions
from rtap.drivers.interface import DEFAULT_NB_DESC, MAX_NB_DESC, MAX_QUEUES
from rtap.drivers.queues import InterruptDriver
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import Port
from rtap.ethdev.ops import DescLim, DevInfo, EthConf, PortConf, Stats
from rtap.flags import TxOffload

if TYPE_CHECKING:
    from rtap.control.netns import NetNS

__all__ = ["DRIVER", "NetUdp", "probe"]

DRIVER = "net_udp"
MAX_PAYLOAD = 65507
DEFAULT_PEERS = 1024
INT_MAX = (1 << 31) - 1
_TX_CAPA = (
    TxOffload.MULTI_SEGS
    | TxOffload.IPV4_CKSUM
    | TxOffload.UDP_CKSUM
    | TxOffload.TCP_CKSUM
    | TxOffload.TCP_TSO
    | TxOffload.UDP_TSO
)

#: The sockets of devices with queues, as in :mod:`rtap.drivers.descriptors`.
_held: set[_socket.socket] = set()


class NetUdp(InterruptDriver[UdpRxQueue, UdpTxQueue]):
    """The ops table of a device on UDP sockets, one for each queue pair."""

    def __init__(
        self,
        port: Port,
        name: str,
        *,
        local: Address | None = None,
        remote: Address | None = None,
        netns: NetNSLike = None,
        sock: object = None,
        options: UdpOptions | None = None,
        peers: int = DEFAULT_PEERS,
        unknown: str = "deliver",
    ) -> None:
        require_native()
        super().__init__(port)
        self._name = name
        self._options = options or UdpOptions()
        self._local, self._remote = local, remote
        self._socks: list[_socket.socket] = []
        self._missed = self._xmissed = 0
        self._drops: dict[_socket.socket, int] = {}
        self._netns: NetNS | None = None
        self._given: _socket.socket | None = None
        self._connected = remote is not None
        self._shared = False
        if sock is not None:
            self._given, self._connected = udp.borrow_socket(sock)
            self._family = int(self._given.family)
        else:
            self._family = udp.family_of(local, remote)
            self._netns = open_netns(netns)
        try:
            self._peers = Peers(self._family, peers, unknown)
            if self._given is None:
                self._claim()
        except BaseException:
            self._close_all()
            raise

    def _claim(self) -> None:
        """Bind the first socket: from now on the address is this device's."""
        self._given = self._open(shared=False)
        name = self._given.getsockname()
        self._local = (name[0], name[1])  # the port that the kernel has chosen

    def _open(self, *, shared: bool) -> _socket.socket:
        assert self._netns is not None
        return call_in(
            self._netns.fd,
            lambda: udp.open_socket(
                self._family, self._local, self._remote, self._options, shared=shared
            ),
        )

    @property
    def peers(self) -> Peers:
        return self._peers

    # -- device

    def dev_infos_get(self) -> DevInfo:
        refused = {txq.gso_refused for txq in self._txq.values()} - {None}
        return DevInfo(
            driver_name=DRIVER,
            name=self._name,
            max_mtu=MAX_PAYLOAD,
            min_rx_bufsize=64,
            max_rx_pktlen=MAX_PAYLOAD,
            max_rx_queues=MAX_QUEUES if self._netns is not None else 1,
            max_tx_queues=MAX_QUEUES if self._netns is not None else 1,
            max_mac_addrs=0,
            tx_offload_capa=_TX_CAPA,
            rx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            tx_desc_lim=DescLim(nb_max=MAX_NB_DESC),
            default_rxportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            default_txportconf=PortConf(ring_size=DEFAULT_NB_DESC),
            mode="udp",
            mtu=MAX_PAYLOAD,
            multi_queue=True,
            tx_offloads=self._conf.tx_offloads,
            tx_offloads_refused=TxOffload.UDP_TSO if refused else TxOffload(0),
            engine="syscall",
        )

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        if conf.rx_gso or conf.tx_gro:
            raise ValueError(
                f"{DRIVER}: rx_gso and tx_gro are always on: datagrams are put together and taken "
                "apart"
            )
        if conf.rx_offloads:
            raise ValueError(f"{DRIVER} has no receive offloads, got {conf.rx_offloads!r}")
        if conf.engine == "uring":
            raise ValueError(f"{DRIVER} works by system calls (engine='auto' or 'syscall')")
        if conf.mtu is not None:
            raise ValueError(f"{DRIVER} has no MTU of its own: the path has one")
        self._release_queues()
        self._nb_queues = (0, 0)
        self._conf = conf
        self._resize(max(nb_rx_queues, nb_tx_queues))
        self._nb_queues = (nb_rx_queues, nb_tx_queues)

    def _resize(self, n: int) -> None:
        while len(self._socks) > n:
            self._close(self._socks.pop())
        if n > 1 and not self._shared and self._netns is not None:
            # The first one has the address alone; all of them have to allow others.
            self._shared = True
            while self._socks:
                self._close(self._socks.pop())
            if self._given is not None:
                self._given.close()
                self._given = None
        while len(self._socks) < n:
            if self._given is not None:
                sock, self._given = self._given, None
            else:
                sock = self._open(shared=True)
            _held.add(sock)
            self._socks.append(sock)
            self._drops[sock] = udp.get_drops(sock)  # a socket of the caller's had a life before

    def _close(self, sock: _socket.socket) -> None:
        self._count_drops()
        self._drops.pop(sock, None)
        _held.discard(sock)
        sock.close()

    def dev_start(self) -> None:
        for rxq in self._rxq.values():
            rxq.purge()
        self._start_queues()
        self._started = True
        for q, intr in self._intr.items():
            intr.set_live(self._is_live(q))

    def dev_stop(self) -> None:
        self._stop_queues()
        self._started = False

    def _close_all(self) -> None:
        for sock in self._socks:
            _held.discard(sock)
            sock.close()
        self._socks.clear()
        if self._given is not None:
            self._given.close()
            self._given = None
        if self._netns is not None:
            self._netns.close()

    def dev_close(self) -> None:
        self._started = False
        with contextlib.ExitStack() as stack:
            # The last entry runs first; if one fails, the rest is still done.
            stack.callback(self._close_all)
            for queue in self._queues():
                stack.callback(queue.close)
            for intr in self._intr.values():
                stack.callback(intr.close)
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        self._close_all()

    # -- queues

    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> UdpRxQueue:
        return UdpRxQueue(
            self._socks[queue_id].fileno(),
            pool,
            self._peers,
            name=self._name,
            connected=self._connected,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            gil=self._conf.gil,
        )

    def _make_tx(self, queue_id: int, nb_desc: int) -> UdpTxQueue:
        return UdpTxQueue(
            self._socks[queue_id].fileno(),
            self._peers,
            name=self._name,
            connected=self._connected,
            queue_id=queue_id,
            port=self._port.id,
            nb_desc=nb_desc,
            gil=self._conf.gil,
        )

    def rx_queue_start(self, queue_id: int) -> None:
        self._rxq[queue_id].purge()
        super().rx_queue_start(queue_id)
        if queue_id in self._intr:
            self._intr[queue_id].set_live(True)

    def rx_queue_stop(self, queue_id: int) -> None:
        if queue_id in self._intr:
            self._intr[queue_id].set_live(False)
        super().rx_queue_stop(queue_id)

    def _is_live(self, queue_id: int) -> bool:
        return self._rxq[queue_id] not in self._deferred

    def mtu_get(self) -> int:
        return MAX_PAYLOAD

    # -- statistics

    def _count_drops(self) -> None:
        for sock in self._socks:
            now = udp.get_drops(sock)
            new = (now - self._drops.get(sock, 0)) % (1 << 32)
            self._drops[sock] = now
            self._missed += new
            self._xmissed += new

    def stats_get(self) -> Stats:
        self._count_drops()
        stats = super().stats_get()
        stats.imissed = self._missed
        return stats

    def stats_reset(self) -> None:
        self._count_drops()
        super().stats_reset()
        self._missed = 0

    def xstats_get(self) -> dict[str, int]:
        self._count_drops()
        return super().xstats_get() | {"rx_missed_packets": self._xmissed}

    def xstats_reset(self) -> None:
        self._count_drops()
        super().xstats_reset()
        self._xmissed = 0


_KEYS = (
    "local=HOST:PORT",
    "remote=HOST:PORT",
    "netns=NAME",
    "peers=N",
    "unknown=deliver|learn|drop",
    "rcvbuf=BYTES",
    "sndbuf=BYTES",
    "pmtu=" + "|".join(udp.PMTU),
)


def options_of(args: DevArgs) -> UdpOptions:
    """Take the socket's options out of device arguments."""
    default = UdpOptions()
    pmtu = args.take_str("pmtu", "") or None
    if pmtu is not None and pmtu not in udp.PMTU:
        raise ValueError(f"{args.name}: pmtu must be {', '.join(udp.PMTU)}, got {pmtu!r}")
    return UdpOptions(
        args.take_int("rcvbuf", default.rcvbuf, 1, INT_MAX),
        args.take_int("sndbuf", default.sndbuf, 1, INT_MAX),
        pmtu,
    )


def probe(args: DevArgs, port: Port) -> NetUdp:
    """Makes a device, see :func:`rtap.register_driver`."""
    addresses: dict[str, Address | None] = {}
    for key in ("local", "remote"):
        text = args.take_str(key, "")
        try:
            addresses[key] = udp.parse(text, key) if text else None
        except ValueError as exc:
            raise ValueError(f"{args.name}: {exc}") from None
    netns = args.take_str("netns", "") or None
    peers = args.take_int("peers", DEFAULT_PEERS, 1, 65535)
    unknown = args.take_str("unknown", "deliver")
    options = options_of(args)
    args.finish(_KEYS)
    if addresses["local"] is None and addresses["remote"] is None:
        raise ValueError(f"{args.name}: {DRIVER} needs local=HOST:PORT or remote=HOST:PORT")
    try:
        return NetUdp(
            port,
            args.name,
            local=addresses["local"],
            remote=addresses["remote"],
            netns=netns,
            options=options,
            peers=peers,
            unknown=unknown,
        )
    except ValueError as exc:
        raise ValueError(f"{args.name}: {exc}") from None
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise OSError(exc.errno, f"{args.name}: another program has that address") from None
        raise
