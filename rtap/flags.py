# SPDX-License-Identifier: BSD-3-Clause
"""Offload and mbuf flags, with DPDK's names and DPDK's bit values.

The names are those of ``rte_ethdev.h`` and ``rte_mbuf_core.h`` without their prefixes
(``RTE_ETH_RX_OFFLOAD_``, ``RTE_ETH_TX_OFFLOAD_``, ``RTE_MBUF_F_``). The values are the same too, so
a number seen in a DPDK log means the same thing here. Flags that neither a TAP device nor
this library's parser can produce or consume are left out.
"""

from __future__ import annotations

from enum import IntFlag

__all__ = ["MbufFlag", "RxOffload", "TxOffload", "flag_names"]


class RxOffload(IntFlag):
    """A device's work on frames before they are received (``RTE_ETH_RX_OFFLOAD_*``).

    TAP and TUN devices can do these:

    ``IPV4_CKSUM``: the IPv4 header checksum is checked;
    ``UDP_CKSUM``, ``TCP_CKSUM``: this checksum is checked, and the kernel may leave it unfinished;
    ``TCP_LRO``, ``UDP_LRO``: frames arrive as super-frames of up to 64 KiB;
    ``SCATTER``: frames longer than a buffer arrive as chains.

    ``CHECKSUM`` and ``VLAN`` are several at once, as in DPDK. The others exist for their names, and
    no device here can do them: ``VLAN_STRIP``, ``VLAN_FILTER``, ``VLAN_EXTEND``, ``QINQ_STRIP``,
    ``OUTER_IPV4_CKSUM``, ``OUTER_UDP_CKSUM``, ``SCTP_CKSUM``, ``TIMESTAMP``, ``KEEP_CRC``,
    ``RSS_HASH``.
    """

    VLAN_STRIP = 1 << 0
    IPV4_CKSUM = 1 << 1
    UDP_CKSUM = 1 << 2
    TCP_CKSUM = 1 << 3
    TCP_LRO = 1 << 4
    QINQ_STRIP = 1 << 5
    OUTER_IPV4_CKSUM = 1 << 6
    VLAN_FILTER = 1 << 9
    VLAN_EXTEND = 1 << 10
    SCATTER = 1 << 13
    TIMESTAMP = 1 << 14
    KEEP_CRC = 1 << 16
    SCTP_CKSUM = 1 << 17
    OUTER_UDP_CKSUM = 1 << 18
    RSS_HASH = 1 << 19
    #: Large UDP datagrams from segmentation-aware senders (USO) arrive whole. DPDK has no name
    #: for it; its own bits grow from 0 upwards (20 is the last one), so the top bit is ours.
    UDP_LRO = 1 << 63

    CHECKSUM = IPV4_CKSUM | UDP_CKSUM | TCP_CKSUM
    VLAN = VLAN_STRIP | VLAN_FILTER | VLAN_EXTEND | QINQ_STRIP


class TxOffload(IntFlag):
    """A device's work on frames that are sent (``RTE_ETH_TX_OFFLOAD_*``).

    TAP and TUN devices can do these, for frames that ask for it in their ``ol_flags``:

    ``IPV4_CKSUM``, ``UDP_CKSUM``, ``TCP_CKSUM``: write that checksum;
    ``TCP_TSO``, ``UDP_TSO``: split super-frames;
    ``VLAN_INSERT``, ``QINQ_INSERT``: put one VLAN tag, or two, in front;
    ``MULTI_SEGS``: take chains of several segments.

    The others exist for their names, and no device here can do them: ``SCTP_CKSUM``,
    ``OUTER_IPV4_CKSUM``, ``OUTER_UDP_CKSUM``, ``VXLAN_TNL_TSO``, ``GRE_TNL_TSO``, ``IPIP_TNL_TSO``,
    ``GENEVE_TNL_TSO``, ``UDP_TNL_TSO``, ``IP_TNL_TSO``, ``MT_LOCKFREE``, ``MBUF_FAST_FREE``.
    """

    VLAN_INSERT = 1 << 0
    IPV4_CKSUM = 1 << 1
    UDP_CKSUM = 1 << 2
    TCP_CKSUM = 1 << 3
    SCTP_CKSUM = 1 << 4
    TCP_TSO = 1 << 5
    UDP_TSO = 1 << 6
    OUTER_IPV4_CKSUM = 1 << 7
    QINQ_INSERT = 1 << 8
    VXLAN_TNL_TSO = 1 << 9
    GRE_TNL_TSO = 1 << 10
    IPIP_TNL_TSO = 1 << 11
    GENEVE_TNL_TSO = 1 << 12
    MT_LOCKFREE = 1 << 14
    MULTI_SEGS = 1 << 15
    MBUF_FAST_FREE = 1 << 16
    UDP_TNL_TSO = 1 << 18
    IP_TNL_TSO = 1 << 19
    OUTER_UDP_CKSUM = 1 << 20


class MbufFlag(IntFlag):
    """``Mbuf.ol_flags`` (``RTE_MBUF_F_*``).

    Three fields are wider than a bit. The receive checksum states are two bits each (BAD, GOOD,
    both for NONE: the frame carries no finished checksum but its data is intact, neither for
    UNKNOWN), and the layer 4 transmit checksum is a two-bit number (TCP 1, SCTP 2, UDP 3). Test
    them through their mask::

        flags & MbufFlag.TX_L4_MASK == MbufFlag.TX_UDP_CKSUM

    Results for a received frame:

    ``RX_IP_CKSUM_MASK``: the IPv4 header checksum, ``RX_IP_CKSUM_UNKNOWN``, ``RX_IP_CKSUM_BAD``,
    ``RX_IP_CKSUM_GOOD`` or ``RX_IP_CKSUM_NONE``;
    ``RX_L4_CKSUM_MASK``: the TCP or UDP checksum, ``RX_L4_CKSUM_UNKNOWN``, ``RX_L4_CKSUM_BAD``,
    ``RX_L4_CKSUM_GOOD`` or ``RX_L4_CKSUM_NONE``;
    ``RX_OUTER_IP_CKSUM_BAD``: a tunnel's outer IPv4 header;
    ``RX_OUTER_L4_CKSUM_MASK``: its outer UDP, ``RX_OUTER_L4_CKSUM_UNKNOWN``,
    ``RX_OUTER_L4_CKSUM_BAD``, ``RX_OUTER_L4_CKSUM_GOOD`` or ``RX_OUTER_L4_CKSUM_INVALID``;
    ``RX_LRO``: a super-frame, to be split at ``tso_segsz``.

    Requests of a frame to send:

    ``TX_IP_CKSUM``: the IPv4 header checksum;
    ``TX_L4_MASK``: ``TX_L4_NO_CKSUM``, ``TX_TCP_CKSUM`` or ``TX_UDP_CKSUM``;
    ``TX_TCP_SEG``, ``TX_UDP_SEG``: to be split at ``tso_segsz``;
    ``TX_VLAN``, ``TX_QINQ``: a tag of ``vlan_tci``, and of ``vlan_tci_outer`` in front of it;
    ``TX_IPV4``, ``TX_IPV6``: no effect here, since the frame itself shows its IP version.

    The others are DPDK's, and nothing here sets or uses them: ``RX_VLAN``, ``RX_VLAN_STRIPPED``,
    ``RX_QINQ``, ``RX_QINQ_STRIPPED``, ``RX_RSS_HASH``, ``RX_FDIR``, ``TX_SCTP_CKSUM``,
    ``TX_OUTER_IP_CKSUM``, ``TX_OUTER_UDP_CKSUM``, ``TX_OUTER_IPV4``, ``TX_OUTER_IPV6``,
    ``EXTERNAL``, ``INDIRECT``.
    """

    RX_VLAN = 1 << 0
    RX_RSS_HASH = 1 << 1
    RX_FDIR = 1 << 2
    RX_L4_CKSUM_BAD = 1 << 3
    RX_IP_CKSUM_BAD = 1 << 4
    RX_OUTER_IP_CKSUM_BAD = 1 << 5
    RX_VLAN_STRIPPED = 1 << 6
    RX_IP_CKSUM_GOOD = 1 << 7
    RX_L4_CKSUM_GOOD = 1 << 8
    RX_QINQ_STRIPPED = 1 << 15
    RX_LRO = 1 << 16
    RX_QINQ = 1 << 20
    RX_OUTER_L4_CKSUM_BAD = 1 << 21
    RX_OUTER_L4_CKSUM_GOOD = 1 << 22

    RX_L4_CKSUM_UNKNOWN = 0
    RX_L4_CKSUM_NONE = RX_L4_CKSUM_BAD | RX_L4_CKSUM_GOOD
    RX_L4_CKSUM_MASK = RX_L4_CKSUM_BAD | RX_L4_CKSUM_GOOD
    RX_IP_CKSUM_UNKNOWN = 0
    RX_IP_CKSUM_NONE = RX_IP_CKSUM_BAD | RX_IP_CKSUM_GOOD
    RX_IP_CKSUM_MASK = RX_IP_CKSUM_BAD | RX_IP_CKSUM_GOOD
    RX_OUTER_L4_CKSUM_UNKNOWN = 0
    RX_OUTER_L4_CKSUM_INVALID = RX_OUTER_L4_CKSUM_BAD | RX_OUTER_L4_CKSUM_GOOD
    RX_OUTER_L4_CKSUM_MASK = RX_OUTER_L4_CKSUM_BAD | RX_OUTER_L4_CKSUM_GOOD

    TX_OUTER_UDP_CKSUM = 1 << 41
    TX_UDP_SEG = 1 << 42
    TX_QINQ = 1 << 49
    TX_TCP_SEG = 1 << 50
    TX_L4_NO_CKSUM = 0
    TX_TCP_CKSUM = 1 << 52
    TX_SCTP_CKSUM = 2 << 52
    TX_UDP_CKSUM = 3 << 52
    TX_L4_MASK = 3 << 52
    TX_IP_CKSUM = 1 << 54
    TX_IPV4 = 1 << 55
    TX_IPV6 = 1 << 56
    TX_VLAN = 1 << 57
    TX_OUTER_IP_CKSUM = 1 << 58
    TX_OUTER_IPV4 = 1 << 59
    TX_OUTER_IPV6 = 1 << 60
    EXTERNAL = 1 << 61
    INDIRECT = 1 << 62


# Values that should appear as one word, tried before the single bits. Masks never appear.
_FIELDS: dict[type[IntFlag], tuple[tuple[int, int, str], ...]] = {
    MbufFlag: tuple(
        (int(mask), int(value), str(value.name))
        for mask, value in (
            (MbufFlag.RX_L4_CKSUM_MASK, MbufFlag.RX_L4_CKSUM_NONE),
            (MbufFlag.RX_IP_CKSUM_MASK, MbufFlag.RX_IP_CKSUM_NONE),
            (MbufFlag.RX_OUTER_L4_CKSUM_MASK, MbufFlag.RX_OUTER_L4_CKSUM_INVALID),
            (MbufFlag.TX_L4_MASK, MbufFlag.TX_UDP_CKSUM),
        )
    ),
}


def flag_names(flags: int, kind: type[IntFlag] = MbufFlag) -> list[str]:
    """The names that make up `flags`, lowest bit first; a nameless bit appears as ``0x...``.

    Fields wider than a bit are read as fields: ``3 << 52`` is ``TX_UDP_CKSUM`` and not
    ``TX_TCP_CKSUM`` with ``TX_SCTP_CKSUM``.

    >>> flag_names(RxOffload.TCP_CKSUM | RxOffload.TCP_LRO, RxOffload)
    ['TCP_CKSUM', 'TCP_LRO']
    """
    rest = int(flags)
    if rest < 0:
        raise ValueError(f"flags must be a non-negative integer, got {flags!r}")
    found: list[tuple[int, str]] = []
    for mask, value, name in _FIELDS.get(kind, ()):
        if rest & mask == value:
            found.append((value & -value, name))
            rest &= ~mask
    single = {int(m.value): name for name, m in kind.__members__.items()}
    while rest:
        bit = rest & -rest
        rest ^= bit
        found.append((bit, single.get(bit, hex(bit))))
    return [name for _, name in sorted(found)]
