# SPDX-License-Identifier: BSD-3-Clause
"""Mempool: the arena, its accounting, and its limits."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from support import pattern, settle

from rtap import Mbuf, Mempool, PoolEmpty

# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"n": 0}, "n must be 1"),
        ({"n": -1}, "n must be 1"),
        ({"n": (1 << 24) + 1}, "n must be 1"),
        ({"n": 1 << 70}, "n must be 1"),
        ({"n": 1, "data_room": 63}, "data_room must be 64"),
        ({"n": 1, "data_room": -1}, "data_room must be 64"),
        ({"n": 1, "data_room": (1 << 24) + 1}, "data_room must be 64"),
        ({"n": 1, "headroom": 15}, "headroom must be 16"),
        ({"n": 1, "headroom": 4097}, "headroom must be 16"),
    ],
)
def test_size_out_of_range_says_what_came(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        Mempool(**arguments)
    assert str(list(arguments.values())[-1]) in str(caught.value)


@pytest.mark.parametrize("n", [None, "8", 8.5, [8]])
def test_size_of_another_type(n: Any) -> None:
    with pytest.raises(TypeError):
        Mempool(n)


def test_options_are_by_keyword() -> None:
    with pytest.raises(TypeError):
        Mempool(8, 2048, 128, True)  # type: ignore[call-arg]


def test_more_than_the_address_space_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot map"):
        Mempool(1 << 24, 1 << 24)


def test_made_once() -> None:
    pool = Mempool(4)
    mbuf = pool.alloc(b"x")
    with pytest.raises(RuntimeError, match="made once"):
        pool.__init__(8)
    assert pool.size == 4
    assert bytes(mbuf) == b"x"


def test_never_initialised_pool_is_refused() -> None:
    pool = Mempool.__new__(Mempool)
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.alloc()
    assert "closed" in repr(pool)


@pytest.mark.parametrize("data_room", [64, 100, 2048, 9000, 65536 + 62])
@pytest.mark.parametrize("headroom", [16, 17, 128, 4096])
def test_geometry(data_room: int, headroom: int) -> None:
    pool = Mempool(3, data_room, headroom)
    assert (pool.size, pool.data_room, pool.headroom) == (3, data_room, headroom)
    burst = pool.alloc_burst(3)
    for mbuf in burst:
        assert (mbuf.headroom, mbuf.tailroom, len(mbuf)) == (headroom, data_room, 0)
    # No two slots share a byte.
    for i, mbuf in enumerate(burst):
        mbuf.append(data_room)[:] = bytes([16 + i]) * data_room
        mbuf.prepend(headroom)[:] = bytes([i]) * headroom
    for i, mbuf in enumerate(burst):
        assert bytes(mbuf) == bytes([i]) * headroom + bytes([16 + i]) * data_room


def test_repr_and_name() -> None:
    pool = Mempool(8, name="left")
    assert pool.name == "left"
    assert "left" in repr(pool)
    assert "8 of 8" in repr(pool)


# ---- alloc


def test_accounting_of_single_mbufs() -> None:
    pool = Mempool(8)
    held = [pool.alloc() for _ in range(8)]
    assert (pool.available, pool.in_use) == (0, 8)
    with pytest.raises(PoolEmpty):
        pool.alloc()
    for left in range(7, -1, -1):
        held.pop()
        assert (pool.available, pool.in_use) == (8 - left, left)


def test_fresh_mbuf_has_no_past() -> None:
    pool = Mempool(1, 256)
    mbuf = pool.alloc(b"old" * 20)
    mbuf.ol_flags = 1 << 55
    mbuf.packet_type = 7
    mbuf.l2_len, mbuf.l3_len, mbuf.l4_len, mbuf.tso_segsz = 1, 2, 3, 4
    mbuf.vlan_tci = 5
    mbuf.port = 6
    mbuf.prepend(10)
    mbuf.free()
    mbuf = pool.alloc()
    assert bytes(mbuf) == b""
    assert (mbuf.pkt_len, mbuf.data_len, mbuf.nb_segs, mbuf.next) == (0, 0, 1, None)
    assert (mbuf.headroom, mbuf.tailroom, mbuf.refcnt) == (128, 256, 1)
    assert (mbuf.ol_flags, mbuf.packet_type, mbuf.vlan_tci, mbuf.port) == (0, 0, 0, 0xFFFF)
    assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len, mbuf.tso_segsz) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"xabcd")[1:],
        array("H", [1, 2]),
        np.arange(4, dtype=np.uint8),
        np.arange(4, dtype=np.uint8).reshape(2, 2),
    ],
    ids=lambda data: type(data).__name__,
)
def test_alloc_takes_any_contiguous_buffer(data: Any) -> None:
    assert bytes(Mempool(2).alloc(data)) == bytes(data)


def test_alloc_takes_an_mbuf_of_another_pool() -> None:
    mbuf = Mempool(2).alloc(b"far away")
    assert bytes(Mempool(2).alloc(mbuf)) == b"far away"


@pytest.mark.parametrize("data", ["text", 5, object(), [1, 2]])
def test_alloc_of_something_else_leaks_nothing(data: Any) -> None:
    pool = Mempool(4)
    with pytest.raises(TypeError):
        pool.alloc(data)
    assert pool.in_use == 0


def test_alloc_of_a_strided_buffer_leaks_nothing() -> None:
    pool = Mempool(4)
    with pytest.raises((BufferError, ValueError)):
        pool.alloc(memoryview(b"abcdef")[::2])
    assert pool.in_use == 0


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 129, 640])
def test_long_data_chains_segments(n: int) -> None:
    pool = Mempool(10, 64)
    data = pattern(3, n)
    mbuf = pool.alloc(data)
    assert bytes(mbuf) == data
    assert len(mbuf) == mbuf.pkt_len == n
    assert mbuf.nb_segs == max(1, -(-n // 64)) == pool.in_use
    mbuf.free()
    assert pool.in_use == 0


def test_chain_longer_than_the_pool_takes_nothing() -> None:
    pool = Mempool(10, 64)
    with pytest.raises(PoolEmpty):
        pool.alloc(bytes(641))
    assert pool.in_use == 0


# ---- alloc_burst


def test_burst_is_all_or_nothing() -> None:
    pool = Mempool(100)
    kept = pool.alloc_burst(60)
    with pytest.raises(PoolEmpty, match="40 of 100"):
        pool.alloc_burst(41)
    assert (pool.available, len(kept)) == (40, 60)
    rest = pool.alloc_burst(40)
    assert (pool.available, len(rest)) == (0, 40)


@pytest.mark.parametrize("n", [-1, 101, 1 << 70])
def test_burst_beyond_the_pool(n: int) -> None:
    pool = Mempool(100)
    with pytest.raises((ValueError, PoolEmpty)):
        pool.alloc_burst(n)
    assert pool.in_use == 0


ANY_EMPTY: list[Any] = [None, b"abc", [], np.zeros((0, 60), np.uint8)]


def test_empty_bursts() -> None:
    pool = Mempool(2)
    for data in ANY_EMPTY:
        assert len(pool.alloc_burst(0, data)) == 0
    assert pool.in_use == 0


def test_burst_data_one_for_all() -> None:
    burst = Mempool(8).alloc_burst(5, b"same")
    assert [bytes(m) for m in burst] == [b"same"] * 5


@pytest.mark.parametrize("kind", [list, tuple])
def test_burst_data_one_each(kind: type) -> None:
    frames = [pattern(i, 20 + i) for i in range(5)]
    burst = Mempool(8).alloc_burst(5, kind(frames))
    assert [bytes(m) for m in burst] == frames


@pytest.mark.parametrize("order", ["C", "rows reversed", "every other row", "columns cut"])
def test_burst_data_array(order: str) -> None:
    square = np.arange(8 * 100, dtype=np.uint32).astype(np.uint8).reshape(8, 100)
    rows: Any = {
        "C": square,
        "rows reversed": square[::-1],
        "every other row": square[::2],
        "columns cut": square[:, 10:90],
    }[order]
    burst = Mempool(64, 64).alloc_burst(len(rows), rows)
    assert [bytes(m) for m in burst] == [row.tobytes() for row in rows]


@pytest.mark.parametrize(
    "data",
    [
        [b"one"],
        [b"one"] * 4,
        np.zeros((2, 10), np.uint8),
        np.zeros((3, 10), np.uint16),
        np.zeros((3, 10), np.uint8)[:, ::2],
        np.zeros((3, 2, 5), np.uint8),
        np.zeros(20, np.uint8)[::2],
    ],
    ids=["too few", "too many", "rows", "itemsize", "columns", "3-d", "strided"],
)
def test_burst_data_of_the_wrong_shape(data: Any) -> None:
    pool = Mempool(8)
    with pytest.raises(ValueError):  # noqa: PT011 - the message depends on the shape
        pool.alloc_burst(3, data)
    assert pool.in_use == 0


@pytest.mark.parametrize("bad", ["text", None, 7])
def test_burst_data_with_a_bad_item_leaks_nothing(bad: Any) -> None:
    pool = Mempool(8, 64)
    with pytest.raises(TypeError):
        pool.alloc_burst(3, [b"fine", bytes(100), bad])
    assert pool.in_use == 0


def test_burst_data_that_runs_the_pool_dry_takes_nothing() -> None:
    pool = Mempool(8, 64)
    with pytest.raises(PoolEmpty):
        pool.alloc_burst(3, bytes(64 * 3))
    assert pool.in_use == 0
    rows: Any = np.zeros((3, 64 * 3), np.uint8)
    with pytest.raises(PoolEmpty):
        pool.alloc_burst(3, rows)
    assert pool.in_use == 0
    with pytest.raises(PoolEmpty):
        pool.alloc_burst(3, [bytes(64 * 6), b"", bytes(64 * 6)])
    assert pool.in_use == 0


def test_burst_items_that_call_back() -> None:
    """A sequence whose items use the pool while it is being filled from them."""
    pool = Mempool(8)
    stolen: list[Mbuf] = []

    class Items:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> bytes:
            if i >= 3:
                raise IndexError
            stolen.append(pool.alloc(b"stolen"))
            return bytes([i])

    burst = pool.alloc_burst(3, Items())  # type: ignore[arg-type]
    assert [bytes(m) for m in burst] == [b"\0", b"\1", b"\2"]
    assert [bytes(m) for m in stolen] == [b"stolen"] * 3


def test_items_fewer_or_more_than_they_say() -> None:
    class Liar(list[bytes]):
        def __len__(self) -> int:
            return 3

    pool = Mempool(8)
    # Whatever the result, nothing is written past the burst and nothing leaks.
    for n in (2, 4, 400):
        try:
            burst = pool.alloc_burst(3, Liar([b"x"] * n))
        except (ValueError, IndexError):
            continue
        assert len(burst) == 3
        del burst
    assert settle(pool) == 0
