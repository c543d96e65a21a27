# SPDX-License-Identifier: BSD-3-Clause
"""Checksums and segmentation that an application requests with mbuf flags.

Frames that arrive behind a bridge are compared byte for byte with those that scapy makes. The
kernel (on a device with virtio-net headers) and rtap (on one without) must agree with scapy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from oracle import oracle
from rigs import HOST_A, HOST_B, TX_L4, Shape, label, wrong_checksums
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrRouting
from scapy.layers.l2 import Ether
from support import pattern, settle
from tx_rigs import Rig, made, rigs, shapes

from rtap import Burst, Mbuf, MbufFlag, Mempool


@pytest.fixture(scope="module", params=rigs(True, False))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Each engine, with virtio-net headers and without."""
    yield from made(request.param)


@pytest.fixture(scope="module")
def least_tcp() -> int:
    """The segment size that this kernel takes instead of a smaller one, of TCP."""
    with oracle() as kernel:
        return kernel.least_tcp


with_headers = pytest.mark.parametrize("rig", rigs(True), indirect=True)
without_headers = pytest.mark.parametrize("rig", rigs(False), indirect=True)


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
    """The checksums above were wrong before they were finished."""
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
    """For TCP, 0 and 0xffff are equally right: they are the same number in ones' complement."""
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
    """The pseudo-header has the final destination (RFC 8200 8.1)."""
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
    """A minimum frame is padded to 60 bytes and more, with bytes that are not zero."""
    frames = [shape.unfinished(b"ab") + b"\xa5" * n for n in (1, 2, 7, 46)]
    burst = Burst([shape.request(rig.dev.pool.alloc(frame)) for frame in frames])
    assert rig.dev.tx_burst(0, burst) == len(frames)
    for got in rig.bridge.arriving(len(frames)):
        assert got[: len(shape.finished(b"ab"))] == shape.finished(b"ab")
        assert set(got[len(shape.finished(b"ab")) :]) <= {0xA5}


def test_padding_in_segments_of_its_own(rig: Rig) -> None:
    """Segments that hold only padding are freed."""
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
def test_many_small_segments(rig: Rig, shape: Shape, segsz: int, least_tcp: int) -> None:
    payload = pattern(9, 100 * segsz)
    mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)), segsz)
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    by_kernel = rig.header and shape.proto == "tcp"
    wanted = shape.segments(payload, max(segsz, least_tcp) if by_kernel else segsz)
    assert rig.bridge.arriving(len(wanted)) == wanted
    assert rig.bridge.nothing_arrives()


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
    """Without headers too, the checksum is finished and nothing is split."""
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
