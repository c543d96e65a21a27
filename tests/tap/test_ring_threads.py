# SPDX-License-Identifier: BSD-3-Clause
"""Queues and threads: waiting, ending a wait, one thread at a time."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from rings import BIG, receive, send_all
from support import Tap, Task, child_place, eventually, frame, links, seq_of

from rtap import Burst, DeviceStateError, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue

pytestmark = pytest.mark.root


# ---- waiting


@pytest.mark.parametrize("timeout", [0, 0.0, 1e-9, 0.05, 0.25])
def test_timeout_is_honoured(tap: Tap, engine: str, timeout: float) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    took = []
    for _ in range(3):
        before = time.monotonic()
        assert len(rx.rx_burst(8, timeout)) == 0
        took.append(time.monotonic() - before)
    assert min(took) >= timeout
    assert min(took) < timeout + 0.05


def test_frame_that_is_there_ends_the_wait_at_once(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    tap.packets().send(frame(3))
    for timeout in (None, 30):
        before = time.monotonic()
        if timeout:
            tap.packets().send(frame(3))
        assert [bytes(m) for m in rx.rx_burst(8, timeout)] == [frame(3)]
        assert time.monotonic() - before < 1


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_frame_that_arrives_ends_the_wait(tap: Tap, engine: str, timeout: float | None) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    packets = tap.packets()
    late = []
    for i in range(5):
        sent_at: list[float] = []

        def send(i: int = i, sent_at: list[float] = sent_at) -> None:
            sent_at.append(time.monotonic())
            packets.send(frame(i))

        timer = threading.Timer(0.03, send)
        timer.start()
        assert [bytes(m) for m in rx.rx_burst(8, timeout)] == [frame(i)]
        late.append(time.monotonic() - sent_at[0])
        timer.join()
    assert min(late) < 0.02


def test_waiting_lets_other_threads_run(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine, gil="hold")
    count = 0
    stop = threading.Event()

    def spin() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=spin)
    thread.start()
    before = count
    assert len(rx.rx_burst(8, 0.3)) == 0
    ran = count - before
    stop.set()
    thread.join()
    assert ran > 1000


def test_ctrl_c_ends_a_wait_within_100_ms(tap: Tap, engine: str) -> None:
    code = """
        import sys, time
        from support import Tap, quiet_netns
        from rtap import Mempool

        with quiet_netns() as ns, Tap(ns) as tap:
            rx = tap.rx(Mempool(8), engine=sys.argv[1])
            for timeout in (None, 60, None, 60, None):
                print("ready", flush=True)
                try:
                    rx.rx_burst(8, timeout)
                except KeyboardInterrupt:
                    print(time.monotonic(), flush=True)
            assert len(rx.rx_burst()) == 0   # the queue is free again
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), engine],
        stdout=subprocess.PIPE,
        text=True,
        **child_place(),
    )
    took = []
    with child:
        assert child.stdout is not None
        try:
            for _ in range(5):
                assert child.stdout.readline() == "ready\n"
                eventually(lambda: asleep(child.pid), "the child waits")
                before = time.monotonic()
                child.send_signal(signal.SIGINT)
                took.append(float(child.stdout.readline()) - before)
            assert child.wait(20) == 0
        finally:
            child.kill()
    assert sorted(took)[2] < 0.1, took


def asleep(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] == "S"


# ---- one thread at a time


def test_second_thread_is_refused_while_the_first_waits(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    packets = tap.packets()

    def wait() -> list[bytes]:
        while True:
            with contextlib.suppress(RuntimeError):  # the other one was looking
                return receive(rx, 1, 64, 20)

    waiter = Task(wait)
    try:

        def refused() -> bool:
            try:
                rx.rx_burst()
            except RuntimeError:
                return True
            return False

        eventually(refused, "the waiting thread owns the queue")
        for use in (rx.rx_burst, rx.purge):
            with pytest.raises(RuntimeError, match="another thread"):
                use()
    finally:
        packets.send(frame(4))
    assert waiter.result() == [frame(4)]
    packets.send(frame(5))
    assert receive(rx, 1) == [frame(5)], "the queue is free again"


def test_threads_that_share_queues_get_errors_not_corruption(netns: NetNS, engine: str) -> None:
    """Bursts are either whole or refused, whichever thread calls."""
    pool = Mempool(4096, 256)
    with Tap(netns, "tap0") as a:
        packets = a.packets(rcvbuf=BIG)
        tx = a.tx(engine=engine, gil="release")
        refused = [0] * 4
        sent: list[set[int]] = [set() for _ in range(4)]

        def work(me: int) -> None:
            for i in range(150):
                first = (me * 150 + i) * 20
                numbers = range(first, first + 20)
                burst = pool.alloc_burst(20, [frame(n) for n in numbers])
                done = 0
                while not done:
                    try:
                        done = tx.tx_burst(burst)
                    except RuntimeError:
                        refused[me] += 1
                        assert len(burst) == 20
                        time.sleep(0)
                assert done == 20
                sent[me].update(numbers)

        for task in [Task(work, i) for i in range(4)]:
            task.result()
        got = packets.drain()
        assert {seq_of(f) for f in got} == set().union(*sent)
        assert len(got) == 4 * 150 * 20 == tx.counters()["packets"]
        assert all(f == frame(seq_of(f)) for f in got)
        # A burst has no frames of another one mixed in.
        numbers = [seq_of(f) for f in got]
        assert all(numbers[i + 1] - numbers[i] == 1 for i in range(len(numbers)) if i % 20 != 19)
    assert pool.in_use == 0


def test_burst_that_is_being_sent_is_nobody_elses(tap: Tap, engine: str) -> None:
    """Another thread sees a burst that is being sent as empty, and may add to it."""
    pool = Mempool(8192, 128)
    tx = tap.tx(engine=engine, gil="release")
    looked: list[int] = []
    stop = threading.Event()
    burst = Burst()

    def look() -> None:
        while not stop.is_set():
            looked.append(len([bytes(m) for m in burst]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            burst.extend(pool.alloc_burst(4096, frame(1)))
            assert tx.tx_burst(burst) == 4096
            assert len(burst) == 0
    finally:
        stop.set()
        thread.join()
    assert len(looked) > 0
    assert pool.in_use == 0


def test_a_queue_may_change_threads(tap: Tap, engine: str) -> None:
    pool = Mempool(512)
    packets = tap.packets(rcvbuf=BIG)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)

    def once(i: int) -> None:
        for _ in range(3):
            assert tx.tx_burst(pool.alloc_burst(32, frame(i))) == 32
            assert packets.frames(32) == [frame(i)] * 32
            for j in range(32):
                packets.send(frame(i + j))
            assert receive(rx, 32) == [frame(i + j) for j in range(32)]

    for i in range(30):
        Task(once, i).result()
        once(1000 + i)
    assert pool.in_use == 0


def test_threads_with_queues_of_their_own(netns: NetNS, engine: str) -> None:
    pool = Mempool(4096)
    taps = [Tap(netns, f"tap{i}") for i in range(12)]

    def work(tap: Tap, me: int) -> None:
        packets = tap.packets(rcvbuf=BIG)
        rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine, gil="release")
        for i in range(40):
            frames = [frame(me << 20 | i << 8 | j) for j in range(30)]
            send_all(tx, pool.alloc_burst(30, frames))
            assert packets.frames(30) == frames
            for f in frames:
                packets.send(f)
            assert receive(rx, 30) == frames

    try:
        for task in [Task(work, tap, i) for i, tap in enumerate(taps)]:
            task.result()
    finally:
        for tap in taps:
            tap.close()
    assert pool.in_use == 0
    assert links(netns) == ["lo"]


def test_more_queues_than_a_ring_has_places_for(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    packets = tap.packets(rcvbuf=BIG)
    queues = [TxQueue(tap.fd, name=tap.name, engine=engine) for _ in range(300)]
    for rounds in range(2):
        for i, tx in enumerate(queues):
            tx.start()
            assert tx.tx_burst(pool.alloc_burst(1, frame(i))) == 1
        assert packets.drain() == [frame(i) for i in range(300)]
        if not rounds:
            for tx in queues[::2]:
                tx.close()
            queues = [
                TxQueue(tap.fd, name=tap.name, engine=engine) if i % 2 == 0 else tx
                for i, tx in enumerate(queues)
            ]
    for tx in queues:
        tx.close()


def test_a_pool_stays_while_a_burst_reads_into_it(tap: Tap, engine: str) -> None:
    """A new pool serves the next burst; the pool that the waiting burst reads into stays."""
    old, new, newer = Mempool(64), Mempool(64, 4096), Mempool(64, 4096)
    rx = tap.rx(old, engine=engine)

    def wait() -> Burst:
        while True:
            with contextlib.suppress(DeviceStateError):  # the other thread is looking
                return rx.rx_burst(8, 30)

    waiter = Task(wait)
    eventually(lambda: is_in_use(rx), "a thread waits in the queue")
    rx.resize(4000, new)
    rx.resize(4000, newer)
    for pool in (old, new, newer):
        with pytest.raises(BufferError, match="1 rx queues or stages"):
            pool.close()
    tap.packets().send(frame(1))
    got = waiter.result()
    assert [bytes(m) for m in got] == [frame(1)]
    assert newer.in_use == 1
    rx.resize(4000)  # nobody bursts: the others can go
    old.close()
    new.close()
    with pytest.raises(BufferError):
        newer.close()
    got.free()
    rx.close()
    newer.close()


def is_in_use(rx: RxQueue) -> bool:
    try:
        rx.rx_burst(1)
    except DeviceStateError as exc:
        return "in use by another thread" in str(exc)
    return False
