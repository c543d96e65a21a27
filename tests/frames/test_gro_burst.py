# SPDX-License-Identifier: BSD-3-Clause
"""``offload.Gro``: coalescing bursts of mbufs into chains, within a call and across calls."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from coalesced import expected, frames_of, sent
from hypothesis import given
from hypothesis import strategies as st
from trains import ACK, FIN, PSH, UDP, V6, F, random_train, regular

from rtap import Burst, Mbuf, MbufFlag, Mempool
from rtap.offload import Gro

HUGE = 1 << 20


@pytest.fixture
def pool() -> Iterator[Mempool]:
    with Mempool(512, data_room=2048) as made:
        yield made


@given(st.randoms(use_true_random=False), st.booleans())
def test_chains_are_what_bytes_are(r: random.Random, tags: bool) -> None:
    """A burst gives the same result as a list of bytes, and every slot comes back."""
    frames = random_train(r, longest=16, tags=tags).bytes()
    with Mempool(256, data_room=2048) as pool:
        gro = Gro(udp=True)
        burst = pool.alloc_burst(len(frames), frames)
        out = gro.coalesce(burst)
        assert len(burst) == 0
        assert sorted(sent(out)) == sorted(expected(frames))
        assert gro.held == 0
        out.free()
        assert pool.in_use == 0


def test_headers_that_fill_a_segment() -> None:
    """A segment of which only headers were in use is not part of the super-frame."""
    frames = [f.build() for f in regular(F(**V6), [300] * 3, random.Random(1))]
    with Mempool(64, data_room=len(frames[0]) - 300) as small:
        out = Gro().coalesce(small.alloc_burst(3, frames))
        assert sent(out) == expected(frames)
        assert out[0].nb_segs == sum(1 for _ in segments(out[0]))
        out.free()


@pytest.mark.parametrize("field", ["ack", "window", "ttl"])
def test_frames_in_segments_that_differ(field: str) -> None:
    """Each frame is compared with the first one's headers, in the segment that holds them."""
    flow = list(regular(F(), [300] * 3, random.Random(1)))
    with Mempool(32, data_room=128) as pool:
        whole = Gro().coalesce(pool.alloc_burst(3, [f.build() for f in flow]))
        assert [mbuf.tso_segsz for mbuf in whole] == [300]
        flow[1:] = [replace(f, **{field: getattr(f, field) + 1}) for f in flow[1:]]
        frames = [f.build() for f in flow]
        apart = Gro().coalesce(pool.alloc_burst(3, frames))
        assert [mbuf.tso_segsz for mbuf in apart] == [0, 300]
        assert sent(apart) == expected(frames)
        whole.free()
        apart.free()


@given(st.randoms(use_true_random=False), st.sampled_from([64, 90, 200, 700]))
def test_frames_in_segments(r: random.Random, room: int) -> None:
    """Frames in small slots lose nothing, and those whose headers are in one segment merge."""
    frames = random_train(r, longest=12).bytes()
    with Mempool(2048, data_room=room) as pool:
        out = Gro(udp=True).coalesce(pool.alloc_burst(len(frames), frames))
        if room >= 200:
            assert sorted(sent(out)) == sorted(expected(frames))
        else:
            assert sum(mbuf.pkt_len for mbuf in out) <= sum(map(len, frames))
        for mbuf in out:
            assert mbuf.nb_segs == sum(1 for _ in segments(mbuf))
            assert mbuf.pkt_len == sum(segment.data_len for segment in segments(mbuf))
        del mbuf
        out.free()
        assert pool.in_use == 0


def test_headers_in_a_segment_of_their_own() -> None:
    """A segment that becomes empty is left out of the chain."""
    frames = frames_of(F(options=b"\1" * 12), 4, 62)
    assert len(frames[0]) == 128
    with Mempool(64, data_room=66) as pool:
        (mbuf,) = Gro().coalesce(pool.alloc_burst(4, frames))
        assert [segment.data_len for segment in segments(mbuf)] == [66, 62, 62, 62, 62]
        assert pool.in_use == 5
        assert bytes(mbuf) == expected(frames)[0][1]
        del mbuf


def segments(mbuf: Mbuf) -> Iterator[Mbuf]:
    at: Mbuf | None = mbuf
    while at is not None:
        yield at
        at = at.next


def test_a_super_frame_says_what_it_is(pool: Mempool) -> None:
    for first, l3, l4 in ((F(), 20, 20), (F(**V6), 40, 20), (F(proto=UDP), 20, 8)):
        (mbuf,) = Gro(udp=True).coalesce(pool.alloc_burst(6, frames_of(first)))
        assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len, mbuf.tso_segsz) == (14, l3, l4, 100)
        assert mbuf.nb_segs == 6
        assert mbuf.pkt_len == 14 + l3 + l4 + 600


def test_a_lone_frame_with_a_right_checksum_is_good(pool: Mempool) -> None:
    (good,) = Gro().coalesce(pool.alloc_burst(1, frames_of(F(), 1)))
    (bad,) = Gro().coalesce(pool.alloc_burst(1, [replace(F(), payload=b"x", bad_l4=True).build()]))
    assert good.ol_flags == MbufFlag.RX_L4_CKSUM_GOOD
    assert bad.ol_flags == 0


# ---- checksums that are not checked


def test_a_checksum_that_was_found_right_is_not_looked_at_again(pool: Mempool) -> None:
    frames = [replace(f, bad_l4=True).build() for f in regular(F(), [50] * 4, random.Random(1))]
    burst = pool.alloc_burst(4, frames)
    burst.ol_flags = MbufFlag.RX_L4_CKSUM_GOOD
    assert len(Gro().coalesce(burst)) == 1
    burst = pool.alloc_burst(4, frames)
    burst.ol_flags = MbufFlag.RX_L4_CKSUM_BAD
    gro = Gro()
    assert len(gro.coalesce(burst)) == 4
    assert gro.stats()["bad_checksum"] == 4


@pytest.mark.parametrize(
    "flag", [MbufFlag.TX_TCP_CKSUM, MbufFlag.TX_TCP_SEG, MbufFlag.RX_LRO, MbufFlag.TX_VLAN]
)
def test_frames_with_requests_stay_alone(pool: Mempool, flag: MbufFlag) -> None:
    burst = pool.alloc_burst(6, frames_of(F()))
    flags = list(burst.ol_flags)
    flags[3] |= flag
    burst.ol_flags = flags
    assert [mbuf.tso_segsz for mbuf in Gro().coalesce(burst)] == [100, 0, 100]


# ---- shared frames


def test_shared_frames_are_left_as_they_are(pool: Mempool) -> None:
    frames = frames_of(F())
    burst = pool.alloc_burst(6, frames)
    mine = list(burst)
    out = Gro().coalesce(burst)
    assert sent(out) == expected(frames)
    assert [bytes(mbuf) for mbuf in mine] == frames
    assert [mbuf.nb_segs for mbuf in mine] == [1] * 6
    out.free()
    del mine
    assert pool.in_use == 0


def test_clones_are_merged_as_copies(pool: Mempool) -> None:
    frames = frames_of(F())
    burst = pool.alloc_burst(6, frames)
    clones = [mbuf.clone() for mbuf in burst]
    out = Gro().coalesce(burst)
    assert sent(out) == expected(frames)
    assert [bytes(mbuf) for mbuf in clones] == frames
    assert sent(Gro().coalesce(Burst(clones))) == expected(frames)
    assert [bytes(mbuf) for mbuf in clones] == frames


def test_clones_that_nobody_else_has_leave_the_originals(pool: Mempool) -> None:
    frames = frames_of(F())
    burst = pool.alloc_burst(6, frames)
    out = Gro().coalesce(Burst([mbuf.clone() for mbuf in burst]))
    assert sent(out) == expected(frames)
    assert [bytes(mbuf) for mbuf in burst] == frames


def test_shared_frames_and_no_buffer_to_copy_to() -> None:
    frames = frames_of(F())
    with Mempool(6) as pool:
        burst = pool.alloc_burst(6, frames)
        mine = list(burst)
        out = Gro().coalesce(burst)
        assert [bytes(mbuf) for mbuf in out] == frames
        out.free()
        assert [bytes(mbuf) for mbuf in mine] == frames
        del mine
        assert pool.in_use == 0


@pytest.mark.parametrize("room", [2048, 120])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "let go"])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("moves", ["a", "t", "A", "P", "aA", "Pt", "aaAA", "ta"])
@pytest.mark.lifetime
def test_a_frame_that_is_changed_while_it_is_held(
    moves: str, which: int, shared: bool, room: int
) -> None:
    """A frame whose window changed since it was parsed does not merge, and no read goes outside.

    The letters stand for A(ppend), P(repend), a(dj), t(rim).
    """
    names = {"a": "adj", "t": "trim", "A": "append", "P": "prepend"}
    frames = frames_of(F(), 3)
    with Mempool(64, room) as pool:
        burst = pool.alloc_burst(3, frames)
        mine = list(burst)
        gro = Gro(timeout=100)
        assert len(gro.coalesce(burst)) == 0
        for move in moves:
            new = getattr(mine[which], names[move])(8)
            if new is not None:
                new[:] = b"new bytes"[:8]
            del new
        changed = [bytes(mbuf) for mbuf in mine]
        if not shared:
            del mine
        out = gro.flush()
        assert [mbuf.tso_segsz for mbuf in out] == [0, 0, 0]
        assert [bytes(mbuf) for mbuf in out] == changed
        out.free()
        mine = []
        assert pool.in_use == 0


@pytest.mark.lifetime
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "let go"])
def test_a_window_that_is_back_in_its_place(pool: Mempool, shared: bool) -> None:
    """A window that moved away and back shows the same bytes, so the frame merges."""
    frames = frames_of(F(), 3)
    burst = pool.alloc_burst(3, frames)
    mine = list(burst)
    gro = Gro(timeout=100)
    assert len(gro.coalesce(burst)) == 0
    for mbuf, data in zip(mine, frames, strict=True):
        mbuf.adj(8)
        mbuf.prepend(8)[:] = data[:8]
        mbuf.trim(8)
        mbuf.append(8)[:] = data[-8:]
    del mbuf
    if not shared:
        del mine
    assert sent(gro.flush()) == expected(frames)


@pytest.mark.lifetime
def test_segments_that_somebody_holds(pool: Mempool) -> None:
    """When a program holds a later segment, the chain is cloned, not taken apart."""
    frames = frames_of(F(), 4, 200)
    with Mempool(64, 128) as small:
        burst = small.alloc_burst(4, frames)
        parts = [mbuf.next for mbuf in burst]
        out = Gro().coalesce(burst)
        assert sent(out) == expected(frames)
        out.free()
        assert [bytes(part) for part in parts if part] == [frame[128:] for frame in frames]
        del parts
        assert small.in_use == 0


@pytest.mark.lifetime
@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("by", ["holding", "cloning"])
def test_a_segment_in_use_is_not_chained_on(by: str, which: int) -> None:
    """A held segment does not change: nothing is chained to it if it is the last one."""
    frames = frames_of(F(), 4, 200)
    with Mempool(64, 128) as small:
        burst = small.alloc_burst(4, frames)
        part = burst[which].next
        assert part is not None
        if by == "cloning":
            part = part.clone()
        out = Gro().coalesce(burst)
        assert part.next is None
        assert sent(out) == expected(frames)
        out.free()
        assert part.next is None
        assert bytes(part) == frames[which][128:]
        del part
        assert small.in_use == 0


@pytest.mark.lifetime
def test_frames_that_others_resize_meanwhile() -> None:
    """Threads move the windows of frames while these are merged.

    Every result is a frame with the lengths it states, and its slots come back.
    """
    frames = frames_of(F(), 4, 60)
    with Mempool(256, 128) as pool:
        stop = threading.Event()
        mine: list[Mbuf] = []

        def resize(seed: int) -> None:
            r = random.Random(seed)
            while not stop.is_set():
                for mbuf in mine[-8:]:
                    how = r.choice(("adj", "trim", "append", "prepend"))
                    with contextlib.suppress(ValueError):
                        getattr(mbuf, how)(r.choice((4, 40, 70)))

        threads = [threading.Thread(target=resize, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(300):
                burst = pool.alloc_burst(4, frames)
                mine = list(burst)
                out = Gro().coalesce(burst)
                for mbuf in out:
                    if mbuf.tso_segsz:
                        assert mbuf.pkt_len == sum(s.data_len for s in segments(mbuf))
                del mbuf
                out.free()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        mine = []
        assert pool.in_use == 0


# ---- across calls


def test_frames_are_held_until_they_are_flushed(pool: Mempool) -> None:
    gro = Gro(timeout=100)
    for at in range(4):
        assert len(gro.coalesce(pool.alloc_burst(1, frames_of(F(), 1, at=at)))) == 0
        assert gro.held == at + 1
    assert sent(gro.flush()) == expected(frames_of(F(), 4))
    assert gro.held == 0
    assert len(gro.flush()) == 0


def test_an_end_lets_a_held_super_frame_go(pool: Mempool) -> None:
    frames = list(regular(F(), [100] * 5, random.Random(1)))
    for last in (
        replace(frames[4], flags=ACK | PSH),
        replace(frames[4], payload=b"x"),
        replace(frames[4], flags=ACK | FIN),
    ):
        gro = Gro(timeout=100)
        packed = [f.build() for f in frames[:4]]
        assert len(gro.coalesce(pool.alloc_burst(4, packed))) == 0
        out = gro.coalesce(pool.alloc_burst(1, [last.build()]))
        assert sent(out) == expected([*packed, last.build()])


def test_the_timeout_is_kept(pool: Mempool) -> None:
    """Once a call comes, no frame has waited longer than the time-out."""
    gro = Gro(timeout=1e-9)
    assert len(gro.coalesce(pool.alloc_burst(2, frames_of(F(), 2)))) == 0
    assert sent(gro.coalesce(Burst())) == expected(frames_of(F(), 2))
    assert gro.stats()["timed_out"] == 1


def test_the_oldest_flow_makes_room(pool: Mempool) -> None:
    gro = Gro(timeout=100, max_flows=3)
    for port in range(5):
        out = gro.coalesce(pool.alloc_burst(2, frames_of(F(sport=port), 2)))
        assert sent(out) == (expected(frames_of(F(sport=port - 3), 2)) if port >= 3 else [])
    assert gro.stats()["evicted"] == 2
    assert gro.held == 6
    rest = gro.flush()
    assert [bytes(mbuf)[34:36] for mbuf in rest] == [b"\0\2", b"\0\3", b"\0\4"]


def test_as_many_frames_as_allowed(pool: Mempool) -> None:
    gro = Gro(timeout=100, max_frames=4)
    frames = frames_of(F(), 10)
    out = gro.coalesce(pool.alloc_burst(10, frames))
    assert [mbuf.pkt_len for mbuf in out] == [54 + 400, 54 + 400]
    assert gro.held == 2
    assert sent(out) + sent(gro.flush()) == [
        *expected(frames[:4]),
        *expected(frames[4:8]),
        *expected(frames[8:]),
    ]


def test_many_flows(pool: Mempool) -> None:
    """With more flows than buckets, the frames of each flow stay in order."""
    r = random.Random(5)
    flows = [frames_of(F(sport=n, version=4), 2) for n in range(200)]
    order = [n for n in range(200) for _ in range(2)]
    r.shuffle(order)
    frames = [flows[n].pop(0) for n in order]
    gro = Gro(max_flows=256)
    out = gro.coalesce(pool.alloc_burst(400, frames))
    assert len(out) == 200
    assert all(mbuf.tso_segsz == 100 for mbuf in out)
    assert gro.stats() == {
        "frames": 400,
        "merged": 400,
        "super_frames": 200,
        "bad_checksum": 0,
        "evicted": 0,
        "timed_out": 0,
    }


def test_held_frames_go_back_with_the_table(pool: Mempool) -> None:
    gro = Gro(timeout=100)
    gro.coalesce(pool.alloc_burst(6, frames_of(F())))
    assert pool.in_use == 6
    del gro
    assert pool.in_use == 0


def test_segments_of_one_super_frame(pool: Mempool) -> None:
    """The number of segments stays below what one write can take."""
    frames = frames_of(F(), 600, 1)
    with Mempool(2000) as large:
        out = Gro(max_frames=2000).coalesce(large.alloc_burst(600, frames))
        assert [mbuf.nb_segs for mbuf in out] == [512, 88]
        out.free()


def test_arguments() -> None:
    for wrong in (-1, float("nan"), 1e9):
        with pytest.raises(ValueError, match="timeout must be"):
            Gro(timeout=wrong)
    for name, value in (("max_flows", 0), ("max_frames", HUGE + 1), ("max_length", 575)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Gro(**{name: value})
    with pytest.raises(TypeError):
        Gro().coalesce(None)  # type: ignore[arg-type]


def test_one_thread_at_a_time(pool: Mempool) -> None:
    """A second thread gets an error, and no frame is lost."""
    gro = Gro(timeout=100, max_flows=64)
    frames = frames_of(F(), 64)
    refused = []
    done = threading.Barrier(2)

    def hammer() -> None:
        done.wait()
        for _ in range(300):
            try:
                gro.coalesce(pool.alloc_burst(64, frames)).free()
            except RuntimeError:
                refused.append(1)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gro.stats()["frames"] == 64 * (600 - len(refused))
    gro.flush().free()
    assert pool.in_use == 0
