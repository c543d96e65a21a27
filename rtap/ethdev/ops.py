# SPDX-License-Identifier: BSD-3-Clause
"""The interface of drivers: the ops table, and the types of its arguments and results.

A driver is a subclass of :class:`EthDevOps`, whose entries have the names of DPDK's
``eth_dev_ops``; :class:`rtap.EthDev` is the generic layer on top, which checks states and arguments
and knows no driver. An instance serves one device and keeps that device's private data.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from rtap.ether import MacAddr
from rtap.flags import MbufFlag, RxOffload, TxOffload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from rtap._core.burst import Burst
    from rtap._core.descriptor import Descriptor
    from rtap._core.mempool import Mempool
    from rtap._udp.peers import Peers

__all__ = [
    "LINK_SPEED_UNKNOWN",
    "DescLim",
    "DevInfo",
    "EthConf",
    "EthDevOps",
    "Link",
    "Loan",
    "PortConf",
    "RxQueueOps",
    "Stats",
    "TxQueueOps",
]

#: ``RTE_ETH_SPEED_NUM_UNKNOWN``, the speed of a virtual link.
LINK_SPEED_UNKNOWN = 0xFFFFFFFF

ENGINES = ("auto", "uring", "syscall")
GIL_POLICIES = ("auto", "release", "hold")

_F = TypeVar("_F", bound=IntFlag)


def as_flags(value: int, kind: type[_F], what: str) -> _F:
    """`value` as flags of `kind`; TypeError for other flags, ValueError for negative numbers."""
    if isinstance(value, (RxOffload, TxOffload, MbufFlag)) and not isinstance(value, kind):
        raise TypeError(f"{what} takes {kind.__name__} flags, got {value!r}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} takes {kind.__name__} flags, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{what} takes {kind.__name__} flags, got the negative number {value}")
    return kind(value)


@dataclass(frozen=True)
class EthConf:
    """The argument of :meth:`EthDev.configure` (``rte_eth_conf``: rxmode, txmode).

    ``rx_offloads`` are :class:`RxOffload` flags, ``tx_offloads`` :class:`TxOffload` flags; none by
    default. ``mtu`` is in bytes; None leaves the interface's. ``engine`` says how packets move:
    "uring", "syscall", or "auto", the cheaper one that works here. ``gil`` says what a burst
    does with the interpreter lock: "release", "hold", or "auto", which releases it unless taking it
    back proves slow.

    ``tx_gro`` merges sent frames into super-frames before they enter the kernel: TCP, and UDP
    if ``tx_offloads`` has UDP_TSO. ``rx_gso`` takes super-frames from the kernel, TCP and UDP,
    and hands out frames within the MTU with their checksums.

    TypeError or ValueError for any other value. ``configure`` checks whether the device can do the
    offloads.
    """

    rx_offloads: RxOffload = RxOffload(0)
    tx_offloads: TxOffload = TxOffload(0)
    mtu: int | None = None
    engine: str = "auto"
    gil: str = "auto"
    tx_gro: bool = False
    rx_gso: bool = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "rx_offloads", as_flags(self.rx_offloads, RxOffload, "rx_offloads"))
        set_(self, "tx_offloads", as_flags(self.tx_offloads, TxOffload, "tx_offloads"))
        for name, legal in (("engine", ENGINES), ("gil", GIL_POLICIES)):
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"{name} must be one of {', '.join(legal)}, got {getattr(self, name)!r}"
                )
        for name in ("tx_gro", "rx_gso"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if self.rx_gso and self.rx_offloads & (RxOffload.TCP_LRO | RxOffload.UDP_LRO):
            raise ValueError(
                "rx_gso splits the super-frames that TCP_LRO and UDP_LRO in rx_offloads ask for: "
                "one or the other"
            )


@dataclass(frozen=True)
class PortConf:
    """``rte_eth_dev_portconf``: a driver's suggestions for a caller without an opinion.

    ``burst_size`` is frames for one burst, ``ring_size`` an ``nb_desc``, ``nb_queues`` a number of
    queues.
    """

    burst_size: int = 64
    ring_size: int = 64
    nb_queues: int = 1


@dataclass(frozen=True)
class DescLim:
    """``rte_eth_desc_lim``: bounds of ``nb_desc``, the most frames for each kernel entry.

    ``nb_min`` to ``nb_max``, in multiples of ``nb_align``.
    """

    nb_min: int = 1
    nb_max: int = 1024
    nb_align: int = 1


@dataclass(frozen=True)
class DevInfo:
    """The result of :meth:`EthDev.info` (``rte_eth_dev_info``, then rtap's own fields).

    Sizes are bytes without the frame check sequence.

    Limits: ``min_mtu`` and ``max_mtu``; ``min_rx_bufsize``, the smallest ``data_room`` of a receive
    queue's pool; ``max_rx_pktlen``, the longest frame; ``max_rx_queues`` and ``max_tx_queues``;
    ``max_mac_addrs``, unicast addresses of the filter; ``rx_desc_lim`` and ``tx_desc_lim``, bounds
    of ``nb_desc``. ``rx_offload_capa`` and ``tx_offload_capa`` are the possible offloads.
    ``default_rxportconf`` and ``default_txportconf`` are suggestions.

    Names: ``name`` of the device, ``driver_name``, ``ifname`` and ``if_index`` of the kernel's
    interface, which is ``multi_queue`` or not, and stays (``persist``) or not. ``mode`` is "tap" or
    "tun", ``mac`` the interface's address.

    In use: ``state``, as :attr:`EthDev.state`; ``nb_rx_queues`` and ``nb_tx_queues``; ``mtu``;
    ``rx_offloads`` and ``tx_offloads``, those that are on; ``rx_offloads_refused``, those that were
    asked for and that this kernel does not have; ``tx_offloads_refused``, those that the kernel
    refuses for some kind of frame, so that rtap does them; ``vnet_hdr``, whether a virtio-net
    header is in front of each frame; ``tx_gro`` and ``rx_gso``. ``engine`` is the one in use,
    "auto" until a queue is set up; ``engine_reason`` says why.
    """

    driver_name: str = ""
    if_index: int = 0
    min_mtu: int = 68
    max_mtu: int = 65535
    min_rx_bufsize: int = 0
    max_rx_pktlen: int = 0
    max_rx_queues: int = 0
    max_tx_queues: int = 0
    max_mac_addrs: int = 1
    rx_offload_capa: RxOffload = RxOffload(0)
    tx_offload_capa: TxOffload = TxOffload(0)
    rx_desc_lim: DescLim = DescLim()
    tx_desc_lim: DescLim = DescLim()
    default_rxportconf: PortConf = PortConf()
    default_txportconf: PortConf = PortConf()
    nb_rx_queues: int = 0
    nb_tx_queues: int = 0

    name: str = ""
    state: str = ""
    ifname: str = ""
    mode: str = ""
    mtu: int = 0
    mac: MacAddr = MacAddr("00:00:00:00:00:00")
    persist: bool = False
    multi_queue: bool = False
    vnet_hdr: bool = False
    rx_offloads: RxOffload = RxOffload(0)
    tx_offloads: TxOffload = TxOffload(0)
    rx_offloads_refused: RxOffload = RxOffload(0)
    tx_offloads_refused: TxOffload = TxOffload(0)
    tx_gro: bool = False
    rx_gso: bool = False
    engine: str = "auto"
    engine_reason: str = ""


@dataclass(frozen=True)
class Link:
    """``rte_eth_link``.

    ``link_status`` is True for up: the interface is up and has a carrier. ``link_speed`` is in
    Mb/s, 0xFFFFFFFF for unknown; ``link_duplex`` is True for full duplex, ``link_autoneg`` for
    autonegotiation.
    """

    link_speed: int = LINK_SPEED_UNKNOWN
    link_duplex: bool = True
    link_autoneg: bool = False
    link_status: bool = False


@dataclass
class Stats:
    """``rte_eth_stats``: counts since the last reset.

    ``ipackets`` and ``ibytes`` were received, ``opackets`` and ``obytes`` sent. ``imissed`` counts
    frames that the kernel dropped because nobody read them in time, ``ierrors`` frames received but
    not handed out, ``oerrors`` frames consumed but not sent, ``rx_nombuf`` bursts that found a
    frame but no free mbuf. Bytes do not include the check sequence.

    ``q_ipackets``, ``q_ibytes``, ``q_opackets``, ``q_obytes`` and ``q_errors`` (of receive queues)
    are lists with one entry for each queue, by number.
    """

    ipackets: int = 0
    opackets: int = 0
    ibytes: int = 0
    obytes: int = 0
    imissed: int = 0
    ierrors: int = 0
    oerrors: int = 0
    rx_nombuf: int = 0
    q_ipackets: list[int] = field(default_factory=list)
    q_opackets: list[int] = field(default_factory=list)
    q_ibytes: list[int] = field(default_factory=list)
    q_obytes: list[int] = field(default_factory=list)
    q_errors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loan:
    """A queue pair for another process: descriptors of both sides, which the driver keeps, and the
    sealed memfds for the state of that process's queues, which the caller closes."""

    rx_fd: int
    tx_fd: int
    rx_state: Descriptor
    tx_state: Descriptor


class RxQueueOps(Protocol):
    """The members of a driver's receive queue that the generic layer needs."""

    @property
    def pool(self) -> Mempool: ...
    @property
    def engine(self) -> str: ...
    @property
    def engine_reason(self) -> str: ...
    def rx_burst(self, n: int = 64, timeout: float | None = 0) -> Burst: ...


class TxQueueOps(Protocol):
    """The members of a driver's transmit queue that the generic layer needs."""

    @property
    def engine(self) -> str: ...
    @property
    def engine_reason(self) -> str: ...
    def tx_burst(self, burst: Burst) -> int: ...
    def send(self, frame: Buffer, pool: Mempool) -> bool: ...


class EthDevOps(ABC):
    """The ops table of one device, the base class of every driver's.

    The generic layer calls these entries one at a time (under its lock), in legal states and with
    checked arguments. They raise exceptions; none returns an errno. After `dev_close` no entry is
    called. A driver defines the abstract entries, and those for its further abilities. The defaults
    here are for a device without these abilities.
    """

    @property
    def ifname(self) -> str:
        """The kernel interface's present name. Default: empty, for none."""
        return ""

    def _refuse(self, what: str) -> NoReturn:
        """Raise OSError (EOPNOTSUPP) for an entry that this driver lacks."""
        info = self.dev_infos_get()
        raise OSError(errno.EOPNOTSUPP, f"{info.name or info.driver_name} {what}")

    # -- device

    @abstractmethod
    def dev_infos_get(self) -> DevInfo:
        """Capabilities and facts; the generic layer adds those it knows itself."""

    @abstractmethod
    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        """Release every queue that is set up, and make room for so many.

        Refuses arguments with a ValueError before it changes anything.
        """

    @abstractmethod
    def dev_start(self) -> None:
        """Start every queue whose start is not deferred. When it raises, none is started."""

    @abstractmethod
    def dev_stop(self) -> None:
        """Stop every queue. No burst is in progress; counters stay."""

    @abstractmethod
    def dev_close(self) -> None:
        """Release everything, from any state, also after failures. Must not raise halfway."""

    def dev_forked(self) -> None:
        """In a forked child: drop the child's copies of all objects that keep the device alive.

        Changes neither the device itself nor anything shared with the parent. Default: nothing.
        """

    # -- queues

    @abstractmethod
    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> RxQueueOps:
        """Make a stopped queue; `dev_start` starts it unless its start is deferred.

        It replaces an existing one, which is released when nothing can fail any more.
        """

    @abstractmethod
    def rx_queue_release(self, queue_id: int) -> None:
        """Close a stopped queue, and forget it with its interrupt."""

    def rx_queue_start(self, queue_id: int) -> None:
        """Start one queue of a started device. Default: refused."""
        self._refuse("cannot start single queues")

    def rx_queue_stop(self, queue_id: int) -> None:
        """Stop one queue, whose bursts are over. If the driver can, it steers no more frames
        to it. Default: refused."""
        self._refuse("cannot stop single queues")

    @abstractmethod
    def tx_queue_setup(self, queue_id: int, nb_desc: int, deferred_start: bool) -> TxQueueOps:
        """As `rx_queue_setup`, for a transmit queue."""

    @abstractmethod
    def tx_queue_release(self, queue_id: int) -> None:
        """Close a stopped queue, and forget it."""

    def tx_queue_start(self, queue_id: int) -> None:
        """Start one queue of a started device. Default: refused."""
        self._refuse("cannot start single queues")

    def tx_queue_stop(self, queue_id: int) -> None:
        """Stop one queue, whose bursts are over. Default: refused."""
        self._refuse("cannot stop single queues")

    def rx_queue_intr_fd(self, queue_id: int) -> int:
        """``rte_eth_dev_rx_intr_ctl_q_get_fd``: a descriptor that belongs to the driver and is
        readable while the interrupt is enabled and frames wait. Default: refused."""
        self._refuse("has no receive interrupts: there is no descriptor to wait for")

    def rx_queue_intr_enable(self, queue_id: int) -> None:
        """Let that descriptor signal, also for frames that have already arrived. Default:
        refused."""
        self._refuse("has no receive interrupts: there is no descriptor to wait for")

    def rx_queue_intr_disable(self, queue_id: int) -> None:
        """Stop that descriptor from signalling. Default: refused."""
        self._refuse("has no receive interrupts: there is no descriptor to wait for")

    @property
    def peers(self) -> Peers:
        """The addresses of those at the other end, by number. Default: refused."""
        self._refuse("has no peers: its frames have no senders outside themselves")

    # -- queue pairs that other processes have

    def loan_terms(self) -> dict[str, Any]:
        """What a borrower of queue pairs has to know, in types that JSON has. Default: refused."""
        self._refuse("cannot lend its queues to other processes")

    def queue_defer(self, queue_id: int, rx: bool, tx: bool) -> None:
        """Whether `dev_start` leaves these queues alone from now on. Default: nothing."""

    def queue_lend(self, queue_id: int) -> Loan:
        """Let another process have a stopped queue pair; what its queues count is counted here.
        Default: refused."""
        self._refuse("cannot lend its queues to other processes")

    def queue_take_back(self, queue_id: int) -> None:
        """The other process no longer has it, or must not use it any more."""

    # -- control

    def link_update(self) -> Link:
        """The link as it is now. Default: up."""
        return Link(link_status=True)

    def dev_set_link_up(self) -> None:
        """Let frames through, and report it (INTR_LSC). Default: refused."""
        self._refuse("cannot set its link up")

    def dev_set_link_down(self) -> None:
        """Let no frame through, and report it (INTR_LSC). Default: refused."""
        self._refuse("cannot set its link down")

    def mac_addr_get(self) -> MacAddr:
        """The interface's Ethernet address. Default: all zero, for none."""
        return MacAddr(bytes(6))

    def mac_addr_set(self, mac: MacAddr) -> None:
        """Give the interface another address, and report it (MAC). Default: refused."""
        self._refuse("cannot change its Ethernet address")

    def app_mac_get(self) -> MacAddr:
        """The address for the application's own frames until it chooses one.

        Default: one derived from the interface's, for an application at the other end of the wire;
        all zero if the interface has none.
        """
        mac = self.mac_addr_get()
        return mac.peer() if any(mac.packed) else mac

    def mtu_get(self) -> int:
        """Bytes of the longest IP packet. Default: 1500."""
        return 1500

    def mtu_set(self, mtu: int) -> None:
        """Change the MTU, and report it (MTU); ValueError when the queues' buffers are too small.
        Default: refused."""
        self._refuse("cannot change its MTU")

    # -- the receive filter; the defaults are for a device that receives every frame

    def promiscuous_enable(self) -> None:
        """Receive every frame, as a device does at first. Default: nothing."""

    def promiscuous_disable(self) -> None:
        """Receive only frames to the given addresses and groups. Default: nothing."""

    def allmulticast_enable(self) -> None:
        """While not promiscuous, receive frames to any group. Default: nothing."""

    def allmulticast_disable(self) -> None:
        """While not promiscuous, receive frames only to the given groups. Default: nothing."""

    def mac_addr_add(self, mac: MacAddr, index: int) -> None:
        """Receive frames to `mac` too; it replaces the address at `index`. 0 is the application's
        own. Default: nothing."""

    def mac_addr_remove(self, index: int) -> None:
        """Undo `mac_addr_add` of that index. Default: nothing."""

    def set_mc_addr_list(self, groups: Sequence[MacAddr]) -> None:
        """From now on receive these groups, instead of the former ones. ValueError for more than
        there is room for. Default: nothing."""

    # -- statistics

    def stats_get(self) -> Stats:
        """The counters since the last `stats_reset`. Default: all zero."""
        return Stats()

    def stats_reset(self) -> None:
        """Count from zero again, in `stats_get` only. Default: nothing."""

    def xstats_get_names(self) -> list[str]:
        """The names of `xstats_get`, in its order."""
        return list(self.xstats_get())

    def xstats_get(self) -> dict[str, int]:
        """Further counters by name, since the last `xstats_reset`. Default: none."""
        return {}

    def xstats_reset(self) -> None:
        """Count from zero again, in `xstats_get` only. Default: nothing."""
