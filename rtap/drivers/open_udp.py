# SPDX-License-Identifier: BSD-3-Clause
""":func:`rtap.open_udp`: a UDP socket as a device, with a pool that fits, in one call."""

from __future__ import annotations

from rtap._core.mempool import Mempool
from rtap.control import udp
from rtap.control.netns import NetNSLike
from rtap.control.udp import Address, UdpOptions
from rtap.drivers.interface import DEFAULT_NB_DESC
from rtap.drivers.net_udp import DEFAULT_PEERS, DRIVER, NetUdp
from rtap.drivers.open_tap import DEFAULT_DATA_ROOM, pool_size
from rtap.ethdev.device import EthDev
from rtap.ethdev.events import Port
from rtap.ethdev.ops import EthConf, as_flags
from rtap.flags import TxOffload

__all__ = ["open_udp"]


def open_udp(
    local: Address | None = None,
    remote: Address | None = None,
    *,
    netns: NetNSLike = None,
    sock: object = None,
    queues: int = 1,
    peers: int = DEFAULT_PEERS,
    unknown: str = "deliver",
    rcvbuf: int | None = None,
    sndbuf: int | None = None,
    pmtu: str | None = None,
    tx_offloads: TxOffload | int = 0,
    nb_mbufs: int | None = None,
    data_room: int | None = None,
    headroom: int = 128,
    gil: str = "auto",
    nb_desc: int = DEFAULT_NB_DESC,
) -> EthDev:
    """Open a UDP socket and return its device, started, with a pool of its own.

    A frame of the device is the payload of a datagram. A super-frame that is sent leaves as
    datagrams of equal size: each has what lies in front of the inner packet, and one segment of it.

    Parameters
    ----------
    local
        The address to bind, a tuple of host and port: ``("::", 4789)`` for IPv6 and IPv4,
        ``("0.0.0.0", 4789)`` for IPv4 alone. Port 0, or None with a `remote`, lets the kernel
        choose.
    remote
        The only peer: the socket is connected to it, and the kernel lets nobody else in. Mbufs from
        it and for it have the peer number 0. None for any number of peers, see `peers`.
    netns
        Where the socket is made, as in :func:`rtap.open`.
    sock
        A UDP socket of the caller's instead of all these. It is duplicated, and the caller keeps
        it; reads and writes of the device never block, whatever the socket's mode.
    queues
        Queue pairs, 1 to 128, each a socket of its own with the same address (SO_REUSEPORT): the
        kernel gives all datagrams of a sender to the same one. Other programs of this user may have
        that address then, too. One for `sock`.
    peers, unknown
        The size of the table of peers, ``dev.peers``, and what happens to datagrams from others:
        "deliver" hands them out with the number 0, "learn" gives the sender a number as long as
        there are any, "drop" drops them. All are counted (``rx_q0_unknown_packets``).
    rcvbuf, sndbuf
        Bytes that may wait in the socket, 8 and 4 MiB by default; above the system's limits only
        with CAP_NET_ADMIN.
    pmtu
        "do" refuses datagrams above the path's MTU (counted in ``tx_q0_too_big_packets``), "dont"
        lets the kernel make fragments; "want", "probe", "interface" and "omit" as in ``ip(7)``.
    tx_offloads
        What mbufs may ask for: for instance ``TxOffload.TCP_TSO``. Super-frames and unfinished
        checksums that were received elsewhere need none.
    nb_mbufs, data_room, headroom
        Size of the pool. A datagram longer than `data_room` becomes a chain of mbufs. `headroom` is
        what can be put in front of each without a copy.
    gil, nb_desc
        As in :func:`rtap.open`.

    Raises ValueError or TypeError for arguments, OSError when the kernel refuses, for instance an
    address that is not this machine's. A failure leaves nothing behind.
    """
    if pmtu is not None and pmtu not in udp.PMTU:
        raise ValueError(f"pmtu must be {', '.join(udp.PMTU)}, got {pmtu!r}")
    if sock is None:
        if local is None and remote is None:
            raise ValueError("open_udp needs local=(host, port), remote=(host, port) or sock")
    elif any(value is not None for value in (local, remote, netns, rcvbuf, sndbuf, pmtu)):
        raise ValueError(
            "sock: the socket has its addresses and options, leave local, remote, netns, rcvbuf, "
            "sndbuf and pmtu out"
        )
    default = UdpOptions()
    options = UdpOptions(
        default.rcvbuf if rcvbuf is None else rcvbuf,
        default.sndbuf if sndbuf is None else sndbuf,
        pmtu,
    )
    conf = EthConf(tx_offloads=as_flags(tx_offloads, TxOffload, "tx_offloads"), gil=gil)

    def make(port: Port) -> NetUdp:
        return NetUdp(
            port,
            f"{DRIVER}{port.id}",
            local=local,
            remote=remote,
            netns=netns,
            sock=sock,
            options=options,
            peers=peers,
            unknown=unknown,
        )

    dev = EthDev._create(DRIVER, make, numbered=True)
    try:
        dev.configure(queues, queues, conf)
        room = DEFAULT_DATA_ROOM if data_room is None else data_room
        n = pool_size(room, queues) if nb_mbufs is None else nb_mbufs
        pool = Mempool(n, room, headroom, name=dev.name)
        for q in range(queues):
            dev.rx_queue_setup(q, nb_desc, pool)
            dev.tx_queue_setup(q, nb_desc)
        dev.start()
    except BaseException:
        dev.close()
        raise
    return dev
