# SPDX-License-Identifier: BSD-3-Clause
"""Which object may outlive which: views, mbufs, bursts, pools, queues, devices, workers."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import (
    PacketSocket,
    Tap,
    Task,
    eventually,
    frame,
    links,
    pattern,
    settle,
    skip_without_engine,
)

import rtap
from rtap import Burst, EthDev, Mempool, NetNS

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


def opened(ns: NetNS, engine: str, name: str = "tap0", **options: Any) -> EthDev:
    return rtap.open(name, netns=ns, engine=engine, **options)


def received(dev: EthDev, ns: NetNS, n: int) -> Burst:
    """A burst of n frames that came from the kernel."""

    with PacketSocket(ns, dev.ifname) as packets:
        for i in range(n):
            packets.send(frame(i))
    burst = dev.rx_burst(0, n, 5)
    assert len(burst) == n
    return burst


# ---- objects without the device they came from


def test_received_frames_outlive_everything(netns: NetNS, engine: str) -> None:
    dev = opened(netns, engine)
    burst = received(dev, netns, 16)
    dev.close()
    del dev
    gc.collect()
    mbuf = burst[3]
    head = burst[5].data
    array = np.asarray(burst[5:6].array(60))
    assert [bytes(m) for m in burst] == [frame(i) for i in range(16)]
    del burst
    gc.collect()
    assert bytes(mbuf) == frame(3)
    assert mbuf.clone()[:] == frame(3)
    del mbuf
    assert head.tobytes() == frame(5)
    assert array[0].tobytes() == frame(5)[:60]
    array[0, :4] = 0xEE
    assert head[:4].tobytes() == b"\xee" * 4


def test_pool_of_a_closed_device(netns: NetNS, engine: str) -> None:
    dev = opened(netns, engine)
    pool = dev.pool
    burst = received(dev, netns, 4)
    view = burst[0].data
    burst.free()
    dev.close()
    assert dev.pool is pool
    with pytest.raises(BufferError):
        pool.close()
    view.release()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.alloc()


def test_frames_of_a_closed_device_are_sent_by_another(
    netns: NetNS, netns2: NetNS, engine: str
) -> None:
    first = opened(netns, engine)
    burst = received(first, netns, 32)
    first.close()
    with opened(netns2, engine) as second, PacketSocket(netns2, "tap0") as packets:
        assert second.tx_burst(0, burst) == 32
        assert packets.drain() == [frame(i) for i in range(32)]


def test_close_while_views_exist(netns: NetNS, engine: str) -> None:
    """Views may be of frames in registered buffers; the name is free at once."""
    dev = opened(netns, engine)
    views = []
    for _ in range(40):
        views.append(received(dev, netns, 4)[2].data)
    dev.close()
    assert links(netns) == ["lo"]
    with opened(netns, engine) as again:
        assert again.send(frame(1))
        assert {v.tobytes() for v in views} == {frame(2)}


def test_closed_device_says_so(netns: NetNS, engine: str) -> None:
    dev = opened(netns, engine)
    burst = dev.pool.alloc_burst(4, frame(1))
    dev.close()
    dev.close()
    for use in (
        lambda: dev.rx_burst(0),
        lambda: dev.tx_burst(0, burst),
        lambda: dev.send(frame(1)),
        lambda: dev.recv(0),
        dev.info,
        dev.start,
        dev.stats,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert len(burst) == 4


def test_close_in_the_middle_of_a_wait(netns: NetNS, engine: str) -> None:
    dev = opened(netns, engine)
    waiter = Task(dev.rx_burst, 0, 8, None)
    time.sleep(0.05)
    dev.close()
    with pytest.raises(RuntimeError, match=r"stopped|closed"):
        waiter.result(5)
    assert links(netns) == ["lo"]


def test_close_in_the_middle_of_bursts(netns: NetNS, engine: str) -> None:
    for _ in range(5):
        dev = opened(netns, engine, gil="release")
        pool = dev.pool

        def send(dev: EthDev = dev, pool: Mempool = pool) -> int:
            sent = 0
            while True:
                burst = pool.alloc_burst(512, frame(1))
                try:
                    sent += dev.tx_burst(0, burst)
                except RuntimeError:
                    assert len(burst) == 512
                    return sent

        def receive(dev: EthDev = dev) -> None:
            while True:
                try:
                    dev.rx_burst(0, 512)
                except RuntimeError:
                    return

        tasks: list[Task[Any]] = [Task(send), Task(receive)]
        time.sleep(0.02)
        dev.close()
        for task in tasks:
            task.result(10)
        assert links(netns) == ["lo"]
        assert settle(pool) == 0


def test_two_threads_close(netns: NetNS, engine: str) -> None:
    for _ in range(10):
        dev = opened(netns, engine)
        for task in [Task(dev.close) for _ in range(4)]:
            task.result(10)
        assert links(netns) == ["lo"]


# ---- workers


@pytest.mark.parametrize("wait", ["poll", "sleep", "adaptive"])
def test_device_closed_under_a_worker(netns: NetNS, netns2: NetNS, engine: str, wait: str) -> None:
    a, b = opened(netns, engine), opened(netns2, engine, "tap1")
    worker = rtap.Worker(wait=wait)
    worker.forward((a, 0), (b, 0))
    worker.start()
    started = time.monotonic()
    a.close()
    assert time.monotonic() - started < 2
    assert links(netns) == ["lo"]
    eventually(lambda: not worker.running, "a worker without a route left ends")
    worker.stop()
    worker.stop()
    # Nothing owns the other device now.
    assert b.tx_burst(0, b.pool.alloc_burst(1, frame(1))) == 1
    b.close()
    with pytest.raises(RuntimeError):
        worker.start()


def test_forgotten_worker_keeps_its_queues_alive(netns: NetNS, netns2: NetNS, engine: str) -> None:
    with opened(netns, engine) as a, opened(netns2, engine, "tap1") as b:
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0))
        worker.start()
        with pytest.warns(ResourceWarning, match="forgotten worker"):
            del worker
        gc.collect()
        with pytest.raises(RuntimeError, match="worker"):
            a.rx_burst(0)

        with PacketSocket(netns, "tap0") as source, PacketSocket(netns2, "tap1") as sink:
            for i in range(10):
                source.send(frame(i))
            assert sink.frames(10) == [frame(i) for i in range(10)]
        a.stop()
        a.start()
        assert len(a.rx_burst(0)) == 0
    assert links(netns) == links(netns2) == ["lo"]


def test_frames_in_a_workers_hands_return(netns: NetNS, netns2: NetNS, engine: str) -> None:

    with opened(netns, engine) as a, opened(netns2, engine, "tap1") as b:
        pool = a.pool
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0), on_full="retry")
        with PacketSocket(netns, "tap0", rcvbuf=64 << 20) as source:
            for _ in range(5):
                with worker:
                    for i in range(500):
                        source.send(frame(i))
                assert settle(pool) == 0
                assert not worker.running


# ---- arenas


def test_pool_of_a_dead_ring(netns: NetNS) -> None:
    """Pools that a ring registered are freed before or after the ring, in other threads too."""

    skip_without_engine("uring")
    with Tap(netns) as tap:
        packets = tap.packets(rcvbuf=64 << 20)
        tx = tap.tx(engine="uring")

        def use(pool: Mempool, data: bytes) -> None:
            for _ in range(20):
                assert tx.tx_burst(pool.alloc_burst(4, data)) == 4
            assert packets.drain() == [data] * 80

        for i in range(30):
            pool = Mempool(64, 256)
            data = frame(i, 200)
            (use if i % 2 else lambda p, d: Task(use, p, d).result())(pool, data)
            # The next arena is likely to get the same addresses.
            pool.close() if i % 3 else None
            del pool


def test_last_mbuf_is_freed_by_a_send(netns: NetNS, engine: str) -> None:
    """The arena and its registration go in the middle of a burst."""
    with Tap(netns) as tap:
        packets = tap.packets(rcvbuf=64 << 20)
        tx = tap.tx(engine=engine, gil="release")
        for i in range(20):
            pool = Mempool(64, 256)
            for _ in range(20):
                tx.tx_burst(pool.alloc_burst(2, frame(i)))
            burst = pool.alloc_burst(64, frame(100 + i))
            del pool
            gc.collect()
            assert tx.tx_burst(burst) == 64
            assert packets.drain() == [frame(i)] * 40 + [frame(100 + i)] * 64


def test_views_in_threads_that_end_late() -> None:
    """Any thread may drop the last reference."""
    data = pattern(1, 60)
    for _ in range(50):
        burst = Mempool(64).alloc_burst(64, data)
        barrier = threading.Barrier(5)

        def look(view: memoryview, barrier: threading.Barrier = barrier) -> bytes:
            barrier.wait()
            return view.tobytes()

        tasks = [Task(look, burst[i].data) for i in range(4)]
        del burst
        barrier.wait()
        assert {t.result() for t in tasks} == {data}


@pytest.mark.parametrize(
    "collect", [gc.collect, lambda: None], ids=["collected", "by counting alone"]
)
def test_cycles_of_native_objects(collect: Callable[[], object]) -> None:
    class Node:
        pass

    pool = Mempool(64)
    for _ in range(100):
        node: Any = Node()
        node.burst = pool.alloc_burst(8)
        node.view = node.burst[0].data
        node.array = np.asarray(pool.alloc_burst(1, b"x" * 60).array(60))
        node.self = node
        del node
        collect()
        if pool.available < 32:
            gc.collect()
    assert settle(pool) == 0
