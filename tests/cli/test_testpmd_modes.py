# SPDX-License-Identifier: BSD-3-Clause
"""The forwarding modes of ``rtap testpmd`` that change frames.

Hosts talk through them with ping and iperf3 where possible. Frames that these do not send are
checked one by one, with scapy's checksums as the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rigs import Shape, wrong_checksums
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet
from support import ETH_P_ALL, PacketSocket, add_ipv6, frame, ip, ping
from testpmds import LRO, PEERS, attended, between, numbers

from rtap.control.netns import NetNS

pytestmark = pytest.mark.root

TWO = ("--vdev=net_rtap0,iface=a0", "--vdev=net_rtap1,iface=b0")
OUT, BACK = "02:00:00:00:00:a1", "02:00:00:00:00:b1"


def through(netns: NetNS, mode: str, frames: list[bytes], *options: str) -> list[bytes]:
    """What comes out of port 1 when frames go into port 0, in that mode."""
    return counted(netns, mode, frames, *options)[0]


def counted(
    netns: NetNS, mode: str, frames: list[bytes], *options: str
) -> tuple[list[bytes], dict[str, int]]:
    """The same, and the statistics at the end."""
    with (
        attended(netns, *TWO, f"--forward-mode={mode}", *options) as pmd,
        PacketSocket(netns, "a0") as out,
        PacketSocket(netns, "b0", ETH_P_ALL) as arriving,
    ):
        pmd.say("start")
        for data in frames:
            out.send(data)
        got = arriving.frames(len(frames))
        total = numbers(pmd.say("stop"))
    assert total["RX-packets"] == len(frames)
    assert total["TX-packets"] == len(got)
    return got, total


# ---- addresses


def test_macswap_swaps_addresses(netns: NetNS) -> None:
    sent = [frame(seq, 64 + seq) for seq in range(50)]
    got = through(netns, "macswap", sent)
    assert got == [data[6:12] + data[:6] + data[12:] for data in sent]


def test_mac_sets_addresses(netns: NetNS) -> None:
    sent = [frame(seq, 64 + seq) for seq in range(50)]
    got = through(netns, "mac", sent, "--eth-peer=1,02:00:00:00:00:77")
    assert {data[:6].hex(":") for data in got} == {"02:00:00:00:00:77"}
    (source,) = {data[6:12] for data in got}
    assert source not in (sent[0][:6], sent[0][6:12])
    assert [data[12:] for data in got] == [data[12:] for data in sent]


@pytest.mark.parametrize("mode", ["mac", "csum"])
@pytest.mark.parametrize("options", [(), LRO], ids=["frames", "super-frames"])
def test_iperf3_through_modes(
    netns: NetNS, netns2: NetNS, mode: str, options: tuple[str, ...]
) -> None:
    with between(netns, netns2, *options, *PEERS, f"--forward-mode={mode}") as hosts:
        hosts.pmd.say("start")
        n_bytes = hosts.iperf3()
        assert n_bytes > 1_000_000
        total = numbers(hosts.pmd.say("stop"))
        assert total["RX-packets"] == total["TX-packets"] > n_bytes / 65536


SHAPES = [
    Shape(version=version, proto=proto, vlans=vlans)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1)
]


def test_5tswap_swaps_all_five(netns: NetNS) -> None:
    got = through(netns, "5tswap", [shape.finished(b"payload") for shape in SHAPES])
    for data, shape in zip(got, SHAPES, strict=True):
        assert wrong_checksums(data) == []
        packet, original = Ether(data), shape.packet(b"payload")
        l3, l4 = (IP if shape.version == 4 else IPv6), (TCP if shape.proto == "tcp" else UDP)
        assert (packet.src, packet.dst) == (original.dst, original.src)
        assert (packet[l3].src, packet[l3].dst) == (original[l3].dst, original[l3].src)
        assert (packet[l4].sport, packet[l4].dport) == (original[l4].dport, original[l4].sport)
        assert bytes(packet[l4].payload) == b"payload"


def test_5tswap_leaves_what_has_no_ports(netns: NetNS) -> None:
    sent = frame(7)
    (data,) = through(netns, "5tswap", [sent])
    assert data == sent[6:12] + sent[:6] + sent[12:]


def test_noisy_changes_frames_as_well(netns: NetNS) -> None:
    sent = [frame(seq) for seq in range(30)]
    noise = ("--noisy-forward-mode=macswap", "--noisy-tx-sw-buffer-size=10")
    got = through(netns, "noisy", sent, *noise, "--noisy-tx-sw-buffer-flushtime=50")
    assert got == [data[6:12] + data[:6] + data[12:] for data in sent]


# ---- checksums


def test_csum_makes_checksums_right(netns: NetNS) -> None:
    pairs = [
        (shape.unfinished(payload), shape.finished(payload)[shape.l2_len :])
        for shape in SHAPES
        for payload in (b"", b"x", b"odd", b"even" * 300)
    ]
    assert all(wrong_checksums(unfinished) for unfinished, _ in pairs)
    got = through(netns, "csum", [unfinished for unfinished, _ in pairs])
    assert [wrong_checksums(data) for data in got] == [[]] * len(pairs)
    # A packet socket reports a tag beside the frame.
    assert [data[14:] for data in got] == [packet for _, packet in pairs]


def test_csum_counts_wrong_ones(netns: NetNS) -> None:
    good = [shape.finished(b"payload") for shape in SHAPES]
    l4 = [data[:-1] + b"!" for data in good]
    ip = [bytearray(Shape(4).finished(b"payload")) for _ in range(3)]
    for data in ip:
        data[14 + 10] ^= 1
    _, total = counted(netns, "csum", [*good, *l4, *map(bytes, ip)])
    assert total["Bad-ipcsum"] == 3
    assert total["Bad-l4csum"] == len(l4)
    assert total["Bad-outer-l4csum"] == total["Bad-outer-ipcsum"] == 0


# ---- echo


@pytest.mark.parametrize("options", [(), LRO], ids=["plain", "offloads"])
def test_ping_through_icmpecho(options: tuple[str, ...]) -> None:
    """The kernel sends neighbour and echo requests; testpmd sends every answer."""
    with (
        NetNS() as ns,
        attended(ns, "--vdev=net_rtap0,iface=a0", "--forward-mode=icmpecho", *options) as pmd,
    ):
        pmd.say("start")
        ip(ns, "addr", "add", "10.9.0.1/24", "dev", "a0")
        add_ipv6(ns, "a0", "fd00::1")
        for address in ("10.9.0.2", "fd00::2"):
            ping(ns, address)
        # Requests in several fragments get no answer; only whole ones do.
        ping(ns, "10.9.0.2", "-s", "1400")
        ping(ns, "fd00::2", "-s", "1400")
        neighbours = ip(ns, "neigh", "show", "dev", "a0")
        info = pmd.say("show port info 0")
        mac = info[info.index("MAC address: ") + 13 :][:17]
        assert neighbours.count(mac) >= 2
        total = numbers(pmd.say("stop"))
        assert total["RX-packets"] >= total["TX-packets"] >= 22
        assert total["TX-dropped"] == 0


def answers(netns: NetNS, requests: list[Packet]) -> list[Packet]:
    """What icmpecho sends back for these, and for a last request that it always answers."""
    last = Ether(src=OUT, dst=BACK) / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(seq=999) / b"last"
    with (
        attended(netns, "--vdev=net_rtap0,iface=a0", "--forward-mode=icmpecho") as pmd,
        PacketSocket(netns, "a0", ETH_P_ALL) as wire,
    ):
        pmd.say("start")
        for packet in (*requests, last):
            wire.send(bytes(packet))
        got: list[Packet] = []
        while not got or not (ICMP in got[-1] and got[-1][ICMP].seq == 999):
            (data,) = wire.frames(1)
            got.append(Ether(data))
    return got[:-1]


REQUESTS: dict[str, tuple[Packet, Callable[[Packet], bool]]] = {
    "arp": (
        Ether(src=OUT, dst="ff:ff:ff:ff:ff:ff")
        / ARP(op=1, hwsrc=OUT, psrc="10.0.0.1", pdst="10.0.0.2"),
        lambda p: (p[ARP].op, p[ARP].psrc, p[ARP].pdst, p.dst) == (2, "10.0.0.2", "10.0.0.1", OUT),
    ),
    "icmp": (
        Ether(src=OUT, dst=BACK) / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(id=5, seq=6) / b"ab",
        lambda p: (p[ICMP].type, p[ICMP].id, p[ICMP].seq, p[IP].src) == (0, 5, 6, "10.0.0.2"),
    ),
    "icmpv6": (
        Ether(src=OUT, dst=BACK)
        / IPv6(src="fd00::1", dst="fd00::2")
        / ICMPv6EchoRequest(id=5, seq=6, data=b"abc"),
        lambda p: (
            (p[ICMPv6EchoReply].id, p[ICMPv6EchoReply].data, p[IPv6].src) == (5, b"abc", "fd00::2")
        ),
    ),
    "neighbour": (
        Ether(src=OUT, dst="33:33:ff:00:00:02")
        / IPv6(src="fd00::1", dst="ff02::1:ff00:2", hlim=255)
        / ICMPv6ND_NS(tgt="fd00::2"),
        lambda p: (
            (p[ICMPv6ND_NA].tgt, p[IPv6].src, p[IPv6].dst, p[IPv6].hlim)
            == ("fd00::2", "fd00::2", "fd00::1", 255)
        ),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_icmpecho_answers(netns: NetNS, name: str) -> None:
    request, right = REQUESTS[name]
    (reply,) = answers(netns, [request])
    assert right(reply), reply.show(dump=True)
    assert reply.dst == OUT
    fresh = Ether(bytes(reply))
    for layer in (IP, ICMP, ICMPv6EchoReply, ICMPv6ND_NA):
        if layer in reply:
            field = "cksum" if layer in (ICMPv6EchoReply, ICMPv6ND_NA) else "chksum"
            stated = getattr(reply[layer], field)
            delattr(fresh[layer], field)
            assert getattr(Ether(bytes(fresh))[layer], field) == stated


def test_icmpecho_drops_the_rest(netns: NetNS) -> None:
    rest: list[Packet] = [
        Ether(frame(1)),
        Ether(src=OUT, dst=BACK) / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(dport=7) / b"echo?",
        Ether(src=OUT, dst=BACK) / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=0) / b"reply",
        Ether(src=OUT, dst=BACK) / ARP(op=2, psrc="10.0.0.1", pdst="10.0.0.2"),
    ]
    assert answers(netns, rest * 100) == []
