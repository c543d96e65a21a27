# SPDX-License-Identifier: BSD-3-Clause
"""Burst: building, selecting, and its views for NumPy."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support import pattern

from rtap import Burst, Mbuf, Mempool

ROOM = 256


@pytest.fixture
def pool() -> Mempool:
    return Mempool(256, ROOM)


def contents(burst: Burst) -> list[bytes]:
    return [bytes(mbuf) for mbuf in burst]


def numbered(pool: Mempool, n: int, length: int = 60) -> Burst:
    return pool.alloc_burst(n, [pattern(i, length) for i in range(n)])


# ---- building


def test_empty_burst() -> None:
    burst = Burst()
    assert len(burst) == 0
    assert not burst
    assert list(burst) == []
    assert len(burst[:]) == len(burst.select([])) == 0
    burst.free()
    with pytest.raises(IndexError):
        burst[0]


def test_never_initialised_burst() -> None:
    burst = Burst.__new__(Burst)
    assert contents(burst) == []
    burst.append(Mempool(1).alloc(b"x"))
    assert contents(burst) == [b"x"]


@pytest.mark.parametrize("kind", [list, tuple, iter, Burst, lambda items: (m for m in items)])
def test_from_any_iterable(pool: Mempool, kind: Callable[[Any], Any]) -> None:
    mbufs = [pool.alloc(bytes([i])) for i in range(20)]
    burst = Burst(kind(mbufs))
    assert list(burst) == mbufs
    assert [m.refcnt for m in mbufs] == [2] * 20
    del burst
    gc.collect()
    assert [m.refcnt for m in mbufs] == [1] * 20


def test_append_and_extend(pool: Mempool) -> None:
    burst = Burst()
    for i in range(100):
        burst.append(pool.alloc(bytes([i])))
    burst.extend(burst[:50])
    burst.extend(burst)
    expected = [bytes([i]) for i in [*range(100), *range(50)] * 2]
    assert contents(burst) == expected
    assert pool.in_use == 100
    del burst
    assert pool.in_use == 0


@pytest.mark.parametrize("bad", [None, b"bytes", 5, "freed"])
def test_a_bad_item_adds_nothing(pool: Mempool, bad: Any) -> None:
    mbuf = pool.alloc(b"good")
    if bad == "freed":
        bad = pool.alloc()
        bad.free()
    burst = Burst([mbuf])
    with pytest.raises((TypeError, ValueError), match=r"Mbuf|freed"):
        burst.extend([mbuf, mbuf, bad, mbuf])
    with pytest.raises((TypeError, ValueError), match=r"Mbuf|freed"):
        burst.append(bad)
    with pytest.raises((TypeError, ValueError), match=r"Mbuf|freed"):
        Burst([mbuf, bad])
    assert (len(burst), mbuf.refcnt) == (1, 2)


@pytest.mark.parametrize("bad", [5, None, Mempool])
def test_not_iterable(bad: Any) -> None:
    with pytest.raises(TypeError):
        Burst(bad)


def test_iterable_that_frees_what_it_gave(pool: Mempool) -> None:
    mbufs = [pool.alloc(b"a"), pool.alloc(b"b")]

    def items() -> Iterator[Mbuf]:
        yield mbufs[0]
        mbufs[0].free()
        yield mbufs[1]

    with pytest.raises(ValueError, match="freed"):
        Burst(items())
    assert pool.in_use == 1


def test_iterable_that_fails(pool: Mempool) -> None:
    def items() -> Iterator[Mbuf]:
        yield pool.alloc()
        raise KeyError("stop")

    burst = Burst()
    with pytest.raises(KeyError):
        burst.extend(items())
    assert (len(burst), pool.in_use) == (0, 0)


def test_large_burst() -> None:
    pool = Mempool(20_000, 64)
    burst = pool.alloc_burst(20_000, b"x" * 20)
    burst.extend(burst)
    assert len(burst) == 40_000
    assert set(burst.lengths) == {20}
    burst.free()
    assert pool.in_use == 0


def test_free_is_idempotent_and_leaves_a_usable_burst(pool: Mempool) -> None:
    kept = pool.alloc(b"kept")
    burst = Burst([kept, pool.alloc(b"gone")])
    burst.free()
    burst.free()
    assert (len(burst), pool.in_use) == (0, 1)
    assert bytes(kept) == b"kept"
    burst.append(kept)
    assert contents(burst) == [b"kept"]


# ---- looking


def test_indexing_shares_the_frame(pool: Mempool) -> None:
    burst = numbered(pool, 5)
    burst[2][0:3] = b"abc"
    assert burst[-3][:3] == b"abc"
    assert burst[2] == burst[-3]
    for bad in (5, -6, sys.maxsize):
        with pytest.raises(IndexError, match=str(bad)):
            burst[bad]
    for wrong in ("0", 1.0, None):
        with pytest.raises(TypeError):
            burst[wrong]  # type: ignore[call-overload]


@pytest.mark.parametrize("step", [None, 1, 2, 7, -1, -2, -7])
def test_slicing(pool: Mempool, step: int | None) -> None:
    burst = numbered(pool, 10)
    model = contents(burst)
    for a in (None, 0, 3, 9, 10, 100, -1, -10, -100):
        for b in (None, 0, 3, 9, 10, 100, -1, -10, -100):
            assert contents(burst[a:b:step]) == model[a:b:step]
    assert pool.in_use == 10


def test_iteration_while_it_changes(pool: Mempool) -> None:
    burst = numbered(pool, 4)
    seen = 0
    for _ in burst:
        seen += 1
        if seen == 2:
            burst.free()
    assert seen == 2
    burst = numbered(pool, 4)
    seen = 0
    for mbuf in burst:
        seen += 1
        if seen <= 100:
            burst.append(mbuf)
    assert seen == 104


def test_one_frame_in_several_bursts(pool: Mempool) -> None:
    mbuf = pool.alloc(b"flood")
    bursts = [Burst([mbuf, pool.alloc(b"own")]) for _ in range(10)]
    mbuf.free()
    assert pool.in_use == 11
    bursts[0][0][:] = b"FLOOD"
    assert {bytes(b[0]) for b in bursts} == {b"FLOOD"}
    del bursts[1:]
    assert pool.in_use == 2
    assert contents(bursts[0]) == [b"FLOOD", b"own"]


# ---- select


@pytest.mark.parametrize(
    "which",
    [
        [True, False, True, False, False, True],
        (True, False, True, False, False, True),
        np.array([1, 0, 1, 0, 0, 1], bool),
        [np.bool_(x) for x in (1, 0, 1, 0, 0, 1)],
        memoryview(b"\1\0\1\0\0\1").cast("?"),
        np.array([1, 0, 1, 0, 0, 1, 1, 1], bool)[:6],
        [0, 2, 5],
        [-6, 2, -1],
        np.array([0, 2, 5]),
        np.array([0, 2, 5], np.uint16),
        [np.int64(0), np.int32(2), np.uint8(5)],
        (0, 2, 5),
        (i for i in (0, 2, 5)),
        {0: None, 2: None, 5: None}.keys(),
    ],
)
def test_select(pool: Mempool, which: Any) -> None:
    burst = numbered(pool, 6)
    model = contents(burst)
    part = burst.select(which)
    assert contents(part) == [model[0], model[2], model[5]]
    assert len(burst) == 6
    assert pool.in_use == 6


def test_select_by_a_computed_mask(pool: Mempool) -> None:
    burst = pool.alloc_burst(6, [bytes(n) for n in (60, 61, 200, 62, 201, 63)])
    mask = np.asarray(burst.lengths) > 100
    assert list(burst.select(mask).lengths) == [200, 201]
    assert list(burst.select(~mask).lengths) == [60, 61, 62, 63]
    assert list(burst.select(np.flatnonzero(mask)).lengths) == [200, 201]
    assert list(burst.select([n > 100 for n in np.asarray(burst.lengths)]).lengths) == [200, 201]


def test_select_repeats_and_reorders(pool: Mempool) -> None:
    burst = numbered(pool, 4)
    model = contents(burst)
    assert contents(burst.select([3, 3, 0, -1])) == [model[3], model[3], model[0], model[3]]
    assert burst.select([1])[0] == burst[1]


@pytest.mark.parametrize("which", [[], (), np.array([], bool), np.array([], np.intp)])
def test_select_nothing(pool: Mempool, which: Any) -> None:
    assert len(Burst().select(which)) == 0
    if not isinstance(which, np.ndarray) or which.dtype != bool:
        assert len(numbered(pool, 3).select(which)) == 0


@pytest.mark.parametrize(
    ("which", "error"),
    [
        ([0, 3], IndexError),
        ([-4], IndexError),
        ([0, 1 << 70], (IndexError, OverflowError)),
        ([True, False], ValueError),
        ([True] * 4, ValueError),
        (np.ones(2, bool), ValueError),
        ([0.0], TypeError),
        (np.array([0.0]), TypeError),
        (["0"], TypeError),
        ([None], TypeError),
        ("01", TypeError),
        (np.zeros((2, 2), np.intp), (TypeError, ValueError)),
        (1, TypeError),
        (None, TypeError),
    ],
)
def test_select_refuses(pool: Mempool, which: Any, error: Any) -> None:
    burst = numbered(pool, 3)
    with pytest.raises(error):
        burst.select(which)
    assert [m.refcnt for m in burst] == [2, 2, 2]  # one by the burst, one by `m`


def test_select_with_indices_that_change_the_burst(pool: Mempool) -> None:
    burst = numbered(pool, 3)

    class Evil:
        def __index__(self) -> int:
            burst.free()
            return 1

    evil: Any = Evil()
    with pytest.raises(IndexError):
        burst.select([evil])
    burst = numbered(pool, 3)
    with pytest.raises(IndexError):
        burst[evil]
    burst = numbered(pool, 3)
    assert len(burst[evil:]) == 0
    assert pool.in_use == 0
