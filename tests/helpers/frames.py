# SPDX-License-Identifier: BSD-3-Clause
"""Frames of every kind that rtap parses, built by scapy, with the positions of their headers."""

from __future__ import annotations

from dataclasses import dataclass

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    PadN,
)
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from rtap.offload import ChecksumStatus, Headers
from rtap.offload import PacketType as T

ETHER = Ether(src="02:00:00:00:00:0b", dst="02:00:00:00:00:0a")
IP4 = IP(src="10.0.0.1", dst="10.0.0.2")
IP6 = IPv6(src="fd00::1", dst="fd00::2")
DATA = Raw(bytes(range(101)))
TCP_OPTIONS = TCP(sport=1, dport=2, options=[("Timestamp", (1, 2))])
UDP_PLAIN = UDP(sport=1, dport=2)
DESTINATION = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"abcd")])
GOOD, UNKNOWN, NONE = ChecksumStatus.GOOD, ChecksumStatus.UNKNOWN, ChecksumStatus.NONE


@dataclass(frozen=True)
class Case:
    packet: Packet
    types: tuple[T, ...]
    lengths: tuple[int, ...]  # l2, l3, l4, outer_l2, outer_l3
    status: ChecksumStatus = GOOD
    fragment: bool = False
    checksums: bool = True  # whether scapy can compute all checksums

    @property
    def frame(self) -> bytes:
        return bytes(self.packet)

    @property
    def headers(self) -> Headers:
        l2, l3, l4, outer_l2, outer_l3 = (*self.lengths, 0, 0)[:5]
        return Headers(sum(self.types), l2, l3, l4, outer_l2, outer_l3, self.fragment)


CASES = {
    "tcp": Case(ETHER / IP4 / TCP_OPTIONS / DATA, (T.L2_ETHER, T.L3_IPV4, T.L4_TCP), (14, 20, 32)),
    "udp": Case(ETHER / IP4 / UDP_PLAIN / DATA, (T.L2_ETHER, T.L3_IPV4, T.L4_UDP), (14, 20, 8)),
    "udp without checksum": Case(
        ETHER / IP4 / UDP(sport=1, dport=2, chksum=0) / DATA,
        (T.L2_ETHER, T.L3_IPV4, T.L4_UDP),
        (14, 20, 8),
        NONE,
        checksums=False,
    ),
    "icmp": Case(
        ETHER / IP4 / ICMP() / DATA, (T.L2_ETHER, T.L3_IPV4, T.L4_ICMP), (14, 20, 8), UNKNOWN
    ),
    "igmp": Case(
        ETHER / IP(src="10.0.0.1", dst="224.0.0.1", proto=2) / Raw(bytes(8)),
        (T.L2_ETHER, T.L3_IPV4, T.L4_IGMP),
        (14, 20, 0),
        UNKNOWN,
    ),
    "sctp": Case(
        ETHER / IP4 / SCTP(sport=1, dport=2) / DATA,
        (T.L2_ETHER, T.L3_IPV4, T.L4_SCTP),
        (14, 20, 12),
        UNKNOWN,
    ),
    "options": Case(
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_NOP()] * 8) / TCP() / DATA,
        (T.L2_ETHER, T.L3_IPV4_EXT, T.L4_TCP),
        (14, 28, 20),
    ),
    "router alert": Case(
        ETHER
        / IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_Router_Alert()])
        / UDP_PLAIN
        / DATA,
        (T.L2_ETHER, T.L3_IPV4_EXT, T.L4_UDP),
        (14, 24, 8),
    ),
    "vlan": Case(
        ETHER / Dot1Q(vlan=7, prio=3) / IP4 / TCP() / DATA,
        (T.L2_ETHER_VLAN, T.L3_IPV4, T.L4_TCP),
        (18, 20, 20),
    ),
    "qinq": Case(
        ETHER / Dot1AD(vlan=7) / Dot1Q(vlan=8) / IP6 / UDP_PLAIN / DATA,
        (T.L2_ETHER_QINQ, T.L3_IPV6, T.L4_UDP),
        (22, 40, 8),
    ),
    "three tags": Case(
        ETHER / Dot1Q(vlan=7) / Dot1Q(vlan=8) / Dot1Q(vlan=9) / IP4 / TCP() / DATA,
        (T.L2_ETHER_QINQ, T.L3_IPV4, T.L4_TCP),
        (26, 20, 20),
    ),
    "tcp6": Case(ETHER / IP6 / TCP_OPTIONS / DATA, (T.L2_ETHER, T.L3_IPV6, T.L4_TCP), (14, 40, 32)),
    "udp6": Case(ETHER / IP6 / UDP_PLAIN / DATA, (T.L2_ETHER, T.L3_IPV6, T.L4_UDP), (14, 40, 8)),
    "icmp6": Case(
        ETHER / IP6 / ICMPv6EchoRequest() / DATA,
        (T.L2_ETHER, T.L3_IPV6, T.L4_ICMP),
        (14, 40, 8),
        UNKNOWN,
    ),
    "extension headers": Case(
        ETHER
        / IP6
        / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"ab")])
        / DESTINATION
        / TCP()
        / DATA,
        (T.L2_ETHER, T.L3_IPV6_EXT, T.L4_TCP),
        (14, 40 + 8 + 8, 20),
    ),
    "routing header": Case(
        ETHER / IP6 / IPv6ExtHdrRouting(addresses=["fd00::3", "fd00::4"]) / UDP_PLAIN / DATA,
        (T.L2_ETHER, T.L3_IPV6_EXT, T.L4_UDP),
        (14, 40 + 40, 8),
    ),
    "routing header at its end": Case(
        ETHER / IP6 / IPv6ExtHdrRouting(addresses=["fd00::3"], segleft=0) / UDP_PLAIN / DATA,
        (T.L2_ETHER, T.L3_IPV6_EXT, T.L4_UDP),
        (14, 40 + 24, 8),
    ),
    "segment routing": Case(
        ETHER
        / IP6
        / IPv6ExtHdrSegmentRouting(addresses=["fd00::3", "fd00::4"], segleft=1)
        / TCP()
        / DATA,
        (T.L2_ETHER, T.L3_IPV6_EXT, T.L4_TCP),
        (14, 40 + 40, 20),
    ),
    "no next header": Case(
        ETHER / IPv6(src="fd00::1", dst="fd00::2", nh=59),
        (T.L2_ETHER, T.L3_IPV6),
        (14, 40, 0),
        UNKNOWN,
    ),
    "first fragment": Case(
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", flags="MF", proto=17) / UDP_PLAIN / DATA,
        (T.L2_ETHER, T.L3_IPV4, T.L4_FRAG),
        (14, 20, 0),
        UNKNOWN,
        fragment=True,
        checksums=False,
    ),
    "last fragment": Case(
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", frag=100, proto=6) / DATA,
        (T.L2_ETHER, T.L3_IPV4, T.L4_FRAG),
        (14, 20, 0),
        UNKNOWN,
        fragment=True,
    ),
    "ipv6 fragment": Case(
        ETHER / IP6 / DESTINATION / IPv6ExtHdrFragment(nh=17, offset=10, m=1) / DATA,
        (T.L2_ETHER, T.L3_IPV6_EXT, T.L4_FRAG),
        (14, 40 + 8 + 8, 0),
        UNKNOWN,
        fragment=True,
    ),
    "vxlan": Case(
        ETHER
        / IP(src="1.1.1.1", dst="2.2.2.2")
        / UDP(sport=1, dport=4789)
        / VXLAN(vni=5, flags=8)
        / ETHER
        / IP4
        / TCP_OPTIONS
        / DATA,
        (
            T.L2_ETHER,
            T.L3_IPV4,
            T.L4_UDP,
            T.TUNNEL_VXLAN,
            T.INNER_L2_ETHER,
            T.INNER_L3_IPV4,
            T.INNER_L4_TCP,
        ),
        (8 + 8 + 14, 20, 32, 14, 20),
    ),
    "vxlan without outer checksum": Case(
        ETHER
        / IPv6(src="fd00::9", dst="fd00::8")
        / UDP(sport=1, dport=4789, chksum=0)
        / VXLAN(vni=5, flags=8)
        / ETHER
        / Dot1Q(vlan=9)
        / IP6
        / DESTINATION
        / UDP_PLAIN
        / DATA,
        (
            T.L2_ETHER,
            T.L3_IPV6,
            T.L4_UDP,
            T.TUNNEL_VXLAN,
            T.INNER_L2_ETHER_VLAN,
            T.INNER_L3_IPV6_EXT,
            T.INNER_L4_UDP,
        ),
        (8 + 8 + 18, 48, 8, 14, 40),
        checksums=False,
    ),
    "gre": Case(
        ETHER / Dot1Q(vlan=1) / IP(src="1.1.1.1", dst="2.2.2.2") / GRE() / IP4 / TCP() / DATA,
        (
            T.L2_ETHER_VLAN,
            T.L3_IPV4,
            T.TUNNEL_GRE,
            T.INNER_L3_IPV4,
            T.INNER_L4_TCP,
        ),
        (4, 20, 20, 18, 20),
    ),
    "gre with all fields": Case(
        ETHER
        / IPv6(src="fd00::9", dst="fd00::8")
        / GRE(chksum_present=1, key_present=1, seqnum_present=1)
        / IP6
        / UDP_PLAIN
        / DATA,
        (T.L2_ETHER, T.L3_IPV6, T.TUNNEL_GRE, T.INNER_L3_IPV6, T.INNER_L4_UDP),
        (16, 40, 8, 14, 40),
    ),
    "nvgre": Case(
        ETHER
        / IP(src="1.1.1.1", dst="2.2.2.2")
        / GRE(key_present=1, key=0x500)
        / ETHER
        / Dot1AD(vlan=1)
        / Dot1Q(vlan=2)
        / IP4
        / UDP_PLAIN
        / DATA,
        (
            T.L2_ETHER,
            T.L3_IPV4,
            T.TUNNEL_NVGRE,
            T.INNER_L2_ETHER_QINQ,
            T.INNER_L3_IPV4,
            T.INNER_L4_UDP,
        ),
        (8 + 22, 20, 8, 14, 20),
    ),
    "ip in ip": Case(
        ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / IP4 / TCP() / DATA,
        (T.L2_ETHER, T.L3_IPV4, T.TUNNEL_IP, T.INNER_L3_IPV4, T.INNER_L4_TCP),
        (0, 20, 20, 14, 20),
    ),
    "ipv6 in ipv4": Case(
        ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / IP6 / ICMPv6EchoRequest(),
        (T.L2_ETHER, T.L3_IPV4, T.TUNNEL_IP, T.INNER_L3_IPV6, T.INNER_L4_ICMP),
        (0, 40, 8, 14, 20),
        UNKNOWN,
    ),
    "ipv4 in ipv6": Case(
        ETHER / IPv6(src="fd00::9", dst="fd00::8") / DESTINATION / IP4 / UDP_PLAIN / DATA,
        (T.L2_ETHER, T.L3_IPV6_EXT, T.TUNNEL_IP, T.INNER_L3_IPV4, T.INNER_L4_UDP),
        (0, 20, 8, 14, 48),
    ),
    "fragment in a tunnel": Case(
        ETHER
        / IP(src="1.1.1.1", dst="2.2.2.2")
        / IP(src="10.0.0.1", dst="10.0.0.2", frag=5, proto=6)
        / DATA,
        (T.L2_ETHER, T.L3_IPV4, T.TUNNEL_IP, T.INNER_L3_IPV4, T.INNER_L4_FRAG),
        (0, 20, 0, 14, 20),
        UNKNOWN,
        fragment=True,
    ),
    "arp": Case(ETHER / ARP(), (T.L2_ETHER_ARP,), (14, 0, 0), UNKNOWN),
    "lldp": Case(
        Ether(src=ETHER.src, dst="01:80:c2:00:00:0e", type=0x88CC) / Raw(bytes(46)),
        (T.L2_ETHER_LLDP,),
        (14, 0, 0),
        UNKNOWN,
    ),
    "ptp": Case(
        Ether(src=ETHER.src, dst="01:1b:19:00:00:00", type=0x88F7) / Raw(bytes(46)),
        (T.L2_ETHER_TIMESYNC,),
        (14, 0, 0),
        UNKNOWN,
    ),
    "unknown ethertype": Case(
        Ether(src=ETHER.src, dst=ETHER.dst, type=0x88B5) / DATA, (T.L2_ETHER,), (14, 0, 0), UNKNOWN
    ),
}
