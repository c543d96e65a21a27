# SPDX-License-Identifier: BSD-3-Clause
"""The offloads of net_rtap, their requirements on the kernel, and the resulting frame lengths."""

from __future__ import annotations

from rtap.control.tun import TunFeature
from rtap.ethdev.ops import EthConf
from rtap.flags import RxOffload, TxOffload

__all__ = [
    "GSO_KINDS",
    "RX_CAPA",
    "TX_CAPA",
    "kernel_offloads",
    "lacking",
    "max_frame",
    "needs_header",
    "refused",
    "rx_room",
    "tun_features",
]

# An Ethernet header and two VLAN tags.
_L2_MAX = 14 + 2 * 4
# The longest frame with LRO: an IPv6 header, whose length field does not count the header itself.
_LRO_MAX = 65535 + 40
_LRO = RxOffload.TCP_LRO | RxOffload.UDP_LRO
_SPLIT = _LRO | RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM

#: IPV4_CKSUM needs nothing from the kernel, which always finishes IPv4 header checksums: rtap
#: checks.
RX_CAPA = RxOffload.CHECKSUM | _LRO | RxOffload.SCATTER
TX_CAPA = (
    TxOffload.VLAN_INSERT
    | TxOffload.QINQ_INSERT
    | TxOffload.IPV4_CKSUM
    | TxOffload.UDP_CKSUM
    | TxOffload.TCP_CKSUM
    | TxOffload.TCP_TSO
    | TxOffload.UDP_TSO
    | TxOffload.MULTI_SEGS
)
#: Done by rtap itself, with any kernel.
_TX_SOFTWARE = (
    TxOffload.MULTI_SEGS | TxOffload.IPV4_CKSUM | TxOffload.VLAN_INSERT | TxOffload.QINQ_INSERT
)


def max_frame(mode: str, mtu: int, offloads: RxOffload) -> int:
    payload = _LRO_MAX if offloads & _LRO else mtu
    return payload + (_L2_MAX if mode == "tap" else 0)


def rx_room(mtu: int = 1500, rx_offloads: RxOffload = RxOffload(0), mode: str = "tap") -> int:
    """Bytes of data room a receive mbuf needs for the longest frame.

    One byte more than the frame, which tells a cut frame from one that just fits.
    """
    return max_frame(mode, mtu, rx_offloads) + 1


def tun_features(offloads: RxOffload) -> TunFeature:
    """The work that the kernel may leave undone for these offloads; ValueError if inconsistent."""
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
                    "frames only with unfinished checksums"
                )
            wanted |= features
    return wanted


def kernel_offloads(conf: EthConf) -> RxOffload:
    """The receive offloads to ask the kernel for: a queue that splits asks for more than
    the application does."""
    return conf.rx_offloads | _SPLIT if conf.rx_gso else conf.rx_offloads


def needs_header(conf: EthConf) -> bool:
    """Whether frames need more information than their bytes have."""
    return bool(
        conf.rx_offloads & ~RxOffload.SCATTER
        or conf.tx_offloads & ~_TX_SOFTWARE
        or conf.tx_gro
        or conf.rx_gso
    )


def lacking(asked: RxOffload, features: TunFeature) -> RxOffload:
    """Those of the offloads asked for that the kernel, which took these features, does not have."""
    return RxOffload(0) if features & TunFeature.USO4 else asked & RxOffload.UDP_LRO


#: The bits of ``TxQueue.software_gso``.
GSO_KINDS = {1: "TCP over IPv4", 2: "TCP over IPv6", 4: "UDP"}


def refused(kinds: int) -> TxOffload:
    """The offloads that take one of those :data:`GSO_KINDS`."""
    return (TxOffload.TCP_TSO if kinds & 3 else TxOffload(0)) | (
        TxOffload.UDP_TSO if kinds & 4 else TxOffload(0)
    )
