# SPDX-License-Identifier: BSD-3-Clause
"""Objects that are never closed, or closed many times, leave nothing behind."""

from __future__ import annotations

import gc
import sysconfig
import weakref
from typing import Any

import pytest
from leftovers import MB, memory
from support import (
    PacketSocket,
    Tap,
    Task,
    eventually,
    frame,
    links,
    none_left,
    open_fds,
    running_threads,
    settle,
    skip_without_engine,
    threads_end,
)

import rtap
from rtap import EthDev, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


def opened(ns: NetNS, engine: str, name: str = "tap0", **options: Any) -> EthDev:
    return rtap.open(name, netns=ns, engine=engine, **options)


# ---- never closed


def forget(held: list[Any]) -> None:
    held.clear()
    gc.collect()


@pytest.mark.parametrize("cycle", [False, True], ids=["", "in a cycle"])
def test_forgotten_device_warns_and_goes(netns: NetNS, engine: str, cycle: bool) -> None:
    dev = opened(netns, engine)
    dev.send(frame(1))
    gone = weakref.ref(dev)
    if cycle:
        loop: list[Any] = [dev]
        loop.append(loop)
        del loop
    held = [dev]
    del dev
    with pytest.warns(ResourceWarning, match=r"unclosed device"):
        forget(held)
    # It may happen on another thread, if that uses the device at this moment.
    eventually(lambda: gone() is None, "the device is collected")
    assert links(netns) == ["lo"]
    assert rtap.devices() == []


def test_forgotten_namespace_warns() -> None:
    held = [NetNS()]
    with pytest.warns(ResourceWarning, match="unclosed network namespace"):
        forget(held)


def test_forgotten_queues_let_go_of_the_descriptor(netns: NetNS, engine: str) -> None:

    pool = Mempool(64)
    for _ in range(3):
        with Tap(netns) as tap:
            rx = RxQueue(tap.fd, pool, name="tap0", engine=engine)
            tx = TxQueue(tap.fd, name="tap0", engine=engine)
            rx.start()
            tx.start()
            for _ in range(20):
                tx.tx_burst(pool.alloc_burst(4, frame(1)))
                rx.rx_burst()
            with pytest.warns(ResourceWarning, match=r"unclosed [rt]x queue 0 of tap0"):
                del rx, tx
        eventually(lambda: links(netns) == ["lo"], "the interface is gone", 1)
    pool.close()


def test_queues_in_cycles(netns: NetNS, engine: str) -> None:

    class Rx(RxQueue):
        me: Any = None

    class Tx(TxQueue):
        me: Any = None

    pool = Mempool(64)
    with Tap(netns) as tap:
        rx = Rx(tap.fd, pool, name="tap0", engine=engine)
        tx = Tx(tap.fd, name="tap0", engine=engine)
        rx.me, tx.me = tx, rx
        rx.start()
        tx.start()
        for _ in range(20):
            tx.tx_burst(pool.alloc_burst(4, frame(1)))
            rx.rx_burst()
        died = weakref.ref(rx.me)
        held = [rx, tx]
        del rx, tx
        with pytest.warns(ResourceWarning, match=r"unclosed [rt]x queue 0 of tap0"):
            forget(held)
        gc.collect()
        assert died() is None
    eventually(lambda: links(netns) == ["lo"], "the interface is gone", 1)
    pool.close()


def test_queue_that_was_never_made(netns: NetNS) -> None:
    """An __init__ that fails leaves an object that can be dropped."""

    pool = Mempool(4)
    for options in ({"nb_desc": 0}, {"engine": "x"}, {"gil": "x"}):
        for _ in range(3):
            with pytest.raises(ValueError, match="must be"):
                RxQueue(0, pool, name="x", **options)
            with pytest.raises(ValueError, match="must be"):
                TxQueue(0, name="x", **options)
    pool.close()


def test_device_that_was_never_made_leaves_nothing(netns: NetNS, engine: str) -> None:
    before = open_fds()
    for options in (
        {"data_room": 100},
        {"mtu": 70_000},
        {"nb_mbufs": 0},
        {"nb_desc": 0},
        {"gil": "never"},
        {"queues": 0},
        {"mac": "ff:ff:ff:ff:ff:ff"},
    ):
        with pytest.raises((ValueError, OSError)):
            opened(netns, engine, **options)
        assert links(netns) == ["lo"]
        assert rtap.devices() == []
    gc.collect()
    none_left(before)


# ---- nothing is left behind


def test_open_and_close_again_and_again(netns: NetNS, engine: str) -> None:
    def once() -> None:
        with opened(netns, engine) as dev:
            pool = dev.pool
            for _ in range(20):
                assert dev.tx_burst(0, pool.alloc_burst(16, frame(1))) == 16
                dev.rx_burst(0)
            assert pool.in_use == 0
        assert links(netns) == ["lo"]

    # Free-threaded Python keeps the heaps of some threads that have ended.
    for _ in range(50 if sysconfig.get_config_var("Py_GIL_DISABLED") else 10):
        once()
    gc.collect()
    before, threads, size = open_fds(), running_threads(), memory()
    for _ in range(40):
        once()
    gc.collect()
    none_left(before)
    # Forty leaked pools would take 300 MB, and forty leaked rings 10 MB.
    assert memory()[1] - size[1] < 8 * MB
    threads_end(threads)


def test_stop_and_start_again_and_again(netns: NetNS, engine: str) -> None:

    with opened(netns, engine) as dev, PacketSocket(netns, "tap0") as packets:
        pool = dev.pool
        before = open_fds()
        for i in range(100):
            dev.stop()
            with pytest.raises(RuntimeError):
                dev.rx_burst(0)
            dev.start()
            assert dev.tx_burst(0, pool.alloc_burst(4, frame(i))) == 4
            assert packets.frames(4) == [frame(i)] * 4
            packets.send(frame(i))
            assert [bytes(m) for m in dev.rx_burst(0, 8, 5)] == [frame(i)]
        none_left(before)
        assert settle(pool) == 0


def test_rings_of_ended_threads_are_used_again(netns: NetNS) -> None:
    """A ring belongs to a thread, and threads come and go."""

    skip_without_engine("uring")
    pool = Mempool(64)
    with Tap(netns) as tap:
        tx = tap.tx(engine="uring")

        def send() -> None:
            assert tx.tx_burst(pool.alloc_burst(8, frame(1))) == 8

        Task(send).result()
        Task(send).result()
        before, size = open_fds(), memory()
        for _ in range(200):
            Task(send).result()
        none_left(before, but=1)
        assert memory()[1] - size[1] < 8 * MB
