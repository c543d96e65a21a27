# SPDX-License-Identifier: BSD-3-Clause
"""A burst as arrays: lengths, flags, gather, scatter, array."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
from typing import Any

import numpy as np
import pytest
from support import pattern

from rtap import Burst, Mempool

ROOM = 256
#: More than a buffer can have, wherever this runs.
HUGE = min(1 << 40, sys.maxsize)


@pytest.fixture
def pool() -> Mempool:
    return Mempool(256, ROOM)


def contents(burst: Burst) -> list[bytes]:
    return [bytes(mbuf) for mbuf in burst]


def bytes2d(rows: int, columns: int, fill: int = 0) -> Any:
    return np.full((rows, columns), fill, np.uint8)


def numbered(pool: Mempool, n: int, length: int = 60) -> Burst:
    return pool.alloc_burst(n, [pattern(i, length) for i in range(n)])


# ---- lengths and flags


def test_lengths(pool: Mempool) -> None:
    sizes = [0, 1, 60, ROOM, ROOM + 1, 3 * ROOM]
    burst = pool.alloc_burst(6, [bytes(n) for n in sizes])
    view = burst.lengths
    array = np.asarray(view)
    assert array.dtype == np.uint32
    assert array.tolist() == sizes == list(view)
    assert np.shares_memory(array, np.asarray(view))
    assert not array.flags.writeable
    burst[0].append(7)
    assert list(burst.lengths) == [7, *sizes[1:]]


def test_ol_flags(pool: Mempool) -> None:
    burst = numbered(pool, 4)
    for i, mbuf in enumerate(burst):
        mbuf.ol_flags = 1 << (16 * i)
    array = np.asarray(burst.ol_flags)
    assert array.dtype == np.uint64
    assert array.tolist() == [1, 1 << 16, 1 << 32, 1 << 48]
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, [0, 0, 0]),
        ((1 << 64) - 1, [(1 << 64) - 1] * 3),
        ([1, 2, 1 << 63], [1, 2, 1 << 63]),
        (np.array([3, 4, 1 << 63], np.uint64), [3, 4, 1 << 63]),
        (np.uint64(1 << 63), [1 << 63] * 3),
        (iter([1, 2, 3]), [1, 2, 3]),
    ],
)
def test_ol_flags_assigned(pool: Mempool, value: Any, expected: list[int]) -> None:
    burst = numbered(pool, 3)
    burst.ol_flags = value
    assert list(burst.ol_flags) == expected == [m.ol_flags for m in burst]


def test_ol_flags_assigned_from_themselves(pool: Mempool) -> None:
    burst = numbered(pool, 3)
    burst.ol_flags = [1, 2, 3]
    burst.ol_flags = np.asarray(burst.ol_flags) | np.uint64(1 << 55)
    assert list(burst.ol_flags) == [1 << 55 | 1, 1 << 55 | 2, 1 << 55 | 3]


@pytest.mark.parametrize(
    "value", [[1, 2], [1, 2, 3, 4], [1, 2, -1], [1, 2, 1 << 64], -1, "a", None]
)
def test_bad_ol_flags_change_nothing(pool: Mempool, value: Any) -> None:
    burst = numbered(pool, 3)
    burst.ol_flags = 7
    with pytest.raises((ValueError, TypeError, OverflowError)):
        burst.ol_flags = value
    assert list(burst.ol_flags) == [7, 7, 7]


@pytest.mark.lifetime
def test_lengths_and_flags_outlive_the_burst(pool: Mempool) -> None:
    burst = numbered(pool, 50)
    lengths, flags = burst.lengths, burst.ol_flags
    burst.free()
    del burst
    numbered(pool, 50, 100)
    assert list(lengths) == [60] * 50
    assert list(flags) == [0] * 50


# ---- gather


def test_gather(pool: Mempool) -> None:
    burst = numbered(pool, 9, ROOM + 44)
    for offset, n in ((0, 1), (0, 300), (17, 30), (ROOM - 3, 6), (ROOM, 1), (299, 1)):
        rows = np.asarray(burst.gather(offset, n))
        assert rows.dtype == np.uint8
        assert rows.shape == (9, n)
        assert [row.tobytes() for row in rows] == [m[offset : offset + n] for m in burst]


def test_gather_is_a_copy(pool: Mempool) -> None:
    burst = numbered(pool, 2)
    before = contents(burst)
    rows = np.asarray(burst.gather(0, 10))
    rows[:] = 255
    assert contents(burst) == before
    burst[0][0:2] = b"zz"
    assert rows[0, 0] == 255


def test_gather_pads_with_zeros(pool: Mempool) -> None:
    sizes = [0, 1, 10, 11, 30, ROOM + 1]
    burst = pool.alloc_burst(6, [b"\xff" * n for n in sizes])
    for offset in (0, 5, 10, 29, 1000):
        rows = np.asarray(burst.gather(offset, 20))
        for row, size in zip(rows, sizes, strict=True):
            there = min(20, max(0, size - offset))
            assert row.tobytes() == b"\xff" * there + bytes(20 - there)


@pytest.mark.parametrize(
    ("offset", "n"), [(-1, 5), (0, -1), (HUGE, 1), (0, HUGE), (sys.maxsize, sys.maxsize)]
)
def test_gather_out_of_range(pool: Mempool, offset: int, n: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        numbered(pool, 2).gather(offset, n)


if sys.maxsize < 1 << 32:  # elsewhere there is room for them

    def test_gather_of_more_bytes_than_there_can_be() -> None:
        burst = Mempool(256).alloc_burst(256)
        with pytest.raises(MemoryError, match="more than there can be"):
            burst.gather(0, 1 << 24)


def test_gather_of_no_frames() -> None:
    rows = np.asarray(Burst().gather(12, 2))
    assert rows.shape == (0, 2)
    assert rows.dtype == np.uint8
    # The way a user would continue.
    assert (rows[:, 0] == 8).sum() == 0
    assert len(Burst().select(rows[:, 0] == 8)) == 0


# ---- scatter


@pytest.mark.parametrize("layout", ["C", "cut", "reversed", "read-only", "broadcast", "bytes"])
def test_scatter(pool: Mempool, layout: str) -> None:
    burst = numbered(pool, 5, ROOM + 44)
    model = [bytearray(m) for m in contents(burst)]
    rows: Any = np.arange(5 * 20, dtype=np.uint8).reshape(5, 20)
    if layout == "cut":
        rows = np.repeat(np.repeat(rows, 2, axis=0), 2, axis=1)[::2, 7:27]
    elif layout == "reversed":
        rows = rows[::-1]
    elif layout == "read-only":
        rows.flags.writeable = False
    elif layout == "broadcast":
        rows = np.broadcast_to(rows[0], (5, 20))
    elif layout == "bytes":
        rows = memoryview(rows.tobytes()).cast("B", (5, 20))
    for offset in (0, 14, ROOM - 10, ROOM + 24):
        burst.scatter(offset, rows)
        for i, want in enumerate(model):
            want[offset : offset + 20] = bytes(memoryview(rows)[i, j] for j in range(20))
        assert contents(burst) == [bytes(m) for m in model]


@pytest.mark.lifetime
@pytest.mark.parametrize("item", [ctypes.c_ubyte, ctypes.c_char, ctypes.c_int8])
def test_ctypes_arrays_have_no_strides(pool: Mempool, item: Any) -> None:
    """Their buffers have contiguous bytes and state no strides."""
    rows = ((item * 10) * 3).from_buffer_copy(bytes(range(30)))
    wanted = [bytes(range(n, n + 10)) for n in (0, 10, 20)]
    burst = pool.alloc_burst(3, rows)
    assert contents(burst) == wanted
    burst = pool.alloc_burst(3, bytes(14))
    burst.scatter(2, rows)
    assert contents(burst) == [b"\0\0" + row + b"\0\0" for row in wanted]
    assert contents(pool.alloc_burst(2, ctypes.create_string_buffer(b"abc"))) == [b"abc\0"] * 2
    assert bytes(pool.alloc(rows)) == bytes(range(30))
    burst[0][2:12] = rows[2]
    assert bytes(burst[0])[2:12] == wanted[2]
    for wrong in (((item * 10) * 2)(), ((item * 10 * 3) * 3)(), (ctypes.c_uint16 * 10 * 3)()):
        with pytest.raises(ValueError, match="uint8 array, got shape"):
            pool.alloc_burst(3, wrong)
        with pytest.raises(ValueError, match="uint8 array, got shape"):
            burst.scatter(0, wrong)
    with pytest.raises(ValueError, match="contiguous bytes or an"):
        pool.alloc_burst(3, ctypes.c_uint32(5))
    assert contents(pool.alloc_burst(2, (item * 0)())) == [b""] * 2
    assert contents(pool.alloc_burst(2, ((item * 0) * 2)())) == [b""] * 2


def test_scatter_what_was_gathered(pool: Mempool) -> None:
    """Swaps the addresses of all frames, as a reflector does."""
    burst = numbered(pool, 64)
    before = contents(burst)
    rows = np.asarray(burst.gather(0, 12))
    swapped: Any = np.concatenate([rows[:, 6:], rows[:, :6]], axis=1)
    burst.scatter(0, swapped)
    assert contents(burst) == [m[6:12] + m[:6] + m[12:] for m in before]


def test_scatter_refuses_short_frames_and_writes_nothing(pool: Mempool) -> None:
    burst = pool.alloc_burst(4, [bytes(n) for n in (60, 60, 20, 60)])
    before = contents(burst)
    with pytest.raises(ValueError, match="frame 2 has 20 bytes, 21 are needed"):
        burst.scatter(1, bytes2d(4, 20, 255))
    assert contents(burst) == before
    burst.scatter(0, bytes2d(4, 20, 255))
    assert contents(burst) == [b"\xff" * 20 + m[20:] for m in before]


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4), np.uint16),
        np.zeros((3, 8), np.uint8)[:, ::2],
        np.zeros((3, 8), np.uint8)[:, ::-1],
        np.zeros((3, 2, 2), np.uint8),
        np.zeros(12, np.uint8),
        np.zeros((), np.uint8),
        b"123456789abc",
        np.zeros((4, 3), np.uint8).T,
    ],
    ids=["rows", "more rows", "items", "columns", "backwards", "3-d", "1-d", "0-d", "bytes", "T"],
)
def test_scatter_of_the_wrong_shape(pool: Mempool, rows: Any) -> None:
    burst = numbered(pool, 3)
    before = contents(burst)
    with pytest.raises((ValueError, BufferError)):
        burst.scatter(0, rows)
    assert contents(burst) == before


@pytest.mark.parametrize("rows", ["abc", 5, None, [[1, 2], [3, 4], [5, 6]]])
def test_scatter_of_no_buffer(pool: Mempool, rows: Any) -> None:
    with pytest.raises(TypeError):
        numbered(pool, 3).scatter(0, rows)


@pytest.mark.parametrize("offset", [-1, 61, min(1 << 32, sys.maxsize), sys.maxsize])
def test_scatter_out_of_range(pool: Mempool, offset: int) -> None:
    burst = numbered(pool, 3)
    before = contents(burst)
    with pytest.raises(ValueError, match=r"must be|are needed"):
        burst.scatter(offset, bytes2d(3, 1, 255))
    assert contents(burst) == before


def test_scatter_to_no_frames() -> None:
    Burst().scatter(0, bytes2d(0, 4))
    with pytest.raises(ValueError, match="0, n"):
        Burst().scatter(0, bytes2d(1, 4))


# ---- array


@pytest.mark.parametrize("n", [1, 14, 60])
def test_array_is_the_frames(pool: Mempool, n: int) -> None:
    burst = numbered(pool, 64)
    view = burst.array(n)
    rows = np.asarray(view)
    assert rows.shape == (64, n)
    assert rows.dtype == np.uint8
    assert rows.flags.writeable
    assert [row.tobytes() for row in rows] == [m[:n] for m in burst]
    rows[:, 0] = np.arange(64)
    assert [m[0] for m in burst] == list(range(64))
    burst[7][0:1] = b"\xee"
    assert rows[7, 0] == 0xEE


def test_array_of_a_part(pool: Mempool) -> None:
    burst = numbered(pool, 64)
    for part in (burst[::2], burst[10:20], burst[::-1], burst[5:6], burst.select([3, 13, 23])):
        rows = np.asarray(part.array(60))
        assert [row.tobytes() for row in rows] == contents(part)
        rows[:, 59] ^= 255
        assert [row.tobytes() for row in rows] == contents(part)


def test_array_where_slots_are_not_regular(pool: Mempool) -> None:
    burst = numbered(pool, 8)
    for irregular in (
        burst.select([0, 1, 3]),
        burst.select([0, 1, 0]),
        burst.select([0, 0]),
        burst.select([0, 2, 1]),
    ):
        with pytest.raises(ValueError, match="regularly"):
            irregular.array(60)
        assert np.asarray(irregular.gather(0, 60)).shape == (len(irregular), 60)
    burst[3].adj(1)
    with pytest.raises(ValueError, match="regularly"):
        burst.array(10)


def test_array_of_short_frames_or_segments(pool: Mempool) -> None:
    burst = pool.alloc_burst(3, [bytes(60), bytes(59), bytes(60)])
    with pytest.raises(ValueError, match="frame 1 has 59 bytes"):
        burst.array(60)
    assert np.asarray(burst.array(59)).shape == (3, 59)
    chains = pool.alloc_burst(2, bytes(ROOM + 10))
    with pytest.raises(ValueError, match="first segment"):
        chains.array(ROOM + 1)
    for bad in (0, -1, HUGE):
        with pytest.raises(ValueError, match="must be"):
            burst.array(bad)


def test_array_of_no_frames() -> None:
    rows = np.asarray(Burst().array(14))
    assert rows.shape == (0, 14)
    assert rows.dtype == np.uint8
    rows[:] = 1
    assert Burst().array(14).tobytes() == b""


def test_array_of_frames_in_two_pools() -> None:
    burst = Burst([Mempool(2).alloc(b"one"), Mempool(2).alloc(b"two")])
    try:
        rows = np.asarray(burst.array(3))
    except ValueError:
        return
    assert [row.tobytes() for row in rows] == [b"one", b"two"]


@pytest.mark.lifetime
def test_array_keeps_the_slots_not_the_burst(pool: Mempool) -> None:
    burst = numbered(pool, 8)
    expected = contents(burst)
    rows = np.asarray(burst.array(60))
    burst.free()
    del burst
    gc.collect()
    assert pool.in_use == 8
    pool.alloc_burst(pool.available, b"\xff" * ROOM)
    assert [row.tobytes() for row in rows] == expected
    part = rows[3:4, 2:3]
    del rows
    gc.collect()
    assert pool.in_use == 8
    del part
    gc.collect()
    assert pool.in_use == 0


@pytest.mark.lifetime
def test_views_outlive_pool_and_burst() -> None:
    burst = Mempool(16, ROOM).alloc_burst(16, pattern(1, 100))
    array, lengths, head = np.asarray(burst.array(100)), burst.lengths, burst[0].data
    gathered = np.asarray(burst.gather(50, 50))
    del burst
    gc.collect()
    assert {row.tobytes() for row in array} == {pattern(1, 100)}
    assert head.tobytes() == pattern(1, 100)
    assert {row.tobytes() for row in gathered} == {pattern(1, 100)[50:]}
    assert list(lengths) == [100] * 16
    del array
    gc.collect()
    assert head.tobytes() == pattern(1, 100)


def test_rows_need_strides(pool: Mempool) -> None:
    """A consumer that asks for plain bytes gets an error, not the gaps between the slots."""
    view = numbered(pool, 4).array(60)
    assert not view.contiguous
    assert view.tobytes() == b"".join(contents(numbered(pool, 4)))
    with pytest.raises(BufferError):
        hashlib.sha256(view)
    gathered = numbered(pool, 4).gather(0, 60)
    assert gathered.contiguous
    assert hashlib.sha256(gathered).digest() == hashlib.sha256(view.tobytes()).digest()
