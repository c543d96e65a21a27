# SPDX-License-Identifier: BSD-3-Clause
"""The arena behind a pool: its lifetime, its memory, its slots, and threads."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import queue
import random
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from support import pattern, settle

from rtap import Burst, Mbuf, Mempool, PoolEmpty


def mappings(name: str) -> int:
    with open("/proc/self/maps") as f:
        return sum(f"/memfd:{name} " in line for line in f)


# ---- close


def test_close_is_idempotent_and_final() -> None:
    pool = Mempool(4)
    pool.close()
    pool.close()
    for use in (
        lambda: pool.alloc(),
        lambda: pool.alloc_burst(1),
        lambda: pool.available,
        lambda: pool.in_use,
        lambda: pool.size,
        lambda: pool.data_room,
        lambda: pool.headroom,
        lambda: pool.fd,
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert repr(pool) == "<Mempool closed>"


def user(kind: str, pool: Mempool, data: bytes) -> Any:
    """An object that keeps a buffer of `pool` with `data` in use."""
    if kind == "segment":
        return pool.alloc(bytes(pool.data_room) + data).next
    mbuf = pool.alloc(data)
    if kind == "burst":
        return Burst([mbuf])
    if kind == "view":
        return mbuf.data
    if kind == "clone":
        return mbuf.clone()
    if kind == "array":
        return Burst([mbuf]).array(len(data))
    return mbuf


@pytest.mark.parametrize("kind", ["mbuf", "burst", "view", "clone", "array", "segment"])
def test_close_is_refused_while_in_use(kind: str) -> None:
    pool = Mempool(4, 64)
    thing = user(kind, pool, bytes(60))
    with pytest.raises(BufferError, match="in use"):
        pool.close()
    assert bytes(pool.alloc(b"still works")) == b"still works"
    del thing
    gc.collect()
    pool.close()


def test_context_manager() -> None:
    with Mempool(4) as pool:
        pool.alloc()
    with pytest.raises(ValueError, match="closed"):
        pool.alloc()
    with pytest.raises(BufferError), Mempool(4) as pool:
        mbuf = pool.alloc(b"kept")
    assert bytes(mbuf) == b"kept"


# ---- the arena outlives its pool


@pytest.mark.lifetime
@pytest.mark.parametrize("kind", ["mbuf", "burst", "view", "clone", "array", "segment"])
def test_arena_goes_with_the_last_user(kind: str) -> None:
    name = f"rtap-test-{kind}"
    pool = Mempool(300, 128, memfd=True, name=name)
    assert mappings(name) == 1
    data = pattern(1, 100)
    thing = user(kind, pool, data)
    del pool
    gc.collect()
    assert mappings(name) == 1
    if kind in ("view", "array"):
        assert thing.tobytes() == data
    else:
        assert bytes(thing[0] if kind == "burst" else thing) == data
    del thing
    gc.collect()
    assert mappings(name) == 0


@pytest.mark.lifetime
def test_orphaned_slots_can_be_cloned_until_the_last_one() -> None:
    name = "rtap-test-orphans"
    mbuf = Mempool(4, memfd=True, name=name).alloc(b"orphan")
    clones = [mbuf.clone() for _ in range(3)]
    with pytest.raises(PoolEmpty):
        mbuf.clone()
    del mbuf
    assert mappings(name) == 1
    assert {bytes(c) for c in clones} == {b"orphan"}
    while clones:
        assert mappings(name) == 1
        clones.pop()
    assert mappings(name) == 0


@pytest.mark.lifetime
def test_orphaned_by_a_thread_and_freed_by_others() -> None:
    name = "rtap-test-threads"
    for _ in range(20):
        pool = Mempool(256, 64, memfd=True, name=name)
        parts = [pool.alloc_burst(8) for _ in range(32)]
        ready = threading.Barrier(5)

        def drop(mine: list[Burst], ready: threading.Barrier = ready) -> None:
            ready.wait()
            while mine:
                mine.pop()

        threads = [threading.Thread(target=drop, args=(parts[i::4],)) for i in range(4)]
        for t in threads:
            t.start()
        del parts
        ready.wait()
        del pool
        for t in threads:
            t.join()
        del threads, t
        gc.collect()
        assert mappings(name) == 0


# ---- memfd


def test_memfd_shows_the_frames() -> None:
    pool = Mempool(16, 2048, memfd=True, name="rtap-test-map")
    fd = pool.fd
    assert fd is not None
    assert not os.get_inheritable(fd)
    size = os.fstat(fd).st_size
    assert size >= 16 * (2048 + 128)
    with mmap.mmap(fd, size) as arena:
        mbufs = [pool.alloc(f"frame {i} of a shared arena".encode()) for i in range(16)]
        for mbuf in mbufs:
            at = arena.find(bytes(mbuf))
            assert at >= 0
            arena[at : at + 5] = b"FRAME"
            assert mbuf[:5] == b"FRAME"
        mbufs[3].prepend(8)[:] = b"headroom"
        assert arena.find(b"headroomFRAME 3") >= 0


def test_memfd_survives_in_who_duplicated_it() -> None:
    pool = Mempool(2, memfd=True)
    fd = os.dup(pool.fd or 0)
    try:
        pool.alloc(b"left behind")
        pool.close()
        with mmap.mmap(fd, 0) as arena:
            assert arena.find(b"left behind") >= 0
    finally:
        os.close(fd)


def test_nobody_changes_the_size_of_the_memfd() -> None:
    """Otherwise a holder of the descriptor could truncate it, and all others would get SIGBUS."""
    pool = Mempool(16, memfd=True)
    mbuf = pool.alloc(pattern(1, 2000))
    fd = os.dup(pool.fd or 0)
    try:
        size = os.fstat(fd).st_size
        for wrong in (0, size // 2, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, wrong)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(fd).st_size == size
        assert bytes(mbuf) == pattern(1, 2000)
        mbuf[:] = pattern(2, 2000)
    finally:
        os.close(fd)


def test_closing_closes_the_memfd() -> None:
    pool = Mempool(2, memfd=True)
    fd = pool.fd
    assert fd is not None
    pool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_without_memfd_there_is_no_descriptor() -> None:
    assert Mempool(2).fd is None


# ---- slots


@pytest.mark.lifetime
def test_slot_under_a_view_is_not_recycled() -> None:
    pool = Mempool(64, 64)
    view = pool.alloc(b"\xaa" * 64).data
    gc.collect()
    assert pool.in_use == 1
    for _ in range(4):
        others = pool.alloc_burst(63, bytes(64))
        with pytest.raises(PoolEmpty):
            pool.alloc()
        for mbuf in others:
            mbuf.prepend(128)[:] = bytes(128)
        del mbuf, others
    assert view.tobytes() == b"\xaa" * 64
    view.release()
    assert pool.in_use == 0


def test_slots_of_a_fresh_burst_are_regularly_spaced() -> None:
    pool = Mempool(512)
    for _ in range(20):
        burst = pool.alloc_burst(64, bytes(60))
        assert np.asarray(burst.array(60)).shape == (64, 60)
        del burst


def test_weakly_referenced_pool_is_collected() -> None:
    class Holder:
        def __init__(self) -> None:
            self.pool = Mempool(4)
            self.burst = self.pool.alloc_burst(2)
            self.me = self

    holder = weakref.ref(Holder())
    gc.collect()
    assert holder() is None


# ---- threads


def test_slots_freed_in_other_threads_are_in_reach() -> None:
    """Also while those threads live and hold a cache, and with more threads than caches."""
    pool = Mempool(4096, 64)
    release = threading.Event()
    filled = threading.Barrier(41)

    def fill() -> None:
        for _ in range(3):
            pool.alloc_burst(90)
        filled.wait()
        release.wait()

    threads = [threading.Thread(target=fill) for _ in range(40)]
    for t in threads:
        t.start()
    try:
        filled.wait(30)
        assert pool.in_use == 0
        everything = pool.alloc_burst(4096)
        assert pool.in_use == 4096
        one_by_one = []
        del everything
        while pool.available:
            one_by_one.append(pool.alloc())
        assert len(one_by_one) == 4096
    finally:
        release.set()
        for t in threads:
            t.join()
    del one_by_one
    assert pool.in_use == 0


@pytest.mark.lifetime
def test_hammering_from_many_threads_keeps_exact_accounts() -> None:
    """Threads allocate, chain, clone, and free what another thread allocated."""
    pool = Mempool(600, 64)
    handed: queue.SimpleQueue[tuple[Any, bytes]] = queue.SimpleQueue()
    stop = threading.Event()
    failures: list[str] = []
    empties = [0] * 8
    rounds = [0] * 8

    def work(me: int) -> None:
        rng = random.Random(me)
        held: list[tuple[Any, bytes]] = []
        while not stop.is_set():
            rounds[me] += 1
            data = bytes([me]) + rng.randbytes(rng.choice((0, 10, 63, 64, 150, 300)))
            try:
                what = rng.randrange(5)
                if what == 0:
                    held.append((pool.alloc(data), data))
                elif what == 1:
                    held.append((pool.alloc_burst(rng.randrange(1, 80), data[:64]), data[:64]))
                elif what == 2 and held and isinstance(held[-1][0], Mbuf):
                    held.append((held[-1][0].clone(), held[-1][1]))
                elif what == 3 and held:
                    handed.put(held.pop(rng.randrange(len(held))))
                elif what == 4:
                    held.append(handed.get_nowait())
            except PoolEmpty:
                empties[me] += 1
            except queue.Empty:
                pass
            while len(held) > rng.randrange(12):
                thing, expected = held.pop(rng.randrange(len(held)))
                mbufs = [thing] if isinstance(thing, Mbuf) else thing
                if {bytes(m) for m in mbufs} != {expected}:
                    failures.append(f"thread {me}: a slot was handed out twice")
                    stop.set()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    stop.wait(2)
    stop.set()
    for t in threads:
        t.join()
    while not handed.empty():
        handed.get()
    assert not failures
    assert min(rounds) > 50
    assert sum(empties) > 0, "the pool was never empty: the test is too easy"
    assert settle(pool) == 0
    everything = pool.alloc_burst(600)
    for i, mbuf in enumerate(everything):
        mbuf.append(2)[:] = i.to_bytes(2, "big")
    assert [bytes(m) for m in everything] == [i.to_bytes(2, "big") for i in range(600)]
