# SPDX-License-Identifier: BSD-3-Clause
"""Processes that share rings: order, wake-ups, kill -9 at any moment, one that writes anything."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from patience import fewer, patient
from ring_mates import (
    END,
    Mates,
    attached,
    frames,
    made,
    number_of,
    nursed,
    place,
    send_all,
    whole,
)
from support import ENGINES, Tap, Task, child_place, eventually, frame, settle
from trains import random_train

from rtap import Burst, DeviceStateError, MbufFlag, Mempool, PoolEmpty, Worker, offload, stages
from rtap._queues.shm_ring import ShmRing

PAGE = 4096


@pytest.fixture(scope="module")
def nursery() -> Iterator[Mates]:
    with nursed(child_place()) as mates:
        yield mates


@pytest.fixture
def mates(nursery: Mates) -> Iterator[Mates]:
    yield nursery
    nursery.clear()


def test_another_process_writes_where_the_frame_is(mates: Mates) -> None:
    pool, there = made()
    back = ShmRing.create(pool, 64)
    mate = mates.start("echo", pool, there, back, n=20)
    assert mate.said() == "up"
    for i in range(20):
        burst = pool.alloc_burst(1, whole(i, 200))
        at = place(burst[0])
        send_all(there, burst)
        burst = back.dequeue(1, 30)
        assert place(burst[0]) == at
        assert bytes(burst[0]) == b"\xee" + whole(i, 200)[1:]
    assert mate.said()["copied_packets"] == 0
    assert there.counters()["copied_packets"] == 0


# ---- several processes


@pytest.mark.parametrize("length", [16, 60, 700])
def test_order_between_two_processes(mates: Mates, length: int) -> None:
    pool, ring = made(512, 256, 64)
    n = fewer(5000)
    sender = mates.start("count_up", pool, ring, first=0, n=n, length=length)
    seen = 0
    while seen < n:
        burst = ring.dequeue(64, 30)
        assert len(burst), sender.said()
        seen = check_order(burst, seen)
        del burst
    assert sender.said()["copied_packets"] == 0
    assert sender.wait() == 0
    assert settle(pool) == 0


def test_nothing_is_lost_or_doubled_among_many(mates: Mates) -> None:
    """Two processes send, two receive; each sender's frames come in order to each receiver."""
    pool, ring = made(512, 256, 128)
    n = fewer(4000)
    receivers = [mates.start("collect", pool, ring) for _ in range(2)]
    senders = [mates.start("count_up", pool, ring, first=i * n, n=n) for i in range(2)]
    for sender in senders:
        assert sender.said()["copied_packets"] == 0
    send_all(ring, pool.alloc_burst(1, END))
    numbers: list[int] = []
    for each in [mate.said() for mate in receivers]:
        for i in range(2):
            mine = [number for number in each if number // n == i]
            assert mine == sorted(mine)
        numbers += each
    assert sorted(numbers) == list(range(2 * n))
    for mate in (*receivers, *senders):
        assert mate.wait() == 0
    assert [bytes(mbuf) for mbuf in ring.dequeue()] == [END]
    assert settle(pool) == 0


def test_workers_in_two_processes(mates: Mates) -> None:
    pool, there = made(512, 256, 64)
    back = ShmRing.create(pool, 64)
    mate = mates.start("forward", pool, there, back, wait="sleep")
    assert mate.said() == "up"
    n = fewer(20_000)
    sent = seen = 0
    while seen < n:
        if sent < n:
            burst = frames(pool, sent, min(32, n - sent), 60)
            sent += len(burst)
            while len(burst):
                there.enqueue(burst)
                seen = check_order(back.dequeue(64), seen)
        if seen < n:
            burst = back.dequeue(64, 0 if sent < n else 30)
            assert len(burst) or sent < n, "a frame is missing"
            seen = check_order(burst, seen)
            del burst
    mate.kill()
    assert pool.available == pool.size


def check_order(burst: Burst, seen: int) -> int:
    for mbuf in burst:
        assert number_of(bytes(mbuf)) == seen
        seen += 1
    return seen


@pytest.mark.root
@pytest.mark.parametrize("engine", ENGINES)
def test_from_device_to_device_through_another_process(mates: Mates, tap: Tap, engine: str) -> None:
    """The kernel reads and writes shared buffers, also registered ones."""
    pool, there = made(512, 2048, 64)
    back = ShmRing.create(pool, 64)
    mate = mates.start("forward", pool, there, back, wait="adaptive")
    mate.said()
    packets = tap.packets()
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    for i in range(60):
        sent = [frame(8 * i + j, 64 + j) for j in range(8)]
        for each in sent:
            packets.send(each)
        burst = rx.rx_burst(8, 10)
        assert len(burst) == 8
        assert there.enqueue(burst) == 8
        while len(burst) < 8:
            burst.extend(back.dequeue(8, 10))
        assert tx.tx_burst(burst) == 8
        assert packets.frames(8) == sent
    assert there.counters()["copied_packets"] == 0
    mate.kill()
    rx.stop()
    tx.stop()
    del burst
    assert settle(pool) == 0


# ---- waiting


@pytest.mark.parametrize("events", [True, False])
def test_waits(events: bool) -> None:
    pool, ring = made()
    _other, end = attached(pool, ring, events=events)
    began = time.monotonic()
    assert len(end.dequeue(1, 0.1)) == 0
    assert time.monotonic() - began >= 0.09
    for _ in range(20):
        task = Task(end.dequeue, 1, None)
        time.sleep(0.002)
        ring.enqueue(pool.alloc_burst(1, b"woken" * 3))
        assert bytes(task.result(10)[0]) == b"woken" * 3
    task = Task(end.dequeue, 1, None)
    time.sleep(0.01)
    end.close()
    with pytest.raises(DeviceStateError, match="stopped while waiting"):
        task.result(10)


@pytest.mark.parametrize("events", [True, False])
def test_a_sleeper_in_another_process_is_woken_at_once(mates: Mates, events: bool) -> None:
    """Not by its look at the ring every 20 milliseconds."""
    pool, ring = made()
    in_a_row = 0
    for _ in range(60):
        mate = mates.start("wait_for_one", pool, ring, events=events)
        assert mate.said() == "up"
        time.sleep(0.02)
        ring.enqueue(pool.alloc_burst(1, struct.pack("!Q", time.monotonic_ns())))
        in_a_row = in_a_row + 1 if mate.said() < patient(8e6) else 0
        assert mate.wait() == 0
        if in_a_row == 6:
            return
    pytest.fail("never six times in a row within eight milliseconds")


def test_stolen_wake_ups_cost_one_look(mates: Mates) -> None:
    pool, ring = made()
    thief = mates.start("drain_events", pool, ring)
    assert thief.said() == "up"
    for _ in range(10):
        mate = mates.start("wait_for_one", pool, ring)
        mate.said()
        time.sleep(0.01)
        ring.enqueue(pool.alloc_burst(1, struct.pack("!Q", time.monotonic_ns())))
        assert mate.said() < patient(1e9)
    source = ring
    target = ShmRing.create(pool, 64)
    worker = Worker(wait="sleep")
    worker.forward(source, target)
    _other, end = attached(pool, ring)
    with worker:
        for _ in range(10):
            time.sleep(0.01)
            end.enqueue(end.pool.alloc_burst(1))
            assert len(target.dequeue(1, patient(1))) == 1


def test_nobody_is_woken_in_vain() -> None:
    """Senders enter the kernel only while somebody sleeps."""
    pool, ring = made()
    assert ring.event_fd is not None
    for _ in range(10):
        ring.enqueue(pool.alloc_burst(1))
        ring.dequeue()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(ring.event_fd)
    ring.dequeue(1, 0.01)
    ring.enqueue(pool.alloc_burst(1))
    ring.enqueue(pool.alloc_burst(1))
    assert os.eventfd_read(ring.event_fd) == 1


# ---- processes that die


def kill_and_replace(mates: Mates, kills: int, size: int) -> None:
    """Two processes forward from one ring to another; one of them is killed again and again, at
    any moment, while frames of one and of several segments go round."""
    choose = random.Random(kills)
    pool = Mempool(512, 128, shared=True)
    there, back = ShmRing.create(pool, size), ShmRing.create(pool, size)
    running = [
        mates.start("relay", pool, there, back, seed=choose.randrange(1 << 30)) for _ in range(2)
    ]
    number = 0
    seen: Counter[int] = Counter()
    killed = 0
    began = time.monotonic()
    while killed < kills:
        until = time.monotonic() + choose.random() * 0.03
        while time.monotonic() < until:
            burst = Burst()
            with contextlib.suppress(PoolEmpty):
                for _ in range(choose.randrange(32)):
                    length = choose.choice([16, 60, 400])
                    burst.append(pool.alloc(whole(number, length)))
                    number += 1
            there.enqueue(burst)
            seen.update(number_of(bytes(mbuf)) for mbuf in back.dequeue(64))
        i = choose.randrange(2)
        running[i].kill()
        assert running[i].failure() == ""
        running[i].close()
        running[i] = mates.start("relay", pool, there, back, seed=choose.randrange(1 << 30))
        killed += 1
        assert max(seen.values(), default=0) <= 1, "a frame came twice"
    assert time.monotonic() - began < patient(20 + kills)
    # Frames still flow.
    before = len(seen)

    def flows() -> bool:
        with contextlib.suppress(PoolEmpty):
            there.enqueue(pool.alloc_burst(1, whole(1 << 40, 60)))
        back.dequeue(1)
        return any(number_of(bytes(mbuf)) == 1 << 40 for mbuf in back.dequeue(64, 0.05))

    assert before > 0
    eventually(flows, "frames go round after the last kill", 20)
    for mate in running:
        mate.kill()
        assert mate.failure() == ""
    del burst
    gc.collect()
    for _ in range(4):
        there.dequeue(1024)
        back.dequeue(1024)
    gc.collect()
    assert pool.available == pool.size


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 256])
@pytest.mark.parametrize("kills", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_kills_at_any_moment(mates: Mates, kills: int, size: int) -> None:
    kill_and_replace(mates, fewer(kills), size)


def test_what_a_dead_sender_has_sent_arrives(mates: Mates) -> None:
    pool, ring = made(256, 256, 64)
    mate = mates.start("count_up", pool, ring, first=0, n=40)
    mate.said()
    mate.kill()
    assert pool.reclaim() <= 8
    assert [number_of(bytes(m)) for m in ring.dequeue()] == list(range(40))


def test_what_lies_in_a_ring_of_the_dead_is_freed(mates: Mates) -> None:
    pool, ring = made(256, 256, 64)
    mate = mates.start("relay", pool, ring, ShmRing.create(pool, 64), seed=1)
    mate.said()
    ring.enqueue(pool.alloc_burst(20, whole(1, 60)))
    ring.close()
    gc.collect()
    mate.kill()
    assert pool.available == pool.size


# ---- processes that write anything anywhere


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_member_that_spoils_everything(mates: Mates, seed: int) -> None:
    """Frames may be lost or changed then. But nobody crashes, hangs, or loses count of its own."""
    pool = Mempool(64, 128, shared=True)
    rings = [ShmRing.create(pool, 16), ShmRing.create(pool, 16)]
    other, *ends = attached(pool, *rings)
    ends_of = [PAGE + 64 * 8 + 64 * 64, PAGE + 16 * 8, PAGE + 16 * 8]
    spoilers = [
        mates.start("spoil", pool, *rings, seed=seed + i, seconds=patient(3), ends=ends_of)
        for i in (10, 20)
    ]
    for mate in spoilers:
        mate.said()
    until = time.monotonic() + patient(3)

    def churn(mine: Mempool, both: list[ShmRing], number: int) -> int:
        choose = random.Random(number)
        rounds = 0
        while time.monotonic() < until:
            rounds += 1
            burst = Burst()
            with contextlib.suppress(PoolEmpty):
                for _ in range(4):
                    burst.append(mine.alloc(bytes(choose.choice([60, 100, 500]))))
            kept = burst[:1] if choose.random() < 0.3 else None
            both[choose.randrange(2)].enqueue(burst)
            for mbuf in both[choose.randrange(2)].dequeue(choose.randrange(1, 8)):
                assert len(bytes(mbuf)) == len(mbuf)
                with contextlib.suppress(PoolEmpty):
                    mbuf.clone()
            assert all(0 <= ring.count <= 16 for ring in both)
            assert 0 <= mine.available <= 64
            del burst, kept
            mbuf = None
        return rounds

    tasks = [Task(churn, pool, rings, 1), Task(churn, other, ends, 2)]
    assert min(task.result(patient(60)) for task in tasks) > 0
    for mate in spoilers:
        assert mate.said() == "done"
    gc.collect()
    for ring in (*rings, *ends):
        ring.close()
    for member in (pool, other):
        member.close()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, pytest.param(40, marks=pytest.mark.soak)])
def test_bytes_that_change_while_they_are_looked_at(mates: Mates, seconds: float) -> None:
    """What is inside frames is another process's to change. Whoever reads lengths there stays
    within the frames, which the build for the sanitizers sees."""
    pool = Mempool(32, 2048, shared=True)
    arena = os.fstat(pool.fd or -1).st_size - -(-(32 * (2048 + 128) + 64) // PAGE) * PAGE
    span = patient(seconds)
    scribblers = [
        mates.start("scribble", pool, seed=seed, seconds=span, first=arena) for seed in range(2)
    ]
    for mate in scribblers:
        mate.said()
    until = time.monotonic() + span
    choose = random.Random(1)
    own = Mempool(1024, 512)
    work: list[Callable[[Burst], object]] = [
        offload.parse_burst,
        offload.verify_burst,
        offload.fill_burst,
        offload.gso,
        stages.Gro(udp=True),
        stages.Gso(pool=own),
        stages.MacSwap(),
        stages.FiveTupleSwap(),
        stages.ChecksumFill(),
        stages.ChecksumVerify(drop=False),
        stages.Echo("02:00:00:00:00:01"),
        stages.Match(protocol=6, destination_port=(1, 9000), action=0),
        stages.Spread(),
        lambda burst: [offload.parse(mbuf) for mbuf in burst],
        lambda burst: [offload.verify(mbuf) for mbuf in burst],
    ]
    while time.monotonic() < until:
        train = random_train(choose, longest=8, tags=choose.random() < 0.5).bytes()
        burst = pool.alloc_burst(len(train), train)
        burst.ol_flags = choose.choice([0, MbufFlag.TX_TCP_CKSUM | MbufFlag.TX_IP_CKSUM])
        for job in choose.sample(work, 5):
            with contextlib.suppress(ValueError, PoolEmpty):
                job(burst)
        del burst
    for mate in scribblers:
        assert mate.said() == "done"
