# SPDX-License-Identifier: BSD-3-Clause
"""Receive offloads: what the kernel leaves unfinished, the mbuf says so, and it can be sent on.

Device A sends super-frames into a bridge. The offloads of device B decide whether the kernel splits
them, and whether it finishes their checksums.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rigs import HOST_A, HOST_B, Bridge, Shape, bridged, label, parse, talk, wrong_checksums
from scapy.layers.inet import IP, TCP, UDP
from support import ip, pattern
from this_kernel import kernel, no_uso, skip_without_uso

import rtap
from rtap import Burst, EthDev, MacAddr, Mbuf, MbufFlag, Mempool, NetNS, RxOffload, TxOffload

TX = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
TCP_LRO = RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
UDP_LRO = RxOffload.UDP_CKSUM | RxOffload.UDP_LRO
LRO = TCP_LRO | UDP_LRO
NONE = MbufFlag.RX_L4_CKSUM_NONE

USO = set() if no_uso() else {"uso"}
FEATURES = {
    0: set(),
    int(RxOffload.IPV4_CKSUM): set(),
    int(RxOffload.TCP_CKSUM): {"csum"},
    int(RxOffload.UDP_CKSUM): {"csum"},
    int(RxOffload.CHECKSUM | RxOffload.SCATTER): {"csum"},
    int(TCP_LRO): {"csum", "tso4", "tso6", "ecn"},
    int(UDP_LRO): {"csum", *USO},
    int(LRO): {"csum", "tso4", "tso6", "ecn", *USO},
}
ETHTOOL = {
    "tx-checksum-ip-generic": "csum",
    "tx-tcp-segmentation": "tso4",
    "tx-tcp6-segmentation": "tso6",
    "tx-tcp-ecn-segmentation": "ecn",
    "tx-udp-segmentation": "uso",
}


def kernel_features(ns: NetNS, ifname: str) -> set[str]:
    """The offloads that the kernel may leave to the device, according to ethtool."""
    out = ns.run(["ethtool", "-k", ifname], capture_output=True, text=True, check=True).stdout
    found = dict(line.strip().split(": ", 1) for line in out.splitlines()[1:])
    return {short for name, short in ETHTOOL.items() if found[name].startswith("on")}


@pytest.mark.skipif(shutil.which("ethtool") is None, reason="needs ethtool")
@pytest.mark.parametrize("offloads", FEATURES, ids=hex)
def test_features_as_the_kernel_has_them(netns: NetNS, offloads: int) -> None:
    with rtap.open("t0", netns=netns, rx_offloads=offloads) as dev:
        assert kernel_features(netns, "t0") == FEATURES[offloads]
        info = dev.info()
        assert info.rx_offloads | info.rx_offloads_refused == offloads
        assert bool(info.rx_offloads_refused) is bool(offloads & RxOffload.UDP_LRO and no_uso())
        assert info.vnet_hdr is bool(offloads)


@pytest.mark.skipif(shutil.which("ethtool") is None, reason="needs ethtool")
def test_features_follow_configure(netns: NetNS) -> None:
    with (
        Mempool(64, 66000) as pool,
        netns.call(rtap.probe, "net_rtap0,iface=t0") as dev,
    ):
        ip(netns, "addr", "add", "10.0.0.1/24", "dev", "t0")
        for offloads in [*FEATURES, *reversed(FEATURES)]:
            dev.configure(1, 1, rtap.EthConf(rx_offloads=RxOffload(offloads)))
            assert kernel_features(netns, "t0") == FEATURES[offloads]
            assert dev.info().vnet_hdr is bool(offloads)
            dev.rx_queue_setup(0, 64, pool)
            dev.tx_queue_setup(0, 64)
            dev.start()
            assert kernel_features(netns, "t0") == FEATURES[offloads]
            dev.stop()
            assert "10.0.0.1" in ip(netns, "addr", "show", "dev", "t0")


# ---- behind a bridge


@contextmanager
def between(rx_offloads: int, engine: str, **options: Any) -> Iterator[Bridge]:
    with bridged(
        a={"tx_offloads": TX, "rx_offloads": LRO},
        b={"rx_offloads": rx_offloads, "engine": engine, **options},
    ) as bridge:
        yield bridge


def send(dev: EthDev, shape: Shape, payload: bytes, segsz: int = 0) -> bytes:
    frame = shape.unfinished(payload)
    mbuf = shape.request(dev.pool.alloc(frame), segsz)
    assert dev.tx_burst(0, Burst([mbuf])) == 1
    return frame


def receive(dev: EthDev, n: int) -> list[Mbuf]:
    got: list[Mbuf] = []
    while len(got) < n:
        burst = dev.rx_burst(0, n - len(got), 5)
        assert len(burst) > 0, f"{len(got)} of {n} frames arrived"
        got += burst
    return got


def arrives_whole(shape: Shape) -> bool:
    """Whether the kernel leaves such a super-frame whole if a device takes it."""
    return shape.proto == "tcp" or not no_uso()


SHAPES = [
    Shape(version, proto, vlans)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1)
]


@pytest.mark.parametrize(
    ("offloads", "whole"),
    [
        (0, ()),
        (RxOffload.CHECKSUM, ()),
        (TCP_LRO, ("tcp",)),
        (UDP_LRO, ("udp",)),
        (LRO, ("tcp", "udp")),
    ],
    ids=["none", "checksum", "tcp", "udp", "both"],
)
def test_super_frames_arrive_whole_where_allowed(engine: str, offloads: int, whole: str) -> None:
    payload = pattern(1, 30_000)
    with between(offloads, engine) as bridge:
        for shape in SHAPES:
            sent = send(bridge.a, shape, payload, 1400)
            if shape.proto in whole and arrives_whole(shape):
                (mbuf,) = receive(bridge.b, 1)
                assert mbuf.ol_flags & MbufFlag.RX_LRO
                assert mbuf.ol_flags & MbufFlag.RX_L4_CKSUM_MASK == NONE
                assert mbuf.tso_segsz == 1400
                assert mbuf.pkt_len == len(sent)
                assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len) == (
                    shape.l2_len,
                    shape.l3_len,
                    shape.l4_len,
                )
                assert bytes(mbuf)[-30_000:] == payload
                continue
            segments = shape.segments(payload, 1400)
            got = receive(bridge.b, len(segments))
            assert all(len(mbuf) <= 1500 + shape.l2_len for mbuf in got)
            assert not any(mbuf.ol_flags & MbufFlag.RX_LRO or mbuf.tso_segsz for mbuf in got)
            if offloads == 0:
                assert [bytes(mbuf) for mbuf in got] == segments
                assert {mbuf.ol_flags for mbuf in got} == {0}
        assert bridge.nothing_arrives()


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_unfinished_checksums_are_told_of(engine: str, shape: Shape) -> None:
    with between(RxOffload.CHECKSUM, engine) as bridge:
        for payload in (b"", b"x", pattern(1, 1000)):
            send(bridge.a, shape, payload)
            (mbuf,) = receive(bridge.b, 1)
            good = MbufFlag.RX_IP_CKSUM_GOOD if shape.version == 4 else 0
            assert mbuf.ol_flags == NONE | good
            assert (mbuf.l2_len, mbuf.l3_len) == (shape.l2_len, shape.l3_len)
            packet = parse(bytes(mbuf))
            layer = TCP if shape.proto == "tcp" else UDP
            packet[layer].chksum = parse(shape.finished(payload))[layer].chksum
            assert bytes(packet) == shape.finished(payload)
            assert wrong_checksums(bytes(mbuf))


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_finished_checksums_are_checked(engine: str, shape: Shape) -> None:
    """Frames with a finished checksum, about which the kernel says nothing, are checked."""
    good, bad = shape.finished(b"abc"), shape.finished(b"abc")[:-1] + b"d"
    with between(LRO, engine) as bridge:
        for frame, status in (
            (good, MbufFlag.RX_L4_CKSUM_GOOD),
            (bad, MbufFlag.RX_L4_CKSUM_BAD),
        ):
            assert bridge.a.send(frame)
            (mbuf,) = receive(bridge.b, 1)
            assert bytes(mbuf) == frame
            assert mbuf.ol_flags == status
        assert bridge.b.xstats()["rx_q0_checksum_good"] == 1
        assert bridge.b.xstats()["rx_q0_checksum_bad"] == 1


@pytest.mark.parametrize("flags", ["A", "CA", "CEPFA"])
@pytest.mark.parametrize("version", [4, 6])
def test_ecn_survives(engine: str, version: int, flags: str) -> None:
    """A super-frame with CWR, which requires TUN_F_TSO_ECN, arrives and can be sent on."""
    shape = Shape(version, tcp_flags=flags)
    payload = pattern(1, 5000)
    with between(LRO, engine) as bridge:
        send(bridge.a, shape, payload, 1400)
        (mbuf,) = receive(bridge.b, 1)
        assert mbuf.ol_flags & MbufFlag.RX_LRO
        assert parse(bytes(mbuf))[TCP].flags == flags
        mbuf[0:12] = bytes(MacAddr(HOST_A)) + bytes(MacAddr(HOST_B))
        wanted = bytes(mbuf)
        assert bridge.b.tx_burst(0, Burst([mbuf])) == 1
        (back,) = receive(bridge.a, 1)
        assert bytes(back) == wanted
        assert back.ol_flags & MbufFlag.RX_LRO
        assert back.tso_segsz == 1400


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("scatter", [False, True])
def test_sent_on_as_it_came(engine: str, shape: Shape, scatter: bool) -> None:
    """A frame received on B goes back to A unfinished, with the same bytes and lengths."""
    payload = pattern(1, 20_000)
    options: dict[str, Any] = {"data_room": 2048} if scatter else {}
    offloads = LRO | (RxOffload.SCATTER if scatter else 0)
    with between(offloads, engine, **options) as bridge:
        for segsz, piece in ((1400, payload), (0, payload[:1000])):
            if segsz and not arrives_whole(shape):
                continue
            send(bridge.a, shape, piece, segsz)
            (mbuf,) = receive(bridge.b, 1)
            assert (mbuf.nb_segs > 1) is (scatter and segsz > 0)
            mbuf[0:12] = bytes(MacAddr(HOST_A)) + bytes(MacAddr(HOST_B))
            wanted = (bytes(mbuf), mbuf.ol_flags, mbuf.tso_segsz, mbuf.l2_len, mbuf.l3_len)
            keep = mbuf.clone()
            assert bridge.b.tx_burst(0, Burst([mbuf])) == 1
            (back,) = receive(bridge.a, 1)
            assert (bytes(back), back.ol_flags, back.tso_segsz, back.l2_len, back.l3_len) == wanted
            assert bytes(keep) == wanted[0]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_sent_on_without_headers(engine: str, shape: Shape) -> None:
    """Toward a device without headers, software finishes checksums and splits super-frames."""
    with between(LRO, engine) as bridge, bridged(a={"engine": engine}) as out:
        for n in (0, 1, 999, 1000):
            send(bridge.a, shape, pattern(n, n))
            (mbuf,) = receive(bridge.b, 1)
            original = bytes(mbuf)
            held = mbuf.clone() if n > 1 else None
            assert out.a.tx_burst(0, Burst([mbuf])) == 1
            assert out.arriving(1) == [shape.finished(pattern(n, n))]
            assert held is None or bytes(held) == original
        wanted = shape.segments(pattern(1, 5000), 1400)
        send(bridge.a, shape, pattern(1, 5000), 1400)
        got = receive(bridge.b, 1 if arrives_whole(shape) else len(wanted))
        assert out.a.tx_burst(0, Burst(got)) == len(got)
        assert out.arriving(len(wanted)) == wanted
        assert out.a.stats().oerrors == 0
        assert out.nothing_arrives()


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("tags", [0, 1])
def test_checksum_place_moves_with_the_frame(engine: str, tags: int, header: bool) -> None:
    """A tag is pushed or popped before an unfinished checksum, which is then finished."""
    with (
        between(LRO, engine) as bridge,
        bridged(a={"engine": engine, "tx_offloads": TX if header else 0}) as out,
    ):
        for proto in ("tcp", "udp"):
            for payload, segsz in ((b"odd", 0), (b"even", 0), (pattern(1, 5000), 1400)):
                shape = Shape(4, proto, tags)
                if segsz and not arrives_whole(shape):
                    continue
                send(bridge.a, shape, payload, segsz)
                (mbuf,) = receive(bridge.b, 1)
                addresses = mbuf[0:12]
                if tags:
                    mbuf.adj(4)
                    mbuf[0:12] = addresses
                else:
                    mbuf.prepend(4)
                    mbuf[0:16] = addresses + b"\x81\x00\x00\x64"
                assert out.a.tx_burst(0, Burst([mbuf])) == 1
                wanted = Shape(4, proto, 1 - tags).segments(payload, segsz or 65535)
                assert out.arriving(len(wanted)) == wanted


# ---- from the kernel's own stack


def test_datagrams_without_offloads_are_complete(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        for n in (0, 1, 100, 1472):
            talk(netns, dev, pattern(n, n))
            (mbuf,) = receive(dev, 1)
            assert wrong_checksums(bytes(mbuf)) == []
            assert mbuf.ol_flags == 0
        if kernel() < (6, 11):  # the kernel cuts nothing for a device that leaves checksums to it
            with pytest.raises(OSError, match="Input/output error"):
                talk(netns, dev, pattern(1, 5000), segment=1000)
            return
        talk(netns, dev, pattern(1, 5000), segment=1000)
        got = receive(dev, 5)
        assert [len(mbuf) for mbuf in got] == [1042] * 5
        assert [wrong_checksums(bytes(mbuf)) for mbuf in got] == [[]] * 5


def test_segmented_datagrams_with_lro_arrive_whole(netns: NetNS, engine: str) -> None:
    skip_without_uso()
    with rtap.open("t0", netns=netns, engine=engine, rx_offloads=UDP_LRO) as dev:
        payload = pattern(1, 50_000)
        talk(netns, dev, payload, segment=1000)
        (mbuf,) = receive(dev, 1)
        assert (mbuf.pkt_len, mbuf.tso_segsz) == (50_042, 1000)
        assert mbuf.ol_flags == MbufFlag.RX_LRO | NONE
        assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len) == (14, 20, 8)
        assert bytes(mbuf)[42:] == payload
        assert IP(bytes(mbuf)[14:]).len == 50_028


def test_fragments_are_complete(netns: NetNS, engine: str) -> None:
    """The kernel cannot leave the checksum of a fragmented datagram to the device."""
    with rtap.open("t0", netns=netns, engine=engine, rx_offloads=LRO) as dev:
        payload = pattern(1, 4000)
        talk(netns, dev, payload)
        got = [bytes(mbuf) for mbuf in receive(dev, 3)]
        assert all(mbuf[20] & 0x3F or mbuf[21] for mbuf in got)
        packets = [IP(frame[14:]) for frame in got]
        body = b"".join(bytes(packet.payload) for packet in packets)
        assert body[8:] == payload
        whole = packets[0].copy()
        whole.flags, whole.frag = 0, 0
        datagram = UDP(body)
        stated = datagram.chksum
        del datagram.chksum
        rebuilt = IP(bytes(IP(src=whole.src, dst=whole.dst) / datagram))
        assert rebuilt[UDP].chksum == stated
