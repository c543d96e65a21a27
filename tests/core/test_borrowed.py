# SPDX-License-Identifier: BSD-3-Clause
"""Segments that borrow their bytes from another slot, maybe a far larger one of another pool.

Copies, growth and writes must stay inside their own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rigs import Shape, label
from support import pattern

from rtap import Burst, Mbuf, MbufFlag, Mempool, offload, stages

PAYLOAD = pattern(5, 60_000)
SEGSZ = 20_000
SHAPES = [Shape(version, proto) for version in (4, 6) for proto in ("tcp", "udp")]
WRITERS: dict[str, Callable[[], stages.Stage]] = {
    "MacSwap": stages.MacSwap,
    "MacRewrite": lambda: stages.MacRewrite(source="02:00:00:00:00:09"),
    "FiveTupleSwap": stages.FiveTupleSwap,
    "ChecksumFill": stages.ChecksumFill,
    "Call": lambda: stages.Call(lambda burst: None),
}


def pieces(shape: Shape, into: Mempool) -> Burst:
    """Three frames of a super-frame, whose payload stays in a 64 KiB slot of another pool."""
    big = Mempool(1, 65_800)
    mbuf = shape.request(big.alloc(shape.unfinished(PAYLOAD)), SEGSZ)
    out = offload.gso(Burst([mbuf]), into)
    assert [m.nb_segs for m in out] == [2, 2, 2]
    return out


def expected(shape: Shape, stage: stages.Stage) -> list[bytes]:
    """The stage's result for the same frames in slots of their own."""
    with Mempool(3, 20_100) as pool:
        burst = pool.alloc_burst(3, shape.segments(PAYLOAD, SEGSZ))
        stage(burst)
        frames = [bytes(m) for m in burst]
        burst.free()
        return frames


@pytest.mark.lifetime
@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("room", [128, 2048, 32_768])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_a_stage_that_writes_takes_as_many_slots_as_a_copy_needs(
    make: Callable[[], stages.Stage], room: int, shape: Shape
) -> None:
    stage = make()
    with Mempool(6 + 3 * (2 + SEGSZ // room) + 20, room) as small:
        burst = pieces(shape, small)
        others = small.alloc_burst(20, b"\x55" * room)
        stage(burst)
        assert [bytes(m) for m in burst] == expected(shape, make())
        assert all(bytes(m) == b"\x55" * room for m in others)
        for mbuf in burst:
            assert mbuf.pkt_len == sum(s.data_len for s in segments(mbuf))
            assert mbuf.nb_segs == sum(1 for _ in segments(mbuf))
        del mbuf
        burst.free()
        others.free()
        assert small.in_use == 0


@pytest.mark.lifetime
@pytest.mark.parametrize(("free", "fit"), [(0, 0), (1, 0), (10, 0), (11, 1), (20, 2), (29, 3)])
def test_frames_for_whose_copy_slots_are_lacking_are_dropped(free: int, fit: int) -> None:
    """A copy takes eleven slots and frees two; a dropped frame frees two."""
    shape = Shape()
    with Mempool(64, 2048) as small:
        burst = pieces(shape, small)
        others = small.alloc_burst(small.available - free, b"\x55" * 2048)
        stages.MacSwap()(burst)
        left = [bytes(m) for m in burst]
        assert left == expected(shape, stages.MacSwap())[:fit]
        assert all(bytes(m) == b"\x55" * 2048 for m in others)
        burst.free()
        others.free()
        assert small.in_use == 0


def segments(mbuf: Mbuf) -> Any:
    at: Mbuf | None = mbuf
    while at is not None:
        yield at
        at = at.next


@pytest.mark.lifetime
def test_the_copy_of_what_is_prepended_to_the_brim() -> None:
    """A frame that fills headroom and data room also fits into one slot."""
    with Mempool(4, 64, headroom=32) as pool:
        mbuf = pool.alloc(pattern(1, 64))
        mbuf.prepend(32)[:] = pattern(2, 32)
        burst = Burst([mbuf, mbuf])
        stages.MacSwap()(burst)
        whole = pattern(2, 32) + pattern(1, 64)
        for copy in burst:
            assert bytes(copy) == whole[6:12] + whole[:6] + whole[12:]
            assert (copy.nb_segs, copy.headroom, copy.tailroom) == (1, 0, 0)
        assert bytes(mbuf) == whole
        del mbuf, copy
        burst.free()


@pytest.mark.lifetime
@pytest.mark.parametrize("segsz", [1400, 16_383, 16_384, SEGSZ])
@pytest.mark.parametrize("cloned", [False, True])
def test_room_around_a_frame_is_its_own(segsz: int, cloned: bool) -> None:
    """Bytes appended to one frame of a super-frame do not overwrite the next one's payload."""
    shape = Shape()
    with Mempool(200, data_room=66_000) as pool:
        mbuf = shape.request(pool.alloc(shape.unfinished(PAYLOAD)), segsz)
        out = offload.gso(Burst([mbuf]))
        del mbuf
        frames = [m.clone() if cloned else m for m in out]
        before = [bytes(m) for m in frames]
        for m in frames:
            room = m.tailroom
            assert (room == 0) == (m.nb_segs > 1)
            with pytest.raises(ValueError, match="n must be"):
                m.append(room + 1)
            m.append(room)[:] = b"\xff" * room
            m.trim(room)
            m.trim(4)
            m.append(4)[:] = before[frames.index(m)][-4:]  # the bytes it had there
        assert [bytes(m) for m in frames] == before
        del m, frames
        out.free()


@pytest.mark.lifetime
def test_merged_out_of_borrowed_segments() -> None:
    """Frames that gso() made by reference merge again; a shared one is copied."""
    shape = Shape()
    for shared in (False, True):
        with Mempool(64, 2048) as small:
            burst = pieces(shape, small)
            mine = list(burst) if shared else []
            stages.Gro()(burst)
            (mbuf,) = burst
            assert mbuf.ol_flags & MbufFlag.RX_LRO
            assert mbuf.pkt_len == sum(s.data_len for s in segments(mbuf))
            stages.Gso()(burst)
            assert [bytes(m) for m in burst] == shape.segments(PAYLOAD, SEGSZ)
            assert [bytes(m) for m in mine] == (shape.segments(PAYLOAD, SEGSZ) if shared else [])
            del mbuf, mine
            burst.free()
            assert small.in_use == 0
