# SPDX-License-Identifier: BSD-3-Clause
"""Mbuf: the window on a frame, chains, clones, views; and a model of all of it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import pattern

from rtap import Burst, Mbuf, Mempool

ROOM = 64


@pytest.fixture
def pool() -> Mempool:
    return Mempool(64, ROOM, 32)


# ---- bytes in and out


def test_mbufs_come_from_pools_only() -> None:
    with pytest.raises(TypeError, match=r"Mempool\.alloc"):
        Mbuf()


@pytest.mark.parametrize(
    "use",
    [
        len,
        bytes,
        hash,
        memoryview,
        lambda m: m.data,
        lambda m: m[0],
        lambda m: m[:],
        lambda m: m.__setitem__(0, 1),
        lambda m: m.clone(),
        lambda m: m.prepend(1),
        lambda m: m.append(1),
        lambda m: m.adj(0),
        lambda m: m.trim(0),
        lambda m: m.next,
        lambda m: m.refcnt,
        lambda m: m.headroom,
        lambda m: m.tailroom,
        lambda m: m.ol_flags,
        lambda m: setattr(m, "ol_flags", 1),
        lambda m: setattr(m, "port", 1),
        lambda m: Burst([m]),
        lambda m: Burst().append(m),
    ],
)
@pytest.mark.parametrize("how", ["freed", "never made"])
def test_a_dead_mbuf_is_refused(pool: Mempool, how: str, use: Callable[[Mbuf], Any]) -> None:
    never_made: Any = Mbuf
    mbuf = pool.alloc(b"abc") if how == "freed" else never_made.__new__(Mbuf)
    mbuf.free()
    mbuf.free()
    with pytest.raises(ValueError, match="freed"):
        use(mbuf)
    assert repr(mbuf) == "<Mbuf freed>"
    assert mbuf != pool.alloc()
    assert pool.in_use == 0


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", ["mbuf", "burst", "pool"])
def test_nothing_is_copied_behind_our_back(
    pool: Mempool, kind: str, copier: Callable[[Any], Any]
) -> None:
    thing = {"mbuf": pool.alloc(b"x"), "burst": pool.alloc_burst(2), "pool": pool}[kind]
    with pytest.raises(TypeError):
        copier(thing)


@pytest.mark.parametrize("kind", [Mbuf, Burst, Mempool])
def test_native_classes_are_final(kind: type) -> None:
    with pytest.raises(TypeError):
        type("Sub", (kind,), {})


def test_sequence_of_bytes(pool: Mempool) -> None:
    data = pattern(5, 3 * ROOM)
    mbuf = pool.alloc(data)
    sequence: Any = mbuf
    assert list(sequence) == list(data)
    assert data[70] in sequence
    assert [mbuf[i] for i in range(-len(data), 0)] == list(data)


@pytest.mark.parametrize("index", [3, -4, sys.maxsize, -sys.maxsize])
def test_index_out_of_range(pool: Mempool, index: int) -> None:
    mbuf = pool.alloc(b"abc")
    with pytest.raises(IndexError, match=str(index)):
        mbuf[index]
    with pytest.raises(IndexError, match=str(index)):
        mbuf[index] = 0
    assert bytes(mbuf) == b"abc"


@pytest.mark.parametrize("index", ["0", 0.0, None, (0, 1)])
def test_index_of_another_type(pool: Mempool, index: Any) -> None:
    mbuf = pool.alloc(b"abc")
    with pytest.raises(TypeError):
        mbuf[index]
    with pytest.raises(TypeError):
        mbuf[index] = 0


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (256, ValueError),
        (-1, ValueError),
        (1 << 70, ValueError),
        (1.5, TypeError),
        ("a", TypeError),
        (b"a", TypeError),
        (None, TypeError),
    ],
)
def test_one_byte_takes_a_byte(pool: Mempool, value: Any, error: type[Exception]) -> None:
    mbuf = pool.alloc(b"abc")
    with pytest.raises(error):
        mbuf[1] = value
    assert bytes(mbuf) == b"abc"


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        (slice(0, 2), b"x", ValueError),
        (slice(0, 2), b"xyz", ValueError),
        (slice(2, 0), b"x", ValueError),
        (slice(1, 100), b"x" * 99, ValueError),
        (slice(0, 4, 2), b"xx", ValueError),
        (slice(None, None, -1), b"xxxxxxxx", ValueError),
        (slice(0, 2), "xy", TypeError),
        (slice(0, 2), [1, 2], TypeError),
        (slice(0, 2), None, TypeError),
    ],
)
def test_slices_never_resize(
    pool: Mempool, index: slice, value: Any, error: type[Exception]
) -> None:
    mbuf = pool.alloc(b"abcdefgh")
    with pytest.raises(error):
        mbuf[index] = value
    assert bytes(mbuf) == b"abcdefgh"
    assert pool.in_use == 1


def test_slice_assignment_from_an_overlapping_view_of_itself(pool: Mempool) -> None:
    """As in a bytearray, the value is read before it is overwritten."""
    for a, b in ((0, 1), (1, 0), (0, 30), (30, 0)):
        data = bytearray(pattern(1, ROOM))
        mbuf = pool.alloc(data)
        mbuf[a : a + 32] = mbuf.data[b : b + 32]
        data[a : a + 32] = data[b : b + 32]
        assert bytes(mbuf) == data


@pytest.mark.lifetime
@pytest.mark.parametrize(
    "use",
    [
        lambda m, evil: m[evil],
        lambda m, evil: m[evil:],
        lambda m, evil: m[0:evil:2],
        lambda m, evil: m.__setitem__(evil, 1),
        lambda m, evil: m.__setitem__(slice(evil, 1), b"x"),
        lambda m, evil: m.__setitem__(0, evil),
        lambda m, evil: m.prepend(evil),
        lambda m, evil: m.append(evil),
        lambda m, evil: m.adj(evil),
        lambda m, evil: m.trim(evil),
    ],
)
def test_argument_that_frees_the_mbuf(pool: Mempool, use: Callable[[Mbuf, Any], Any]) -> None:
    """An ``__index__`` may do anything; when it returns, the slot may belong to another mbuf."""
    taken: list[Mbuf] = []

    class Evil:
        def __index__(self) -> int:
            mbuf.free()
            taken.extend(pool.alloc_burst(pool.available, b"not ours"))
            return 0

    mbuf = pool.alloc(b"abc")
    with pytest.raises(ValueError, match="freed"):
        use(mbuf, Evil())
    assert {(bytes(m), m.ol_flags, m.port) for m in taken} == {(b"not ours", 0, 0xFFFF)}


if sys.version_info >= (3, 12):

    def test_value_that_frees_the_mbuf(pool: Mempool) -> None:
        class Evil:
            def __buffer__(self, flags: int) -> memoryview:
                mbuf.free()
                taken.extend(pool.alloc_burst(64, b"not ours"))
                return memoryview(b"xyz")

        taken: list[Mbuf] = []
        mbuf = pool.alloc(b"abc")
        with pytest.raises(ValueError, match="freed"):
            mbuf[0:3] = Evil()
        assert {bytes(m) for m in taken} == {b"not ours"}


# ---- the window


@pytest.mark.parametrize("n", [0, 1, 32])
def test_prepend(pool: Mempool, n: int) -> None:
    mbuf = pool.alloc(b"payload")
    view = mbuf.prepend(n)
    view[:] = b"h" * n
    assert bytes(mbuf) == b"h" * n + b"payload"
    assert (mbuf.headroom, len(mbuf), mbuf.data_len) == (32 - n, 7 + n, 7 + n)


@pytest.mark.parametrize("n", [0, 1, ROOM - 7])
def test_append(pool: Mempool, n: int) -> None:
    mbuf = pool.alloc(b"payload")
    view = mbuf.append(n)
    view[:] = b"t" * n
    assert bytes(mbuf) == b"payload" + b"t" * n
    assert mbuf.tailroom == ROOM - 7 - n


@pytest.mark.parametrize(
    ("method", "most"), [("prepend", 32), ("append", ROOM - 7), ("adj", 7), ("trim", 7)]
)
def test_window_at_its_ends(pool: Mempool, method: str, most: int) -> None:
    huge = [n for n in (1 << 31, 1 << 32, (1 << 32) + 1) if n < sys.maxsize]
    for bad in (most + 1, -1, *huge, sys.maxsize):
        mbuf = pool.alloc(b"payload")
        with pytest.raises(ValueError, match=rf"n must be 0\.\.{most}, got {bad}"):
            getattr(mbuf, method)(bad)
        assert bytes(mbuf) == b"payload"
        assert (mbuf.headroom, mbuf.tailroom) == (32, ROOM - 7)
    mbuf = pool.alloc(b"payload")
    getattr(mbuf, method)(most)
    getattr(mbuf, method)(0)
    with pytest.raises(ValueError, match=r"n must be 0\.\.0"):
        getattr(mbuf, method)(1)


@pytest.mark.parametrize("method", ["prepend", "append", "adj", "trim"])
@pytest.mark.parametrize("n", [1.5, "1", None])
def test_window_moves_by_whole_bytes(pool: Mempool, method: str, n: Any) -> None:
    mbuf = pool.alloc(b"payload")
    with pytest.raises(TypeError):
        getattr(mbuf, method)(n)
    assert bytes(mbuf) == b"payload"


def test_headers_off_and_on_again(pool: Mempool) -> None:
    mbuf = pool.alloc(b"outerinner")
    mbuf.adj(5)
    assert bytes(mbuf) == b"inner"
    assert mbuf.prepend(5).tobytes() == b"outer"
    mbuf.trim(5)
    assert bytes(mbuf) == b"outer"
    assert mbuf.append(5).tobytes() == b"inner"


def test_window_of_a_chain(pool: Mempool) -> None:
    data = pattern(7, 2 * ROOM + 10)
    mbuf = pool.alloc(data)
    assert (mbuf.nb_segs, mbuf.data_len, mbuf.pkt_len) == (3, ROOM, len(data))
    assert (mbuf.headroom, mbuf.tailroom) == (32, ROOM - 10)
    mbuf.prepend(4)[:] = b"head"
    mbuf.append(4)[:] = b"tail"
    assert bytes(mbuf) == b"head" + data + b"tail"
    with pytest.raises(ValueError, match=rf"0\.\.{ROOM + 4}"):
        mbuf.adj(ROOM + 5)
    with pytest.raises(ValueError, match=r"0\.\.14"):
        mbuf.trim(15)
    mbuf.adj(ROOM + 4)
    mbuf.trim(14)
    assert bytes(mbuf) == data[ROOM : 2 * ROOM]
    assert (mbuf.nb_segs, mbuf.data_len, len(mbuf)) == (3, 0, ROOM)
    # Slices step over the empty segments at both ends.
    mbuf[1:-1] = b"y" * (ROOM - 2)
    assert mbuf[:3] + mbuf[-3:] == data[ROOM : ROOM + 1] + b"yyyy" + data[2 * ROOM - 1 : 2 * ROOM]


def test_every_slice_over_segment_borders(pool: Mempool) -> None:
    data = pattern(2, ROOM + 5)
    mbuf = pool.alloc(data)
    mbuf.adj(ROOM - 4)
    data = data[ROOM - 4 :]
    for a in range(-11, 12):
        for b in range(-11, 12):
            assert mbuf[a:b] == data[a:b]
            fresh = bytes(range(100, 100 + len(data[a:b])))
            mbuf[a:b] = fresh
            model = bytearray(data)
            model[a : a + len(fresh) if a >= 0 else len(data) + a + len(fresh)] = fresh
            if fresh:
                start = slice(a, b).indices(len(data))[0]
                model = bytearray(data)
                model[start : start + len(fresh)] = fresh
                assert bytes(mbuf) == model
            mbuf[:] = data


# ---- metadata


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("ol_flags", 64),
        ("packet_type", 32),
        ("l2_len", 16),
        ("l3_len", 16),
        ("l4_len", 16),
        ("tso_segsz", 16),
        ("vlan_tci", 16),
        ("vlan_tci_outer", 16),
        ("outer_l2_len", 16),
        ("outer_l3_len", 16),
        ("port", 16),
    ],
)
def test_metadata_fields(pool: Mempool, name: str, bits: int) -> None:
    mbuf = pool.alloc(b"x")
    for value in (0, 1, (1 << bits) - 1):
        setattr(mbuf, name, value)
        assert getattr(mbuf, name) == value
    for bad in (-1, 1 << bits, 1 << 80):
        with pytest.raises((ValueError, OverflowError)):
            setattr(mbuf, name, bad)
    for bad_type in ("1", None):
        with pytest.raises(TypeError):
            setattr(mbuf, name, bad_type)
    assert getattr(mbuf, name) == (1 << bits) - 1


def test_metadata_takes_numpy_numbers(pool: Mempool) -> None:
    mbuf = pool.alloc(b"x")
    mbuf.ol_flags = np.uint64(1 << 63)
    mbuf.l2_len = np.uint16(14)
    assert (mbuf.ol_flags, mbuf.l2_len) == (1 << 63, 14)
    mbuf[0] = np.uint8(7)
    assert bytes(mbuf) == b"\x07"


@pytest.mark.parametrize("name", ["pkt_len", "data_len", "nb_segs", "next", "refcnt", "headroom"])
def test_shape_is_read_only(pool: Mempool, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(pool.alloc(b"x"), name, 1)
