# SPDX-License-Identifier: BSD-3-Clause
"""Later segments of a chain, ``mbuf.next``: they show bytes, but no call takes them as frames."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import pattern

from rtap import Burst, Mbuf, Mempool, offload, stages

ROOM = 64


@pytest.fixture
def pool() -> Mempool:
    return Mempool(64, ROOM, 32)


DOORS: dict[str, Callable[[Mbuf], object]] = {
    "Burst": lambda part: Burst([part]),
    "append": lambda part: Burst().append(part),
    "extend": lambda part: Burst().extend(iter([part])),
    "grow": lambda part: part.append(1),
    "grow by none": lambda part: part.append(0),
    "prepend": lambda part: part.prepend(1),
    "adj": lambda part: part.adj(1),
    "trim": lambda part: part.trim(1),
    "parse": offload.parse,
    "verify": offload.verify,
    "fill": offload.fill,
    "coalesce": lambda part: offload.Gro().coalesce(Burst([part])),
}


@pytest.mark.lifetime
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
@pytest.mark.parametrize("segment", [1, 2])
def test_a_later_segment_is_no_frame(
    pool: Mempool, door: Callable[[Mbuf], object], segment: int
) -> None:
    """Every call that takes or resizes a frame refuses it, and a refusal changes nothing."""
    data = pattern(7, 3 * ROOM - 8)
    mbuf = pool.alloc(data)
    part = mbuf
    for _ in range(segment):
        assert part.next is not None
        part = part.next
    with pytest.raises(ValueError, match="a later segment is no frame"):
        door(part)
    assert (part.headroom, part.tailroom) == (0, 0)
    assert (bytes(mbuf), len(mbuf), mbuf.nb_segs) == (data, len(data), 3)
    assert (bytes(part), len(part), part.nb_segs) == (
        data[segment * ROOM :],
        len(data) - segment * ROOM,
        3 - segment,
    )
    part.free()
    assert mbuf.refcnt == 1


@pytest.mark.lifetime
def test_a_burst_with_a_segment_in_it_takes_none(pool: Mempool) -> None:
    mbuf = pool.alloc(bytes(2 * ROOM))
    burst = Burst([mbuf])
    with pytest.raises(ValueError, match="no frame"):
        burst.extend([mbuf, mbuf.next, mbuf])
    assert len(burst) == 1
    assert mbuf.refcnt == 2


@pytest.mark.lifetime
def test_a_segment_follows_its_frame(pool: Mempool) -> None:
    """The lengths of a later segment are always current, whatever resized the frame."""
    data = pattern(7, 3 * ROOM - 8)
    mbuf = pool.alloc(data)
    rest = mbuf.next
    assert rest is not None
    last = rest.next
    assert last is not None
    mbuf.trim(20)
    for part, start in ((rest, ROOM), (last, 2 * ROOM)):
        assert bytes(part) == data[start:-20]
        assert len(part) == part.pkt_len == len(data) - 20 - start
        assert part[-1] == data[-21]
        assert f"pkt_len={len(part)}" in repr(part)
        with pytest.raises(IndexError):
            part[len(part)]
    mbuf.append(28)[:] = b"\xee" * 28
    assert bytes(rest) == data[ROOM:-20] + b"\xee" * 28
    last[-1:] = b"!"
    assert bytes(mbuf)[-2:] == b"\xee!"
    mbuf.free()
    assert bytes(last)[-2:] == b"\xee!"


@pytest.mark.lifetime
def test_a_clone_of_a_segment_is_a_frame(pool: Mempool) -> None:
    """The clone has the rest of the chain, with a window of its own."""
    data = pattern(7, 3 * ROOM)
    mbuf = pool.alloc(data)
    rest = mbuf.next
    assert rest is not None
    frame = Burst([rest.clone()])[0]
    assert (bytes(frame), len(frame), frame.nb_segs) == (data[ROOM:], 2 * ROOM, 2)
    frame.trim(ROOM)
    frame.adj(4)
    assert bytes(frame) == data[ROOM + 4 : 2 * ROOM]
    assert (bytes(mbuf), bytes(rest)) == (data, data[ROOM:])
    burst = Burst([frame, frame])
    stages.MacSwap()(burst)
    assert bytes(mbuf) == data
    assert len(burst[0]) == ROOM - 4
