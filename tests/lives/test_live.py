# SPDX-License-Identifier: BSD-3-Clause
"""Counters of native objects, which only the checked build has.

There, live_objects.py checks what each test leaves behind.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import Tap, Task, eventually, frame, skip_without_engine

import rtap
from rtap import Burst, Mempool, offload, stages
from rtap._core import live

pytestmark = [pytest.mark.root, pytest.mark.lifetime]

BUILD = Path(os.environ.get("RTAP_TEST_BUILD") or "release").name
COUNTED = BUILD in ("debug", "sanitize")


@contextmanager
def one_time(**expected: int) -> Iterator[None]:
    """Inside, exactly so many more objects of each kind exist; afterwards none do."""
    gc.collect()
    before = live.counts()
    yield
    after = live.counts()
    more = {kind: n - before[kind] for kind, n in after.items() if n != before[kind]}
    named = {kind.replace("_", " "): n for kind, n in expected.items()}
    assert more == (named if COUNTED else {})


def test_counted_on_the_checked_build_alone() -> None:
    assert bool(live.counts()) == COUNTED
    assert set(live.counts().values()) <= set(range(1 << 20))


def test_pools_and_buffers() -> None:
    with one_time(pools=1, arenas=1):
        pool = Mempool(64, 256)
    with one_time(mbufs=9):
        burst = pool.alloc_burst(8)
        mbuf = pool.alloc(b"x" * 60)
    with one_time(mbufs=1):
        clone = mbuf.clone()
    with one_time(mbufs=3):
        chain = pool.alloc(b"x" * 600)
    with one_time(mbufs=-13):
        burst.free()
        del mbuf, clone, chain
    with one_time(arenas=-1):
        pool.close()
    with one_time(pools=-1):
        del pool


def test_a_view_keeps_the_arena() -> None:
    with one_time(pools=1, arenas=1, mbufs=1):
        view = Mempool(64, memfd=True).alloc(b"x" * 60).data
    with one_time(pools=-1, arenas=-1, mbufs=-1):
        view.release()
        del view


def test_a_pool_that_cannot_be_made() -> None:
    with one_time(), pytest.raises(MemoryError):
        Mempool(1 << 24, 1 << 24)


def test_queues(tap: Tap) -> None:
    pool, pieces = Mempool(64), Mempool(64)
    with one_time(rx_queues=1, pool_users=2, splitters=1):
        rx = tap.rx(pool, split=pieces, engine="syscall")
    with one_time(tx_queues=1, mergers=1, gro_tables=1):
        tx = tap.tx(gro=True, engine="syscall")
    with one_time(pool_users=-2):
        rx.close()
        tx.close()
    tap.close()
    with one_time(rx_queues=-1, tx_queues=-1, splitters=-1, mergers=-1, gro_tables=-1):
        del rx, tx
        gc.collect()


def test_what_a_ring_keeps(tap: Tap) -> None:
    skip_without_engine("uring")
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine="uring"), tap.tx(engine="uring")
    rx.rx_burst()  # this thread has a ring
    with one_time(descriptors_in_rings=1, arenas_in_rings=1):
        for i in range(40):
            tx.tx_burst(pool.alloc_burst(2, frame(i)))
    with one_time(descriptors_in_rings=-1):
        tx.close()
    with one_time(descriptors_in_rings=-1, pool_users=-1):
        rx.close()
    with one_time(arenas_in_rings=-1, arenas=-1):
        pool.close()


def test_threads_with_a_ring(tap: Tap) -> None:
    skip_without_engine("uring")
    pool = Mempool(64)
    tx = tap.tx(engine="uring")
    before = live.counts()
    seen: list[dict[str, int]] = []

    def send() -> None:
        tx.tx_burst(pool.alloc_burst(2, frame()))
        seen.append(live.counts())

    Task(send).result()
    if COUNTED:
        name = "threads with a ring"
        assert seen[0][name] == before[name] + 1
        eventually(lambda: live.counts()[name] == before[name], "the thread's ring is nobody's")


def test_stages() -> None:
    pool = Mempool(64)
    with one_time():
        stages.Gro()(Burst([pool.alloc(frame(i)) for i in range(3)]))
    with one_time(gro_tables=1):
        table = offload.Gro()
    with one_time(mbufs=3):
        burst = Burst([pool.alloc(frame(i)) for i in range(3)])
        table.coalesce(burst).free()
        burst = Burst([pool.alloc(frame(i)) for i in range(3)])
    del table, burst


def test_a_worker() -> None:
    def null(n: int) -> rtap.EthDev:
        dev = rtap.probe(f"net_null{n}")
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, Mempool(512))
        dev.tx_queue_setup(0, 64)
        dev.start()
        return dev

    with null(1) as a, null(2) as b:
        with one_time(workers=1):
            worker = rtap.Worker()
        worker.forward((a, 0), (b, 0), stages=[stages.MacSwap()])
        a.rx_burst(0).free()
        before = live.counts()
        with worker:
            now = live.counts()
        if COUNTED:
            assert now["worker threads"] == before["worker threads"] + 1
            assert now["stage rooms"] == before["stage rooms"] + 1
            assert live.counts()["worker threads"] == before["worker threads"]
        with one_time(workers=-1, stage_rooms=-1):
            del worker
