# SPDX-License-Identifier: BSD-3-Clause
"""Who outlives whom: views, mbufs, bursts, pools, queues, devices, workers, the interpreter."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import (
    PacketSocket,
    Tap,
    Task,
    child_place,
    eventually,
    frame,
    links,
    none_left,
    open_fds,
    pattern,
    python,
    settle,
    skip_without_engine,
)

import rtap
from rtap import Burst, EthDev, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue

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
    """Also of frames that are in the kernel's registered buffers; the name is free at once."""
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


# ---- nobody closes


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
    # On another thread, when somebody looks at the device at that moment.
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
        del rx, tx
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
    # The other device is nobody's now.
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


# ---- nothing is left behind


def rss() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def test_open_and_close_again_and_again(netns: NetNS, engine: str) -> None:
    def once() -> None:
        with opened(netns, engine) as dev:
            pool = dev.pool
            for _ in range(20):
                assert dev.tx_burst(0, pool.alloc_burst(16, frame(1))) == 16
                dev.rx_burst(0)
            assert pool.in_use == 0
        assert links(netns) == ["lo"]

    # Without a GIL the interpreter keeps a heap for each of a number of threads that have ended.
    for _ in range(50 if sysconfig.get_config_var("Py_GIL_DISABLED") else 10):
        once()
    gc.collect()
    before, memory = open_fds(), rss()
    for _ in range(40):
        once()
    gc.collect()
    none_left(before)
    # Forty lost pools would be 300 MB, forty lost rings 10 MB.
    assert rss() - memory < 8 << 20
    assert threading.active_count() < 5


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
    """A ring belongs to a thread; threads come and go."""

    skip_without_engine("uring")
    pool = Mempool(64)
    with Tap(netns) as tap:
        tx = tap.tx(engine="uring")

        def send() -> None:
            assert tx.tx_burst(pool.alloc_burst(8, frame(1))) == 8

        Task(send).result()
        Task(send).result()
        before, memory = open_fds(), rss()
        for _ in range(200):
            Task(send).result()
        none_left(before, but=1)
        assert rss() - memory < 8 << 20


# ---- the end of the interpreter

PREPARE = """
    import gc, sys, threading, time
    import rtap
    from rtap import Burst, Mempool
    from support import PacketSocket, frame

    ns, engine = sys.argv[1], sys.argv[2]
    dev = rtap.open("tap0", netns=ns, engine=engine, gil="release")
    other = rtap.open("tap1", netns=ns, engine=engine)
    pool = dev.pool
    for i in range(40):
        assert dev.tx_burst(0, pool.alloc_burst(8, frame(i))) == 8
        dev.rx_burst(0)
"""

EXITS = {
    "devices": "",
    "bursts and views": """
        burst = pool.alloc_burst(8, frame(1))
        view, array, part = burst[0].data, burst.array(60), burst[1].append(3)
        iterator = iter(burst)
        next(iterator)
    """,
    "numpy": """
        import numpy as np
        burst = pool.alloc_burst(8, frame(1))
        array = np.asarray(burst.array(60))
        lengths = np.asarray(burst.lengths)
    """,
    "in a cycle": """
        class Holder: pass
        holder = Holder()
        holder.me = holder
        holder.everything = (dev, pool, pool.alloc_burst(4), other, pool.alloc(b"x").data)
        del dev, pool, other
    """,
    "in builtins": """
        import builtins
        builtins.kept = (dev, pool.alloc_burst(4), pool.alloc(b"x").data)
    """,
    "a waiting thread": """
        started = threading.Event()
        def wait():
            started.set()
            dev.rx_burst(0, 8, None)
        threading.Thread(target=wait, daemon=True).start()
        started.wait()
        time.sleep(0.05)
    """,
    "a bursting thread": """
        def burst():
            while True:
                dev.tx_burst(0, pool.alloc_burst(200, frame(1)))
        threading.Thread(target=burst, daemon=True).start()
        time.sleep(0.05)
    """,
    "a worker": """
        worker = rtap.Worker(wait="adaptive")
        worker.forward((dev, 0), (other, 0))
        worker.start()
        time.sleep(0.05)
    """,
    "a polling worker": """
        worker = rtap.Worker(wait="poll")
        worker.forward((dev, 0), (other, 0))
        worker.start()
        time.sleep(0.05)
    """,
    "a forgotten worker": """
        worker = rtap.Worker()
        worker.forward((dev, 0), (other, 0))
        worker.start()
        del worker, dev, other
    """,
    "a failed worker": """
        worker = rtap.Worker()
        worker.forward((dev, 0), (other, 0))
        worker.start()
        dev.close()
    """,
    "sys.exit in a thread's time": """
        threading.Thread(target=lambda: dev.rx_burst(0, 8, 0.3)).start()
        sys.exit(0)
    """,
    "a closed pool": """
        mine = Mempool(64, memfd=True)
        dev.tx_burst(0, mine.alloc_burst(8, frame(1)))
        mine.close()
    """,
    "an unraised error": """
        try:
            dev.rx_burst(99)
        except ValueError as exc:
            error = exc
    """,
}


@pytest.mark.parametrize("what", EXITS.values(), ids=EXITS.keys())
def test_exit_with_everything_open(netns: NetNS, engine: str, what: str) -> None:
    code = textwrap.dedent(PREPARE) + textwrap.dedent(what)
    done = python(code, netns.path, engine, warnings="default")
    stderr = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    stderr = [line for line in stderr if not line.startswith("  ")]
    assert (done.returncode, stderr) == (0, [])
    eventually(lambda: links(netns) == ["lo"], "the interfaces are gone")


def test_exit_says_what_was_left_open(netns: NetNS) -> None:
    done = python(textwrap.dedent(PREPARE), netns.path, "syscall", warnings="always")
    assert done.returncode == 0
    assert done.stderr.count("ResourceWarning: unclosed device") == 2


def test_uncaught_error_is_the_only_output(netns: NetNS, engine: str) -> None:
    done = python(
        textwrap.dedent(PREPARE) + "raise SystemExit('the end')",
        netns.path,
        engine,
        warnings="ignore",
    )
    assert (done.returncode, done.stderr) == (1, "the end\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_process_leaves_a_name_that_can_be_used(
    netns: NetNS, engine: str, number: signal.Signals
) -> None:
    """Also while the kernel is still taking the dead process's ring down."""
    code = textwrap.dedent(PREPARE) + "print('ready', flush=True)\ndev.rx_burst(0, 8, None)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code, netns.path, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **child_place(),
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        child.wait(20)
        with opened(netns, engine) as dev, opened(netns, engine, "tap1") as other:
            assert dev.send(frame(1))
            assert other.send(frame(2))
    assert child.returncode == -number


# ---- arenas


def test_pool_of_a_dead_ring(netns: NetNS) -> None:
    """Pools that a ring had registered go before the ring and after it, in other threads too."""

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
    """An arena that goes away in the middle of a burst, together with its registration."""
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
    """The last reference is dropped by whoever is last, in any thread."""
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


def test_environment_is_the_one_under_test() -> None:
    """The children above have to import the build that this process tests."""
    done = python("import rtap, os; print(os.path.dirname(rtap.__file__))")
    assert done.stdout.strip() == os.path.dirname(rtap.__file__)
