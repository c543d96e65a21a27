# SPDX-License-Identifier: BSD-3-Clause
"""Frames with checksums that the kernel left unfinished, rewritten and sent on.

They cross two bridges with two rtap devices in between. The last reader requests no offloads, and
what it gets is compared with the same changes made by scapy.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from oracle import ones_sum
from rigs import HOST_A, HOST_B, Shape, add_bridge, iproute, label
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet
from support import (
    ENGINES,
    Tap,
    eventually,
    ip,
    pattern,
    quiet_netns,
    skip_without_devices,
    skip_without_engine,
)

import rtap
from rtap import Burst, EthDev, MbufFlag, RxOffload, TxOffload, Worker, offload, stages
from rtap.offload import VnetHdr

pytestmark = pytest.mark.root

RX = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
TX = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
FILLS = ["ChecksumFill", "fill_burst"]


# ---- the way


class Way:
    """`first` writes the frames that `dev` receives; `last` reads the frames that `out` sends."""

    def __init__(self, first: Tap, dev: EthDev, out: EthDev, last: Tap) -> None:
        self.first, self.dev, self.out, self.last = first, dev, out, last

    def write(self, frame: bytes, hdr: VnetHdr) -> None:
        os.write(self.first.fd, hdr.pack() + frame)

    def arriving(self, n: int) -> list[bytes]:
        """``n`` frames, or those received until five seconds pass without one."""
        got: list[bytes] = []
        while len(got) < n and select.select([self.last.fd], [], [], 5)[0]:
            got.append(os.read(self.last.fd, 1 << 17))
        return got

    def cross(self, sample: Sample, how: Rewriting, fill: str) -> list[bytes]:
        """The frames that arrive when a frame is rewritten and filled on its way."""
        if fill == "ChecksumFill":
            worker = Worker()
            after = [how.stage(sample), stages.ChecksumFill()]
            worker.forward((self.dev, 0), (self.out, 0), stages=after, on_full="retry")
            with worker:
                self.write(*sample.frame())
                got = self.arriving(len(sample.packets))
            assert not any(route.error for route in worker.stats().routes)
            return got
        self.write(*sample.frame())
        burst = self.dev.rx_burst(0, 1, 5)
        (mbuf,) = burst
        assert mbuf.ol_flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
        assert bool(mbuf.ol_flags & MbufFlag.RX_LRO) == (sample.segsz > 0)
        del mbuf
        how.stage(sample)(burst)
        assert offload.fill_burst(burst) == 1
        assert self.out.tx_burst(0, burst) == 1
        return self.arriving(len(sample.packets))


@pytest.fixture(
    scope="module",
    params=[(engine, header) for engine in ENGINES for header in (True, False)],
    ids=lambda param: f"{param[0]}-{'header' if param[1] else 'plain'}",
)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """The way to a device with headers, or to one without, where software does all."""
    engine, header = request.param
    skip_without_devices()
    skip_without_engine(engine)
    options: dict[str, Any] = {"engine": engine, "nb_mbufs": 256}
    with contextlib.ExitStack() as stack:
        left, right = (stack.enter_context(quiet_netns()) for _ in range(2))
        for ns in (left, right):
            add_bridge(ns)
            # The bridge floods all frames, wherever it last saw their addresses.
            iproute(ns, "link set br0 type bridge ageing_time 0")
        first = stack.enter_context(Tap(left, "first", mtu=9000))
        dev = stack.enter_context(rtap.open("in", netns=left, mtu=9000, rx_offloads=RX, **options))
        out = stack.enter_context(
            rtap.open("out", netns=right, mtu=9000, tx_offloads=TX if header else 0, **options)
        )
        last = stack.enter_context(Tap(right, "last", mtu=9000, vnet_hdr=False))
        assert (dev.info().vnet_hdr, out.info().vnet_hdr) == (True, header)
        for ns, name in ((left, "first"), (left, "in"), (right, "out"), (right, "last")):
            ip(ns, "link", "set", name, "master", "br0")
        way = Way(first, dev, out, last)
        probe = Ether(src=HOST_A, dst=HOST_B, type=0x88B5) / bytes(46)

        def passes() -> bool:
            way.write(bytes(probe), VnetHdr())
            burst = dev.rx_burst(0, 8, 0.05)
            return len(burst) > 0 and out.tx_burst(0, burst) > 0 and last.waiting()

        # A bridge starts to forward a moment after its ports are up.
        eventually(passes, "a frame over both bridges")
        while last.waiting():
            os.read(last.fd, 1 << 17)
        while len(dev.rx_burst(0)) > 0:
            pass
        yield way


# ---- frames for that way


def layers(packet: Packet, *kinds: type[Packet]) -> list[Packet]:
    """The packet's layers of these kinds, from the outermost on."""
    found = []
    while packet:
        if isinstance(packet, kinds):
            found.append(packet)
        packet = packet.payload
    return found


@dataclass
class Sample:
    """`packets` are the finished packets of a frame, before it is rewritten.

    ``layer`` is the index, from the outermost, of the TCP or UDP header with the unfinished
    checksum.
    """

    whole: bytes
    packets: list[bytes]
    segsz: int = 0
    layer: int = 0
    #: Where IP and TCP or UDP begin in the packet, by layer.
    places: tuple[tuple[int, int], ...] = ()

    def frame(self) -> tuple[bytes, VnetHdr]:
        """The frame as the kernel has it, with the pseudo-header's sum in the checksum field."""
        l3, l4 = self.places[self.layer]
        four = self.whole[l3] >> 4 == 4
        transport = layers(Ether(self.whole), TCP, UDP)[self.layer]
        udp = isinstance(transport, UDP)
        at = l4 + (6 if udp else 16)
        length = len(self.whole) - l4
        addresses = self.whole[l3 + 12 : l3 + 20] if four else self.whole[l3 + 8 : l3 + 40]
        pseudo = ones_sum(addresses + bytes([0, 17 if udp else 6]) + length.to_bytes(2, "big"))
        frame = self.whole[:at] + pseudo.to_bytes(2, "big") + self.whole[at + 2 :]
        kind = 0
        if self.segsz:
            kind = VnetHdr.GSO_UDP_L4 if udp else VnetHdr.GSO_TCPV4 if four else VnetHdr.GSO_TCPV6
        header = 8 if udp else 4 * transport.dataofs
        hdr = VnetHdr(1, kind, l4 + header if kind else 0, self.segsz, l4, 6 if udp else 16)
        return frame, hdr

    def rewritten(self, change: Callable[[Packet], None]) -> list[bytes]:
        """The frame that must arrive: checksums are right, or absent where they were absent."""
        out = []
        for data in self.packets:
            packet = Ether(data)
            change(packet)
            for layer in layers(packet, IP, TCP, UDP):
                if layer.chksum != 0:
                    del layer.chksum
            out.append(bytes(packet))
        return out


def plain(shape: Shape, segsz: int = 0) -> Sample:
    """A packet without a tunnel, or a super-frame with an odd remainder."""
    payload = pattern(3, 2 * segsz + 301 if segsz else 301)
    at = (shape.l2_len, shape.l2_len + shape.l3_len)
    if segsz == 0:
        frame = shape.finished(payload)
        return Sample(frame, [frame], places=(at,))
    return Sample(shape.finished(payload), shape.segments(payload, segsz), segsz, places=(at,))


def tunnel(
    outer: int, inner: int, proto: str, *, layer: int, vlans: int = 0, zero: bool = False
) -> Sample:
    """VXLAN over IPv4 or IPv6; with ``zero`` there is no outer UDP checksum."""
    addresses = {4: IP(src="192.0.2.1", dst="192.0.2.2"), 6: IPv6(src="fd01::1", dst="fd01::2")}
    packet: Any = Ether(src=HOST_A, dst=HOST_B)
    for tag in range(vlans):
        packet /= Dot1Q(vlan=100 + tag)
    packet /= addresses[outer] / UDP(sport=40000, dport=4789, **({"chksum": 0} if zero else {}))
    packet /= VXLAN(vni=5, flags=8)
    inside = Shape(inner, proto)
    frame = bytes(packet / Ether(inside.finished(pattern(4, 300))))
    l3 = 14 + 4 * vlans
    l4 = l3 + (20 if outer == 4 else 40)
    inner_l3 = l4 + 8 + 8 + 14
    places = ((l3, l4), (inner_l3, inner_l3 + inside.l3_len))
    return Sample(frame, [frame], layer=layer, places=places)


# ---- changes


@dataclass(frozen=True)
class Rewriting:
    """The same change made by a stage and with scapy."""

    stage: Callable[[Sample], Any]
    change: Callable[[Packet], None]


def swap_macs(packet: Packet) -> None:
    packet.src, packet.dst = packet.dst, packet.src


def swap_tuple(packet: Packet) -> None:
    swap_macs(packet)
    network, transport = layers(packet, IP, IPv6)[0], layers(packet, TCP, UDP)[0]
    network.src, network.dst = network.dst, network.src
    transport.sport, transport.dport = transport.dport, transport.sport


NEW = {4: "198.51.100.7", 6: "fd02::5:7"}


def nat(layer: int) -> Rewriting:
    """Rewrites source address and port by slices, in the outermost packet or inside a tunnel."""

    def change(packet: Packet) -> None:
        network = layers(packet, IP, IPv6)[layer]
        network.src = NEW[4 if isinstance(network, IP) else 6]
        layers(packet, TCP, UDP)[layer].sport = 51234

    def stage(sample: Sample) -> Callable[[Burst], None]:
        l3, l4 = sample.places[layer]

        def rewrite(burst: Burst) -> None:
            for mbuf in burst:
                if mbuf[l3] >> 4 == 4:
                    mbuf[l3 + 12 : l3 + 16] = socket.inet_aton(NEW[4])
                else:
                    mbuf[l3 + 8 : l3 + 24] = socket.inet_pton(socket.AF_INET6, NEW[6])
                mbuf[l4 : l4 + 2] = (51234).to_bytes(2, "big")

        return rewrite

    return Rewriting(stage, change)


def zeroed(sample: Sample) -> Callable[[Burst], None]:
    """Zeroes the checksum field, as programs do before they compute one.

    The frame still says that its checksum is unfinished.
    """
    at = sum(sample.frame()[1][4:6])

    def rewrite(burst: Burst) -> None:
        for mbuf in burst:
            mbuf[at : at + 2] = bytes(2)

    return rewrite


REWRITINGS = {
    "mac": Rewriting(lambda _: stages.MacSwap(), swap_macs),
    "tuple": Rewriting(lambda _: stages.FiveTupleSwap(), swap_tuple),
    "nat": nat(0),
    "zeroed": Rewriting(zeroed, lambda _: None),
}
INSIDE = {**REWRITINGS, "nat-inside": nat(1)}

SHAPES = [
    *(Shape(v, proto, vlans) for v in (4, 6) for proto in ("tcp", "udp") for vlans in (0, 1, 2)),
    *(Shape(v, "tcp", 1, l3_options=True) for v in (4, 6)),
]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("segsz", [0, 1001], ids=["single", "super"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_packets(way: Way, shape: Shape, segsz: int, fill: str) -> None:
    sample = plain(shape, segsz)
    for name, how in REWRITINGS.items():
        assert way.cross(sample, how, fill) == sample.rewritten(how.change), name


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("layer", "zero"),
    [(0, False), (1, False), (1, True)],
    ids=["outer-unfinished", "inner-unfinished", "inner-unfinished-no-outer"],
)
@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("outer", "inner", "vlans"), [(4, 4, 0), (4, 6, 1), (6, 4, 1), (6, 6, 0), (4, 4, 2)]
)
def test_tunnels(
    way: Way, outer: int, inner: int, proto: str, vlans: int, layer: int, zero: bool, fill: str
) -> None:
    """The unfinished checksum is the tunnel's own or that of the packet inside."""
    sample = tunnel(outer, inner, proto, layer=layer, vlans=vlans, zero=zero)
    for name, how in INSIDE.items():
        assert way.cross(sample, how, fill) == sample.rewritten(how.change), name


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("version", [4, 6])
def test_tunnels_that_are_cut_from_one_super_frame(way: Way, version: int, fill: str) -> None:
    """Each datagram is a VXLAN packet after the split; before, only the first looks like one."""
    inner = Shape(4, "tcp")
    piece = bytes(VXLAN(vni=5, flags=8) / Ether(inner.finished(pattern(5, 401))))
    shape = Shape(version, "udp", fields={"sport": 40000, "dport": 4789})
    at = (shape.l2_len, shape.l2_len + shape.l3_len)
    sample = Sample(
        shape.finished(3 * piece), shape.segments(3 * piece, len(piece)), len(piece), places=(at,)
    )
    for name, how in REWRITINGS.items():
        assert way.cross(sample, how, fill) == sample.rewritten(how.change), name
