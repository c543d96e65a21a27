# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames in mbufs split into mbufs, from and to pools of any slot size."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Maker
from rigs import Shape, label

from rtap import Burst, Mbuf, MbufFlag, Mempool, offload, stages
from rtap.offload import ChecksumStatus

PAYLOAD = random.Random(8).randbytes(70_000)
SHAPES = [
    Shape(version, proto, vlans, options)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans, options in ((0, False), (2, True))
]
#: data_room of the super-frame's pool and of the target pool.
ROOMS = [(65_800, 2048), (2048, 65_800), (300, 2048), (65_800, 300), (300, 128), (101, 67)]
LEFT_TO_DO = MbufFlag.RX_L4_CKSUM_NONE


def wanted(mbuf: Mbuf, proto: str, segsz: int) -> Mbuf:
    """Requests that the frame is split; the application need not set header lengths."""
    mbuf.ol_flags = MbufFlag.TX_TCP_SEG if proto == "tcp" else MbufFlag.TX_UDP_SEG
    mbuf.tso_segsz = segsz
    return mbuf


def slots(n: int, room: int) -> Mempool:
    return Mempool(n, room, headroom=64)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize(("source", "target"), ROOMS)
@pytest.mark.parametrize(("payload", "segsz"), [(20_001, 1400), (3000, 1500), (60_000, 20_000)])
def test_pools_of_any_slots(
    shape: Shape, source: int, target: int, payload: int, segsz: int
) -> None:
    """Frames are copied into one slot or several, or refer to the payload."""
    data = PAYLOAD[:payload]
    pool, other = slots(2 + 70_000 // source, source), slots(40 + 80_000 // target, target)
    burst = pool.alloc_burst(1, shape.unfinished(data))
    wanted(burst[0], shape.proto, segsz)
    out = offload.gso(burst, other)
    assert [bytes(mbuf) for mbuf in out] == shape.segments(data, segsz)
    assert len(burst) == 0
    for mbuf in out:
        assert mbuf.pkt_len == len(bytes(mbuf))
        assert not mbuf.ol_flags & (MbufFlag.TX_TCP_SEG | MbufFlag.TX_UDP_SEG)
        assert mbuf.ol_flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_GOOD
        assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len) == (
            shape.l2_len,
            shape.l3_len,
            shape.l4_len,
        )
        assert offload.verify(mbuf) is ChecksumStatus.GOOD
    del mbuf
    out.free()
    assert (pool.in_use, other.in_use) == (0, 0)


def test_the_frames_own_pool() -> None:
    shape = Shape()
    pool = slots(100, 2048)
    out = offload.gso(Burst([wanted(pool.alloc(shape.finished(PAYLOAD[:5000])), "tcp", 1000)]))
    assert [bytes(mbuf) for mbuf in out] == shape.segments(PAYLOAD[:5000], 1000)
    assert pool.in_use == 5


@given(st.integers(0, 2**32), st.sampled_from([65_800, 700, 131]), st.sampled_from([9000, 300, 70]))
def test_like_segment(seed: int, source: int, target: int) -> None:
    """Frames of all kinds give the result of segment(), which is compared with the kernel's."""
    question = Maker(seed).super_frame()
    pool, other = slots(1 + 70_000 // source, source), slots(2500, target)
    expected = offload.segment(question.frame, question.hdr)
    burst = pool.alloc_burst(1, question.frame)
    wanted(burst[0], "udp" if question.hdr.csum_offset == 6 else "tcp", question.hdr.gso_size)
    assert [bytes(mbuf) for mbuf in offload.gso(burst, other)] == expected


def test_order_and_other_frames() -> None:
    """Frames that need no split pass unchanged, in their place."""
    shape = Shape(6, "tcp")
    pool = slots(200, 2048)
    small = shape.finished(b"small")
    burst = pool.alloc_burst(5, [small, b"x" * 60, shape.finished(PAYLOAD[:3000]), b"", small])
    wanted(burst[2], "tcp", 1000)
    burst[0].ol_flags = MbufFlag.TX_TCP_CKSUM
    first = burst[0]
    out = offload.gso(burst)
    pieces = shape.segments(PAYLOAD[:3000], 1000)
    assert [bytes(mbuf) for mbuf in out] == [small, b"x" * 60, *pieces, b"", small]
    assert out[0] == first
    assert out[0].ol_flags == MbufFlag.TX_TCP_CKSUM
    assert offload.gso(Burst()).__len__() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("payload", [0, 1, 1000])
def test_wanted_but_short_enough(shape: Shape, payload: int) -> None:
    pool = slots(20, 256)
    burst = Burst([wanted(pool.alloc(shape.unfinished(PAYLOAD[:payload])), shape.proto, 1000)])
    (mbuf,) = offload.gso(burst)
    assert bytes(mbuf) == shape.finished(PAYLOAD[:payload])
    assert mbuf.ol_flags == 0


def test_a_shared_frame_is_not_written_to() -> None:
    shape = Shape()
    pool = slots(20, 2048)
    mbuf = wanted(pool.alloc(shape.unfinished(b"short")), "tcp", 1000)
    (done,) = offload.gso(Burst([mbuf]))
    assert bytes(mbuf) == shape.unfinished(b"short")
    assert mbuf.ol_flags == MbufFlag.TX_TCP_SEG
    assert bytes(done) == shape.finished(b"short")
    long = wanted(pool.alloc(shape.unfinished(PAYLOAD[:1500])), "tcp", 1000)
    offload.gso(Burst([long]))
    assert bytes(long) == shape.unfinished(PAYLOAD[:1500])


def test_too_few_mbufs() -> None:
    """Frames without a slot stay in the burst, as after a send; nothing is lost."""
    shape = Shape()
    pool, other = slots(3, 65_800), slots(12, 2048)
    frames = [shape.finished(bytes([n]) * 5000) for n in range(3)]
    burst = pool.alloc_burst(3, frames)
    for mbuf in burst:
        wanted(mbuf, "tcp", 1000)
    del mbuf
    out = offload.gso(burst, other)
    assert (len(out), len(burst), other.in_use, pool.in_use) == (10, 1, 10, 1)
    assert bytes(burst[0]) == frames[2]
    assert len(offload.gso(burst, other)) == 0
    assert (len(burst), other.in_use) == (1, 10)
    out.free()
    assert [bytes(m) for m in offload.gso(burst, other)] == shape.segments(bytes([2]) * 5000, 1000)
    assert len(burst) == 0


def test_a_pool_that_cannot_be_used_keeps_no_frame() -> None:
    """Whatever is wrong with the pool or the frames, the call fails before any frame moves."""
    shape = Shape()
    pool, closed = slots(10, 4096), slots(4, 64)
    closed.close()
    frames = [shape.finished(PAYLOAD[:3000])] * 4
    burst = pool.alloc_burst(4, frames)
    for mbuf in burst:
        wanted(mbuf, "tcp", 1000)
    del mbuf
    for _ in range(3):
        with pytest.raises(ValueError, match="the mempool is closed"):
            offload.gso(burst, closed)
        with pytest.raises(TypeError):
            offload.gso(burst, b"no pool")  # type: ignore[arg-type]
        assert [bytes(mbuf) for mbuf in burst] == frames
    burst[3].tso_segsz = 0
    with pytest.raises(ValueError, match="frame 3 cannot be segmented"):
        offload.gso(burst, pool)
    assert [bytes(mbuf) for mbuf in burst] == frames
    burst.free()
    pool.close()  # nothing uses it


@pytest.mark.parametrize("segsz", [1000, 17_000])
def test_too_few_mbufs_for_chains(segsz: int) -> None:
    shape = Shape()
    pool = slots(1, 65_800)
    burst = Burst([wanted(pool.alloc(shape.finished(PAYLOAD[:60_000])), "tcp", segsz)])
    for n in range(1, 8):
        other = slots(n, 100)
        assert len(offload.gso(burst, other)) == 0
        assert (len(burst), other.in_use) == (1, 0)
    assert bytes(burst[0]) == shape.finished(PAYLOAD[:60_000])


def test_by_reference_the_super_frame_stays_until_the_last_piece_goes() -> None:
    shape = Shape()
    pool, other = slots(1, 65_800), slots(20, 2048)
    out = offload.gso(
        Burst([wanted(pool.alloc(shape.finished(PAYLOAD[:60_000])), "tcp", 20_000)]), other
    )
    assert [mbuf.nb_segs for mbuf in out] == [2, 2, 2]
    assert (pool.in_use, other.in_use) == (1, 6)
    last = out[2]
    out.free()
    assert bytes(last) == shape.segments(PAYLOAD[:60_000], 20_000)[2]
    assert (pool.in_use, other.in_use) == (1, 2)
    last.free()
    assert (pool.in_use, other.in_use) == (0, 0)


@pytest.mark.parametrize(("room", "segs"), [(70_000, 1), (33_000, 2)])
def test_by_reference_where_the_pool_has_room_for_it(room: int, segs: int) -> None:
    """Each piece takes two mbufs, and one more for each mbuf of the super-frame that it spans."""
    shape = Shape()
    data = PAYLOAD[:60_000]
    expected = shape.segments(data, 20_000)
    for extra, refer in ((0, True), (-1, False)):
        with slots(segs, room) as pool, slots(2 * 3 + segs + extra, 32_768) as other:
            burst = Burst([wanted(pool.alloc(shape.finished(data)), "tcp", 20_000)])
            assert burst[0].nb_segs == segs
            out = offload.gso(burst, other)
            assert [bytes(mbuf) for mbuf in out] == expected
            assert (pool.in_use == segs) is refer
            assert all((mbuf.nb_segs > 1) is refer for mbuf in out)
            out.free()


@pytest.mark.parametrize(
    ("size", "room", "refer"),
    [(16_384, 65_800, True), (16_383, 65_800, False), (20_000, 13_000, False)],
    ids=["long", "short", "in short segments"],
)
def test_by_reference_from_a_length_on(size: int, room: int, refer: bool) -> None:
    shape = Shape()
    data = PAYLOAD[: 3 * size]
    with slots(5, room) as pool, slots(16, 32_768) as other:
        burst = Burst([wanted(pool.alloc(shape.finished(data)), "tcp", size)])
        out = offload.gso(burst, other)
        assert [bytes(mbuf) for mbuf in out] == shape.segments(data, size)
        assert [mbuf.nb_segs for mbuf in out] == [2 if refer else 1] * 3
        out.free()


@pytest.mark.parametrize(("room", "refer"), [(66, True), (65, False)])
def test_by_reference_behind_headers_of_one_mbuf(room: int, refer: bool) -> None:
    """The headers are Ethernet, IPv4 and TCP with timestamps: 66 bytes."""
    shape = Shape()
    data = PAYLOAD[:40_000]
    with slots(1, 65_800) as pool, slots(700, room) as other:
        burst = Burst([wanted(pool.alloc(shape.finished(data)), "tcp", 20_000)])
        out = offload.gso(burst, other)
        assert [bytes(mbuf) for mbuf in out] == shape.segments(data, 20_000)
        assert [mbuf.nb_segs == 2 for mbuf in out] == [refer] * 2
        out.free()


def test_by_reference_out_of_clones() -> None:
    """Pieces of segments that borrow bytes borrow them from the owner."""
    shape = Shape(6, "udp")
    pool, other = slots(40, 20_000), slots(200, 2048)
    mbuf = pool.alloc(shape.finished(PAYLOAD[:40_000]))
    copy = wanted(mbuf.clone(), "udp", 18_000)
    out = offload.gso(Burst([copy]), other)
    copy.free()
    expected = shape.segments(PAYLOAD[:40_000], 18_000)
    assert [bytes(piece) for piece in out] == expected
    mbuf.free()
    assert [bytes(piece) for piece in out] == expected
    out.free()
    assert (pool.in_use, other.in_use) == (0, 0)


def test_what_does_not_fit_is_refused_before_anything_moves() -> None:
    shape = Shape()
    pool = slots(50, 4096)
    burst = pool.alloc_burst(3, shape.finished(PAYLOAD[:3000]))
    for mbuf in burst:
        wanted(mbuf, "tcp", 1000)
    burst[1].tso_segsz = 0
    with pytest.raises(ValueError, match="frame 1 cannot be segmented: gso_size"):
        offload.gso(burst)
    assert len(burst) == 3
    wanted(burst[1], "udp", 1000)
    with pytest.raises(ValueError, match=r"frame 1 .* protocol"):
        offload.gso(burst)
    wanted(burst[1], "tcp", 1000)[14] = 0x44
    with pytest.raises(ValueError, match=r"frame 1 .* malformed"):
        offload.gso(burst)
    assert pool.in_use == 3


@pytest.mark.parametrize("what", ["the datagram's length", "the place of the checksum"])
def test_a_frame_whose_checksum_cannot_be_finished_is_refused_too(what: str) -> None:
    """This frame needs no split, and the super-frame before it stays whole."""
    shape = Shape(4, "udp")
    pool = slots(50, 4096)
    whole = wanted(pool.alloc(shape.finished(PAYLOAD[:3000])), "udp", 1000)
    if what == "the place of the checksum":
        burst = pool.alloc_burst(2, shape.segments(PAYLOAD[:2000], 1000))
        stages.Gro(udp=True)(burst)
        (odd,) = burst
        odd.ol_flags = MbufFlag.RX_L4_CKSUM_NONE
        odd.adj(42)
    else:
        odd = wanted(pool.alloc(shape.finished(b"x")), "udp", 1000)
        odd[38:40] = b"\x7f\xff"
    burst = Burst([whole, odd])
    frames, flags = [bytes(mbuf) for mbuf in burst], [mbuf.ol_flags for mbuf in burst]
    says = "its lengths contradict" if "length" in what else "its checksum is not inside"
    with pytest.raises(ValueError, match=f"frame 1 cannot be segmented: {says}"):
        offload.gso(burst)
    assert [bytes(mbuf) for mbuf in burst] == frames
    assert [mbuf.ol_flags for mbuf in burst] == flags


def test_headers_longer_than_is_looked_at() -> None:
    """A chain whose headers reach past its first 256 bytes is refused, not misread."""
    shape = Shape(6, "tcp")
    whole = shape.finished(PAYLOAD[:3000])
    option = bytes([60, 30]) + bytes([1, 244]) + bytes(244)
    last = bytes([6, 30]) + option[2:]
    frame = bytearray(whole[:54] + option + last + whole[54:])
    frame[20] = 60
    frame[18:20] = (len(frame) - 54).to_bytes(2, "big")
    one, chain = slots(1, 8192).alloc(frame), slots(100, 100).alloc(frame)
    assert len(offload.gso(Burst([wanted(one, "tcp", 1000)]), slots(50, 2048))) == 3
    with pytest.raises(ValueError, match="frame 0"):
        offload.gso(Burst([wanted(chain, "tcp", 1000)]), slots(50, 2048))


def test_arguments() -> None:
    pool = slots(1, 64)
    with pytest.raises(TypeError):
        offload.gso([], pool)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        offload.gso(Burst(), "pool")  # type: ignore[arg-type]
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        offload.gso(Burst(), pool)
