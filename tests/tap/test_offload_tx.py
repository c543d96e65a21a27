# SPDX-License-Identifier: BSD-3-Clause
"""Checksums and segmentation that an application asks for with mbuf flags.

What arrives behind a bridge is compared byte for byte with the frames that scapy makes: the
kernel (on a device with virtio-net headers) and rtap (on one without) have to agree with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs import (
    HOST_A,
    HOST_B,
    TX_L4,
    TX_SEG,
    Bridge,
    Shape,
    bridged,
    iproute,
    label,
    write_in,
    wrong_checksums,
)
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrRouting
from scapy.layers.l2 import Ether
from support import (
    ENGINES,
    PacketSocket,
    pattern,
    settle,
    skip_without_devices,
    skip_without_engine,
)

import rtap
from rtap import Burst, EthDev, Mbuf, MbufFlag, Mempool, NetNS, TxOffload

OFFLOADS = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO


@dataclass
class Rig:
    bridge: Bridge
    header: bool
    engine: str

    @property
    def dev(self) -> EthDev:
        return self.bridge.a


def rigs(*headers: bool) -> list[Any]:
    return [
        pytest.param((engine, header), id=f"{engine}-{'header' if header else 'plain'}")
        for engine in ENGINES
        for header in headers
    ]


@pytest.fixture(scope="module", params=rigs(True, False))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A bridge whose near device has virtio-net headers, or none."""
    skip_without_devices()
    engine, header = request.param
    skip_without_engine(engine)
    offloads = OFFLOADS if header else TxOffload(0)
    with bridged(
        a={"engine": engine, "tx_offloads": offloads, "nb_mbufs": 256, "data_room": 66000},
        b={"engine": "syscall"},
    ) as bridge:
        assert bridge.a.info().vnet_hdr is header
        yield Rig(bridge, header, engine)
        assert settle(bridge.a.pool) == 0


with_headers = pytest.mark.parametrize("rig", rigs(True), indirect=True)
without_headers = pytest.mark.parametrize("rig", rigs(False), indirect=True)


SHAPES = [
    Shape(version, proto, vlans, options)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1, 2)
    for options in (False, True)
]


shapes = pytest.mark.parametrize("shape", SHAPES, ids=label)


def counters(dev: EthDev) -> tuple[int, int, int]:
    """(opackets, oerrors, refused)"""
    stats = dev.stats()
    return stats.opackets, stats.oerrors, txq_counters(dev)["refused"]


def txq_counters(dev: EthDev) -> dict[str, int]:
    queue: Any = dev.tx_queue(0)
    found: dict[str, int] = queue.counters()
    return found


def chain(pool: Mempool, data: bytes, request: Callable[[Mbuf], object]) -> Mbuf:
    mbuf = pool.alloc(data)
    request(mbuf)
    return mbuf


# ---- checksums


@shapes
def test_checksums(rig: Rig, shape: Shape) -> None:
    payloads = [pattern(n, n) for n in (0, 1, 2, 3, 64, 555, 1400)]
    burst = Burst([shape.request(rig.dev.pool.alloc(shape.unfinished(p))) for p in payloads])
    assert rig.dev.tx_burst(0, burst) == len(payloads)
    assert rig.bridge.arriving(len(payloads)) == [shape.finished(p) for p in payloads]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_the_kernel_without_a_request_sends_it_as_it_is(rig: Rig, version: int, proto: str) -> None:
    """That the checksums above were wrong before somebody finished them."""
    frame = Shape(version, proto).unfinished(b"x" * 100)
    assert wrong_checksums(frame)
    assert rig.dev.send(frame)
    assert rig.bridge.arriving(1) == [frame]


def test_only_the_ip_checksum(rig: Rig) -> None:
    for options in (False, True):
        shape = Shape(l3_options=options)
        packet = Ether(shape.finished(b"abc"))
        packet[TCP].chksum = 0x1234
        wanted = bytes(packet)
        packet[IP].chksum = 0xBEEF
        mbuf = shape.request(rig.dev.pool.alloc(bytes(packet)))
        mbuf.ol_flags = MbufFlag.TX_IP_CKSUM | MbufFlag.TX_IPV4
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        assert rig.bridge.arriving(1) == [wanted]


def test_only_the_tcp_checksum(rig: Rig) -> None:
    shape = Shape()
    packet = Ether(shape.finished(b"abc"))
    packet[IP].chksum = 0x1234
    wanted = bytes(packet)
    packet[TCP].chksum = 0xBEEF
    mbuf = shape.request(rig.dev.pool.alloc(bytes(packet)))
    mbuf.ol_flags = MbufFlag.TX_TCP_CKSUM | MbufFlag.TX_IPV4
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(1) == [wanted]


@pytest.mark.parametrize("version", [4, 6])
def test_udp_sum_of_zero_is_sent_as_ffff(rig: Rig, version: int) -> None:
    shape = Shape(version, "udp")
    rest = Ether(shape.finished(b"\0\0" + b"payload!"))[UDP].chksum
    payload = rest.to_bytes(2, "big") + b"payload!"
    assert Ether(shape.finished(payload))[UDP].chksum == 0xFFFF
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)))
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(1) == [shape.finished(payload)]


def test_tcp_sum_of_zero(rig: Rig) -> None:
    """Here 0 is as good as 0xffff: both are the same number in ones' complement."""
    shape = Shape()
    rest = Ether(shape.finished(b"\0\0" + b"payload!"))[TCP].chksum
    payload = rest.to_bytes(2, "big") + b"payload!"
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)))
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    (got,) = rig.bridge.arriving(1)
    packet = Ether(got)
    assert packet[TCP].chksum in (0, 0xFFFF)
    packet[TCP].chksum = Ether(shape.finished(payload))[TCP].chksum
    assert bytes(packet) == shape.finished(payload)


@pytest.mark.parametrize("data_room", [100, 101, 64, 333])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_checksum_of_a_chain(rig: Rig, version: int, proto: str, data_room: int) -> None:
    shape = Shape(version, proto)
    if data_room < shape.l2_len + shape.l3_len + shape.l4_len:
        data_room = shape.l2_len + shape.l3_len + shape.l4_len + 1
    with Mempool(64, data_room) as pool:
        payloads = [pattern(n, n) for n in (data_room, 500, 999, 1400)]
        burst = Burst([chain(pool, shape.unfinished(p), shape.request) for p in payloads])
        assert all(mbuf.nb_segs > 1 for mbuf in burst)
        assert rig.dev.tx_burst(0, burst) == len(payloads)
        assert rig.bridge.arriving(len(payloads)) == [shape.finished(p) for p in payloads]
        del burst
        assert settle(pool) == 0


@pytest.mark.parametrize("layer", [TCP(sport=1, dport=2), UDP(sport=1, dport=2)])
def test_pseudo_header_with_a_routing_header(rig: Rig, layer: Any) -> None:
    """It has the final destination (RFC 8200 8.1)."""
    routed = IPv6ExtHdrRouting(addresses=["fd00::8", "fd00::9"], segleft=2)
    packet = Ether(src=HOST_A, dst=HOST_B) / IPv6(src="fd00::1", dst="fd00::2") / routed / layer
    wanted = bytes(packet / b"payload")
    mbuf = rig.dev.pool.alloc(wanted)
    at = 14 + 40 + 40 + (16 if isinstance(layer, TCP) else 6)
    mbuf[at : at + 2] = b"\xbe\xef"
    mbuf.l2_len, mbuf.l3_len = 14, 80
    mbuf.ol_flags = TX_L4["tcp" if isinstance(layer, TCP) else "udp"] | MbufFlag.TX_IPV6
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(1) == [wanted]


@shapes
def test_padding_is_no_part_of_the_sum(rig: Rig, shape: Shape) -> None:
    """A minimum frame filled up to 60 bytes and more, with what is not zero."""
    frames = [shape.unfinished(b"ab") + b"\xa5" * n for n in (1, 2, 7, 46)]
    burst = Burst([shape.request(rig.dev.pool.alloc(frame)) for frame in frames])
    assert rig.dev.tx_burst(0, burst) == len(frames)
    for got in rig.bridge.arriving(len(frames)):
        assert got[: len(shape.finished(b"ab"))] == shape.finished(b"ab")
        assert set(got[len(shape.finished(b"ab")) :]) <= {0xA5}


def test_padding_in_segments_of_its_own(rig: Rig) -> None:
    """Those that hold nothing else are given back."""
    shape = Shape()
    with Mempool(16, 128) as pool:
        mbuf = shape.request(pool.alloc(shape.unfinished(b"ab") + b"\xa5" * 600))
        assert mbuf.nb_segs == 6
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        del mbuf
        (got,) = rig.bridge.arriving(1)
        assert got == shape.finished(b"ab")
        assert settle(pool) == 0


# ---- segmentation


@pytest.mark.parametrize(
    ("length", "segsz"),
    [(1001, 1000), (10_000, 1000), (60_000, 1420)],
)
@shapes
def test_segments(rig: Rig, shape: Shape, length: int, segsz: int) -> None:
    payload = pattern(length, length)
    wanted = shape.segments(payload, segsz)
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)), segsz)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(len(wanted)) == wanted


@pytest.mark.parametrize("segsz", [1, 7])
@pytest.mark.parametrize("shape", [Shape(4), Shape(6, "udp", 2)], ids=label)
def test_many_small_segments(rig: Rig, shape: Shape, segsz: int) -> None:
    payload = pattern(9, 100 * segsz)
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)), segsz)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(100) == shape.segments(payload, segsz)


@pytest.mark.parametrize("flags", ["A", "PA", "FA", "FPA", "EA", "CA", "CEPA", "CEFPA"])
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_flags_of_segments(rig: Rig, version: int, flags: str) -> None:
    shape = Shape(version, tcp_flags=flags)
    payload = pattern(3, 3500)
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)), 1000)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(4) == shape.segments(payload, 1000)


@pytest.mark.parametrize("length", [1, 999, 1000])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_what_fits_into_one_segment_is_one_frame(
    rig: Rig, version: int, proto: str, length: int
) -> None:
    """Also without headers: there is a checksum to finish and nothing to split."""
    shape = Shape(version, proto, tcp_flags="PA")
    payload = pattern(length, length)
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)), 1000)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(1) == [shape.finished(payload)]


def test_segmentation_implies_the_checksum(rig: Rig) -> None:
    shape = Shape()
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(b"x" * 2500)), 1000)
    mbuf.ol_flags = MbufFlag.TX_TCP_SEG | MbufFlag.TX_IPV4
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(3) == shape.segments(b"x" * 2500, 1000)


@pytest.mark.parametrize("shape", [Shape(4), Shape(6), Shape(4, "udp"), Shape(6, "udp")], ids=label)
def test_segments_of_a_chain(rig: Rig, shape: Shape) -> None:
    payload = pattern(7, 30_001)
    wanted = shape.segments(payload, 1400)
    with Mempool(512, 257) as pool:
        mbuf = shape.request(pool.alloc(shape.unfinished(payload)), 1400)
        assert mbuf.nb_segs > 100
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        del mbuf
        assert rig.bridge.arriving(len(wanted)) == wanted
        assert settle(pool) == 0


def test_padding_of_a_super_frame(rig: Rig) -> None:
    shape = Shape()
    payload = pattern(1, 2500)
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload) + b"\xa5" * 9), 1000)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(3) == shape.segments(payload, 1000)


@with_headers
def test_counts_super_frames_as_one(rig: Rig) -> None:
    shape = Shape()
    frame = shape.unfinished(b"x" * 2500)
    before = rig.dev.stats()
    mbuf = shape.request(rig.dev.pool.alloc(frame), 1000)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    after = rig.dev.stats()
    assert after.opackets - before.opackets == 1
    assert after.obytes - before.obytes == len(frame)
    assert len(rig.bridge.arriving(3)) == 3


@without_headers
@pytest.mark.parametrize("shape", [Shape(4), Shape(6), Shape(4, "udp"), Shape(6, "udp")], ids=label)
def test_without_headers_a_super_frame_is_split_in_its_place(rig: Rig, shape: Shape) -> None:
    pool = rig.dev.pool
    before = rig.dev.stats().opackets, rig.dev.xstats()["tx_q0_software_gso_packets"]
    large = pattern(1, 2500)
    burst = Burst(
        [
            shape.request(pool.alloc(shape.unfinished(b"small"))),
            shape.request(pool.alloc(shape.unfinished(large)), 1000),
            shape.request(pool.alloc(shape.unfinished(b"between"))),
            shape.request(pool.alloc(shape.unfinished(large)), 500),
            shape.request(pool.alloc(shape.unfinished(large)), 1400),
            shape.request(pool.alloc(shape.unfinished(b"last"))),
        ]
    )
    assert rig.dev.tx_burst(0, burst) == 6
    assert len(burst) == 0
    wanted = [
        shape.finished(b"small"),
        *shape.segments(large, 1000),
        shape.finished(b"between"),
        *shape.segments(large, 500),
        *shape.segments(large, 1400),
        shape.finished(b"last"),
    ]
    assert rig.bridge.arriving(len(wanted)) == wanted
    stats = rig.dev.stats()
    assert (stats.opackets - before[0], stats.oerrors) == (len(wanted), 0)
    assert rig.dev.xstats()["tx_q0_software_gso_packets"] == before[1] + 3
    assert rig.bridge.nothing_arrives()


# ---- shared frames


def mbuf_state(mbuf: Mbuf) -> tuple[object, ...]:
    lengths = (mbuf.pkt_len, mbuf.l2_len, mbuf.l3_len, mbuf.l4_len, mbuf.tso_segsz)
    return bytes(mbuf), mbuf.ol_flags, mbuf.refcnt, *lengths


@pytest.mark.parametrize("data_room", [4096, 333])
@pytest.mark.parametrize("shape", [Shape(4), Shape(6, "udp"), Shape(4, "udp", 1)], ids=label)
def test_a_shared_original_is_left_alone(rig: Rig, shape: Shape, data_room: int) -> None:
    payload = pattern(5, 1400)
    padded = shape.unfinished(payload) + b"\xa5" * 5
    for segsz in (0, 1000):
        wanted = shape.segments(payload, segsz or len(payload))
        with Mempool(64, data_room) as pool:
            mbuf = shape.request(pool.alloc(padded), segsz)
            state = mbuf_state(mbuf)
            for copies in (1, 2):
                assert rig.dev.tx_burst(0, Burst([mbuf] * copies)) == copies
                assert rig.bridge.arriving(len(wanted) * copies) == wanted * copies
                assert mbuf_state(mbuf) == state
            clone = mbuf.clone()
            assert rig.dev.tx_burst(0, Burst([clone])) == 1
            del clone
            assert rig.bridge.arriving(len(wanted)) == wanted
            assert mbuf_state(mbuf) == state
            del mbuf
            assert settle(pool) == 0


def test_flooded_to_a_device_with_and_one_without_headers(rig: Rig) -> None:
    """One mbuf in the bursts of two devices, with an unfinished checksum."""
    shape = Shape()
    frame = shape.unfinished(b"flood")
    with (
        rtap.open("flood", netns=rig.bridge.ns, tx_offloads=0 if rig.header else OFFLOADS) as other,
        PacketSocket(rig.bridge.ns, "flood", 0x0003) as seen,
    ):
        assert other.info().vnet_hdr is not rig.header
        mbuf = shape.request(rig.dev.pool.alloc(frame))
        mine, theirs = Burst([mbuf]), Burst([mbuf])
        assert other.tx_burst(0, theirs) == rig.dev.tx_burst(0, mine) == 1
        assert bytes(mbuf) == frame
        assert rig.bridge.arriving(1) == [shape.finished(b"flood")]
        (got,) = seen.frames(1)
        if rig.header:  # the other one has none: finished in software
            assert got == shape.finished(b"flood")
        else:  # a packet socket sees what the kernel has still to finish
            assert got[:34] == shape.finished(b"flood")[:34]
            assert got[-5:] == b"flood"


def test_a_shared_frame_waits_when_there_is_no_mbuf_for_its_copy(rig: Rig) -> None:
    shape = Shape()
    with Mempool(2, 4096) as pool:
        mbuf = shape.request(pool.alloc(shape.unfinished(b"one")))
        other = pool.alloc(b"in the way")
        burst = Burst([mbuf])
        sent, errors, _ = counters(rig.dev)
        assert rig.dev.tx_burst(0, burst) == 0
        assert len(burst) == 1
        assert counters(rig.dev)[:2] == (sent, errors)
        assert txq_counters(rig.dev)["full"] > 0
        del other
        assert rig.dev.tx_burst(0, burst) == 1
        assert rig.bridge.arriving(1) == [shape.finished(b"one")]
        assert bytes(mbuf) == shape.unfinished(b"one")
        del burst, mbuf
        assert settle(pool) == 0


def test_a_frame_sent_alone_needs_no_second_mbuf(rig: Rig) -> None:
    shape = Shape()
    with Mempool(1, 4096) as pool:
        for _ in range(3):
            burst = pool.alloc_burst(1, [shape.unfinished(b"one")])
            shape.request(burst[0])
            assert rig.dev.tx_burst(0, burst) == 1
            assert rig.bridge.arriving(1) == [shape.finished(b"one")]


# ---- requests that do not fit their frame


def edit(offset: int, value: bytes) -> Callable[[Mbuf], None]:
    def change(mbuf: Mbuf) -> None:
        mbuf[offset : offset + len(value)] = value

    return change


def assign(**fields: int) -> Callable[[Mbuf], None]:
    def change(mbuf: Mbuf) -> None:
        for name, value in fields.items():
            setattr(mbuf, name, value)

    return change


V4 = MbufFlag.TX_IPV4
WRONG: dict[str, tuple[Shape, Callable[[Mbuf], None]]] = {
    "no lengths": (Shape(), assign(l2_len=0, l3_len=0)),
    "no l2_len": (Shape(), assign(l2_len=0)),
    "l2_len one short": (Shape(), assign(l2_len=13)),
    "l2_len past the end": (Shape(), assign(l2_len=120)),
    "l2_len at its limit": (Shape(), assign(l2_len=65535)),
    "tag forgotten": (Shape(vlans=1), assign(l2_len=14)),
    "no l3_len": (Shape(), assign(l3_len=0)),
    "l3_len below a header": (Shape(), assign(l3_len=16)),
    "l3_len and ihl differ": (Shape(), assign(l3_len=24)),
    "options forgotten": (Shape(l3_options=True), assign(l3_len=20)),
    "l3_len past the end": (Shape(), assign(l3_len=200)),
    "l3_len at its limit": (Shape(), assign(l3_len=65535)),
    "v6: l3_len of v4": (Shape(6), assign(l3_len=20)),
    "v6: no l3_len": (Shape(6), assign(l3_len=0)),
    "v6: l3_len past the payload": (Shape(6), assign(l3_len=40 + 32 + 60)),
    "neither IPv4 nor IPv6": (Shape(), edit(14, b"\x55")),
    "ihl below a header": (Shape(), edit(14, b"\x44")),
    "ihl above l3_len": (Shape(), edit(14, b"\x4f")),
    "IP length below its header": (Shape(), edit(16, b"\0\x13")),
    "IP length without room for TCP": (Shape(), edit(16, b"\0\x27")),
    "IP length past the frame": (Shape(), edit(16, b"\x05\0")),
    "IP length at its limit": (Shape(), edit(16, b"\xff\xff")),
    "v6: length past the frame": (Shape(6), edit(18, b"\x05\0")),
    "v6: length of zero": (Shape(6), edit(18, b"\0\0")),
    "udp: length without room for UDP": (Shape(4, "udp"), edit(16, b"\0\x1b")),
    "tcp: data offset below a header": (Shape(), edit(46, b"\x40")),
    "tcp: data offset of zero": (Shape(), edit(46, b"\x00")),
    "tcp: data offset past the payload": (Shape(proto="tcp"), edit(46, b"\xf0")),
    "fragment": (Shape(), edit(20, b"\x20\x00")),
    "later fragment": (Shape(), edit(20, b"\x00\x10")),
    "another protocol": (Shape(), edit(23, b"\x11")),
    "udp: another protocol": (Shape(4, "udp"), edit(23, b"\x06")),
    "v6: another protocol": (Shape(6), edit(20, b"\x11")),
    "v6: fragment": (Shape(6, l3_options=True), edit(20, b"\x2c")),
    "v6: options forgotten": (Shape(6, l3_options=True), assign(l3_len=40)),
    "sctp": (Shape(), assign(ol_flags=MbufFlag.TX_SCTP_CKSUM | V4)),
    "two transports": (Shape(), assign(ol_flags=TX_L4["tcp"] | TX_SEG["udp"] | V4, tso_segsz=2)),
    "two segmentations": (
        Shape(),
        assign(ol_flags=TX_SEG["tcp"] | TX_SEG["udp"] | V4, tso_segsz=2),
    ),
    "segments of nothing": (Shape(), assign(ol_flags=TX_SEG["tcp"] | V4, tso_segsz=0)),
    "udp: segments of nothing": (Shape(4, "udp"), assign(ol_flags=TX_SEG["udp"] | V4, tso_segsz=0)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_does_not_fit_is_refused_and_counted(rig: Rig, case: str) -> None:
    """The others of its burst go, and in order."""
    shape, spoil = WRONG[case]
    pool = rig.dev.pool
    payload = b"payload" if "data offset past" not in case else b""
    bad = shape.request(pool.alloc(shape.unfinished(payload)))
    spoil(bad)
    first = shape.request(pool.alloc(shape.unfinished(b"first")))
    last = shape.request(pool.alloc(shape.unfinished(b"last!")))
    sent, errors, refused = counters(rig.dev)
    burst = Burst([first, bad, last])
    del first, bad, last
    assert rig.dev.tx_burst(0, burst) == 3
    assert len(burst) == 0
    assert counters(rig.dev) == (sent + 2, errors + 1, refused + 1)
    assert rig.bridge.arriving(2) == [shape.finished(b"first"), shape.finished(b"last!")]
    assert rig.bridge.nothing_arrives()
    assert settle(pool) == 0


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        (Shape(4, "tcp"), True),
        (Shape(4, "udp", 2), True),
        (Shape(6, "udp"), True),
        (Shape(6, "udp", 1), False),
        (Shape(6, "tcp"), False),
        (Shape(4, "tcp", 2, True), False),
    ],
    ids=label,
)
def test_headers_have_to_be_in_the_first_segment(rig: Rig, shape: Shape, fits: bool) -> None:
    """Up to the end of the fixed part of the transport header, in segments of 64 bytes."""
    with Mempool(64, 64) as pool:
        sent, errors, refused = counters(rig.dev)
        mbuf = shape.request(pool.alloc(shape.unfinished(b"x" * 100)))
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        assert counters(rig.dev) == (sent + fits, errors + (not fits), refused + (not fits))
        if fits:
            assert rig.bridge.arriving(1) == [shape.finished(b"x" * 100)]
        del mbuf
    assert rig.bridge.nothing_arrives()


def test_a_burst_of_refused_frames(rig: Rig) -> None:
    pool = rig.dev.pool
    sent, errors, refused = counters(rig.dev)
    burst = pool.alloc_burst(100, [Shape().unfinished(b"x")] * 100)
    burst.ol_flags = int(TX_L4["tcp"])
    assert rig.dev.tx_burst(0, burst) == 100
    assert counters(rig.dev) == (sent, errors + 100, refused + 100)
    del burst
    assert settle(pool) == 0
    assert rig.bridge.nothing_arrives()


def test_flags_that_ask_for_nothing(rig: Rig) -> None:
    """TX_IPV4 and the like only describe a frame."""
    frame = Shape().unfinished(b"abc")
    mbuf = rig.dev.pool.alloc(frame)
    mbuf.ol_flags = MbufFlag.TX_IPV4 | MbufFlag.TX_OUTER_IPV4 | MbufFlag.RX_VLAN
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(1) == [frame]


# ---- TUN


@pytest.mark.parametrize("header", [True, False])
def test_requests_on_a_tun_device(netns: NetNS, engine: str, header: bool) -> None:
    """Between two TUN devices the kernel routes, and finishes what it was asked to finish."""
    with (
        rtap.open(
            "u0", netns=netns, mode="tun", engine=engine, tx_offloads=OFFLOADS if header else 0
        ) as a,
        rtap.open("u1", netns=netns, mode="tun") as b,
    ):
        write_in(netns, "/proc/sys/net/ipv4/ip_forward", "1")
        write_in(netns, "/proc/sys/net/ipv4/conf/all/rp_filter", "0")
        write_in(netns, "/proc/sys/net/ipv4/conf/u0/rp_filter", "0")
        iproute(netns, "addr add 10.0.0.254/32 dev u0")
        iproute(netns, "route add 10.0.0.2/32 dev u1")
        for proto in ("tcp", "udp"):
            shape = Shape(4, proto)
            for payload, segsz in ((b"x", 0), (pattern(1, 1000), 0), (pattern(1, 2500), 1000)):
                packet = shape.unfinished(payload)[14:]
                mbuf = shape.request(a.pool.alloc(packet), segsz)
                mbuf.l2_len = 0
                assert a.tx_burst(0, Burst([mbuf])) == 1
                wanted = shape.segments(payload, segsz or 65535)
                for segment in wanted:
                    forwarded = IP(segment[14:])
                    forwarded.ttl -= 1
                    del forwarded.chksum
                    assert b.recv(5) == bytes(forwarded)


# ---- anything at all


@functools.cache
def template(number: int, n: int) -> bytes:
    """An unfinished frame of that shape before ``n`` bytes, which scapy takes its time for."""
    return SHAPES[number].unfinished(bytes(n))[: -n or None]


# To everybody: an example may make the bridge look for the receiver elsewhere.
MARK = b"\xff" * 6 + Shape().finished(b"mark")[6:]


@pytest.mark.fuzz
@pytest.mark.parametrize("rig", [("uring", True), ("syscall", False)], indirect=True)
@given(data=st.data())
def test_any_request_is_sent_or_counted(rig: Rig, data: st.DataObject) -> None:
    """Whatever the lengths and flags say: nothing is lost, nothing breaks, the rest goes."""
    number = data.draw(st.integers(0, len(SHAPES) - 1))
    shape = SHAPES[number]
    payload = data.draw(st.binary(max_size=100))
    raw = bytearray(template(number, len(payload)) + payload)
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(14, len(raw)))]
    lengths = st.one_of(st.integers(0, 70), st.integers(0, 65535))
    sent, errors, _ = counters(rig.dev)
    with Mempool(16, data.draw(st.sampled_from((64, 65, 100, 2048)))) as pool:
        mbuf = pool.alloc(raw)
        shape.request(mbuf)
        mbuf.ol_flags = data.draw(st.one_of(st.just(mbuf.ol_flags), st.integers(0, 2**64 - 1)))
        if data.draw(st.booleans()):
            mbuf.l2_len = data.draw(lengths)
        if data.draw(st.booleans()):
            mbuf.l3_len = data.draw(lengths)
        mbuf.tso_segsz = data.draw(lengths)
        held = mbuf.clone() if data.draw(st.booleans()) else None
        burst = Burst([mbuf])
        del mbuf
        assert rig.dev.tx_burst(0, burst) == 1
        now_sent, now_errors, _ = counters(rig.dev)
        assert now_sent + now_errors == sent + errors + 1
        if held is not None:
            assert bytes(held) == bytes(raw)
        del held, burst
        assert pool.in_use == 0
    assert rig.dev.send(MARK)
    while (got := rig.bridge.b.recv(5)) != MARK:
        assert got is not None
