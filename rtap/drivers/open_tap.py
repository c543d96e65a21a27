# SPDX-License-Identifier: BSD-3-Clause
""":func:`rtap.open`: an interface, its device and a pool that fits, in one call."""

from __future__ import annotations

from rtap._core.mempool import Mempool
from rtap.control import tun
from rtap.control.netns import NetNSLike
from rtap.drivers.interface import DEFAULT_NB_DESC
from rtap.drivers.net_rtap import DEFAULT_IFNAME, DRIVER, NetRtap
from rtap.drivers.offloads import needs_header, rx_room, tun_features
from rtap.drivers.options import Account, IfaceOptions
from rtap.ethdev.device import EthDev
from rtap.ethdev.events import Port
from rtap.ethdev.ops import EthConf, as_flags
from rtap.ether import MacAddr, MacLike
from rtap.flags import RxOffload, TxOffload

__all__ = ["open", "pool_size", "rx_data_room"]

DEFAULT_DATA_ROOM = 2048


def rx_data_room(mtu: int, offloads: RxOffload, mode: str) -> int:
    """Bytes of data room for the longest frame, unless it may be scattered over several mbufs."""
    if offloads & RxOffload.SCATTER:
        return DEFAULT_DATA_ROOM
    return max(DEFAULT_DATA_ROOM, rx_room(mtu, offloads, mode))


def pool_size(room: int, queues: int) -> int:
    """Enough mbufs for a few bursts in hand on every queue, by default tens of megabytes at
    most (memory that is never touched is never used)."""
    if room <= 4096:
        return max(4096, 256 * queues)
    if room <= 16384:
        return max(2048, 128 * queues)
    return max(512, 64 * queues)


def open(  # noqa: A001 - rtap.open() reads like io.open()
    name: str = "",
    *,
    queues: int = 1,
    mtu: int | None = None,
    mac: MacLike | None = None,
    persist: bool = False,
    rx_offloads: RxOffload | int = 0,
    tx_offloads: TxOffload | int = 0,
    tx_gro: bool = False,
    rx_gso: bool = False,
    mode: str = "tap",
    nb_mbufs: int | None = None,
    data_room: int | None = None,
    engine: str = "auto",
    gil: str = "auto",
    netns: NetNSLike = None,
    sndbuf: int | None = None,
    txqueuelen: int | None = None,
    owner: Account | None = None,
    group: Account | None = None,
    fd: int | None = None,
    nb_desc: int = DEFAULT_NB_DESC,
) -> EthDev:
    """Open a TAP (or TUN) interface and return its device, started, with a pool of its own.

    Parameters
    ----------
    name
        Interface name, or a pattern with ``%d`` ("tap%d"); "rtap%d" by default. A persistent
        interface is taken over, a new one is made if none exists.
    queues
        Queue pairs, 1 to 128. An existing single-queue interface has one.
    mtu, mac
        For the kernel's interface; None leaves it unchanged.
    persist
        Keep the interface when the device is closed.
    rx_offloads, tx_offloads
        For example ``RxOffload.TCP_CKSUM | RxOffload.TCP_LRO``: TCP arrives in frames of up to
        64 KiB. LRO needs the checksum offload of the same protocol, and 64 KiB buffers unless
        ``SCATTER`` is on too.
    tx_gro
        Merge frames of a TCP flow into super-frames as they are sent, with ``UDP_TSO`` in
        `tx_offloads` datagrams too. For programs that send frames within the MTU.
    rx_gso
        Take super-frames from the kernel and split them into frames within the MTU, with their
        checksums. For programs that work on such frames. Replaces LRO in `rx_offloads`.
    mode
        "tap" for Ethernet frames, "tun" for IP packets.
    nb_mbufs, data_room
        Size of the pool; by default as much as MTU, offloads and queues need. Without
        `data_room` the pool is replaced when the MTU outgrows its buffers.
    engine
        "uring", "syscall", or "auto": the cheaper one that works here
        (``info().engine_reason``).
    gil
        "release" or "hold" the interpreter lock during a burst, or "auto".
    netns
        Where the interface is made: a :class:`NetNS`, a descriptor, a name of ``ip netns``, a
        path; the calling thread's network namespace by default.
    sndbuf
        Bytes that may wait in the kernel's stack before sends fall short (TUNSETSNDBUF);
        unlimited by default.
    txqueuelen
        How many frames may wait in each queue, 1 to 524288 (the kernel begins with 1000).
    owner, group
        The user and the group that may attach to the interface without CAP_NET_ADMIN, by number or
        name. If neither is set, everybody may who can open ``/dev/net/tun``.
    fd
        A descriptor that somebody else attached to an interface (TUNSETIFF), instead of `name` and
        `netns`. It is duplicated, and the caller keeps it; both share one open file, which becomes
        non-blocking (if it is made blocking again, bursts still never block). Offloads need
        IFF_VNET_HDR on it. Works without CAP_NET_ADMIN if the interface is
        in the caller's network namespace, up, and one queue is enough.
    nb_desc
        The most frames for each kernel entry.

    Raises ValueError or TypeError for arguments, OSError when the kernel refuses: PermissionError
    without CAP_NET_ADMIN, FileNotFoundError without ``/dev/net/tun``, EBUSY for an interface that
    another process has open. A failure leaves nothing behind.
    """
    if mode not in ("tap", "tun"):
        raise ValueError(f"mode must be tap or tun, got {mode!r}")
    conf = EthConf(
        as_flags(rx_offloads, RxOffload, "rx_offloads"),
        as_flags(tx_offloads, TxOffload, "tx_offloads"),
        mtu,
        engine,
        gil,
        tx_gro=tx_gro,
        rx_gso=rx_gso,
    )
    tun_features(conf.rx_offloads)
    options = IfaceOptions(owner, group, txqueuelen, sndbuf, fd)
    if fd is not None and (name or netns is not None):
        raise ValueError("fd: the descriptor says which interface it is, leave name and netns out")
    ifname = tun.check_ifname(name or DEFAULT_IFNAME)
    address = None if mac is None else MacAddr(mac)

    made: list[NetRtap] = []

    def make(port: Port) -> NetRtap:
        made.append(
            NetRtap(
                port,
                ifname,
                mode=mode,
                netns=netns,
                options=options,
                vnet_hdr=needs_header(conf),
            )
        )
        return made[0]

    dev = EthDev._create(DRIVER, make, numbered=True)
    try:
        dev.configure(queues, queues, conf)
        if address is not None:
            dev.mac = address

        name = dev.name

        def new_pool(room: int) -> Mempool:  # refers to no device: the driver keeps it
            n = pool_size(room, queues) if nb_mbufs is None else nb_mbufs
            return Mempool(n, room, name=name)

        if data_room is None and not conf.rx_offloads & RxOffload.SCATTER:
            made[0].new_pool = new_pool
        room = rx_data_room(dev.mtu, conf.rx_offloads, mode) if data_room is None else data_room
        pool = new_pool(room)
        for q in range(queues):
            dev.rx_queue_setup(q, nb_desc, pool)
            dev.tx_queue_setup(q, nb_desc)
        dev.start()
        if persist:
            # Last, so that a failure leaves no interface behind.
            made[0].set_persist(True)
    except BaseException:
        dev.close()
        raise
    return dev
