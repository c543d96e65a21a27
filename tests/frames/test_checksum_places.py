# SPDX-License-Identifier: BSD-3-Clause
"""Where a checksum is written, and with which value.

A UDP sum of zero is written as 0xffff everywhere, and nothing outside the frame changes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from rigs import Shape, bridged, label
from support import (
    ENGINES,
    ETH_P_ALL,
    PacketSocket,
    pattern,
    skip_without_devices,
    skip_without_engine,
)

import rtap
from rtap import (
    Burst,
    EthDev,
    Mbuf,
    MbufFlag,
    Mempool,
    RxOffload,
    TxOffload,
    offload,
    stages,
)
from rtap._ring import RxQueue
from rtap.offload import VnetHdr

NEEDS_CSUM = 1
SHAPES = [Shape(version, "udp", vlans) for version in (4, 6) for vlans in (0, 2)]


def zero_sum(shape: Shape, payload: bytes) -> bytes:
    """The payload, with its first word set so that the UDP checksum is zero."""
    frame = shape.finished(b"\0\0" + payload[2:])
    at = shape.l2_len + shape.l3_len + 6
    return frame[at : at + 2] + payload[2:]


def field(shape: Shape, frame: bytes) -> bytes:
    at = shape.l2_len + shape.l3_len + 6
    return frame[at : at + 2]


def filled_burst(frame: bytes) -> bytes:
    with Mempool(4, 100) as pool:
        burst = pool.alloc_burst(1, frame)
        assert offload.fill_burst(burst) == 1
        (out,) = map(bytes, burst)
        burst.free()
        return out


def filled_by_stage(frame: bytes) -> bytes:
    with Mempool(4, 2048) as pool:
        burst = pool.alloc_burst(1, frame)
        stages.ChecksumFill()(burst)
        (out,) = map(bytes, burst)
        burst.free()
        return out


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("fill", [offload.fill, filled_burst, filled_by_stage])
def test_a_udp_sum_of_zero_that_is_filled_in(shape: Shape, fill: Callable[[bytes], bytes]) -> None:
    payload = zero_sum(shape, pattern(1, 200))
    assert field(shape, fill(shape.unfinished(payload))) == b"\xff\xff"
    assert fill(shape.unfinished(payload)) == shape.finished(payload)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_a_udp_sum_of_zero_that_is_completed(shape: Shape) -> None:
    frame = bytearray(shape.finished(zero_sum(shape, pattern(1, 200))))
    start = shape.l2_len + shape.l3_len
    frame[start + 6 : start + 8] = b"\0\0"
    # The field holds the pseudo-header's sum, chosen so that the total is 0xffff.
    rest = offload.partial(bytes(frame[start:])) ^ 0xFFFF
    frame[start + 6 : start + 8] = struct.pack("!H", rest)
    done = offload.complete(bytes(frame), VnetHdr(NEEDS_CSUM, 0, 0, 0, start, 6))
    assert field(shape, done) == b"\xff\xff"


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_udp_sums_of_zero_of_segments(shape: Shape) -> None:
    """Two datagrams with the same payload have the same sum."""
    piece = zero_sum(shape, pattern(1, 200))
    frame = shape.unfinished(2 * piece)
    hdr = VnetHdr(NEEDS_CSUM, 5, 0, len(piece), shape.l2_len + shape.l3_len, 6)
    wanted = shape.segments(2 * piece, len(piece))
    assert [field(shape, data) for data in wanted] == 2 * [b"\xff\xff"]
    assert offload.segment(frame, hdr) == wanted
    for room in (2048, 64):
        with Mempool(32, room) as pool:
            burst = Burst([shape.request(pool.alloc(frame), len(piece))])
            out = offload.gso(burst)
            assert [bytes(mbuf) for mbuf in out] == wanted
            out.free()


@pytest.mark.parametrize("l2", [True, False])
def test_a_checksum_is_completed_inside_the_frame(l2: bool) -> None:
    """For any protocol, the last possible place of the field ends with the frame."""
    frame = b"\x01" * 12 + b"\x88\xb5" + bytes(46)
    start = 20
    last = len(frame) - start - 2
    done = offload.complete(frame, VnetHdr(NEEDS_CSUM, 0, 0, 0, start, last), l2=l2)
    assert done == frame[:-2] + b"\xff\xff"
    for outside in (last + 1, last + 2, last + 3, 0xFFFF):
        with pytest.raises(ValueError, match="csum_offset"):
            offload.complete(frame, VnetHdr(NEEDS_CSUM, 0, 0, 0, start, outside), l2=l2)


class Rig:
    """Frames with an unfinished checksum as the kernel leaves it, and a device without headers."""

    def __init__(self, source: EthDev, dev: EthDev, plain: EthDev, sent: PacketSocket) -> None:
        self.source, self.dev, self.plain, self.sent = source, dev, plain, sent

    def received(self, shape: Shape, payload: bytes, segsz: int = 0) -> Mbuf:
        request = shape.request(self.source.pool.alloc(shape.unfinished(payload)), segsz)
        assert self.source.tx_burst(0, Burst([request])) == 1
        (mbuf,) = self.dev.rx_burst(0, 1, 5)
        assert mbuf.ol_flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
        return mbuf


@pytest.fixture(scope="module", params=ENGINES)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    skip_without_devices()
    skip_without_engine(request.param)
    checksums = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM
    received = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.UDP_LRO
    ours = {"engine": request.param, "rx_offloads": received, "tx_offloads": checksums}
    with (
        bridged(a={"tx_offloads": checksums | TxOffload.UDP_TSO}, b=ours) as bridge,
        rtap.open("plain", netns=bridge.ns, engine=request.param) as plain,
        PacketSocket(bridge.ns, "plain", ETH_P_ALL) as sent,
    ):
        assert (bridge.b.info().vnet_hdr, plain.info().vnet_hdr) == (True, False)
        yield Rig(bridge.a, bridge.b, plain, sent)


@pytest.mark.root
@pytest.mark.parametrize("header", [True, False], ids=["header", "plain"])
@pytest.mark.parametrize("clone", [False, True], ids=["", "clone"])
@pytest.mark.parametrize("inside", [2, 1, 0, -1])
def test_a_frame_that_has_lost_the_place_of_its_checksum(
    rig: Rig, header: bool, clone: bool, inside: int
) -> None:
    """The frame is sent if the whole field is left; otherwise it is a bad request."""
    dev = rig.dev if header else rig.plain
    mbuf = rig.received(Shape(), bytes(20))
    mbuf.trim(mbuf.pkt_len - (14 + 20 + 16 + inside))
    bad = dev.xstats()["tx_q0_bad_request_packets"]
    sent = dev.stats().opackets
    burst = Burst([mbuf.clone() if clone else mbuf])
    assert dev.tx_burst(0, burst) == 1
    assert dev.xstats()["tx_q0_bad_request_packets"] - bad == (inside < 2)
    assert dev.stats().opackets - sent == (inside == 2)


@pytest.mark.root
@pytest.mark.parametrize("inside", [2, 1, 0, -1])
def test_the_verdict_on_a_frame_that_has_lost_the_place_of_its_checksum(
    rig: Rig, inside: int
) -> None:
    """When a byte of the field is gone, the verdict is no longer "unfinished"."""
    mbuf = rig.received(Shape(), bytes(20))
    mbuf.trim(mbuf.pkt_len - (14 + 20 + 16 + inside))
    burst = Burst([mbuf])
    stages.ChecksumVerify(drop=False)(burst)
    unfinished = MbufFlag.RX_L4_CKSUM_NONE if inside == 2 else 0
    assert burst[0].ol_flags & MbufFlag.RX_L4_CKSUM_MASK == unfinished


@pytest.mark.root
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inside", [2, 1, 0, -1])
def test_gso_of_a_frame_that_has_lost_the_place_of_its_checksum(
    rig: Rig, shared: bool, inside: int
) -> None:
    """The same when software finishes the checksum; a refused burst keeps its frames."""
    burst = Burst([rig.received(Shape(), bytes(20))])
    burst[0].trim(burst[0].pkt_len - (14 + 20 + 16 + inside))
    before = bytes(burst[0])
    held = burst[0] if shared else None
    if inside == 2:
        (done,) = offload.gso(burst)
        assert bytes(done) == before[:50] + offload.checksum(before[34:]).to_bytes(2, "big")
        assert held is None or bytes(held) == before
        return
    for _ in range(2):
        with pytest.raises(ValueError, match="its checksum is not inside it"):
            offload.gso(burst)
        assert [bytes(mbuf) for mbuf in burst] == [before]
    stages.Gso()(burst)
    assert len(burst) == 0


@pytest.mark.root
@pytest.mark.parametrize("shape", SHAPES[::2], ids=label)
def test_a_udp_sum_of_zero_that_is_finished(rig: Rig, shape: Shape) -> None:
    payload = zero_sum(shape, pattern(1, 200))
    mbuf = rig.received(shape, payload)
    (done,) = offload.gso(Burst([mbuf]))
    assert bytes(done) == shape.finished(payload)
    assert field(shape, bytes(done)) == b"\xff\xff"


@pytest.mark.root
@pytest.mark.parametrize("shape", SHAPES[::2], ids=label)
def test_a_udp_sum_of_zero_of_a_super_frame_that_was_cut_to_one(rig: Rig, shape: Shape) -> None:
    """Where the device has no headers, software still splits it, into a single frame."""
    payload = zero_sum(shape, pattern(1, 200))
    mbuf = rig.received(shape, 2 * payload, len(payload))
    assert mbuf.ol_flags & MbufFlag.RX_LRO
    mbuf.trim(len(payload))
    headers = shape.l2_len + shape.l3_len + 8
    mbuf[:headers] = shape.finished(payload)[:headers]
    rig.sent.drain()
    assert rig.plain.tx_burst(0, Burst([mbuf])) == 1
    assert rig.sent.frames(1) == [shape.finished(payload)]


@pytest.mark.root
@pytest.mark.parametrize("moved", [-14, 4, 40])
def test_the_place_of_a_checksum_in_a_copy(rig: Rig, moved: int) -> None:
    """The place is right although the copy's window starts at another offset."""
    shape = Shape()
    mbuf = rig.received(shape, pattern(1, 200))
    data = bytes(mbuf)[max(-moved, 0) :]
    if moved > 0:
        mbuf.prepend(moved)[:] = bytes(moved)
    else:
        mbuf.adj(-moved)
    holder = mbuf.clone()
    (done,) = offload.gso(Burst([mbuf]), l2=moved > 0)  # finished in a copy
    whole = shape.finished(pattern(1, 200))[max(-moved, 0) :]
    assert bytes(done) == bytes(max(moved, 0)) + whole
    assert bytes(holder) == bytes(max(moved, 0)) + data


@pytest.mark.parametrize("outside", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 2, 30], ids=lambda n: f"{n} before")
def test_a_received_frame_whose_checksum_has_no_place(
    engine: str, before: int, outside: int
) -> None:
    """For any protocol, the field must end inside the frame."""
    data = bytes(12) + b"\x88\xb5" + pattern(1, 50)
    start = len(data) - 2 - before
    hdr = struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, start, before + outside)
    with ExitStack() as stack:
        pool = stack.enter_context(Mempool(4, 2048))
        ours, theirs = map(
            stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        ours.setblocking(False)
        rx = RxQueue(ours.fileno(), pool, name="rx", engine=engine)
        stack.callback(rx.close)
        rx.start()
        theirs.send(hdr + data)
        burst = rx.rx_burst(1)
        assert [bytes(mbuf) for mbuf in burst] == ([] if outside else [data])
        assert rx.counters()["errors"] == rx.counters()["bad_vnet_hdr"] == (outside > 0)
        burst.free()
