# SPDX-License-Identifier: BSD-3-Clause
"""Frames that are hard to steer, built by scapy for the rules of steering.py."""

from __future__ import annotations

from frames import CASES, DATA, DESTINATION
from rigs import MAC_A, MAC_B
from scapy.layers.inet import (
    ICMP,
    IP,
    TCP,
    UDP,
    IPOption_NOP,
    IPOption_Router_Alert,
    fragment,
)
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    fragment6,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import GRE, LLC, SNAP, Dot1AD, Dot1Q, Dot3, Ether
from scapy.layers.sctp import SCTP
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

ETHER = Ether(src=MAC_A, dst=MAC_B)
V4, V6 = IP(src="10.9.0.1", dst="10.9.0.2"), IPv6(src="fd09::1", dst="fd09::2")
UNHEARD = IP(src="10.66.0.9", dst="10.9.0.2")
PREFIX = IPv6(src="fd09::1", dst="fd09:0:0:1::9")
QUERY = UDP(sport=1053, dport=53) / Raw(b"who is it, and what else is there to say")
PAGE, TELNET = TCP(sport=1080, dport=80), TCP(sport=1023, dport=23)
OWN = UDP(sport=20500, dport=7) / Raw(b"from a port of its own")
LONG = Raw(bytes(range(256)) * 10)
#: IPv4 options may be 40 bytes.
OPTIONS = (
    [IPOption_NOP()] * 4,
    [IPOption_Router_Alert()],
    [IPOption_Router_Alert(), *[IPOption_NOP()] * 36],
)
HOP = IPv6ExtHdrHopByHop(options=[PadN(optdata=b"ab")])
ROUTING = IPv6ExtHdrRouting(addresses=["fd09:0:0:1::3", "fd09::4"])
SIGNED = AH(spi=5, seq=1, icv=bytes(12))


def _plain() -> list[Packet]:
    """Each transport under each kind of network header."""
    heads = [V4, V6, UNHEARD, PREFIX]
    heads += [IP(src=ip.src, dst=ip.dst, options=o) for ip in (V4, UNHEARD) for o in OPTIONS]
    for ip in (V6, PREFIX):
        heads += [ip / HOP, ip / DESTINATION, ip / ROUTING, ip / HOP / ROUTING / DESTINATION]
        heads += [ip / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(200))] * 3)]
        heads += [ip / SIGNED, ip / HOP / SIGNED / DESTINATION]
    transports = [QUERY, OWN, PAGE, TELNET, SCTP(sport=1, dport=2) / Raw(bytes(8))]
    found = [ETHER / head / body for head in heads for body in transports]
    found += [ETHER / V4 / SIGNED / body for body in transports]
    found += [ETHER / IPv6(src="fe80::1", dst="ff02::16") / HOP / ICMPv6EchoRequest()]
    tags = [Dot1Q(vlan=7), Dot1Q(vlan=0, prio=5), Dot1AD(vlan=7) / Dot1Q(vlan=8)]
    tags += [Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3)]
    return found + [ETHER / tag / ip / b for tag in tags for ip in heads[:5] for b in transports]


def _fragments() -> list[Packet]:
    found: list[Packet] = []
    for ip in (V4, UNHEARD):
        for body in (QUERY / LONG, OWN / LONG, PAGE / LONG, ICMP() / LONG):
            found += [ETHER / part for part in fragment(ip / body, 600)]
    for tag in (ETHER, ETHER / Dot1Q(vlan=7)):
        found += [tag / part for part in fragment(V4 / QUERY / LONG, 1000)]
    for ip in (V6, PREFIX, IPv6(src="fd09::1", dst="fd09::3")):
        for body in (QUERY, PAGE, ICMPv6EchoRequest()):
            whole = ip / IPv6ExtHdrFragment(id=9) / body / LONG
            found += [ETHER / part for part in fragment6(whole, 800)]
            # RFC 6946: an atomic fragment, which holds the whole packet.
            found += [
                ETHER / head / IPv6ExtHdrFragment(id=9) / body / DATA for head in (ip, ip / HOP)
            ]
    # The first fragment ends within the ports.
    found += [ETHER / IP(src=V4.src, dst=V4.dst, flags="MF", proto=17) / Raw(b"\4\35\0")]
    return found


def _inside() -> list[Packet]:
    """Packets that a rule would take, inside others that it must not take."""
    inner = [V4 / QUERY, UNHEARD / OWN, V6 / QUERY, PREFIX / PAGE, V4 / TELNET]
    found: list[Packet] = []
    for outer in (IP(src="10.9.0.1", dst="10.9.0.2"), V6):
        found += [ETHER / outer / packet for packet in inner]
        found += [ETHER / outer / GRE() / packet for packet in inner]
        vxlan = UDP(sport=4000, dport=4789) / VXLAN(vni=5, flags=8)
        found += [ETHER / outer / vxlan / ETHER / packet for packet in inner]
    found += [ETHER / V4 / ICMP(type=3, code=3) / packet for packet in inner[:2]]
    found += [ETHER / UNHEARD / V4 / QUERY, ETHER / UNHEARD / GRE() / V4 / QUERY]
    snap = Dot3(src=MAC_A, dst=MAC_B) / LLC(dsap=0xAA, ssap=0xAA, ctrl=3) / SNAP(code=0x0800)
    return found + [snap / packet for packet in inner[:2]]


def _contradictions() -> list[Packet]:
    """Headers that are truncated, too long or too short."""
    found = [ETHER / V4 / TCP(sport=1080, dport=80, dataofs=n) for n in (0, 4, 15)]
    found += [ETHER / UNHEARD / TCP(sport=1080, dport=99, dataofs=n) for n in (0, 4, 15)]
    found += [ETHER / PREFIX / TCP(sport=1080, dport=99, dataofs=n) for n in (0, 4, 15)]
    for length in (20, 22, 24, 27, 28, 40, 2000):  # the stated length; the frame has all bytes
        found.append(ETHER / IP(src=V4.src, dst=V4.dst, proto=17, len=length) / QUERY)
        found.append(ETHER / IP(src=UNHEARD.src, dst=V4.dst, proto=17, len=length) / QUERY)
    for length in (0, 2, 4, 8, 40, 2000):
        found.append(ETHER / IPv6(src=V6.src, dst=V6.dst, nh=17, plen=length) / QUERY)
        found.append(ETHER / IPv6(src=V6.src, dst=PREFIX.dst, nh=17, plen=length) / QUERY)
        bad = IPv6ExtHdrDestOpt(len=min(length, 255))
        found.append(ETHER / V6 / bad / QUERY)
    found += [ETHER / V4 / UDP(sport=1053, dport=53, len=n) / DATA for n in (0, 7, 9, 4000)]
    found += [ETHER / IP(src=ip.src, dst=ip.dst, ihl=15) / QUERY for ip in (V4, UNHEARD)]
    return found


def _cut(whole: bool) -> list[bytes]:
    """Frames cut to each length that the kernel passes on, with the whole IP header or without."""
    frames = [(34, 14, ETHER / ip / QUERY) for ip in (V4, UNHEARD)]
    frames += [(54, 14, ETHER / ip / QUERY) for ip in (V6 / HOP, PREFIX)]
    frames += [(38, 20, ETHER / Dot1Q(vlan=7) / V4 / PAGE)]
    return [
        bytes(frame)[:n]
        for head, least, frame in frames
        for n in (range(head, 90) if whole else range(least, head))
    ]


ODD: list[bytes] = [
    *(bytes(p) for part in (_plain, _fragments, _inside, _contradictions) for p in part()),
    *_cut(True),
    *(case.frame for case in CASES.values()),
]

#: Frames whose IP header is truncated or contradicts itself. Wireshark shows what there is.
HEADLESS: list[bytes] = [
    *_cut(False),
    *(
        bytes(ETHER / IP(src=ip.src, dst=ip.dst, **wrong) / QUERY)
        for ip in (V4, UNHEARD)
        for wrong in ({"ihl": 4}, {"ihl": 0}, {"version": 6}, {"len": 19}, {"len": 0})
    ),
    bytes(ETHER / IPv6(src=V6.src, dst=V6.dst, version=4) / QUERY),
]
