# SPDX-License-Identifier: BSD-3-Clause
"""os.fork while other threads hold locks, use pools, burst or start workers; how children end."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from forks import in_child, warm_up
from support import Tap, Task, frame, links, python, skip_without_devices

import rtap
from rtap import EthDev, EthEvent, Mempool, NetNS, Worker, callback_register
from rtap._work import thread as work_thread
from rtap.control import channel, monitor
from rtap.ethdev import events
from rtap.ethdev.registry import _own as device_names

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


def use_after_fork(dev: EthDev, worker: Worker, netns: NetNS) -> None:
    """Makes the calls that take a lock, in the child."""
    for use in (dev.stats, dev.stop, dev.link, worker.start):
        with pytest.raises(RuntimeError, match="fork"):
            use()
    assert not worker.running
    worker.stats()
    worker.stop()
    dev.close()
    with rtap.open("t1", netns=netns) as own:
        own.callback_register(EthEvent.MTU, print)
        own.mtu = 1400
        assert own.send(frame(1))
        own.stats()


@contextlib.contextmanager
def held(lock: Any) -> Iterator[None]:
    """Another thread holds the lock."""
    taken, give = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            assert give.wait(20)

    task = Task(hold)
    assert taken.wait(5)
    try:
        yield
    finally:
        give.set()
        task.result()


@pytest.mark.parametrize(
    "what", ["device", "port numbers", "events", "watches", "sockets", "a socket"]
)
def test_fork_while_another_thread_has_a_lock(netns: NetNS, what: str) -> None:
    with rtap.open("t0", netns=netns) as dev:
        dev.callback_register(EthEvent.MTU, print)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))
        lock = {
            "device": lambda: dev._lock,
            "port numbers": lambda: device_names.lock,
            "events": lambda: events._dispatcher._lock,
            "watches": lambda: monitor._monitor._lock,
            "sockets": lambda: channel._channels.lock,
            "a socket": lambda: next(iter(channel._channels.by_netns.values()))._lock,
        }[what]()
        with held(lock):
            in_child(lambda: use_after_fork(dev, worker, netns), 5)
        assert dev.stats().opackets == 0
        assert links(netns) == ["lo", "t0"]


def test_fork_while_another_thread_starts_a_worker(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, go = threading.Event(), threading.Event()

    def slow(microseconds: int) -> int:
        starting.set()
        assert go.wait(20)
        return -1

    monkeypatch.setattr(work_thread, "limit_resume_latency", slow)
    with rtap.open("t0", netns=netns) as dev:
        worker = Worker(resume_latency=100)
        worker.forward((dev, 0), (dev, 0))
        starter = Task(worker.start)
        try:
            assert starting.wait(5)
            in_child(lambda: worker.running or worker.stats() or worker.stop(), 5)
            in_child(lambda: repr(worker), 5)
        finally:
            go.set()
            starter.result()
        assert worker.running
        worker.stop()


def test_the_child_lets_go_of_a_device_that_another_thread_uses(netns: NetNS) -> None:
    """The child has the last reference but does not close the device, which is the parent's."""
    inside, go = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        inside.set()
        assert go.wait(20)

    with rtap.open("t0", netns=netns) as kept:
        dev = rtap.open("t1", netns=netns)
        kept.callback_register(EthEvent.MTU, callback)
        handle = callback_register(EthEvent.MTU, lambda *_: None)
        kept.mtu = 1400
        assert inside.wait(5)
        dev.mtu = 1400  # the event waits for the callback, and refers to the device
        known = [dev]
        lock = dev._lock
        del dev

        def child() -> None:
            assert rtap.devices() == []
            known.clear()
            gc.collect()
            assert links(netns) == ["lo", "t0", "t1"]

        try:
            with held(lock):
                in_child(child, 5)
            known[0].set_link_down()
            known[0].close()
        finally:
            go.set()
            handle.unregister()
        assert links(netns) == ["lo", "t0"]


def test_fork_while_other_threads_use_the_pool_without_the_lock(
    netns: NetNS, netns2: NetNS, engine: str
) -> None:
    """A child that frees mbufs must not wait for a lock held by a thread that it does not have."""
    with (
        rtap.open("tap0", netns=netns, engine=engine) as a,
        rtap.open("tap1", netns=netns2, engine=engine) as b,
    ):
        worker = rtap.Worker(wait="poll")
        worker.forward((a, 0), (b, 0))
        worker.start()
        pool = a.pool
        held = pool.alloc_burst(100, frame(1))

        def child() -> None:
            held.free()
            for _ in range(3):
                pool.alloc_burst(200)
                pool.alloc(b"x" * 100).free()
            assert pool.available <= pool.size

        for _ in range(150):
            in_child(child, 5)
        assert worker.running
        worker.stop()


def test_fork_while_other_threads_burst(netns: NetNS, engine: str) -> None:
    """Rings, their list and the pool's caches are all in use at the fork."""
    stop = threading.Event()
    pool = Mempool(8192)
    taps = [Tap(netns, f"tap{i}") for i in range(3)]

    def work(tap: Tap) -> int:
        rx = tap.rx(pool, engine=engine, gil="release")
        tx = tap.tx(engine=engine, gil="release")
        done = 0
        while not stop.is_set():
            done += tx.tx_burst(pool.alloc_burst(500, frame(1)))
            rx.rx_burst(500)
        return done

    def child() -> None:
        pool.alloc_burst(100).free()
        with Tap(netns, "tap9") as own:
            tx = own.tx(engine=engine)
            assert tx.tx_burst(pool.alloc_burst(64, frame(2))) == 64

    tasks = [Task(work, tap) for tap in taps]
    try:
        for _ in range(25):
            in_child(child, 10)
    finally:
        stop.set()
        sent = [task.result() for task in tasks]
        counters = [tap.counters() for tap in taps]
        for tap in taps:
            tap.close()
    assert [c["rx_packets"] for c in counters] == sent
    assert pool.in_use == 0


def test_fork_in_a_thread(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    warm_up(rx, tx, pool, tap)

    def child() -> None:
        with pytest.raises(RuntimeError, match="fork"):
            rx.rx_burst()

    Task(in_child, child).result()
    warm_up(rx, tx, pool, tap)


def test_child_that_exits_as_usual_leaves_the_parent_alone() -> None:
    """The child shuts down the whole interpreter with everything open."""
    skip_without_devices()
    done = python(
        """
        import os, sys, threading
        import rtap
        from support import frame, links, quiet_netns

        ns = quiet_netns()
        a, b = rtap.open("tap0", netns=ns), rtap.open("tap1", netns=ns)
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0))
        worker.start()
        burst = b.pool.alloc_burst(8, frame(1))
        view = burst[0].data
        array = burst.array(60)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            print("child")
            sys.exit(7)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert worker.running
        assert links(ns) == ["lo", "tap0", "tap1"]
        assert b.mtu == 1500
        worker.stop()
        assert b.tx_burst(0, burst) == 8
        assert view.tobytes() == frame(1)
        a.close()
        b.close()
        assert links(ns) == ["lo"]
        ns.close()
        print("parent")
        """,
        warnings="ignore",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["child", "parent"]


def test_multiprocessing_by_fork(netns: NetNS, engine: str) -> None:
    """A pool of worker processes runs beside an open device, as in data-processing code."""
    skip_without_devices()
    done = python(
        """
        import multiprocessing, sys
        import rtap
        from support import frame, quiet_netns

        def work(i):
            return len(rtap.Mempool(8).alloc(bytes(i)))

        with quiet_netns() as ns, rtap.open("tap0", netns=ns, engine=sys.argv[1]) as dev:
            dev.send(frame(0))
            with multiprocessing.get_context("fork").Pool(3) as processes:
                assert processes.map(work, range(30)) == list(range(30))
                dev.send(frame(1))
            assert dev.stats().opackets == 2
        """,
        engine,
        warnings="ignore",
    )
    assert (done.returncode, done.stderr) == (0, "")
