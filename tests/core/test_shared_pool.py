# SPDX-License-Identifier: BSD-3-Clause
"""Pools that several processes allocate from, and what remains of those that are killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import random
import struct
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from forks import in_child
from hypothesis import example, given
from hypothesis import strategies as st
from patience import fewer, patient
from ring_mates import SEALS, Mates, nursed, sealed
from support import child_place, eventually, open_fds, pattern, settle
from together import in_threads

from rtap import Burst, Mempool, PoolEmpty

PAGE = 4096
MEMBERS = 64


@pytest.fixture(scope="module")
def nursery() -> Iterator[Mates]:
    with nursed(child_place()) as mates:
        yield mates


@pytest.fixture
def mates(nursery: Mates) -> Iterator[Mates]:
    yield nursery
    nursery.clear()


def all_of(pool: Mempool) -> list[Burst]:
    """All buffers that can be had."""
    found = []
    with contextlib.suppress(PoolEmpty):
        while True:
            found.append(pool.alloc_burst(1))
    return found


# ---- one pool, several members


def test_a_shared_pool_is_a_pool() -> None:
    pool = Mempool(16, 256, 64, shared=True, name="mine")
    assert pool.shared
    assert not Mempool(1).shared
    assert not Mempool(1, memfd=True).shared
    assert (pool.size, pool.data_room, pool.headroom) == (16, 256, 64)
    assert pool.fd is not None
    assert os.readlink(f"/proc/self/fd/{pool.fd}") == "/memfd:mine (deleted)"
    assert fcntl.fcntl(pool.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    mbuf = pool.alloc(pattern(1, 600))
    assert mbuf.nb_segs == 3
    assert bytes(mbuf) == pattern(1, 600)
    assert bytes(mbuf.clone()) == pattern(1, 600)
    assert pool.in_use == 3
    del mbuf
    assert settle(pool) == 0
    assert pool.reclaim() == 0


def test_buffers_of_a_new_pool_are_regularly_spaced() -> None:
    pool = Mempool(1024, 256, shared=True)
    burst = pool.alloc_burst(64, bytes(60))
    assert memoryview(burst.array(60)).shape == (64, 60)


def test_two_members_take_and_free_the_same_buffers() -> None:
    pool = Mempool(8, 256, shared=True)
    assert pool.fd is not None
    other = Mempool.attach(pool.fd, name="other")
    assert (other.size, other.data_room, other.headroom) == (8, 256, 128)
    assert "other" in repr(other)
    kept = pool.alloc_burst(5, b"x" * 60)
    assert pool.available == other.available == 3
    with pytest.raises(PoolEmpty):
        other.alloc_burst(4)
    more = other.alloc_burst(3)
    for each in (pool, other):
        with pytest.raises(PoolEmpty):
            each.alloc()
    kept.free()
    assert len(other.alloc_burst(5)) == 5
    more.free()
    assert pool.available == other.available == 8


@pytest.mark.lifetime
def test_closing_concerns_only_the_own_buffers() -> None:
    pool = Mempool(8, 256, shared=True)
    assert pool.fd is not None
    other = Mempool.attach(pool.fd)
    mbuf = other.alloc(b"kept")
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.alloc()
    with pytest.raises(BufferError, match="1 of 8 mbufs are in use by this process"):
        other.close()
    assert bytes(mbuf) == b"kept"
    del mbuf
    other.close()


@pytest.mark.lifetime
def test_the_arena_stays_for_the_last_view() -> None:
    before = open_fds()
    pool = Mempool(64, 256, shared=True)
    view = pool.alloc(b"seen").data
    del pool
    gc.collect()
    assert view.tobytes() == b"seen"
    assert len(open_fds()) == len(before) + 2
    del view
    gc.collect()
    assert open_fds() == before


@pytest.mark.lifetime
def test_caches_go_back_when_a_member_goes() -> None:
    pool = Mempool(4096, 64, shared=True)
    assert pool.fd is not None
    other = Mempool.attach(pool.fd)
    other.alloc_burst(32).free()
    assert pool.available < 4096  # in the other's cache
    assert pool.available > 4096 - 256
    other.close()
    assert pool.available == 4096


def test_small_pools_have_small_caches() -> None:
    pool = Mempool(64, 64, shared=True)
    assert pool.fd is not None
    other = Mempool.attach(pool.fd)
    other.alloc_burst(64).free()
    for mbuf in [other.alloc() for _ in range(20)]:
        mbuf.free()
    assert pool.available >= 62


def test_many_threads_of_many_members() -> None:
    pool = Mempool(512, 64, shared=True)
    assert pool.fd is not None
    members = [pool, Mempool.attach(pool.fd), Mempool.attach(pool.fd)]

    def churn(number: int) -> None:
        choose = random.Random(number)
        mine = members[number % len(members)]
        kept: list[tuple[Burst, bytes]] = []
        for round_ in range(fewer(400)):
            data = struct.pack("=II", number, round_) * 4
            with contextlib.suppress(PoolEmpty):
                kept.append((mine.alloc_burst(choose.randrange(1, 40), data), data))
            if kept and choose.random() < 0.6:
                burst, data = kept.pop(choose.randrange(len(kept)))
                assert all(bytes(mbuf) == data for mbuf in burst)
        for burst, data in kept:
            assert all(bytes(mbuf) == data for mbuf in burst)

    in_threads(churn)
    gc.collect()
    for member in members[1:]:
        member.close()
    assert pool.available == 512


def test_at_most_64_members() -> None:
    pool = Mempool(8, 64, shared=True)
    assert pool.fd is not None
    others = [Mempool.attach(pool.fd) for _ in range(MEMBERS - 1)]
    with pytest.raises(OSError, match="64 processes") as caught:
        Mempool.attach(pool.fd)
    assert caught.value.errno == errno.EUSERS
    others.pop().close()
    Mempool.attach(pool.fd).close()


# ---- what is attached


def header(pool: Mempool) -> bytes:
    assert pool.fd is not None
    return os.pread(pool.fd, 64, 0)


def test_what_is_no_shared_pool_is_refused() -> None:
    pool = Mempool(16, 256, shared=True)
    good, size = header(pool), os.fstat(pool.fd or -1).st_size
    read, write = os.pipe()
    with tempfile.TemporaryFile() as file:
        for fd in (read, file.fileno(), os.open("/dev/null", os.O_RDWR)):
            with pytest.raises(ValueError, match=r"not a memfd|not sealed"):
                Mempool.attach(fd)
            if fd != file.fileno():
                os.close(fd)
    os.close(write)
    with pytest.raises(ValueError, match="not an open descriptor"):
        Mempool.attach(1 << 20)
    other = Mempool(16, memfd=True)
    with pytest.raises(ValueError, match="not a shared pool"):
        Mempool.attach(other.fd or -1)
    cases: list[tuple[bytes, int, int, str]] = [
        (good, size, 0, "not sealed"),
        (good, size, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, "not sealed"),
        (b"", 0, SEALS, "too small"),
        (good[:48], PAGE - 1, SEALS, "too small"),
        (bytes(64), size, SEALS, "not a shared pool"),
        (good[:16] + struct.pack("=I", 9) + good[20:], size, SEALS, "another version"),
        (good, size + PAGE, SEALS, "not the one that its header tells"),
        (good, size - PAGE, SEALS, "not the one that its header tells"),
        (good[:32] + struct.pack("=Q", size + 1) + good[40:], size, SEALS, "not the one that"),
    ]
    for at, values in ((20, (0, 1 << 22 | 1, 1 << 31)), (24, (63, 1 << 25)), (28, (15, 4097))):
        for value in values:
            spoiled = good[:at] + struct.pack("=I", value) + good[at + 4 :]
            cases.append((spoiled, size, SEALS, "out of range"))
    for data, length, seals, says in cases:
        with sealed(data, length, seals) as fd, pytest.raises(ValueError, match=says):
            Mempool.attach(fd)


@given(st.lists(st.tuples(st.integers(0, 47), st.integers(0, 255)), max_size=8), st.integers(0, 5))
@example([(21, 255), (22, 63)], 2)
@example([], 2)
def test_any_header_is_refused_or_right(changes: list[tuple[int, int]], pages: int) -> None:
    pool = Mempool(16, 256, shared=True)
    size = os.fstat(pool.fd or -1).st_size + (pages - 2) * PAGE
    data = bytearray(header(pool))
    for at, value in changes:
        data[at] = value
    with sealed(bytes(data), size) as fd:
        try:
            other = Mempool.attach(fd)
        except ValueError as exc:
            assert "cannot be attached as a mempool" in str(exc)  # noqa: PT017
            return
        burst = other.alloc_burst(other.available, bytes(60))
        assert len(burst) == other.size
        del burst
        other.close()


def test_an_own_memfd_stays_open() -> None:
    pool = Mempool(16, shared=True)
    fd = os.dup(pool.fd or -1)
    before = open_fds()
    Mempool.attach(fd).close()
    assert open_fds() == before
    os.close(fd)


@pytest.mark.root
def test_without_proc_one_sentence_says_why(tmp_path: object) -> None:
    def child() -> None:
        pool = Mempool(4, shared=True)
        fd = os.dup(pool.fd or -1)
        os.chroot(str(tmp_path))
        for make in (lambda: Mempool(4, shared=True), lambda: Mempool.attach(fd)):
            with pytest.raises(OSError, match="needs /proc"):
                make()
        assert Mempool(4, memfd=True).available == 4

    in_child(child)


# ---- processes


def test_another_process_frees_what_it_took(mates: Mates) -> None:
    pool = Mempool(256, 64, shared=True)
    mate = mates.start("fill", pool, n=200)
    assert mate.said() >= 256 - 8
    assert mate.wait() == 0
    assert pool.available == 256


def test_a_killed_process_leaves_nothing(mates: Mates) -> None:
    pool = Mempool(256, 64, shared=True)
    mine = pool.alloc_burst(100, bytes(60))
    mate = mates.start("take", pool, n=150)
    assert mate.said() == 150
    assert pool.available <= 6
    assert pool.reclaim() == 0
    mate.kill()
    assert pool.reclaim() >= 150
    assert pool.available == 156
    assert len(mine) == 100


def test_an_empty_pool_takes_it_back_by_itself(mates: Mates) -> None:
    pool = Mempool(64, 64, shared=True)
    mate = mates.start("take", pool, n=64)
    assert mate.said() == 64
    for _ in range(3):
        with pytest.raises(PoolEmpty):
            pool.alloc()
    mate.kill()

    def comes_back() -> bool:
        with contextlib.suppress(PoolEmpty):
            return len(pool.alloc_burst(64)) == 64
        return False

    eventually(comes_back, "the buffers of a killed process come back")


def test_a_newcomer_takes_it_back(mates: Mates) -> None:
    """It may get the number of the dead one, which then looks alive to everybody else."""
    pool = Mempool(64, 64, shared=True)
    mate = mates.start("take", pool, n=60)
    mate.said()
    mate.kill()
    assert pool.fd is not None
    other = Mempool.attach(pool.fd)
    assert len(all_of(other)) == 64


def test_a_child_does_not_keep_a_dead_parent_alive(mates: Mates) -> None:
    pool = Mempool(64, 64, shared=True)
    mate = mates.start("take_and_fork", pool, n=50)
    taken, child = mate.said()
    assert taken == 50
    mate.kill()
    try:  # the child closes its copies when it runs for the first time
        eventually(lambda: pool.available == 64, "the dead parent's buffers are free")
    finally:
        os.kill(child, 9)


@pytest.mark.lifetime
def test_fork() -> None:
    """The child can use neither the pool nor what it holds of it, and gives nothing back."""
    pool = Mempool(64, 64, shared=True)
    kept = pool.alloc_burst(10, b"kept" * 4)
    fd = pool.fd or -1

    held: list[Any] = [pool, kept]
    del pool, kept

    def child() -> None:
        for use in ("alloc", "reclaim"):
            with pytest.raises(RuntimeError, match=r"before fork\(\)"):
                getattr(held[0], use)()
        other = Mempool.attach(fd)
        assert other.available <= 54
        held[1].free()
        other_kept = other.alloc_burst(20)
        held.clear()  # the arena goes
        gc.collect()
        assert other.available <= 34
        del other_kept

    in_child(child)
    assert held[0].in_use == 10
    assert {bytes(mbuf) for mbuf in held.pop()} == {b"kept" * 4}
    assert settle(held[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [200, pytest.param(2000, marks=pytest.mark.soak)])
def test_random_kills(mates: Mates, kills: int) -> None:
    choose = random.Random(kills)
    pool = Mempool(256, 64, shared=True)
    running = [mates.start("take", pool, n=choose.randrange(1, 20)) for _ in range(4)]
    for _ in range(fewer(kills)):
        i = choose.randrange(4)
        time.sleep(choose.random() * 0.01)  # anywhere between its first step and its last
        running[i].kill()
        running[i].close()
        running[i] = mates.start("take", pool, n=choose.randrange(1, 20))
        if choose.random() < 0.2:
            mine = all_of(pool)
            assert len(mine) >= 256 - 4 * 20 - 4 * 8
            del mine
    for mate in running:
        mate.kill()
    assert pool.available == 256


@pytest.mark.slow
def test_a_member_that_writes_anything_anywhere(mates: Mates) -> None:
    """It may take buffers away, but neither crash others nor make them use one buffer twice."""
    pool = Mempool(256, 64, shared=True)
    assert pool.fd is not None
    members = [pool, Mempool.attach(pool.fd)]
    control = PAGE + 256 * 8 + 256 * 64
    spoilers = [
        mates.start("spoil", pool, seed=seed, seconds=patient(2), ends=[control])
        for seed in range(2)
    ]
    assert [mate.said() for mate in spoilers] == ["up", "up"]

    def churn(number: int) -> int:
        choose = random.Random(number)
        mine = members[number % 2]
        kept: list[Burst] = []
        rounds = 0
        until = time.monotonic() + patient(2)
        while time.monotonic() < until:
            rounds += 1
            with contextlib.suppress(PoolEmpty):
                kept.append(mine.alloc_burst(choose.randrange(1, 9), bytes(60)))
                kept.append(Burst([mine.alloc(bytes(200))]))
                kept.append(Burst([kept[-1][0].clone()]))
            assert 0 <= mine.available <= 256
            while len(kept) > 12 or (kept and choose.random() < 0.3):
                burst = kept.pop(choose.randrange(len(kept)))
                assert sum(burst.lengths) >= 60 * len(burst)
                del burst
        return rounds

    assert min(in_threads(churn, 4)) > 0
    assert [mate.said() for mate in spoilers] == ["done", "done"]
    gc.collect()
    for member in members:  # none of them has lost count of its own
        member.close()
