# SPDX-License-Identifier: BSD-3-Clause
"""Stages that rewrite frames and answer requests, on frames of any length, truncated anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from rigs import Shape, label, wrong_checksums
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet

from rtap import Burst, Mempool, stages
from rtap.stages import Stage

DESTINATION, SOURCE = bytes.fromhex("0200000000d0"), bytes.fromhex("0200000000c0")
ASKER = "02:00:00:00:00:a1"

CHANGES: dict[str, Callable[[], list[Stage]]] = {
    "mac": lambda: [stages.MacRewrite(DESTINATION, SOURCE)],
    "macswap": lambda: [stages.MacSwap()],
    "5tswap": lambda: [stages.FiveTupleSwap()],
    "csum": lambda: [stages.MacRewrite(DESTINATION, SOURCE), stages.ChecksumFill()],
    "icmpecho": lambda: [stages.Echo(SOURCE)],
}


def changed(data: bytes, change: str, room: int = 2048, cut: int = 0) -> list[bytes]:
    """The stage's result for a frame whose first segment ends after `cut` bytes (0: whole)."""
    pool = Mempool(8, 64 if cut else room)
    mbuf = pool.alloc(bytes(64 - cut) + data if cut else data)
    if cut:
        mbuf.adj(64 - cut)
        assert mbuf.data_len == min(cut, len(data))
    burst = Burst([mbuf])
    del mbuf
    for stage in CHANGES[change]():
        stage(burst)
    out = [bytes(mbuf) for mbuf in burst]
    burst.free()
    assert pool.in_use == 0
    return out


SHAPES = [
    Shape(version=version, proto=proto, vlans=vlans)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1, 2)
]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_five_tuples_are_exchanged(shape: Shape) -> None:
    data = shape.finished(b"payload")
    (out,) = changed(data, "5tswap")
    assert wrong_checksums(out) == []
    l3, size = shape.l2_len, (4 if shape.version == 4 else 16)
    at, l4 = l3 + (12 if shape.version == 4 else 8), l3 + shape.l3_len
    expected = bytearray(data)
    for start, n in ((0, 6), (at, size), (l4, 2)):
        expected[start : start + 2 * n] = data[start + n : start + 2 * n] + data[start : start + n]
    assert out == bytes(expected)
    assert changed(out, "5tswap") == [data]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_checksums_are_written(shape: Shape) -> None:
    for payload in (b"", b"x", b"payload"):
        (out,) = changed(shape.unfinished(payload), "csum")
        assert out == DESTINATION + SOURCE + shape.finished(payload)[12:]


def test_addresses() -> None:
    data = Shape().finished(b"payload")
    assert changed(data, "mac") == [DESTINATION + SOURCE + data[12:]]
    assert changed(data, "macswap") == [data[6:12] + data[:6] + data[12:]]


def test_ports_of_fragments() -> None:
    """The first fragment has ports, and the others have none."""
    shape = Shape(proto="udp")
    for flags, offset, ports in (("MF", 0, True), ("MF", 3, False), (0, 3, False)):
        packet = shape.packet(b"payload")
        packet[IP].flags, packet[IP].frag = flags, offset
        data = bytes(packet)
        (out,) = changed(data, "5tswap")
        assert out[26:34] == data[30:34] + data[26:30]
        assert (out[34:38] == data[36:38] + data[34:36]) == ports
        assert (out[34:38] == data[34:38]) != ports


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("change", CHANGES)
def test_frames_that_are_cut_off(change: str, shape: Shape) -> None:
    """Whatever is missing, a frame keeps its length, and no byte after it changes."""
    data = shape.finished(b"payload")
    for n in range(1, len(data)):
        for out in changed(data[:n], change):
            assert len(out) == n
            if n < 12:
                assert out == data[:n]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("change", CHANGES)
def test_where_a_frame_is_cut_makes_no_difference(change: str, shape: Shape) -> None:
    data = shape.unfinished(b"payload" * 3)
    whole = changed(data, change)
    for cut in range(1, 65):
        assert changed(data, change, cut=cut) == whole


@pytest.mark.parametrize("change", CHANGES)
def test_any_bytes(change: str) -> None:
    rng = random.Random(change)
    starts = (
        b"",
        b"\x02" * 12 + b"\x08\x00\x45",
        b"\x02" * 12 + b"\x86\xdd\x60",
        b"\x02" * 12 + b"\x08\x06",
        b"\x02" * 12 + b"\x81\x00\x00\x01\x86\xdd\x60",
        b"\x02" * 12 + b"\x86\xdd\x60" + bytes(5) + b"\x3a\xff",
    )
    for _ in range(300):
        data = rng.choice(starts) + rng.randbytes(rng.randint(1, 100))
        for out in changed(data[:128], change):
            assert len(out) == len(data[:128]) or change == "icmpecho"


# ---- answers


def answer(packet: Packet, room: int = 2048) -> Packet | None:
    for out in changed(bytes(packet), "icmpecho", room):
        return Ether(out)
    return None


ETHER = Ether(src=ASKER, dst="02:00:00:00:00:c0")
TAGGED = ETHER / Dot1Q(vlan=7)
V6 = IPv6(src="fd00::1", dst="fd00::2", hlim=255)
ASKED = ARP(op=1, hwsrc=ASKER, psrc="10.0.0.1", pdst="10.0.0.2")
ECHO = IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8, id=3, seq=4) / b"data"


@pytest.mark.parametrize("ether", [ETHER, TAGGED], ids=["plain", "tagged"])
def test_arp(ether: Packet) -> None:
    reply = answer(ether / ASKED)
    assert reply is not None
    assert (reply.src, reply.dst) == (SOURCE.hex(":"), ASKER)
    arp = reply[ARP]
    assert (arp.op, arp.hwsrc, arp.psrc) == (2, SOURCE.hex(":"), "10.0.0.2")
    assert (arp.hwdst, arp.pdst) == (ASKER, "10.0.0.1")


@pytest.mark.parametrize("ether", [ETHER, TAGGED], ids=["plain", "tagged"])
def test_icmp(ether: Packet) -> None:
    reply = answer(ether / ECHO)
    assert reply is not None
    assert (reply.src, reply.dst) == (SOURCE.hex(":"), ASKER)
    stated = (reply[IP].chksum, reply[ICMP].chksum)
    expected = IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(type=0, id=3, seq=4) / b"data"
    assert bytes(reply[IP]) == bytes(expected)
    assert all(stated)


@pytest.mark.parametrize("ether", [ETHER, TAGGED], ids=["plain", "tagged"])
def test_icmpv6(ether: Packet) -> None:
    reply = answer(ether / V6 / ICMPv6EchoRequest(id=3, seq=4, data=b"data"))
    assert reply is not None
    assert (reply.src, reply.dst) == (SOURCE.hex(":"), ASKER)
    expected = IPv6(src="fd00::2", dst="fd00::1", hlim=255) / ICMPv6EchoRequest(
        type=129, id=3, seq=4, data=b"data"
    )
    assert bytes(reply[IPv6]) == bytes(expected)


@pytest.mark.parametrize("options", [0, 1, 2])
@pytest.mark.parametrize("group", [True, False])
def test_neighbour_solicitations(options: int, group: bool) -> None:
    """An answer has one option, whatever the request had, so the frame may grow or shrink."""
    packet: Packet = ETHER / V6 / ICMPv6ND_NS(tgt="fd00::2")
    if group:
        packet[IPv6].dst = "ff02::1:ff00:2"
    for _ in range(options):
        packet /= ICMPv6NDOptSrcLLAddr(lladdr=ASKER)
    reply = answer(packet)
    assert reply is not None
    assert len(reply) == 14 + 40 + 32
    assert (reply[IPv6].src, reply[IPv6].dst, reply[IPv6].plen) == ("fd00::2", "fd00::1", 32)
    advert = bytes(reply[IPv6].payload)
    assert advert[0] == 136
    assert advert[4] == 0x60
    assert advert[8:24] == bytes.fromhex("fd00" + "00" * 13 + "02")
    assert advert[24:] == b"\x02\x01" + SOURCE
    fresh = Ether(bytes(reply))
    del fresh[IPv6].payload.cksum
    assert bytes(fresh) == bytes(reply)


def test_no_room_for_an_advertisement_is_no_answer() -> None:
    packet = ETHER / V6 / ICMPv6ND_NS(tgt="fd00::2")
    assert len(packet) == 78
    assert answer(packet, room=80) is None
    assert answer(packet, room=86) is not None


@pytest.mark.parametrize(
    "packet",
    [
        ETHER / ARP(op=2, psrc="10.0.0.1", pdst="10.0.0.2"),
        ETHER / ARP(op=1, psrc="0.0.0.0", pdst="10.0.0.2"),
        ETHER / ARP(op=1, psrc="10.0.0.2", pdst="10.0.0.2"),
        ETHER / ARP(op=1, hwlen=8, psrc="10.0.0.1", pdst="10.0.0.2"),
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=0),
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8, code=1),
        ETHER / IP(src="10.0.0.1", dst="224.0.0.1") / ICMP(type=8),
        ETHER / IP(src="10.0.0.1", dst="255.255.255.255") / ICMP(type=8),
        ETHER / IP(src="0.0.0.0", dst="10.0.0.2") / ICMP(type=8),
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / ICMP(type=8),
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", frag=2) / ICMP(type=8),
        ETHER / IPv6(src="fd00::1", dst="ff02::1") / ICMPv6EchoRequest(),
        ETHER / IPv6(src="::", dst="fd00::2") / ICMPv6EchoRequest(),
        ETHER / IPv6(src="::", dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt="fd00::2"),
        ETHER / IPv6(src="fd00::1", dst="fd00::2", hlim=64) / ICMPv6ND_NS(tgt="fd00::2"),
        ETHER / V6 / ICMPv6ND_NS(tgt="ff02::2"),
        Shape().packet(b"tcp"),
        Shape(version=6, proto="udp").packet(b"udp"),
        Ether(b"\x02" * 14 + b"what"),
    ],
    ids=lambda packet: packet.summary()[8:50],
)
def test_what_has_no_answer(packet: Packet) -> None:
    assert answer(packet) is None
