# SPDX-License-Identifier: BSD-3-Clause
"""Many starts and stops of workers leave nothing behind; make soak does ten thousand."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
from leftovers import MB, memory
from support import none_left, open_fds, running_threads, threads_end

import rtap
from rtap import EthDev, Mempool, Worker

#: Two hundred leaked threads would take 1.6 GB of address space.
lives = pytest.mark.parametrize("lives", [200, pytest.param(5000, marks=pytest.mark.soak)])


@pytest.fixture
def pair() -> Iterator[tuple[EthDev, EthDev, Mempool]]:
    """Two net_null devices on one pool."""
    with (
        Mempool(512) as pool,
        rtap.probe("net_null0,size=64") as source,
        rtap.probe("net_null1") as sink,
    ):
        for dev in (source, sink):
            dev.configure(1, 1)
            dev.rx_queue_setup(0, 64, pool)
            dev.tx_queue_setup(0, 64)
            dev.start()
        yield source, sink, pool


@lives
@pytest.mark.parametrize("again", [True, False], ids=["one worker", "each time another"])
def test_many_starts_and_stops(
    pair: tuple[EthDev, EthDev, Mempool], again: bool, lives: int
) -> None:
    """One worker is started many times, or a new one each time; each moves frames."""
    source, sink, pool = pair

    def make() -> Worker:
        worker = Worker()
        worker.forward((source, 0), (sink, 0))
        return worker

    worker = make()
    for life in range(lives + 50):
        if life == 50:  # caches are filled by then
            gc.collect()
            before, threads, size = open_fds(), running_threads(), memory()
        if not again:
            worker = make()
        worker.start()
        while worker.stats().routes[0].tx_packets == 0:
            time.sleep(0)  # its thread needs the GIL once, to start
        worker.stop()
        assert not worker.running
    gc.collect()
    now = memory()
    none_left(before)
    threads_end(threads)
    assert pool.in_use == 0
    # A thread's stack is 8 MB of address space, a route's buffers some kilobytes of memory.
    assert now[0] - size[0] < 64 * MB
    assert now[1] - size[1] < 4 * MB
    stats = worker.stats().routes[0]
    assert stats.tx_packets > 0
    assert stats.drops == 0
    assert source.rx_burst(0, 8)  # the worker has released the queues
