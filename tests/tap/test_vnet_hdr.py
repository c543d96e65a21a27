# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header is kept from the read to the write, so that a super-frame stays one.

Packet sockets with PACKET_VNET_HDR are at both ends. A frame that is sent with a header into device
A, and that rtap forwards from A to B, must come out of B with the same header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from support import LOCAL, REMOTE, SOL_PACKET, PacketSocket, Tap
from vnet import MAX_SUPER_FRAME, NEEDS_CSUM, OFFLOADS, ROOMS, SHAPES, USO, Shape, offload

from rtap import Burst, Mbuf, MbufFlag, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue

pytestmark = pytest.mark.root

PACKET_VNET_HDR = 15  # linux/if_packet.h


class VnetSocket:
    """A packet socket on which every frame follows its virtio-net header."""

    def __init__(self, tap: Tap, protocol: int = 3) -> None:
        self.socket: PacketSocket = tap.packets(protocol, rcvbuf=64 << 20)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)

    def send(self, shape: Shape) -> None:
        self.socket.send(shape.header() + shape.frame())

    def recv(self) -> tuple[tuple[int, ...], bytes]:
        data = self.socket.recv(1 << 17)
        return struct.unpack("=BBHHHH", data[:10]), data[10:]


class Pair:
    """Devices A and B in namespaces of their own, and the two queues between them."""

    def __init__(self, a: Tap, b: Tap, engine: str, room: int, **options: Any) -> None:
        self.a, self.b = a, b
        self.pool = Mempool(max(64, 4 * -(-MAX_SUPER_FRAME // room)), room)
        self.rx: RxQueue = a.rx(
            self.pool,
            engine=engine,
            max_frame=min(MAX_SUPER_FRAME, 128 * room - 1),
            scatter=True,
        )
        self.tx: TxQueue = b.tx(engine=engine, **options)

    def received(self) -> Mbuf:
        burst = self.rx.rx_burst(1, 5)
        assert len(burst) == 1
        return burst[0]


@pytest.fixture
def taps(netns: NetNS, netns2: NetNS) -> Iterator[tuple[Tap, Tap]]:
    with Tap(netns, "tap0") as a, Tap(netns2, "tap1") as b:
        yield a, b


def forwarding(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int
) -> tuple[Pair, VnetSocket, Mbuf]:
    """Sends a frame of that shape to device A and forwards it; gives what B sends."""
    a, b = taps
    offload(a, shape.features)
    pair = Pair(a, b, engine, room)
    source, sink = VnetSocket(a), VnetSocket(b)
    source.send(shape)
    return pair, sink, pair.received()


def expected_header(shape: Shape) -> tuple[int, ...]:
    if not shape.flags:
        return (0, 0, 0, 0, 0, 0)
    size = shape.gso_size if shape.gso else 0
    return (NEEDS_CSUM, shape.gso, -1, size, shape.csum_start, shape.csum_offset)


def assert_came_through(shape: Shape, came: tuple[tuple[int, ...], bytes]) -> None:
    header, data = came
    assert data == shape.frame()
    wanted = expected_header(shape)
    # hdr_len is a hint that the kernel computes again from the linear part of the frame.
    assert (*header[:2], *header[3:]) == (*wanted[:2], *wanted[3:])


# ---- one frame at a time


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
def test_header_is_kept_from_read_to_write(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int
) -> None:
    if room == ROOMS["short"] and len(shape.frame()) > 128 * room:
        shape = Shape(**{**vars(shape), "payload": 10_000})
    pair, sink, mbuf = forwarding(taps, engine, shape, room)
    assert bytes(mbuf) == shape.frame()
    assert mbuf.l2_len == (14 if shape.flags else mbuf.l2_len)
    flags = MbufFlag(mbuf.ol_flags)
    if shape.flags:
        assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
        assert (mbuf.l3_len, mbuf.l4_len) == (shape.l3_len, shape.l4_len)
    else:
        assert flags & (MbufFlag.RX_L4_CKSUM_MASK | MbufFlag.RX_LRO) == 0
    assert bool(flags & MbufFlag.RX_LRO) == bool(shape.gso)
    assert mbuf.tso_segsz == shape.gso_size
    burst = Burst([mbuf])
    del mbuf
    assert pair.tx.tx_burst(burst) == 1
    assert_came_through(shape, sink.recv())
    assert pair.pool.in_use == 0
    assert pair.rx.counters()["errors"] == pair.tx.counters()["errors"] == 0


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], SHAPES[12]], ids=lambda s: s.name)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
@pytest.mark.parametrize("how", ["reference", "clone", "both"])
def test_header_of_a_shared_frame(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int, how: str
) -> None:
    pair, sink, mbuf = forwarding(taps, engine, shape, room)
    frames = {"reference": [mbuf], "clone": [mbuf.clone()], "both": [mbuf, mbuf.clone(), mbuf]}
    burst = Burst(frames[how])
    n = len(burst)
    assert pair.tx.tx_burst(burst) == n
    for _ in range(n):
        assert_came_through(shape, sink.recv())
    assert bytes(mbuf) == shape.frame()
    assert mbuf.tso_segsz == shape.gso_size


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], SHAPES[12]], ids=lambda s: s.name)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
@pytest.mark.parametrize("clone", [False, True], ids=["", "clone"])
def test_header_follows_when_the_front_of_the_frame_moves(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int, clone: bool
) -> None:
    """A tunnel replaces the Ethernet header, and a router pushes a tag."""
    pair, sink, mbuf = forwarding(taps, engine, shape, room)
    if clone:
        mbuf = mbuf.clone()
    mbuf.adj(14)
    mbuf.prepend(14)[:] = REMOTE + LOCAL + shape.frame()[12:14]
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    header, data = sink.recv()
    assert data == REMOTE + LOCAL + shape.frame()[12:]
    assert header[4:] == (shape.csum_start, shape.csum_offset)

    tag = b"\x81\x00\x00\x05"
    mbuf.prepend(4)
    mbuf[:16] = LOCAL + REMOTE + tag
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    header, data = sink.recv()
    # The kernel removes the tag on reception, and adjusts the header.
    untagged = LOCAL + REMOTE + shape.frame()[12:]
    tagged = LOCAL + REMOTE + tag + shape.frame()[12:]
    assert data in (untagged, tagged)
    assert header[:2] == (NEEDS_CSUM, shape.gso)
    assert header[4:] == (shape.csum_start + 4 * (data == tagged), shape.csum_offset)
    assert header[3] == shape.gso_size
    assert pair.tx.counters()["errors"] == 0


def test_frame_cut_past_its_headers_has_none(taps: tuple[Tap, Tap], engine: str) -> None:
    """The rest must not be sent with offsets that point before it."""
    shape = SHAPES[2]
    pair, sink, mbuf = forwarding(taps, engine, shape, 2048)
    mbuf.adj(60)
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    header, data = sink.recv()
    assert data == shape.frame()[60:]
    assert header == (0, 0, 0, 0, 0, 0)


def test_flags_taken_off_take_the_header_off(taps: tuple[Tap, Tap], engine: str) -> None:
    """A program that finishes a checksum clears the flags, and the kernel gets no request."""
    shape = SHAPES[2]
    pair, sink, mbuf = forwarding(taps, engine, shape, 2048)
    burst = Burst([mbuf])
    del mbuf
    burst.ol_flags = 0
    assert pair.tx.tx_burst(burst) == 1
    header, data = sink.recv()
    assert data == shape.frame()
    assert header[0] & NEEDS_CSUM == 0


def test_metadata_of_one_frame_does_not_stick_to_the_next(
    taps: tuple[Tap, Tap], engine: str
) -> None:
    a, b = taps
    offload(a, OFFLOADS | USO)
    pair = Pair(a, b, engine, ROOMS["single"])
    source, sink = VnetSocket(a), VnetSocket(b)
    order = [shape for plain in SHAPES[:2] for shape in (*SHAPES, plain, plain)]
    for _ in range(6):
        for start in range(0, len(order), 20):
            part = order[start : start + 20]
            for shape in part:
                source.send(shape)
            burst = pair.rx.rx_burst(20, 5)
            assert len(burst) == len(part)
            for mbuf, shape in zip(burst, part, strict=True):
                assert mbuf.tso_segsz == shape.gso_size
                assert bool(mbuf.ol_flags & MbufFlag.RX_LRO) == bool(shape.gso)
            del mbuf
            assert pair.tx.tx_burst(burst) == len(part)
            for shape in part:
                assert_came_through(shape, sink.recv())
    assert pair.pool.in_use == 0


# ---- a device without the header


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s.flags and not s.gso], ids=lambda s: s.name
)
@pytest.mark.parametrize("room", [2048, 120], ids=["single", "chains"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_checksum_is_finished_for_a_device_without_headers(
    netns: NetNS, netns2: NetNS, engine: str, shape: Shape, room: int, shared: bool
) -> None:
    with Tap(netns, "tap0") as a, Tap(netns2, "tap1", vnet_hdr=False) as b:
        offload(a, shape.features)
        pair = Pair(a, b, engine, room)
        source = VnetSocket(a)
        sink = b.packets(3)
        source.send(shape)
        mbuf = pair.received()
        burst = Burst([mbuf])
        kept = burst[:] if shared else None
        del mbuf
        assert pair.tx.tx_burst(burst) == 1
        assert sink.frames(1) == [Shape(**{**vars(shape), "flags": 0}).frame()]
        if kept is not None:
            assert bytes(kept[0]) == shape.frame(), "the shared frame was written to"
            del kept
        assert pair.pool.in_use == 0


def test_super_frame_never_leaves_by_a_device_without_headers(
    netns: NetNS, netns2: NetNS, engine: str
) -> None:
    """A super-frame is split there, never sent as one frame."""
    shape = SHAPES[7]
    with Tap(netns, "tap0") as a, Tap(netns2, "tap1", vnet_hdr=False) as b:
        offload(a, shape.features)
        pair = Pair(a, b, engine, ROOMS["single"])
        sink = b.packets(3)
        VnetSocket(a).send(shape)
        assert pair.tx.tx_burst(Burst([pair.received()])) == 1
        got = sink.drain()
        counters = pair.tx.counters()
        assert all(len(f) <= 14 + shape.l3_len + shape.l4_len + shape.gso_size for f in got)
        assert len(got) == -(-shape.payload // shape.gso_size)
        assert counters["errors"] == 0
        assert pair.pool.in_use == 0
