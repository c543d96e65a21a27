# SPDX-License-Identifier: BSD-3-Clause
"""VLAN tags that an application requests with TX_VLAN and TX_QINQ arrive in the frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rigs import HOST_A, HOST_B, Shape, bridged, iproute, label
from support import ENGINES, frame, pattern, settle, skip_without_devices, skip_without_engine

import rtap
from rtap import (
    Burst,
    MacAddr,
    Mbuf,
    MbufFlag,
    Mempool,
    NetNS,
    RxOffload,
    TxOffload,
    offload,
)

OFFLOADS = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
INSERT = TxOffload.VLAN_INSERT | TxOffload.QINQ_INSERT
LRO = RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
TCI, OUTER = 0x6123, 0x2456
ONE = b"\x81\x00\x61\x23"
TWO = b"\x88\xa8\x24\x56" + ONE
ASKED = {MbufFlag.TX_VLAN: ONE, MbufFlag.TX_QINQ: TWO, MbufFlag.TX_QINQ | MbufFlag.TX_VLAN: TWO}
asked = pytest.mark.parametrize("flag", ASKED, ids=["vlan", "qinq", "both"])
SHAPES = [Shape(version, proto) for version in (4, 6) for proto in ("tcp", "udp")]


def tagged(data: bytes, flag: MbufFlag) -> bytes:
    return data[:12] + ASKED[flag] + data[12:]


def ask(mbuf: Mbuf, flag: MbufFlag) -> Mbuf:
    mbuf.ol_flags |= flag
    mbuf.vlan_tci, mbuf.vlan_tci_outer = TCI, OUTER
    return mbuf


class Rig:
    def __init__(self, bridge: Any, header: bool) -> None:
        self.bridge, self.header, self.dev = bridge, header, bridge.a


@pytest.fixture(
    scope="module",
    params=[(engine, header) for engine in ENGINES for header in (True, False)],
    ids=lambda p: f"{p[0]}-{'header' if p[1] else 'plain'}",
)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    skip_without_devices()
    engine, header = request.param
    skip_without_engine(engine)
    offloads = INSERT | OFFLOADS if header else INSERT
    with bridged(
        a={"engine": engine, "tx_offloads": offloads, "nb_mbufs": 256, "data_room": 66000},
        b={"engine": "syscall"},
    ) as bridge:
        assert bridge.a.info().vnet_hdr is header  # inserting takes none
        yield Rig(bridge, header)
        assert settle(bridge.a.pool) == 0


@asked
def test_frames_of_any_kind(rig: Rig, flag: MbufFlag) -> None:
    frames = [frame(n, length) for n, length in enumerate((16, 60, 1514))]
    burst = Burst([ask(rig.dev.pool.alloc(f), flag) for f in frames])
    assert rig.dev.tx_burst(0, burst) == 3
    assert rig.bridge.arriving(3) == [tagged(f, flag) for f in frames]
    assert rig.dev.stats().oerrors == 0


@asked
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_with_checksums_and_segments(rig: Rig, shape: Shape, flag: MbufFlag) -> None:
    """The application's header lengths do not include the requested tags."""
    for segsz in (0, 1000) if rig.header else (0,):
        payload = pattern(3, 3500 if segsz else 1200)
        mbuf = shape.request(rig.dev.pool.alloc(shape.unfinished(payload)), segsz)
        wanted = [tagged(f, flag) for f in shape.segments(payload, segsz or 65535)]
        assert rig.dev.tx_burst(0, Burst([ask(mbuf, flag)])) == 1
        del mbuf
        assert rig.bridge.arriving(len(wanted)) == wanted


@asked
def test_a_shared_original_is_left_alone(rig: Rig, flag: MbufFlag) -> None:
    with Mempool(8, 2048) as pool:
        mbuf = ask(pool.alloc(frame(1, 200)), flag)
        state = bytes(mbuf), mbuf.ol_flags, mbuf.pkt_len, mbuf.headroom
        assert rig.dev.tx_burst(0, Burst([mbuf, mbuf])) == 2
        clone = mbuf.clone()
        assert rig.dev.tx_burst(0, Burst([clone])) == 1
        del clone
        assert rig.bridge.arriving(3) == [tagged(frame(1, 200), flag)] * 3
        assert (bytes(mbuf), mbuf.ol_flags, mbuf.pkt_len, mbuf.headroom) == state
        del mbuf
        assert settle(pool) == 0


@asked
@pytest.mark.parametrize("headroom", [0, 3, 4, 7, 8, 17])
def test_where_the_room_is(rig: Rig, headroom: int, flag: MbufFlag) -> None:
    """Tags use the headroom, or else the tailroom; the virtio-net header needs room as well."""
    with Mempool(4, 256, headroom=32) as pool:
        mbuf = pool.alloc(frame(1, 100)[32 - headroom :])
        mbuf.prepend(32 - headroom)[:] = frame(1, 100)[: 32 - headroom]
        assert mbuf.headroom == headroom
        assert rig.dev.tx_burst(0, Burst([ask(mbuf, flag)])) == 1
        del mbuf
        assert rig.bridge.arriving(1) == [tagged(frame(1, 100), flag)]
        assert settle(pool) == 0


@asked
@pytest.mark.parametrize("headroom", [16, 3, 0])
def test_the_place_of_an_unfinished_checksum_moves_with_its_bytes(
    rig: Rig, headroom: int, flag: MbufFlag
) -> None:
    """A super-frame made here, which is sent under a header of its own or split: tags go in front
    of the frame, or behind its addresses where there is no headroom."""
    shape = Shape()
    payload = pattern(4, 360)
    frames = shape.segments(payload, 120)
    with Mempool(8, 512, headroom=16) as pool:
        burst = Burst()
        for f in frames:
            mbuf = pool.alloc(f[16 - headroom :])
            mbuf.prepend(16 - headroom)[:] = f[: 16 - headroom]
            burst.append(mbuf)
        del mbuf
        out = offload.Gro().coalesce(burst)
        assert len(out) == 1
        assert (out[0].headroom, out[0].tso_segsz, out[0].nb_segs) == (headroom, 120, 3)
        ask(out[0], flag)
        assert rig.dev.tx_burst(0, out) == 1  # nobody else sees it: the tags go into it
        assert rig.bridge.arriving(3) == [tagged(f, flag) for f in frames]
        assert settle(pool) == 0


@asked
def test_no_room_anywhere(rig: Rig, flag: MbufFlag) -> None:
    full = frame(1, 32 + 256)
    with Mempool(4, 256, headroom=32) as pool:
        mbuf = pool.alloc(full[32:])
        mbuf.prepend(32)[:] = full[:32]
        assert (mbuf.headroom, mbuf.tailroom) == (0, 0)
        before = rig.dev.xstats()["tx_q0_bad_request_packets"]
        assert rig.dev.tx_burst(0, Burst([ask(mbuf, flag), pool.alloc(frame(2))])) == 2
        del mbuf
        assert rig.dev.xstats()["tx_q0_bad_request_packets"] == before + 1
        assert rig.bridge.arriving(1) == [frame(2)]
        assert settle(pool) == 0
    rig.dev.stats_reset()


@asked
def test_chains(rig: Rig, flag: MbufFlag) -> None:
    with Mempool(32, 64) as pool:
        mbuf = ask(pool.alloc(frame(1, 1000)), flag)
        assert mbuf.nb_segs == 16
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        del mbuf
        assert rig.bridge.arriving(1) == [tagged(frame(1, 1000), flag)]
        before = rig.dev.xstats()["tx_q0_bad_request_packets"]
        mbuf = ask(pool.alloc(frame(1, 70)), flag)
        mbuf.adj(53)  # leaves 11 bytes in the first segment, less than two addresses
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        assert rig.dev.xstats()["tx_q0_bad_request_packets"] == before + 1
        del mbuf
        assert settle(pool) == 0
    rig.dev.stats_reset()


@asked
def test_a_super_frame_on_its_way(engine: str, flag: MbufFlag) -> None:
    """It is received whole, tagged, and sent on whole."""
    shape = Shape()
    payload = pattern(1, 20_000)
    options = {"engine": engine, "rx_offloads": LRO, "tx_offloads": INSERT | OFFLOADS}
    with bridged(a=options, b=options) as bridge:
        mbuf = shape.request(bridge.a.pool.alloc(shape.unfinished(payload)), 1400)
        assert bridge.a.tx_burst(0, Burst([mbuf])) == 1
        (mbuf,) = bridge.b.rx_burst(0, 1, 5)
        assert mbuf.ol_flags & MbufFlag.RX_LRO
        mbuf[0:12] = bytes(MacAddr(HOST_A)) + bytes(MacAddr(HOST_B))
        wanted = tagged(bytes(mbuf), flag)
        assert bridge.b.tx_burst(0, Burst([ask(mbuf, flag)])) == 1
        (back,) = bridge.a.rx_burst(0, 1, 5)
        assert bytes(back) == wanted
        assert back.ol_flags & MbufFlag.RX_LRO
        assert back.tso_segsz == 1400
        assert (back.l3_len, back.l4_len) == (shape.l3_len, shape.l4_len)
        assert back.l2_len == 14 + len(ASKED[flag])


@asked
def test_a_tun_device_has_no_place_for_tags(netns: NetNS, engine: str, flag: MbufFlag) -> None:
    with rtap.open("u0", netns=netns, mode="tun", engine=engine) as dev:
        iproute(netns, "addr add 10.0.0.254/32 dev u0")
        packet = Shape().finished(b"abc")[14:]
        burst = Burst([ask(dev.pool.alloc(packet), flag), dev.pool.alloc(packet)])
        assert dev.tx_burst(0, burst) == 2
        assert dev.xstats()["tx_q0_bad_request_packets"] == 1
        assert dev.stats().opackets == 1
