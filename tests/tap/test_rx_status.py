# SPDX-License-Identifier: BSD-3-Clause
"""The metadata of a received mbuf: packet type, header lengths, checksums, segment size.

The descriptor is one end of a pair of datagram sockets, so that any frame can come with any
virtio-net header, even with one that no kernel would write.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import ones_sum
from rigs import HOST_A, HOST_B, Shape, label
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from support import frame

from rtap import Burst, Mbuf, MbufFlag, Mempool, RxOffload, offload, stages
from rtap._ring import RxQueue, TxQueue

NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, UDP_UFO, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80
PLAIN = bytes(10)
ROOM, HEADROOM = 2048, 64
CHECKSUM = RxOffload.CHECKSUM
UNKNOWN, BAD, GOOD, NONE = (
    MbufFlag.RX_L4_CKSUM_UNKNOWN,
    MbufFlag.RX_L4_CKSUM_BAD,
    MbufFlag.RX_L4_CKSUM_GOOD,
    MbufFlag.RX_L4_CKSUM_NONE,
)
L4, IP_STATUS = MbufFlag.RX_L4_CKSUM_MASK, MbufFlag.RX_IP_CKSUM_MASK
IP_GOOD, IP_BAD = MbufFlag.RX_IP_CKSUM_GOOD, MbufFlag.RX_IP_CKSUM_BAD


class Pair:
    """Queues on one end of a socket pair."""

    def __init__(
        self,
        stack: ExitStack,
        engine: str = "syscall",
        offloads: int = CHECKSUM,
        room: int = ROOM,
        **options: Any,
    ) -> None:
        ours, self.theirs = map(
            stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        )
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.pool = stack.enter_context(Mempool(32, room, headroom=HEADROOM))
        self.rx = RxQueue(
            ours.fileno(),
            self.pool,
            name="pair",
            engine=engine,
            offloads=offloads,
            scatter=room < ROOM,
            max_frame=1522,
            **options,
        )
        self.tx = TxQueue(ours.fileno(), name="pair", engine=engine, **options)
        for queue in (self.rx, self.tx):
            stack.callback(queue.close)
            queue.start()

    def receive(self, data: bytes, header: bytes = PLAIN) -> Mbuf | None:
        """The mbuf of such a frame; None if it was dropped and counted with its reason."""
        before = self.rx.counters()
        assert self.theirs.send(header + data) == len(header) + len(data)
        burst = self.rx.rx_burst(8)
        after = self.rx.counters()
        lost = len(burst) == 0
        assert after["bad_vnet_hdr"] - before["bad_vnet_hdr"] == lost
        assert after["errors"] - before["errors"] == lost
        return None if lost else burst[0]

    def arrives(self, data: bytes, header: bytes = PLAIN) -> Mbuf:
        mbuf = self.receive(data, header)
        assert mbuf is not None
        assert bytes(mbuf) == data
        return mbuf


@pytest.fixture
def pair(engine: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, engine)


def header(
    flags: int = NEEDS_CSUM,
    gso: int = 0,
    size: int = 0,
    start: int = 34,
    offset: int = 16,
    hdr_len: int = 0,
) -> bytes:
    return struct.pack("<BBHHHH", flags, gso, hdr_len, size, start, offset)


def ether(packet: Any) -> bytes:
    return bytes(Ether(src=HOST_A, dst=HOST_B) / packet)


# ---- packet type and lengths

INNER = IP(src="10.1.0.1", dst="10.1.0.2") / TCP() / b"inside"
# rte_mbuf_ptype.h; (outer_l2_len, outer_l3_len, l2_len, l3_len, l4_len)
KINDS: dict[str, tuple[bytes, int, tuple[int, ...]]] = {
    "local experiment": (frame(1, 100), 0x1, (0, 0, 14, 0, 0)),
    "arp": (ether(ARP()), 0x3, (0, 0, 14, 0, 0)),
    "tcp4": (Shape().finished(b"x"), 0x111, (0, 0, 14, 20, 32)),
    "udp4": (Shape(4, "udp").finished(b"x"), 0x211, (0, 0, 14, 20, 8)),
    "tcp6": (Shape(6).finished(b"x"), 0x141, (0, 0, 14, 40, 32)),
    "udp6": (Shape(6, "udp").finished(b"x"), 0x241, (0, 0, 14, 40, 8)),
    "ipv4 options": (Shape(l3_options=True).finished(b"x"), 0x131, (0, 0, 14, 28, 32)),
    "ipv6 extension": (Shape(6, l3_options=True).finished(b"x"), 0x1C1, (0, 0, 14, 48, 32)),
    "vlan": (Shape(vlans=1).finished(b"x"), 0x116, (0, 0, 18, 20, 32)),
    "qinq": (
        ether(Dot1AD(vlan=5, type=0x8100) / Dot1Q(vlan=6) / IP(dst="10.0.0.1") / UDP() / b"x"),
        0x217,
        (0, 0, 22, 20, 8),
    ),
    "icmp": (ether(IP(dst="10.0.0.1") / ICMP()), 0x511, (0, 0, 14, 20, 8)),
    "fragment": (ether(IP(dst="10.0.0.1", flags="MF") / UDP() / b"x"), 0x311, (0, 0, 14, 20, 0)),
    "vxlan": (
        ether(IP(dst="10.0.0.1") / UDP() / VXLAN(vni=1) / Ether() / INNER),
        0x1113211,
        (14, 20, 30, 20, 20),
    ),
    "gre": (ether(IP(dst="10.0.0.1") / GRE() / INNER), 0x1102011, (14, 20, 4, 20, 20)),
    "ipip": (ether(IP(dst="10.0.0.1") / INNER), 0x1101011, (14, 20, 0, 20, 20)),
}


def lengths(mbuf: Mbuf) -> tuple[int, ...]:
    return mbuf.outer_l2_len, mbuf.outer_l3_len, mbuf.l2_len, mbuf.l3_len, mbuf.l4_len


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [ROOM, 64], ids=["single", "chain"])
def test_packet_type_and_lengths(engine: str, kind: str, room: int) -> None:
    data, packet_type, wanted = KINDS[kind]
    with ExitStack() as stack:
        mbuf = Pair(stack, engine, RxOffload.IPV4_CKSUM, room).arrives(data)
        assert hex(mbuf.packet_type) == hex(packet_type)
        assert lengths(mbuf) == wanted
        del mbuf


@pytest.mark.parametrize("version", [4, 6])
def test_on_a_tun_device_there_is_no_layer_2(engine: str, version: int) -> None:
    shape = Shape(version, "udp")
    with ExitStack() as stack:
        mbuf = Pair(stack, engine, CHECKSUM, l2=False).arrives(shape.finished(b"x")[14:])
        assert mbuf.packet_type == (0x210 if version == 4 else 0x240)
        assert lengths(mbuf) == (0, 0, 0, shape.l3_len, 8)
        assert mbuf.ol_flags & L4 == GOOD
        del mbuf


def test_nothing_is_looked_at_that_was_not_asked_for(engine: str) -> None:
    with ExitStack() as stack:
        mbuf = Pair(stack, engine, 0).arrives(Shape().finished(b"x"))
        assert (mbuf.packet_type, mbuf.ol_flags, lengths(mbuf)) == (0, 0, (0,) * 5)
        del mbuf


# ---- checksums

SHAPES = [
    Shape(version, proto, vlans)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 2)
]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("room", [ROOM, 65], ids=["single", "chain"])
def test_checksum_status(engine: str, shape: Shape, room: int) -> None:
    ip = IP_GOOD if shape.version == 4 else 0
    place = {
        "start": shape.l2_len + shape.l3_len,
        "offset": 16 if shape.proto == "tcp" else 6,
    }
    with ExitStack() as stack:
        pair = Pair(stack, engine, CHECKSUM, room)
        for n in (1, 2, 333, 1000):
            good = shape.finished(bytes(range(1, 251)) * 4)[: shape.l2_len + shape.l3_len + n + 32]
            good = shape.finished(good[-n:])
            bad = good[:-1] + bytes([good[-1] ^ 1])
            for data, hdr, status in (
                (good, PLAIN, GOOD),
                (bad, PLAIN, BAD),
                (good + b"\xa5" * 7, PLAIN, GOOD),  # Ethernet padding
                (bad, header(DATA_VALID), GOOD),  # whoever sent it vouches for it
                (bad, header(NEEDS_CSUM, **place), NONE),
            ):
                assert pair.arrives(data, hdr).ol_flags == status | ip
        if shape.version == 4:
            data = bytearray(good)
            data[shape.l2_len + 10] ^= 0x40
            assert pair.arrives(bytes(data)).ol_flags == IP_BAD | GOOD


@pytest.mark.parametrize("offload", ["IPV4_CKSUM", "UDP_CKSUM", "TCP_CKSUM"])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_each_checksum_is_looked_at_when_asked_for(engine: str, proto: str, offload: str) -> None:
    shape = Shape(4, proto)
    wanted = {"IPV4_CKSUM": (IP_GOOD, UNKNOWN), f"{proto.upper()}_CKSUM": (0, BAD)}
    with ExitStack() as stack:
        pair = Pair(stack, engine, RxOffload[offload])
        mbuf = pair.arrives(shape.finished(b"abc")[:-1] + b"d")
        assert (mbuf.ol_flags & IP_STATUS, mbuf.ol_flags & L4) == wanted.get(offload, (0, UNKNOWN))
        del mbuf


UNSAID: dict[str, tuple[bytes, int]] = {
    "no ip": (frame(1, 100), UNKNOWN),
    "arp": (ether(ARP()), UNKNOWN),
    "icmp": (ether(IP(dst="10.0.0.1") / ICMP()), UNKNOWN),
    "first fragment": (ether(IP(dst="10.0.0.1", flags="MF") / UDP() / bytes(40)), UNKNOWN),
    "later fragment": (ether(IP(dst="10.0.0.1", frag=9) / UDP() / bytes(40)), UNKNOWN),
    "fragment of ipv6": (
        ether(IPv6(dst="fd00::1") / IPv6ExtHdrFragment(m=1) / UDP(chksum=1) / bytes(40)),
        UNKNOWN,
    ),
    "cut short": (Shape().finished(bytes(100))[:100], UNKNOWN),
    "udp longer than ip": (ether(IP(dst="10.0.0.1") / UDP(len=99) / bytes(8)), UNKNOWN),
    "udp without a checksum": (ether(IP(dst="10.0.0.1") / UDP(chksum=0) / b"x"), NONE),
    "udp6 without a checksum": (ether(IPv6(dst="fd00::1") / UDP(chksum=0) / b"x"), BAD),
    "data offset too small": (Shape(fields={"dataofs": 4}).finished(b"x"), UNKNOWN),
    "in a tunnel": (ether(IP(dst="10.0.0.1") / GRE() / INNER), GOOD),
    "broken in a tunnel": (ether(IP(dst="10.0.0.1") / GRE() / INNER)[:-1] + b"X", BAD),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_cannot_be_said(pair: Pair, case: str) -> None:
    data, status = UNSAID[case]
    assert pair.arrives(data).ol_flags & L4 == status


def test_the_kernels_word_is_not_about_what_is_inside_a_tunnel(pair: Pair) -> None:
    data = bytearray(ether(IP(dst="10.0.0.1") / UDP() / VXLAN() / Ether() / INNER))
    data[-1] ^= 1
    assert pair.arrives(bytes(data), header(DATA_VALID)).ol_flags & L4 == BAD
    assert pair.arrives(ether(IP(dst="10.0.0.1") / ICMP()), header(DATA_VALID)).ol_flags & L4 == 0


def test_a_datagram_without_a_checksum_is_sent_on_as_it_came(pair: Pair) -> None:
    data = ether(IP(dst="10.0.0.1") / UDP(chksum=0) / b"x")
    assert pair.tx.tx_burst(Burst([pair.arrives(data)])) == 1
    assert pair.theirs.recv(1 << 16) == PLAIN + data
    assert pair.tx.xcounters()["checksum_offload"] == 0


# ---- headers that do not fit their frame

TCP4, TCP6, UDP4, UDP6 = (
    Shape(v, p).finished(bytes(range(250)) * 4) for p in ("tcp", "udp") for v in (4, 6)
)
OPTIONS = Shape(l3_options=True).finished(bytes(1000))
TAGGED = Shape(vlans=1).finished(bytes(1000))
FRAGMENT = ether(IP(dst="10.0.0.1", flags="MF") / TCP() / bytes(1000))
EXTENDED = Shape(6, l3_options=True).finished(bytes(1000))


def edited(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


GSO4 = {"gso": TCPV4, "size": 400}
GSO6 = {"gso": TCPV6, "size": 400, "start": 54}
USO4 = {"gso": UDP_L4, "size": 400, "offset": 6}
MALFORMED: dict[str, tuple[bytes, bytes]] = {
    "hdr_len > frame": (TCP4, header(**GSO4, hdr_len=len(TCP4) + 1)),
    "hdr_len at its limit": (TCP4, header(**GSO4, hdr_len=0xFFFF)),
    "hdr_len > frame, checksum only": (TCP4, header(hdr_len=len(TCP4) + 1)),
    "gso_size 0": (TCP4, header(gso=TCPV4, size=0)),
    "gso_size 0xffff": (TCP4, header(gso=TCPV4, size=0xFFFF)),
    "uso: gso_size 0": (UDP4, header(gso=UDP_L4, size=0, offset=6)),
    "csum_start 0": (TCP4, header(start=0)),
    "csum_start in the Ethernet header": (TCP4, header(start=13)),
    "csum_start at L3": (TCP4, header(start=14)),
    "csum_start one before the end of L3": (TCP4, header(start=33)),
    "csum_start one behind the end of L3": (TCP4, header(start=35)),
    "csum_start in the options": (OPTIONS, header(start=34)),
    "csum_start in front of the extension": (EXTENDED, header(start=54)),
    "csum_start without the tag": (TAGGED, header(start=34)),
    "csum_start at the end": (TCP4, header(start=len(TCP4))),
    "csum_start past the end": (TCP4, header(start=len(TCP4) + 1)),
    "csum_start at its limit": (TCP4, header(start=0xFFFF)),
    "csum_offset past the end": (TCP4, header(offset=len(TCP4) - 35)),
    "csum_offset at its limit": (TCP4, header(offset=0xFFFF)),
    "start and offset wrap": (TCP4, header(start=0xFFFF, offset=0xFFFF)),
    "tcp: csum_offset of udp": (TCP4, header(offset=6)),
    "udp: csum_offset of tcp": (UDP4, header(offset=16)),
    "gso: csum_offset of udp": (TCP4, header(gso=TCPV4, size=400, offset=6)),
    "gso: csum_offset 0": (TCP4, header(gso=TCPV4, size=400, offset=0)),
    "uso: csum_offset of tcp": (UDP4, header(gso=UDP_L4, size=400, offset=16)),
    "gso: csum_start 0": (TCP4, header(gso=TCPV4, size=400, start=0)),
    "gso: csum_start past the end": (TCP4, header(gso=TCPV4, size=400, start=len(TCP4) + 1)),
    "gso: csum_start in L3": (TCP4, header(gso=TCPV4, size=400, start=30)),
    "gso: csum_start behind L4's": (TCP4, header(gso=TCPV4, size=400, start=36)),
    "unknown gso_type": (TCP4, header(gso=2, size=400)),
    "unknown gso_type 0x7f": (TCP4, header(gso=0x7F, size=400)),
    "ecn of nothing": (TCP4, header(gso=ECN, size=400)),
    "ufo": (UDP4, header(gso=UDP_UFO, size=400, offset=6)),
    "tcp4 on ipv6": (TCP6, header(gso=TCPV4, size=400, start=54)),
    "tcp6 on ipv4": (TCP4, header(gso=TCPV6, size=400)),
    "tcp4 on udp": (UDP4, header(gso=TCPV4, size=400)),
    "tcp6 on udp": (UDP6, header(**GSO6)),
    "uso on tcp": (TCP4, header(**USO4)),
    "uso on tcp6": (TCP6, header(gso=UDP_L4, size=400, start=54, offset=6)),
    "gso on arp": (ether(ARP()), header(**GSO4)),
    "gso on no ip at all": (frame(1, 1000), header(**GSO4)),
    "gso without NEEDS_CSUM": (TCP4, header(0, **GSO4)),
    "gso with DATA_VALID": (TCP4, header(DATA_VALID, **GSO4)),
    "uso without NEEDS_CSUM": (UDP4, header(0, **USO4)),
    "uso with ecn": (UDP4, header(gso=UDP_L4 | ECN, size=400, offset=6)),
    "gso of a fragment": (FRAGMENT, header(**GSO4)),
    "csum_start past pkt_len, minimal": (bytes(14), header(start=20)),
    "frame without IP header": (TCP4[:14], header(start=14, offset=0)),
    "frame ends in the IP header": (TCP4[:33], header(start=34)),
    "frame ends behind the IP header": (TCP4[:34], header(start=34)),
    "frame ends in the checksum": (TCP4[:51], header(start=34)),
    "gso: frame ends in the TCP header": (TCP4[:53], header(**GSO4)),
    "gso: frame ends in the TCP options": (TCP4[:60], header(**GSO4)),
    "gso: frame shorter than its IP length": (TCP4[:-1], header(**GSO4)),
    "gso: ihl below a header": (edited(TCP4, 14, b"\x44"), header(**GSO4)),
    "gso: ihl past the frame": (edited(TCP4[:60], 14, b"\x4f"), header(**GSO4)),
    "gso: data offset below a header": (edited(TCP4, 46, b"\x40"), header(**GSO4)),
    "gso: data offset past the frame": (
        edited(edited(TCP4[:58], 16, b"\0\x2c"), 46, b"\xf0"),
        header(**GSO4),
    ),
    "gso: IP length below its header": (edited(TCP4, 16, b"\0\x13"), header(**GSO4)),
    "gso: IP length without room for TCP": (edited(TCP4, 16, b"\0\x27"), header(**GSO4)),
    "gso: IP length of zero": (edited(TCP4, 16, b"\0\0"), header(**GSO4)),
    "gso: version nibble": (edited(TCP4, 14, b"\x65"), header(**GSO4)),
    "gso6: fragment header": (
        ether(IPv6(dst="fd00::1") / IPv6ExtHdrFragment(m=1, nh=6) / bytes(100)),
        header(gso=TCPV6, size=40, start=62),
    ),
    "gso6: endless extension headers": (
        ether(IPv6(dst="fd00::1", nh=0) / (b"\0\0" + bytes(6)) / bytes(400)),
        header(gso=TCPV6, size=40, start=54),
    ),
    "gso6: extension past the frame": (edited(EXTENDED, 55, b"\xff"), header(**GSO6)),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("room", [ROOM, 64], ids=["single", "chain"])
def test_a_header_that_does_not_fit_is_counted_and_its_frame_dropped(
    engine: str, case: str, room: int
) -> None:
    data, hdr = MALFORMED[case]
    with ExitStack() as stack:
        pair = Pair(stack, engine, CHECKSUM, room)
        assert pair.receive(data, hdr) is None
        assert pair.pool.in_use == 0
        assert pair.rx.xcounters()["bad_header_packets"] == 1
        mbuf = pair.arrives(TCP4)  # the next one is none the worse for it
        assert mbuf.ol_flags & L4 == GOOD
        del mbuf


@pytest.mark.parametrize(
    ("data", "hdr"),
    [
        (TCP4, header(**GSO4)),
        (TCP4, header(**GSO4, hdr_len=len(TCP4))),
        (TCP4, header(gso=TCPV4 | ECN, size=400, hdr_len=66)),
        (TCP4, header(gso=TCPV4, size=0xFFFE)),
        (TCP6, header(**GSO6)),
        (TCP6, header(gso=TCPV6 | ECN, size=1, start=54)),
        (UDP4, header(**USO4)),
        (UDP6, header(gso=UDP_L4, size=400, start=54, offset=6)),
        (OPTIONS, header(gso=TCPV4, size=400, start=42)),
        (TAGGED, header(gso=TCPV4, size=400, start=38)),
        (EXTENDED, header(gso=TCPV6, size=400, start=62)),
    ],
)
@pytest.mark.parametrize("room", [ROOM, 64], ids=["single", "chain"])
def test_the_same_without_the_fault(engine: str, data: bytes, hdr: bytes, room: int) -> None:
    _, gso, _, size, start, _ = struct.unpack("<BBHHHH", hdr)
    with ExitStack() as stack:
        mbuf = Pair(stack, engine, CHECKSUM, room).arrives(data, hdr)
        assert mbuf.ol_flags & ~IP_STATUS == MbufFlag.RX_LRO | NONE
        assert mbuf.tso_segsz == size
        assert mbuf.l2_len + mbuf.l3_len == start
        assert mbuf.l4_len == (8 if gso == UDP_L4 else 32)
        del mbuf


def test_split_datagrams_of_a_tunnel_are_the_tunnels(pair: Pair) -> None:
    """The contents of the first datagram say nothing about the others."""
    data = ether(
        IP(src="10.0.0.2", dst="10.0.0.1") / UDP() / VXLAN() / Ether() / INNER / bytes(900)
    )
    mbuf = pair.arrives(data, header(**USO4))
    assert mbuf.packet_type == 0x211
    assert lengths(mbuf) == (0, 0, 14, 20, 8)
    assert mbuf.ol_flags & MbufFlag.RX_LRO


def test_unfinished_in_a_tunnel(pair: Pair) -> None:
    """The unfinished checksum may be the inner one, even in an unknown tunnel."""
    data = ether(IP(dst="10.0.0.1") / UDP() / VXLAN() / Ether() / INNER)
    at = data.index(bytes(INNER)) + 20
    for place in ({"start": at}, {"start": 34, "offset": 6}):
        assert pair.arrives(data, header(**place)).ol_flags & L4 == NONE
    other = ether(IP(dst="10.0.0.1") / UDP(dport=6081) / bytes(8) / Ether() / INNER)
    at = other.index(bytes(INNER)) + 20
    mbuf = pair.arrives(other, header(start=at))
    assert mbuf.ol_flags & L4 == NONE
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    assert pair.theirs.recv(1 << 16) == header(start=at) + other


@pytest.mark.parametrize("gap", [7, 8])
def test_what_is_around_an_unfinished_one_is_filled_in(pair: Pair, gap: int) -> None:
    """The tunnel is unknown, and its header may have an odd length."""
    data = ether(IP(dst="10.0.0.1") / UDP(dport=6081) / bytes(gap) / Ether() / INNER)
    inner = bytes(INNER)
    at = data.index(inner) + 20
    pseudo = ones_sum(inner[12:20] + struct.pack("!HH", 6, len(inner) - 20))
    unfinished = data[: at + 16] + struct.pack("!H", pseudo) + data[at + 18 :]
    wrong = unfinished[:40] + b"\xbe\xef" + unfinished[42:]
    burst = Burst([pair.arrives(wrong, header(start=at))])
    assert offload.fill_burst(burst) == 1
    assert bytes(burst[0]) == unfinished


def test_unfinished_behind_the_packet(pair: Pair) -> None:
    """An unfinished field outside the packet does not change the packet's own verdict."""
    data = ether(IP(dst="10.0.0.1") / UDP() / bytes(30)) + b"\xa5" * 40
    wrong = data[:40] + b"\xbe\xef" + data[42:]
    place = header(start=len(data) - 36, offset=6)
    burst = Burst([pair.arrives(wrong, place), pair.arrives(data, place)])
    stages.ChecksumVerify(drop=False)(burst)
    assert [mbuf.ol_flags & L4 for mbuf in burst] == [BAD | NONE, NONE]
    assert offload.fill_burst(burst) == 2
    assert [bytes(mbuf) for mbuf in burst] == [data, data]


# ---- nothing outside the frame is read or written


def seen(pair: Pair, data: bytes, hdr: bytes, fill: int) -> tuple[object, ...]:
    """Receives a frame into a pool filled with that byte; no other memory may change."""
    room, pool = pair.pool.data_room, pair.pool
    slots = pool.alloc_burst(pool.available, bytes([fill]) * room)
    for mbuf in slots:
        mbuf.prepend(HEADROOM)[:] = bytes([fill]) * HEADROOM
    del mbuf
    slots.free()
    got = pair.receive(data, hdr)
    if got is not None:
        result = (bytes(got), got.ol_flags, got.packet_type, got.tso_segsz, *lengths(got))
    else:
        result = ()
    del got
    slots = pool.alloc_burst(pool.available, bytes([fill]) * 0)
    stained = 0
    for mbuf in slots:
        whole = bytes(mbuf.prepend(HEADROOM)) + bytes(mbuf.append(room))
        stained += room + HEADROOM - whole.count(fill)
    # The frame and its header, except bytes that happen to have that value.
    assert stained <= len(hdr) + len(data)
    return result


CASES = [*MALFORMED.values(), *((data, PLAIN) for data, _, _ in KINDS.values())]


@pytest.mark.parametrize("room", [ROOM, 64], ids=["single", "chain"])
def test_what_lies_around_a_frame_makes_no_difference(room: int) -> None:
    with ExitStack() as stack:
        pair = Pair(stack, "syscall", CHECKSUM, room)
        for data, hdr in CASES:
            assert seen(pair, data, hdr, 0x00) == seen(pair, data, hdr, 0xFF)
            for n in range(14, 110):
                short = data[:n]
                assert seen(pair, short, hdr, 0x00) == seen(pair, short, hdr, 0xFF)


HEADERS = st.builds(
    header,
    flags=st.sampled_from((0, 1, 2, 3, 4, 255)),
    gso=st.one_of(st.sampled_from((0, 1, 3, 4, 5, 0x81, 0x84, 0x85)), st.integers(0, 255)),
    size=st.one_of(st.integers(0, 1500), st.integers(0, 65535)),
    start=st.one_of(st.integers(0, 80), st.integers(0, 65535)),
    offset=st.one_of(st.sampled_from((6, 16)), st.integers(0, 65535)),
    hdr_len=st.one_of(st.just(0), st.integers(0, 65535)),
)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_header_on_any_frame(data: st.DataObject) -> None:
    """The frame is dropped and counted, or delivered unchanged; sent on, its header fits."""
    raw = bytearray(data.draw(st.sampled_from([d for d, _ in CASES])))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, min(100, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(14, len(raw)))]
    hdr = data.draw(HEADERS)
    l2 = data.draw(st.booleans())
    with ExitStack() as stack:
        pair = Pair(stack, "syscall", CHECKSUM, data.draw(st.sampled_from((ROOM, 64, 77))), l2=l2)
        mbuf = pair.receive(bytes(raw), hdr)
        if mbuf is None:
            return
        assert bytes(mbuf) == raw
        assert sum(lengths(mbuf)) <= len(raw)
        flags, gso, _, size, start, offset = struct.unpack("<BBHHHH", hdr)
        keeps = bool(flags & NEEDS_CSUM)
        assert bool(mbuf.ol_flags & MbufFlag.RX_LRO) == bool(gso)
        assert pair.tx.tx_burst(Burst([mbuf])) == 1
        del mbuf
        if not l2 and len(raw) < 20:  # no IP packet
            assert pair.tx.xcounters()["bad_request_packets"] == 1
            return
        sent = pair.theirs.recv(1 << 16)
        assert sent[10:] == raw
        wanted = (1, gso, size if gso else 0, start, offset) if keeps else (0, 0, 0, 0, 0)
        got = struct.unpack("<BBHHHH", sent[:10])
        assert (*got[:2], *got[3:]) == wanted
        assert got[2] <= len(raw)
