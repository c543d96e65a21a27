# SPDX-License-Identifier: BSD-3-Clause
"""Queues, devices, callbacks and workers shared between threads: nothing is lost or counted twice.

test_freethreading.py does the same for pools, bursts and mbufs.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import pytest
from support import eventually, settle
from together import THREADS, empty_after, in_threads, may_raise, together, tolerant

import rtap
from rtap import Burst, DeviceStateError, EthEvent, Mempool, NetNS, Worker
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap.offload import Gro

pytestmark = pytest.mark.thread_unsafe(reason="makes its own threads")


@pytest.fixture
def pool() -> Iterator[Mempool]:
    yield from empty_after()


# ---- queues


def test_a_queue_has_one_owner_at_a_time(pool: Mempool) -> None:
    """A second thread gets an error, and every frame goes to exactly one thread."""
    rx = NullRxQueue(pool, name="null", gil="release")
    tx = NullTxQueue("null", gil="release")
    rx.start()
    tx.start()

    def job(me: int) -> tuple[int, int]:
        received = sent = 0
        for _ in range(2000):
            burst = Burst()
            with may_raise(DeviceStateError, says="in use by another thread"):
                burst = rx.rx_burst(16)
            received += len(burst)
            while len(burst):
                try:
                    sent += tx.tx_burst(burst)
                except DeviceStateError:
                    burst.free()
        return received, sent

    results = in_threads(job)
    assert sum(received for received, _ in results) == rx.counters()["packets"] > 0
    assert sum(sent for _, sent in results) == tx.counters()["packets"] > 0
    rx.close()
    tx.close()


def test_started_stopped_and_closed_by_everybody() -> None:
    def job(me: int) -> None:
        rng = random.Random(me)
        for rx in queues:
            for _ in range(4):
                step = rng.choice([rx.start, rx.stop, lambda rx=rx: rx.rx_burst(4)])
                with contextlib.suppress(DeviceStateError):
                    step()
            rx.close()
            with pytest.raises(DeviceStateError, match="closed"):
                rx.start()

    pool = Mempool(256, 64)
    queues = [NullRxQueue(pool, name="null") for _ in range(200)]
    in_threads(job, 4)
    assert settle(pool) == 0
    pool.close()  # each queue has released it exactly once


def test_counters_while_everybody_resets(pool: Mempool) -> None:
    rx = NullRxQueue(pool, name="null")
    rx.start()
    done = threading.Event()

    def burst() -> None:
        for _ in range(3000):
            rx.rx_burst(8)
        done.set()

    def look() -> None:
        while not done.is_set():
            for counters in (rx.counters(), rx.xcounters()):
                assert min(counters.values()) >= 0
            rx.reset_counters()
            rx.reset_xcounters()
            rx.name = "other"
            assert "rx queue 0 of" in repr(rx)

    together(burst, look, look)
    rx.close()


def test_a_gro_has_one_user_at_a_time(pool: Mempool) -> None:
    gro = Gro()

    def job(me: int) -> None:
        came = 0
        for _ in range(500):
            burst = pool.alloc_burst(8, b"\0" * 60)
            with may_raise(RuntimeError, says="another thread"):
                came += len(gro.coalesce(burst))
            came += len(burst)  # where it was refused
        assert came == 500 * 8

    in_threads(job, 4)
    gro.flush()


# ---- devices


def test_devices_come_and_go() -> None:
    pool = Mempool(4096, 256)

    def job(me: int) -> None:
        for i in range(40):
            name = f"net_null{(me + i) % 4}"
            with may_raise(ValueError, says="already"), rtap.probe(name) as dev:
                dev.configure(2, 2)
                for q in range(2):
                    dev.rx_queue_setup(q, 32, pool)
                    dev.tx_queue_setup(q, 32)
                dev.start()
                assert rtap.device(name) is dev
                assert dev.tx_burst(1, dev.rx_burst(0, 8)) == 8
                assert dev in rtap.devices()
                dev.stop()

    in_threads(job)
    assert rtap.devices() == []
    assert settle(pool) == 0
    pool.close()


def test_one_device_and_everybody(pool: Mempool) -> None:
    """Threads make control calls, read statistics and burst, until one closes the device."""
    dev = rtap.probe("net_null0")
    dev.configure(THREADS, THREADS)
    for q in range(THREADS):
        dev.rx_queue_setup(q, 32, pool)
        dev.tx_queue_setup(q, 32)
    dev.start()

    def job(me: int) -> int:
        rng = random.Random(me)
        moved = 0
        for i in range(600):
            try:
                moved += dev.tx_burst(me, dev.rx_burst(me, 8))
                step = rng.randrange(8)
                if step == 0:
                    dev.stats()
                elif step == 1:
                    dev.xstats()
                elif step == 2:
                    dev.stats_reset()
                elif step == 3:
                    assert dev.pool is pool
                elif step == 4:
                    dev.stop()
                elif step == 5:
                    repr(dev)
                elif step == 6:
                    dev.rx_queue_stop(me)
                    dev.rx_queue_start(me)
                elif i > 500 and me == 0:
                    dev.close()
                dev.start()
            except DeviceStateError:
                tolerant(dev.start, DeviceStateError)
        return moved

    assert sum(in_threads(job)) > 0
    dev.close()


@pytest.mark.root
def test_interfaces_come_and_go(netns: NetNS, engine: str) -> None:
    def job(me: int) -> None:
        for i in range(8):
            with rtap.open(f"t{me}", netns=netns, engine=engine, nb_mbufs=64) as dev:
                assert dev.send(bytes(60))
                dev.rx_burst(0, 8)
                dev.mtu = 1400 + i
                assert dev.mtu == 1400 + i
                assert dev.stats().opackets == 1

    in_threads(job, 4)


@pytest.mark.root
def test_queues_of_one_interface(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, queues=4, engine=engine) as dev:

        def job(me: int) -> int:
            burst = Burst()
            for _ in range(300):
                burst.extend(dev.pool.alloc_burst(8, bytes([2, 0, 0, 0, 0, me]) * 10))
                while len(burst):
                    dev.tx_burst(me, burst)
                dev.rx_burst(me, 8)
            return 300 * 8

        assert sum(in_threads(job, 4)) == dev.stats().opackets
        assert dev.stats().q_opackets == [2400] * 4


# ---- events and workers


def test_callbacks_come_and_go() -> None:
    heard = []

    def job(me: int) -> None:
        for _ in range(60):
            mine = rtap.callback_register(EthEvent.NEW, lambda dev, event, data: heard.append(me))
            with rtap.probe(f"net_null{me}") as dev:
                own = dev.callback_register(EthEvent.DESTROY, lambda *args: heard.append(args))
                dev.configure()
                if me % 2:
                    own.unregister()
            mine.unregister()

    in_threads(job, 4)
    eventually(
        lambda: not any(t.name == "rtap-events" for t in threading.enumerate()),
        "the end of the events thread",
    )
    assert len(heard) > 0


def test_a_worker_that_everybody_starts_and_stops(pool: Mempool) -> None:
    with rtap.probe("net_null0") as dev:
        dev.configure()
        dev.rx_queue_setup(0, 32, pool)
        dev.tx_queue_setup(0, 32)
        dev.start()
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))

        def job(me: int) -> None:
            for _ in range(60):
                with contextlib.suppress(DeviceStateError):
                    worker.start()
                worker.stats()
                repr(worker)
                assert worker.running in (True, False)
                worker.stop()

        in_threads(job, 4)
        worker.stop()
        assert not worker.running
        assert dev.tx_burst(0, dev.rx_burst(0, 4)) == 4  # the queues have no owner
