# SPDX-License-Identifier: BSD-3-Clause
"""Packet types: the headers of a frame, with DPDK's names and values (``rte_mbuf_ptype.h``)."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["PacketType", "packet_type_names"]


class PacketType(IntEnum):
    """Values of ``Mbuf.packet_type`` and ``Headers.packet_type`` (``RTE_PTYPE_*``).

    Not bits: each layer is a number of four bits, to be compared under its mask::

        packet_type & PacketType.L4_MASK == PacketType.L4_UDP

    In a tunnel the outer headers are in L2, L3 and L4 or TUNNEL, the inner ones in the INNER
    fields. IPV4_EXT has options, IPV6_EXT extension headers. Types that rtap does not parse are
    left out.
    """

    L2_ETHER = 0x1
    L2_ETHER_TIMESYNC = 0x2
    L2_ETHER_ARP = 0x3
    L2_ETHER_LLDP = 0x4
    L2_ETHER_VLAN = 0x6
    L2_ETHER_QINQ = 0x7
    L2_MASK = 0xF
    L3_IPV4 = 0x10
    L3_IPV4_EXT = 0x30
    L3_IPV6 = 0x40
    L3_IPV6_EXT = 0xC0
    L3_MASK = 0xF0
    L4_TCP = 0x100
    L4_UDP = 0x200
    L4_FRAG = 0x300
    L4_SCTP = 0x400
    L4_ICMP = 0x500
    L4_IGMP = 0x700
    L4_MASK = 0xF00
    TUNNEL_IP = 0x1000
    TUNNEL_GRE = 0x2000
    TUNNEL_VXLAN = 0x3000
    TUNNEL_NVGRE = 0x4000
    TUNNEL_MASK = 0xF000
    INNER_L2_ETHER = 0x10000
    INNER_L2_ETHER_VLAN = 0x20000
    INNER_L2_ETHER_QINQ = 0x30000
    INNER_L2_MASK = 0xF0000
    INNER_L3_IPV4 = 0x100000
    INNER_L3_IPV4_EXT = 0x200000
    INNER_L3_IPV6 = 0x300000
    INNER_L3_IPV6_EXT = 0x500000
    INNER_L3_MASK = 0xF00000
    INNER_L4_TCP = 0x1000000
    INNER_L4_UDP = 0x2000000
    INNER_L4_FRAG = 0x3000000
    INNER_L4_SCTP = 0x4000000
    INNER_L4_ICMP = 0x5000000
    INNER_L4_MASK = 0xF000000


_MASKS = [int(member) for name, member in PacketType.__members__.items() if name.endswith("_MASK")]
_NAMES = {
    int(member): name
    for name, member in PacketType.__members__.items()
    if not name.endswith("_MASK")
}


def packet_type_names(packet_type: int) -> list[str]:
    """The name of each layer of a packet type, outermost first; a nameless one is ``0x...``.

    >>> packet_type_names(0x211)
    ['L2_ETHER', 'L3_IPV4', 'L4_UDP']
    """
    fields = (packet_type & mask for mask in _MASKS)
    return [_NAMES.get(value, hex(value)) for value in fields if value]
