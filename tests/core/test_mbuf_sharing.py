# SPDX-License-Identifier: BSD-3-Clause
"""Mbufs in chains, as clones and under views, checked against a model."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from support import pattern, settle

from rtap import Burst, Mbuf, Mempool, PoolEmpty

ROOM = 64


@pytest.fixture
def pool() -> Mempool:
    return Mempool(64, ROOM, 32)


# ---- chains


def test_segments_one_by_one(pool: Mempool) -> None:
    data = pattern(7, 3 * ROOM)
    mbuf: Mbuf | None = pool.alloc(data)
    parts = []
    left = 3
    while mbuf is not None:
        assert mbuf.nb_segs == left
        assert mbuf.pkt_len == left * ROOM
        assert bytes(mbuf) == data[-left * ROOM :]
        parts.append(bytes(mbuf)[: mbuf.data_len])
        mbuf = mbuf.next
        left -= 1
    assert b"".join(parts) == data
    assert settle(pool) == 0


def test_rest_of_a_chain_outlives_its_head(pool: Mempool) -> None:
    data = pattern(7, 3 * ROOM)
    mbuf = pool.alloc(data)
    rest = mbuf.next
    assert rest is not None
    assert rest == mbuf.next
    mbuf.free()
    assert pool.in_use == 2
    assert bytes(rest) == data[ROOM:]
    assert len(pool.alloc_burst(62, b"x" * ROOM)) == 62
    assert bytes(rest) == data[ROOM:]
    last = rest.next
    del rest
    assert pool.in_use == 1
    assert last is not None
    assert last.data.tobytes() == data[2 * ROOM :]


def test_very_long_chain() -> None:
    pool = Mempool(2000, 64)
    data = pattern(1, 64 * 2000)
    mbuf = pool.alloc(data)
    assert mbuf.nb_segs == 2000
    assert bytes(mbuf) == data
    mbuf[1000:100_000] = bytes(99_000)
    assert bytes(mbuf) == data[:1000] + bytes(99_000) + data[100_000:]
    mbuf.free()
    assert pool.in_use == 0


def test_chain_of_more_segments_than_are_counted() -> None:
    """nb_segs has 16 bits: a longer chain is refused, not miscounted."""
    pool = Mempool(70_000, 64)
    data = bytes(64 * 66_000)
    try:
        mbuf = pool.alloc(data)
    except ValueError:
        assert pool.in_use == 0
    else:
        assert mbuf.nb_segs == 66_000
        assert len(mbuf) == len(data)


# ---- clones


def test_clone_has_its_own_window_and_metadata(pool: Mempool) -> None:
    mbuf = pool.alloc(b"shared bytes")
    mbuf.ol_flags, mbuf.port, mbuf.l2_len = 5, 6, 7
    clone = mbuf.clone()
    assert bytes(clone) == b"shared bytes"
    assert (clone.ol_flags, clone.port, clone.l2_len) == (5, 6, 7)
    assert (clone.headroom, clone.tailroom) == (mbuf.headroom, mbuf.tailroom)
    clone.adj(7)
    clone.ol_flags = 9
    assert (bytes(clone), bytes(mbuf), mbuf.ol_flags) == (b"bytes", b"shared bytes", 5)
    clone[:] = b"BYTES"
    assert bytes(mbuf) == b"shared BYTES"
    assert clone != mbuf
    assert pool.in_use == 2


def test_clone_of_a_clone_outlives_both(pool: Mempool) -> None:
    data = pattern(9, 3 * ROOM)
    mbuf = pool.alloc(data)
    clone = mbuf.clone()
    second = clone.clone()
    assert pool.in_use == 9
    mbuf.free()
    clone.free()
    assert bytes(second) == data
    assert len(pool.alloc_burst(pool.available, b"x" * ROOM)) > 0
    assert bytes(second) == data
    second.free()
    assert pool.in_use == 0


def test_clone_returns_as_a_whole_slot(pool: Mempool) -> None:
    """After use, a header that borrowed another's bytes has its own again."""
    mbuf = pool.alloc(b"m" * ROOM)
    clones = [mbuf.clone() for _ in range(63)]
    clones[5].adj(60)
    del clones
    burst = pool.alloc_burst(63)
    for i, other in enumerate(burst):
        other.append(ROOM)[:] = bytes([i]) * ROOM
    assert bytes(mbuf) == b"m" * ROOM
    assert [bytes(other) for other in burst] == [bytes([i]) * ROOM for i in range(63)]


def test_clone_of_a_chain_is_all_or_nothing() -> None:
    pool = Mempool(5, ROOM)
    mbuf = pool.alloc(bytes(3 * ROOM))
    with pytest.raises(PoolEmpty):
        mbuf.clone()
    assert pool.in_use == 3
    assert mbuf.refcnt == 1
    assert bytes(mbuf) == bytes(3 * ROOM)


def test_refcnt_counts_holders(pool: Mempool) -> None:
    mbuf = pool.alloc(b"x")
    assert mbuf.refcnt == 1
    burst = Burst([mbuf, mbuf])
    assert mbuf.refcnt == 3
    clone = mbuf.clone()
    assert (mbuf.refcnt, clone.refcnt) == (4, 1)
    other = burst[0]
    assert mbuf.refcnt == 5
    del other, burst, clone
    assert mbuf.refcnt == 1


def test_same_frame_is_equal_and_hashes_alike(pool: Mempool) -> None:
    mbuf = pool.alloc(b"x")
    burst = Burst([mbuf, pool.alloc(b"x")])
    assert burst[0] == mbuf == burst[-2]
    assert burst[1] != mbuf
    assert mbuf != b"x"
    assert len({mbuf, burst[0], burst[1]}) == 2


# ---- views


def test_data_is_a_writable_window(pool: Mempool) -> None:
    mbuf = pool.alloc(b"window")
    view = mbuf.data
    assert (view.format, view.itemsize, view.ndim, view.readonly) == ("B", 1, 1, False)
    assert view.contiguous
    view[0] = ord("W")
    assert bytes(mbuf) == b"Window"
    assert memoryview(mbuf) == view
    array = np.frombuffer(mbuf, np.uint8)  # type: ignore[call-overload]
    array[-1] = ord("!")
    assert bytes(mbuf) == b"Windo!"


def test_chain_has_no_single_view(pool: Mempool) -> None:
    mbuf = pool.alloc(pattern(0, ROOM + 1))
    with pytest.raises(BufferError, match="2 segments"):
        memoryview(mbuf)
    with pytest.raises(BufferError, match="2 segments"):
        _ = mbuf.data
    with pytest.raises(BufferError, match="2 segments"):
        np.frombuffer(mbuf, np.uint8)  # type: ignore[call-overload]
    rest = mbuf.next
    assert rest is not None
    assert rest.data.tobytes() == pattern(0, ROOM + 1)[ROOM:]
    mbuf.free()
    assert pool.in_use == 1


VIEWS: dict[str, Callable[[Mbuf], Any]] = {
    "data": lambda m: m.data,
    "memoryview": memoryview,
    "part": lambda m: m.data[2:4],
    "cast": lambda m: m.data.cast("H"),
    "append": lambda m: m.append(2),
    "append none": lambda m: m.append(0),
    "prepend": lambda m: m.prepend(2),
    "numpy": lambda m: np.frombuffer(m, np.uint8),  # type: ignore[call-overload]
    "numpy part": lambda m: np.frombuffer(m, np.uint8)[1:2],  # type: ignore[call-overload]
    "grandchild": lambda m: memoryview(memoryview(m))[1:][1:],
}


@pytest.mark.lifetime
@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS.keys())
def test_free_is_refused_under_a_view(pool: Mempool, view_of: Callable[[Mbuf], Any]) -> None:
    mbuf = pool.alloc(b"abcdef")
    view = view_of(mbuf)
    with pytest.raises(BufferError, match="view"):
        mbuf.free()
    assert pool.in_use == 1
    assert bytes(mbuf)[:0] == b""
    del view
    gc.collect()
    mbuf.free()
    assert pool.in_use == 0


@pytest.mark.lifetime
@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS.keys())
def test_view_keeps_its_slot(view_of: Callable[[Mbuf], Any]) -> None:
    pool = Mempool(4, ROOM, 32)
    burst = Burst([pool.alloc(b"abcdef")])
    view = view_of(burst[0])
    before = bytes(view)
    burst.free()
    del burst
    gc.collect()
    assert pool.in_use == 1
    for _ in range(3):
        for other in pool.alloc_burst(3):
            other.prepend(32)[:] = b"\xff" * 32
            other.append(ROOM)[:] = b"\xff" * ROOM
        del other
    assert bytes(view) == before
    del view
    gc.collect()
    assert pool.in_use == 0


@pytest.mark.lifetime
def test_views_of_two_handles_on_one_frame(pool: Mempool) -> None:
    mbuf = pool.alloc(b"abc")
    other = Burst([mbuf])[0]
    view = mbuf.data
    other.free()
    assert view.tobytes() == b"abc"
    with pytest.raises(BufferError):
        mbuf.free()
    view.release()
    mbuf.free()
    assert pool.in_use == 0


@pytest.mark.lifetime
def test_view_stays_put_when_the_window_moves(pool: Mempool) -> None:
    mbuf = pool.alloc(b"abcdef")
    view = mbuf.data
    mbuf.adj(2)
    mbuf.trim(2)
    assert view.tobytes() == b"abcdef"
    view[2:4] = b"CD"
    assert bytes(mbuf) == b"CD"


@pytest.mark.lifetime
def test_refused_view_counts_for_nothing(pool: Mempool) -> None:
    mbuf = pool.alloc(bytes(ROOM + 1))
    for _ in range(3):
        with pytest.raises(BufferError):
            memoryview(mbuf)
    mbuf.free()
    assert pool.in_use == 0


# ---- a model


class Slot:
    """One header: its own bytes, or those of the slot it borrows from."""

    def __init__(self, owner: Slot | None = None) -> None:
        self.owner = owner
        self.store: bytearray = owner.store if owner else bytearray(32 + ROOM)
        self.off = 32
        self.n = 0
        self.next: Slot | None = None


class Model:
    def __init__(self, mbuf: Mbuf, head: Slot) -> None:
        self.mbuf = mbuf
        self.head = head

    def segments(self) -> list[Slot]:
        found = [self.head]
        while (seg := found[-1].next) is not None:
            found.append(seg)
        return found

    def content(self) -> bytes:
        return b"".join(bytes(s.store[s.off : s.off + s.n]) for s in self.segments())

    def write(self, offset: int, data: bytes) -> None:
        for s in self.segments():
            for i in range(s.n):
                if offset <= 0 and -offset < len(data):
                    s.store[s.off + i] = data[-offset]
                offset -= 1


sizes = st.integers(0, 3 * ROOM + 3) | st.sampled_from([0, 1, ROOM - 1, ROOM, ROOM + 1])
steps = st.integers(0, 2 * ROOM) | st.sampled_from([0, 1, 31, 32, 33, ROOM - 1, ROOM, ROOM + 1])
ends = st.none() | st.integers(-3 * ROOM - 9, 3 * ROOM + 9)


class MbufMachine(RuleBasedStateMachine):
    """Random sequences of all operations on mbufs, compared with bytearrays."""

    mbufs = Bundle("mbufs")

    def __init__(self) -> None:
        super().__init__()
        self.pool = Mempool(40, ROOM, 32)
        self.live: list[Model] = []
        self.fill = 0

    def fresh(self, n: int) -> bytes:
        self.fill += 1
        return pattern(self.fill, n)

    def slots(self) -> int:
        seen: set[Slot] = set()
        todo = [m.head for m in self.live]
        while todo:
            slot = todo.pop()
            if slot not in seen:
                seen.add(slot)
                todo += [s for s in (slot.owner, slot.next) if s is not None]
        return len(seen)

    def add(self, mbuf: Mbuf, head: Slot) -> Model:
        model = Model(mbuf, head)
        self.live.append(model)
        return model

    @rule(target=mbufs, n=sizes)
    def alloc(self, n: int) -> Model | None:
        data = self.fresh(n)
        parts = [data[i : i + ROOM] for i in range(0, max(n, 1), ROOM)]
        if len(parts) > 40 - self.slots():
            with pytest.raises(PoolEmpty):
                self.pool.alloc(data)
            return None
        head = last = Slot()
        for i, part in enumerate(parts):
            if i:
                last.next = Slot()
                last = last.next
            last.store[32 : 32 + len(part)] = part
            last.n = len(part)
        return self.add(self.pool.alloc(data), head)

    @rule(target=mbufs, m=mbufs)
    def clone(self, m: Model | None) -> Model | None:
        if m is None:
            return None
        segments = m.segments()
        if len(segments) > 40 - self.slots():
            with pytest.raises(PoolEmpty):
                m.mbuf.clone()
            return None
        copies = []
        for s in segments:
            slot = Slot(s.owner or s)
            slot.off, slot.n = s.off, s.n
            copies.append(slot)
        for a, b in itertools.pairwise(copies):
            a.next = b
        return self.add(m.mbuf.clone(), copies[0])

    @rule(m=consumes(mbufs))
    def free(self, m: Model | None) -> None:
        if m is not None:
            self.live.remove(m)
            m.mbuf.free()

    @rule(m=mbufs, n=steps)
    def prepend(self, m: Model | None, n: int) -> None:
        if m is None:
            return
        s = m.head
        if n > s.off:
            with pytest.raises(ValueError, match=r"n must be"):
                m.mbuf.prepend(n)
            return
        s.off -= n
        s.n += n
        s.store[s.off : s.off + n] = data = self.fresh(n)
        m.mbuf.prepend(n)[:] = data

    @rule(m=mbufs, n=steps)
    def append(self, m: Model | None, n: int) -> None:
        if m is None:
            return
        s = m.segments()[-1]
        if n > len(s.store) - s.off - s.n:
            with pytest.raises(ValueError, match=r"n must be"):
                m.mbuf.append(n)
            return
        s.n += n
        end = s.off + s.n
        s.store[end - n : end] = data = self.fresh(n)
        m.mbuf.append(n)[:] = data

    @rule(m=mbufs, n=steps)
    def adj(self, m: Model | None, n: int) -> None:
        if m is None:
            return
        if n > m.head.n:
            with pytest.raises(ValueError, match=r"n must be"):
                m.mbuf.adj(n)
            return
        m.mbuf.adj(n)
        m.head.off += n
        m.head.n -= n

    @rule(m=mbufs, n=steps)
    def trim(self, m: Model | None, n: int) -> None:
        if m is None:
            return
        last = m.segments()[-1]
        if n > last.n:
            with pytest.raises(ValueError, match=r"n must be"):
                m.mbuf.trim(n)
            return
        m.mbuf.trim(n)
        last.n -= n

    @rule(m=mbufs, a=ends, b=ends)
    def write_slice(self, m: Model | None, a: int | None, b: int | None) -> None:
        if m is None:
            return
        start, stop, _ = slice(a, b).indices(len(m.content()))
        data = self.fresh(max(0, stop - start))
        m.mbuf[a:b] = data
        m.write(start, data)

    @rule(m=mbufs, i=st.integers(-4 * ROOM, 4 * ROOM), value=st.integers(0, 255))
    def write_byte(self, m: Model | None, i: int, value: int) -> None:
        if m is None:
            return
        n = len(m.content())
        if not -n <= i < n:
            with pytest.raises(IndexError):
                m.mbuf[i] = value
            return
        m.mbuf[i] = value
        m.write(i % n, bytes([value]))

    @rule(m=mbufs, a=ends, b=ends, step=st.sampled_from([None, 1, 2, -1, -3, 70]))
    def read_slice(self, m: Model | None, a: int | None, b: int | None, step: int | None) -> None:
        if m is not None:
            assert m.mbuf[a:b:step] == m.content()[a:b:step]

    @rule(m=mbufs)
    def segments_agree(self, m: Model | None) -> None:
        if m is None:
            return
        mbuf: Mbuf | None = m.mbuf
        for s in m.segments():
            assert mbuf is not None
            assert mbuf.data_len == s.n
            assert mbuf[: s.n] == s.store[s.off : s.off + s.n]
            mbuf = mbuf.next
        assert mbuf is None

    @invariant()
    def agrees(self) -> None:
        for m in self.live:
            segments = m.segments()
            last = segments[-1]
            assert bytes(m.mbuf) == m.content()
            assert len(m.mbuf) == sum(s.n for s in segments)
            assert m.mbuf.nb_segs == len(segments)
            assert m.mbuf.headroom == m.head.off
            assert m.mbuf.tailroom == len(last.store) - last.off - last.n
        assert self.pool.in_use == self.slots()

    def teardown(self) -> None:
        for m in self.live:
            m.mbuf.free()
        assert self.pool.in_use == 0


TestMbufModel = pytest.mark.fuzz(pytest.mark.lifetime(MbufMachine.TestCase))
