# SPDX-License-Identifier: BSD-3-Clause
"""Resetting statistics during a burst: counts from before the reset never come back.

A worker moves single frames between two ``net_null`` queues and never takes the GIL, so a reset
nearly always falls into the middle of some counter's addition.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from support import Task

import rtap
from rtap import EthDev, Mempool, Worker

RESETS = 5000
SIZE = 100
#: During a burst, a queue's counter may be this far ahead of the worker's.
BURST = 1

BASIC = ("ipackets", "ibytes", "opackets", "obytes")
EXTENDED = tuple(
    f"{way}_q0_{name}"
    for way in ("rx", "tx")
    for name in ("size_65_to_127_packets", "unicast_packets")
)


@pytest.fixture
def dev() -> Iterator[EthDev]:
    with (
        Mempool(256) as pool,
        rtap.probe(f"net_null0,size={SIZE}") as device,
    ):
        pool.alloc_burst(256, bytes(SIZE)).free()  # a unicast destination
        device.configure(1, 1)
        device.rx_queue_setup(0, 64, pool)
        device.tx_queue_setup(0, 64)
        device.start()
        yield device


@pytest.fixture
def moving(dev: EthDev) -> Iterator[Callable[[], int]]:
    """Moves frames all the time; yields a function that counts them independently."""
    worker = Worker(wait="poll", burst=BURST)
    worker.forward((dev, 0), (dev, 0))
    with worker:
        yield lambda: worker.stats().rx_packets
    assert worker.stats().drops == 0


def basic(dev: EthDev) -> dict[str, int]:
    stats = dev.stats()
    return {name: getattr(stats, name) for name in BASIC}


def extended(dev: EthDev) -> dict[str, int]:
    xstats = dev.xstats()
    assert {name for name, n in xstats.items() if n} <= set(EXTENDED)
    return {name: xstats[name] for name in EXTENDED}


def size_of(name: str) -> int:
    return SIZE if name.endswith("bytes") else 1


@pytest.mark.parametrize("kind", ["basic", "extended"])
def test_no_more_than_was_moved_since(dev: EthDev, moving: Callable[[], int], kind: str) -> None:
    read = basic if kind == "basic" else extended
    reset = dev.stats_reset if kind == "basic" else dev.xstats_reset
    for _ in range(RESETS):
        before = moving()
        reset()
        counted = read(dev)
        most = moving() + BURST - before
        assert {name: n for name, n in counted.items() if n > most * size_of(name)} == {}
        assert {name: n for name, n in counted.items() if n < 0} == {}


def test_reset_while_another_reads(dev: EthDev, moving: Callable[[], int]) -> None:
    """A reading during a reset is from before it or after it, and never negative."""
    over = threading.Event()

    def lowest() -> int:
        least = 0
        while not over.is_set():
            least = min(least, *basic(dev).values(), *extended(dev).values())
        return least

    readers = [Task(lowest) for _ in range(2)]
    try:
        for _ in range(RESETS):
            dev.stats_reset()
            dev.xstats_reset()
    finally:
        over.set()
    assert [reader.result() for reader in readers] == [0, 0]


def test_queue_reads_without_the_device_lock(dev: EthDev, moving: Callable[[], int]) -> None:
    """The same for the queue objects, which take no lock."""
    rxq = dev.rx_queue(0)
    over = threading.Event()

    def lowest() -> int:
        least = 0
        while not over.is_set():
            least = min(least, *rxq.counters().values(), *rxq.xcounters().values())
        return least

    reader = Task(lowest)
    try:
        for _ in range(RESETS):
            rxq.reset_counters()
            rxq.reset_xcounters()
    finally:
        over.set()
    assert reader.result() == 0


def test_exact_after_the_last_reset(dev: EthDev) -> None:
    """Once frames rest, a reset gives zero and counting goes on from there."""
    worker = Worker(wait="poll", burst=BURST)
    worker.forward((dev, 0), (dev, 0))
    with worker:
        for _ in range(RESETS):
            dev.stats_reset()
            dev.xstats_reset()
    dev.stats_reset()
    dev.xstats_reset()
    assert set(basic(dev).values()) | set(extended(dev).values()) == {0}
    assert dev.tx_burst(0, dev.rx_burst(0, 7)) == 7
    assert basic(dev) == {name: 7 * size_of(name) for name in BASIC}
    assert extended(dev) == dict.fromkeys(EXTENDED, 7)
