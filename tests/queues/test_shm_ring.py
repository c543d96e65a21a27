# SPDX-License-Identifier: BSD-3-Clause
"""Rings through which processes hand each other frames of a shared pool."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import random
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
from forks import in_child
from hypothesis import example, given
from hypothesis import strategies as st
from patience import fewer
from ring_mates import SEALS, attached, frames, made, number_of, place, sealed, send_all, whole
from support import Task, eventually, open_fds, pattern, settle

from rtap import Burst, DeviceStateError, Mempool, PoolEmpty, Worker
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap._queues.shm_ring import ShmRing

PAGE = 4096
FIELDS = {
    "ol_flags": 64,
    "packet_type": 32,
    "l2_len": 16,
    "l3_len": 16,
    "l4_len": 16,
    "tso_segsz": 16,
    "vlan_tci": 16,
    "vlan_tci_outer": 16,
    "outer_l2_len": 16,
    "outer_l3_len": 16,
    "port": 16,
}


# ---- what a ring is


def test_frames_come_out_in_order() -> None:
    pool, ring = made()
    assert (ring.size, ring.count, len(ring), ring.pool, ring.closed) == (64, 0, 0, pool, False)
    assert ring
    burst = pool.alloc_burst(10, [whole(i, 60) for i in range(10)])
    assert ring.enqueue(burst) == 10
    assert (len(burst), ring.count) == (0, 10)
    assert [number_of(bytes(m)) for m in ring.dequeue(4)] == [0, 1, 2, 3]
    assert [number_of(bytes(m)) for m in ring.dequeue()] == [4, 5, 6, 7, 8, 9]
    assert len(ring.dequeue()) == 0
    assert "0 of 64" in repr(ring)
    ring.close()
    assert settle(pool) == 0


def test_a_full_ring_takes_no_more() -> None:
    pool, ring = made(size=8)
    burst = pool.alloc_burst(20, [whole(i, 60) for i in range(20)])
    for first, taken in ((8, 8), (11, 3), (14, 3), (17, 3)):
        assert ring.enqueue(burst) == taken
        assert ring.enqueue(burst) == 0
        assert number_of(bytes(burst[0])) == first
        assert ring.count == 8
        assert len(ring.dequeue(3)) == 3
    assert ring.counters()["tx_full"] == 8


@pytest.mark.parametrize("size", [2, 4, 1024])
def test_many_laps(size: int) -> None:
    pool, ring = made(64, 64, size)
    sent = seen = 0
    choose = random.Random(size)
    for _ in range(3000):
        n = choose.randrange(0, 9)
        with contextlib.suppress(PoolEmpty):
            burst = pool.alloc_burst(n, [whole(sent + i, 16) for i in range(n)])
            sent += ring.enqueue(burst)
        for mbuf in ring.dequeue(choose.randrange(1, 9)):
            assert number_of(bytes(mbuf)) == seen
            seen += 1
    while seen < sent:
        for mbuf in ring.dequeue():
            assert number_of(bytes(mbuf)) == seen
            seen += 1
    assert sent > 3 * size
    assert ring.counters()["rx_packets"] == ring.counters()["tx_packets"] == sent
    assert ring.counters()["copied_packets"] == 0


def test_sizes() -> None:
    pool = Mempool(8, shared=True)
    for size in (3, 0, 1, -2, 1000, 1 << 21):
        with pytest.raises(ValueError, match="size must be"):
            ShmRing.create(pool, size)
    with pytest.raises(ValueError, match="shared=True"):
        ShmRing.create(Mempool(8), 8)
    ring = ShmRing.create(pool, 8, name="eight")
    assert ring.name == "eight"
    assert os.readlink(f"/proc/self/fd/{ring.fd}") == "/memfd:eight (deleted)"
    assert fcntl.fcntl(ring.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    ShmRing(ring.fd, 8, pool=pool).close()
    with pytest.raises(ValueError, match="room for 8 frames, not 16"):
        ShmRing(ring.fd, 16, pool=pool)
    with pytest.raises(ValueError, match="must be an eventfd"):
        ShmRing(ring.fd, pool=pool, event_fd=ring.fd)


class Named(ShmRing):
    """As a class with another constructor may be made of it."""

    def __init__(self, pool: Mempool, fd: int) -> None:
        super().__init__(fd, pool=pool)
        self.extra = 1


def test_a_subclass_has_a_constructor_of_its_own() -> None:
    pool, ring = made()
    other = Named(pool, ring.fd)
    assert other.extra == 1
    ring.enqueue(pool.alloc_burst(1))
    assert len(other.dequeue()) == 1
    assert type(Named.create(pool, 8)) is Named


@pytest.mark.lifetime
def test_close() -> None:
    before = open_fds()
    pool, ring = made()
    with pytest.raises(BufferError, match="1 rx queues, rings or stages"):
        pool.close()
    with ring:
        ring.enqueue(pool.alloc_burst(5))
    ring.close()
    assert ring.closed
    assert "closed" in repr(ring)
    for name in ("fd", "count", "rx_queue", "pool", "name"):
        with pytest.raises(ValueError, match="the ring is closed"):
            getattr(ring, name)
    for name in ("dequeue", "counters", "xstats", "__len__", "__enter__"):
        with pytest.raises(ValueError, match="the ring is closed"):
            getattr(ring, name)()
    with pytest.raises(ValueError, match="the ring is closed"):
        ring.enqueue(Burst())
    assert pool.available == pool.size  # nobody has the ring open any more
    pool.close()
    del ring
    gc.collect()
    assert open_fds() == before


@pytest.mark.lifetime
def test_a_ring_that_is_forgotten_goes() -> None:
    before = open_fds()
    pool, ring = made()
    queue = ring.rx_queue
    ring.enqueue(pool.alloc_burst(5))
    del ring
    gc.collect()
    assert len(queue.rx_burst(3)) == 3
    del queue
    gc.collect()
    assert pool.available == pool.size
    pool.close()
    gc.collect()
    assert open_fds() == before


def test_frames_stay_while_somebody_has_the_ring_open() -> None:
    pool, ring = made()
    other, end = attached(pool, ring)
    ring.enqueue(pool.alloc_burst(5, b"stay" * 4))
    ring.close()
    pool.close()
    assert other.reclaim() == 0
    assert {bytes(m) for m in end.dequeue()} == {b"stay" * 4}


def test_a_ring_that_is_opened_again_has_lost_its_frames() -> None:
    """Nobody had it open, so what lay in it was freed, and may be in use elsewhere by now."""
    pool, ring = made(64, 64, 64)
    fd = os.dup(ring.fd)
    ring.enqueue(pool.alloc_burst(40))
    ring.close()
    kept = pool.alloc_burst(64, b"mine" * 4)
    again = ShmRing(fd, pool=pool)
    os.close(fd)
    assert len(again.dequeue()) == 0
    assert {bytes(m) for m in kept} == {b"mine" * 4}
    part = kept[:10]
    del kept
    gc.collect()
    assert again.enqueue(part) == 10
    del part
    assert len(again.dequeue()) == 10


def test_at_most_256_rings() -> None:
    pool = Mempool(8, 64, shared=True)
    rings = [ShmRing.create(pool, 2) for _ in range(256)]
    with pytest.raises(OSError, match="256 rings"):
        ShmRing.create(pool, 2)
    rings.pop().close()
    ShmRing.create(pool, 2).close()


# ---- what is copied, and what is not


def test_no_byte_is_copied() -> None:
    pool, ring = made()
    _other, end = attached(pool, ring)
    mbuf = pool.alloc(pattern(3, 100))
    offset = place(mbuf) - place(pool.alloc(b"x"))
    view = mbuf.data
    burst = Burst([mbuf])
    at = place(mbuf)
    del mbuf, view
    gc.collect()
    assert ring.enqueue(burst) == 1
    assert ring.counters()["copied_packets"] == 0
    received = end.dequeue()[0]
    assert bytes(received) == pattern(3, 100)
    # Both map the arena as one block: the frame is as far from another one here as there.
    assert at != place(received)
    assert offset % 64 == 0
    received[0:4] = b"back"
    assert end.enqueue(Burst()) == 0
    back = Burst([received])
    del received
    assert end.enqueue(back) == 1
    assert end.counters()["copied_packets"] == 0
    home = ring.dequeue()[0]
    assert place(home) == at
    assert bytes(home[0:4]) == b"back"


def shared_frame(pool: Mempool) -> tuple[Burst, Any]:
    burst = pool.alloc_burst(1, pattern(1, 60))
    return burst, burst[0]


def clone(pool: Mempool) -> tuple[Burst, Any]:
    return Burst([pool.alloc(pattern(1, 60)).clone()]), None


def viewed(pool: Mempool) -> tuple[Burst, Any]:
    burst = pool.alloc_burst(1, pattern(1, 60))
    return burst, burst[0].data


def foreign(pool: Mempool) -> tuple[Burst, Any]:
    return Mempool(4, 512).alloc_burst(1, pattern(1, 60)), None


@pytest.mark.parametrize("make", [shared_frame, clone, viewed, foreign])
def test_a_frame_that_others_hold_is_copied(make: Callable[[Mempool], tuple[Burst, Any]]) -> None:
    pool, ring = made()
    burst, keeper = make(pool)
    burst.ol_flags = 1 << 40
    assert ring.enqueue(burst) == 1
    assert ring.counters()["copied_packets"] == 1
    received = ring.dequeue()[0]
    assert bytes(received) == pattern(1, 60)
    assert received.ol_flags == 1 << 40
    received[0:1] = b"!"
    if keeper is not None:
        assert bytes(keeper) == pattern(1, 60)
    del received, keeper, burst
    assert settle(pool) == 0


def test_long_foreign_frames_become_chains() -> None:
    _pool, ring = made(256, 256)
    other = Mempool(4, 5000)
    ring.enqueue(other.alloc_burst(1, pattern(1, 200) * 20))
    received = ring.dequeue()[0]
    assert received.nb_segs == 16
    assert bytes(received) == pattern(1, 200) * 20


def test_without_room_for_a_copy_the_count_is_short() -> None:
    pool, ring = made(8, 256, 8)
    other = Mempool(8)
    kept = pool.alloc_burst(6)
    burst = other.alloc_burst(4, [whole(i, 60) for i in range(4)])
    assert ring.enqueue(burst) == 2
    assert ring.counters()["copy_failed"] == 1
    assert [number_of(bytes(m)) for m in burst] == [2, 3]
    assert [number_of(bytes(m)) for m in ring.dequeue()] == [0, 1]
    del kept
    gc.collect()
    assert ring.enqueue(burst) == 2


# ---- what travels with a frame


@given(st.fixed_dictionaries({name: st.integers(0, (1 << n) - 1) for name, n in FIELDS.items()}))
@example({name: (1 << n) - 1 for name, n in FIELDS.items()})
@example(dict.fromkeys(FIELDS, 0))
def test_metadata(fields: dict[str, int]) -> None:
    pool, ring = made(16, 64, 4)
    other, end = attached(pool, ring)
    burst = pool.alloc_burst(2, [b"one" * 10, b"two" * 60])
    for name, value in fields.items():
        setattr(burst[0], name, value)
    burst[0].adj(3)
    burst[0].prepend(1)[:] = b"!"
    copy = Burst([burst[0]])
    assert ring.enqueue(copy) == 1
    assert ring.counters()["copied_packets"] == 1
    assert ring.enqueue(burst) == 2
    copied, moved, last = end.dequeue()
    for received in (copied, moved):
        assert bytes(received) == b"!" + b"one" * 9
        assert {name: getattr(received, name) for name in FIELDS} == fields
    assert (moved.headroom, moved.tailroom) == (130, 34)
    assert bytes(last) == b"two" * 60
    del copied, moved, received, last, copy, burst
    end.close()
    ring.close()
    other.close()
    pool.close()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(2, 8))
def test_chains_arrive_whole(lengths: list[int], size: int) -> None:
    pool, ring = made(64, 64, 8)
    other, end = attached(pool, ring)
    burst = pool.alloc_burst(0)
    for i, length in enumerate(lengths):
        burst.append(pool.alloc(pattern(i, 100) * 3)) if length == 300 else burst.append(
            pool.alloc((pattern(i, 100) * 3)[:length])
        )
    sizes = [mbuf.nb_segs for mbuf in burst]
    assert ring.enqueue(burst) == len(lengths)
    assert ring.count == len(lengths)
    received = list(end.dequeue(size)) + list(end.dequeue())
    assert [mbuf.nb_segs for mbuf in received] == sizes
    for i, mbuf in enumerate(received):
        assert bytes(mbuf) == (pattern(i, 100) * 3)[: lengths[i]]
    assert ring.counters()["copied_packets"] == 0
    del received, mbuf
    gc.collect()
    assert pool.available >= 64 - 2
    end.close()
    ring.close()
    other.close()
    pool.close()


def test_a_chain_that_finds_no_room_stays_whole() -> None:
    pool, ring = made(64, 64, 2)
    ring.enqueue(pool.alloc_burst(2))
    burst = Burst([pool.alloc(pattern(2, 200))])
    assert ring.enqueue(burst) == 0
    assert bytes(burst[0]) == pattern(2, 200)
    assert burst[0].nb_segs == 4
    ring.dequeue()
    assert ring.enqueue(burst) == 1
    assert bytes(ring.dequeue()[0]) == pattern(2, 200)


@pytest.mark.parametrize("seed", range(4))
def test_against_a_model(seed: int) -> None:
    """Random calls through two members and two rings, beside a queue of Python's for each ring."""
    choose = random.Random(seed)
    pool = Mempool(48, 64, shared=True)
    rings = [ShmRing.create(pool, 4), ShmRing.create(pool, 16)]
    other, *ends = attached(pool, *rings)
    members: list[tuple[Mempool, list[Any]]] = [(pool, rings), (other, ends)]
    model: list[deque[tuple[int, int]]] = [deque(), deque()]
    kept: list[tuple[Burst, tuple[int, int]]] = []
    number = 0
    for _ in range(fewer(1500)):
        mine, both = choose.choice(members)
        which = choose.randrange(2)
        if choose.random() < 0.55:
            burst = Burst()
            frames: list[tuple[int, int]] = []
            with contextlib.suppress(PoolEmpty):
                for _ in range(choose.randrange(5)):
                    number += 1
                    frames.append((number, choose.choice([8, 60, 64, 65, 150])))
                    try:
                        burst.append(mine.alloc(whole(*frames[-1])))
                    except PoolEmpty:
                        frames.pop()
                        raise
            if len(burst) and choose.random() < 0.2:
                kept.append((burst[:1], frames[0]))
            room = both[which].size - len(model[which])
            sent = both[which].enqueue(burst)
            assert sent <= room
            if not both[which].counters()["copy_failed"]:
                assert sent == min(room, len(frames))
            model[which] += frames[:sent]
        else:
            n = choose.randrange(1, 6)
            received = both[which].dequeue(n)
            assert len(received) == min(n, len(model[which]))
            for mbuf in received:
                assert bytes(mbuf) == whole(*model[which].popleft())
        for each in both:
            assert each.count == len(model[both.index(each)])
        while len(kept) > 3:
            burst, frame = kept.pop(0)
            assert bytes(burst[0]) == whole(*frame)
    del kept, burst, received, mbuf
    for end in ends:
        end.close()
    gc.collect()
    other.close()
    assert pool.in_use == sum(-(-length // 64) for frames in model for _, length in frames)


# ---- descriptors that are no rings


def header(ring: ShmRing) -> bytes:
    return os.pread(ring.fd, 64, 0)


def test_what_is_no_ring_of_the_pool_is_refused() -> None:
    pool, ring = made()
    good, size = header(ring), os.fstat(ring.fd).st_size
    other, stranger = made()
    assert pool.fd is not None
    for fd, says in (
        (stranger.fd, "for another pool"),
        (pool.fd, "not a ring"),
        (ring.event_fd, "not a memfd"),
        (1 << 20, "not an open descriptor"),
    ):
        with pytest.raises(ValueError, match=says):
            ShmRing(fd or -1, pool=pool)
    cases: list[tuple[bytes, int, int, str]] = [
        (good, size, 0, "not sealed"),
        (good[:40], PAGE - 1, SEALS, "too small"),
        (bytes(64), size, SEALS, "not a ring"),
        (good[:16] + struct.pack("=I", 7) + good[20:], size, SEALS, "another version"),
        (good, size + PAGE, SEALS, "not the one that its header tells"),
        (good[:32] + struct.pack("=Q", size + 1) + good[40:], size, SEALS, "not the one that"),
    ]
    for at, values in ((20, (0, 1, 3, 1 << 21)), (24, (256, 1 << 31))):
        for value in values:
            spoiled = good[:at] + struct.pack("=I", value) + good[at + 4 :]
            cases.append((spoiled, size, SEALS, "out of range"))
    for data, length, seals, says in cases:
        with sealed(data, length, seals) as fd, pytest.raises(ValueError, match=says):
            ShmRing(fd, pool=pool)
    del other, stranger


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 255)), max_size=8), st.integers(0))
@example([], 1)
def test_any_header_and_any_cells(changes: list[tuple[int, int]], seed: int) -> None:
    choose = random.Random(seed)
    pool, ring = made(16, 64, 8)
    data = bytearray(header(ring).ljust(PAGE + 64, b"\0"))
    for at, value in changes:
        data[at] = value
    data[128:] = choose.randbytes(len(data) - 128)
    for at in range(PAGE, PAGE + 64, 8):
        if choose.random() < 0.5:  # a full cell of the first lap, of any slot
            slot, version = choose.randrange(32), choose.randrange(4)
            struct.pack_into("=Q", data, at, 1 | slot << 17 | version << 39)
    struct.pack_into("=QQ", data, 128, 0, 0)
    with sealed(bytes(data), os.fstat(ring.fd).st_size) as fd:
        try:
            other = ShmRing(fd, pool=pool)
        except ValueError as exc:
            assert "is not a ring of this pool" in str(exc)  # noqa: PT017
            return
    for _ in range(4):
        with contextlib.suppress(PoolEmpty):
            other.enqueue(pool.alloc_burst(3, bytes(60)))
        assert 0 <= other.count <= other.size
        for mbuf in other.dequeue():
            assert len(bytes(mbuf)) == len(mbuf)
        mbuf = None
    other.close()
    ring.close()
    pool.close()


# ---- workers


class Ends:
    """A device with one queue of each side."""

    def __init__(self, pool: Mempool) -> None:
        self.name = "null"
        self.rx = NullRxQueue(pool, name="null")
        self.tx = NullTxQueue("null")
        for queue in (self.rx, self.tx):
            queue.start()

    def rx_queue(self, number: int) -> NullRxQueue:
        return self.rx

    def tx_queue(self, number: int) -> NullTxQueue:
        return self.tx


@pytest.mark.parametrize("wait", ["poll", "sleep", "adaptive"])
@pytest.mark.parametrize("events", [True, False])
def test_a_ring_is_source_and_target(wait: str, events: bool) -> None:
    pool, there = made()
    back = ShmRing.create(pool, 64)
    _other, source, target = attached(pool, there, back, events=events)
    worker = Worker(wait=wait)
    worker.forward(source, [target])
    with worker:
        for i in range(60):
            there.enqueue(pool.alloc_burst(1, whole(i, 60)))
            assert number_of(bytes(back.dequeue(1, 10)[0])) == i
            if i % 20 == 0:
                time.sleep(0.05)
        with pytest.raises(DeviceStateError, match="in use"):
            source.dequeue()
    stats = worker.stats().routes[0]
    assert (stats.rx_packets, stats.targets[0].packets, stats.device) == (60, 60, "ring")


def test_between_a_device_and_a_ring() -> None:
    pool, ring = made(256, 256, 64)
    ends = Ends(pool)
    worker = Worker(wait="poll")
    worker.forward((ends, 0), ring, on_full="retry")
    worker.forward(ring, (ends, 0))
    with worker:
        eventually(lambda: worker.stats().routes[1].targets[0].packets > 10_000, "frames go round")
    ring.close()
    ends.rx.close()
    assert settle(pool) == 0
    with pytest.raises(TypeError, match="queue number"):
        Worker().forward(ends, ends)  # type: ignore[arg-type]


def test_closing_a_ring_ends_its_routes() -> None:
    pool, ring = made()
    target = ShmRing.create(pool, 64)
    worker = Worker(wait="sleep")
    worker.forward(ring, target)
    with worker:
        eventually(lambda: worker.stats().routes[0].idle, "the route is parked")
        ring.close()
        eventually(lambda: not worker.running, "the worker ends")
    assert len(target.dequeue()) == 0


# ---- threads, forks


def test_threads_with_a_ring_each() -> None:
    pool, ring = made(512, 64, 64)
    n = fewer(3000)
    ends = [ShmRing(ring.fd, pool=pool, event_fd=ring.event_fd) for _ in range(4)]
    seen: Counter[int] = Counter()
    lock = threading.Lock()
    finished = threading.Event()

    def send(number: int) -> None:
        for i in range(n):
            send_all(ends[number], frames(pool, number * n + i, 1, 16))

    def receive(number: int) -> None:
        mine: Counter[int] = Counter()
        while True:
            over = finished.is_set()
            burst = ends[number].dequeue(16, 0.01)
            mine.update(number_of(bytes(mbuf)) for mbuf in burst)
            if over and not len(burst):
                break
        with lock:
            seen.update(mine)

    receivers = [Task(receive, number) for number in (2, 3)]
    senders = [Task(send, number) for number in (0, 1)]
    for task in senders:
        task.result(100)
    finished.set()
    for task in receivers:
        task.result(100)
    assert seen == Counter(range(2 * n))
    assert settle(pool) == 0


@pytest.mark.lifetime
def test_fork() -> None:
    pool, ring = made()
    ring.enqueue(pool.alloc_burst(5))

    held: list[Any] = [pool, ring]
    del pool, ring

    def child() -> None:
        for name in ("dequeue", "close"):
            with pytest.raises(DeviceStateError, match=r"before fork\(\)"):
                getattr(held[1], name)()
        with pytest.raises(DeviceStateError, match=r"before fork\(\)"):
            held[1].enqueue(Burst())
        with pytest.raises(RuntimeError, match=r"before fork\(\)"):
            ShmRing.create(held[0], 8)
        held.clear()  # the memory goes
        gc.collect()

    in_child(child)
    assert held[0].in_use == 5
    assert len(held[1].dequeue()) == 5
