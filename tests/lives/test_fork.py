# SPDX-License-Identifier: BSD-3-Clause
"""os.fork with open rings: the child may use nothing of the parent's, the parent goes on."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import Tap, Task, frame, links, python, skip_without_devices

import rtap
from rtap import (
    Burst,
    EthDev,
    EthEvent,
    Mempool,
    NetNS,
    Worker,
    callback_register,
)
from rtap._ring import RxQueue, TxQueue
from rtap._work import thread as work_thread
from rtap.control import channel, monitor
from rtap.ethdev import events
from rtap.ethdev.registry import _own as device_names

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


def fork() -> int:
    with warnings.catch_warnings():
        # From Python 3.12 on a fork beside other threads warns; those here are ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class Child:
    """A forked child that runs a function; it may be told to wait first."""

    def __init__(self, fn: Callable[[], object], wait: bool = False, timeout: float = 20) -> None:
        self._timeout = timeout
        self._report, report = os.pipe()
        go, self._go = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._go)
                if wait:
                    os.read(go, 1)
                faulthandler.register(signal.SIGUSR1, file=report)
                fn()
                status = 0
            except BaseException:  # noqa: BLE001 - the parent shows it
                os.write(report, traceback.format_exc().encode()[-4000:])
            finally:
                os._exit(status)
        os.close(report)
        os.close(go)

    def finish(self) -> None:
        """Lets it run, and fails with its traceback unless it ends well and in time."""
        # Not by closing: later children have this end too.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"x")
        os.close(self._go)
        deadline = time.monotonic() + self._timeout
        pid = 0
        while pid == 0 and time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0.001)
        if pid == 0:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.2)
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
        with os.fdopen(self._report, "rb") as pipe:
            report = pipe.read().decode()
        if pid == 0:
            pytest.fail(f"the child hung for {self._timeout} s:\n{report}")
        if status or report:
            pytest.fail(f"the child ended with {os.waitstatus_to_exitcode(status)}:\n{report}")


def in_child(fn: Callable[[], object], timeout: float = 20) -> None:
    Child(fn, timeout=timeout).finish()


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("tap0", netns=netns, engine=engine) as device:
        yield device


def warm_up(rx: RxQueue, tx: TxQueue, pool: Mempool, tap: Tap) -> None:
    """Enough bursts for the ring to have registered the descriptor and the arena."""
    packets = tap.packets()
    for i in range(40):
        assert tx.tx_burst(pool.alloc_burst(8, frame(i))) == 8
        assert packets.frames(8) == [frame(i)] * 8
        packets.send(frame(i))
        assert [bytes(m) for m in rx.rx_burst(8, 5)] == [frame(i)]


# ---- the child


def test_child_is_refused_by_the_queues(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    warm_up(rx, tx, pool, tap)
    burst = pool.alloc_burst(4, frame(1))
    packets = tap.packets()
    packets.send(frame(9))

    def child() -> None:
        for use in (
            rx.rx_burst,
            lambda: rx.rx_burst(8, None),
            rx.purge,
            lambda: rx.room,
            lambda: rx.resize(1522),
            lambda: rx.set_filter(True),
            lambda: tx.tx_burst(burst),
            lambda: tx.tx_burst(Burst()),
            lambda: tx.send(frame(1), pool),
        ):
            with pytest.raises(RuntimeError, match=r"fork"):
                use()
        assert len(burst) == 4

    in_child(child)
    # The frame that waited is still there, and nothing was sent.
    assert [bytes(m) for m in rx.rx_burst(8, 5)] == [frame(9)]
    assert packets.drain() == []
    assert tx.tx_burst(burst) == 4
    assert packets.drain() == [frame(1)] * 4


def test_child_is_refused_by_the_device(dev: EthDev) -> None:
    burst = dev.pool.alloc_burst(2, frame(1))

    def child() -> None:
        for use in (
            lambda: dev.rx_burst(0),
            lambda: dev.rx_burst(0, 8, None),
            lambda: dev.tx_burst(0, burst),
            lambda: dev.recv(0),
            lambda: dev.send(frame(1)),
            dev.start,
            dev.stop,
            dev.configure,
            dev.info,
            dev.link,
            dev.stats,
            dev.stats_reset,
            dev.set_link_up,
            dev.set_link_down,
            lambda: dev.mtu,
            lambda: dev.mac,
            lambda: setattr(dev, "mtu", 1400),
        ):
            with pytest.raises(RuntimeError, match=r"fork"):
                use()
        dev.close()
        dev.close()

    in_child(child)
    assert dev.tx_burst(0, burst) == 2
    assert dev.stats().opackets == 2
    assert dev.mtu == 1500


@pytest.mark.parametrize("use", ["stop", "close", "purge", "start", "delete"])
def test_child_does_not_hang_on_a_queue_that_was_in_use(tap: Tap, engine: str, use: str) -> None:
    """Its owner is a thread that does not exist in the child."""
    queues = [tap.rx(Mempool(8), engine=engine)]
    waiter = Task(queues[0].rx_burst, 8, 20)
    time.sleep(0.05)

    def child() -> None:
        with contextlib.suppress(RuntimeError):
            if use == "delete":
                queues.clear()
            else:
                getattr(queues[0], use)()

    def from_another_thread() -> None:
        # Whose number is not that of the thread that waits.
        in_child(child, 5)

    from_another_thread()
    Task(from_another_thread).result()
    tap.packets().send(frame(3))
    assert [bytes(m) for m in waiter.result()] == [frame(3)]


def test_child_does_not_hang_on_a_device_that_was_in_use(dev: EthDev, netns: NetNS) -> None:
    waiter = Task(dev.rx_burst, 0, 8, 20)
    time.sleep(0.05)
    in_child(dev.close, 5)
    Task(in_child, dev.close, 5).result()
    assert dev.state == "started"
    assert links(netns) == ["lo", "tap0"]
    dev.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        waiter.result()


def test_childs_copies_of_mbufs_are_its_own(tap: Tap, engine: str) -> None:
    """Anonymous memory is copied on write, also where the kernel has the arena pinned."""
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    warm_up(rx, tx, pool, tap)
    packets = tap.packets(rcvbuf=64 << 20)
    burst = pool.alloc_burst(32, [frame(i, 1000) for i in range(32)])

    def child() -> None:
        assert [bytes(m) for m in burst] == [frame(i, 1000) for i in range(32)]
        for mbuf in burst:
            mbuf[:] = b"\xff" * 1000
        del mbuf
        burst.free()
        everything = pool.alloc_burst(64, b"\xee" * 2048)
        assert pool.available == 0
        everything.free()

    children = [Child(child, wait=True) for _ in range(3)]
    for c in children:
        c.finish()
    assert [bytes(m) for m in burst] == [frame(i, 1000) for i in range(32)]
    assert tx.tx_burst(burst) == 32
    assert packets.drain() == [frame(i, 1000) for i in range(32)]
    assert pool.in_use == 0
    warm_up(rx, tx, pool, tap)


def test_parent_goes_on_while_the_child_lives(tap: Tap, engine: str) -> None:
    """What a fork does to pinned memory must not come between the ring and the arena."""
    pool = Mempool(256)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    warm_up(rx, tx, pool, tap)
    packets = tap.packets(rcvbuf=64 << 20)
    kept = pool.alloc_burst(32, b"\xaa" * 100)
    child = Child(lambda: kept.free(), wait=True)
    for i in range(100):
        frames = [frame(64 * i + j) for j in range(64)]
        assert tx.tx_burst(pool.alloc_burst(64, frames)) == 64
        assert packets.drain() == frames
        for f in frames:
            packets.send(f)
        assert [bytes(m) for m in rx.rx_burst(64)] == frames
    child.finish()
    assert {bytes(m) for m in kept} == {b"\xaa" * 100}


def test_child_opens_a_device_of_its_own(dev: EthDev, netns: NetNS, engine: str) -> None:
    assert dev.send(frame(1))

    def child() -> None:
        with rtap.open("tap1", netns=netns, engine=engine) as own:
            assert own.name == dev.name, "names in this process are free again"
            for i in range(40):
                assert own.tx_burst(0, own.pool.alloc_burst(64, frame(i))) == 64
                assert len(own.rx_burst(0)) == 0
            assert own.stats().opackets == 40 * 64
        assert links(netns) == ["lo", "tap0"]

    in_child(child)
    assert dev.send(frame(2))
    assert links(netns) == ["lo", "tap0"]


def test_grandchildren(dev: EthDev) -> None:
    def child() -> None:
        def grandchild() -> None:
            with pytest.raises(RuntimeError, match="fork"):
                dev.rx_burst(0)

        in_child(grandchild)
        with pytest.raises(RuntimeError, match="fork"):
            dev.rx_burst(0)

    in_child(child)
    assert len(dev.rx_burst(0)) == 0


# ---- the interface


def test_child_does_not_keep_the_interface_alive(netns: NetNS, engine: str) -> None:
    dev = rtap.open("tap0", netns=netns, engine=engine)
    with dev:
        for i in range(40):
            dev.tx_burst(0, dev.pool.alloc_burst(8, frame(i)))
            dev.rx_burst(0)
        child = Child(lambda: None, wait=True)
        assert links(netns) == ["lo", "tap0"]
        assert dev.send(frame(1))
    try:
        assert links(netns) == ["lo"]
        # and its name is free
        with rtap.open("tap0", netns=netns, engine=engine) as again:
            assert again.send(frame(2))
    finally:
        child.finish()


def test_queues_that_are_not_the_devices(tap: Tap, engine: str) -> None:
    """The child's copy of a ring holds no reference on a descriptor either."""
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    warm_up(rx, tx, pool, tap)
    go, done = os.pipe()
    report, says = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(done)
        os.close(tap.fd)
        for number in os.listdir("/proc/self/fd"):
            # Packet sockets would hold the interface too.
            with contextlib.suppress(OSError):
                if "socket:" in os.readlink(f"/proc/self/fd/{number}"):
                    os.close(int(number))
        os.write(says, b"x")
        os.read(go, 1)
        os._exit(0)
    try:
        assert os.read(report, 1) == b"x"
        tap.close()
        deadline = time.monotonic() + 1
        while tap.name in links(tap.ns):
            assert time.monotonic() < deadline, "the child keeps the interface"
    finally:
        for fd in (go, done, report, says):
            os.close(fd)
        os.waitpid(pid, 0)


def test_programs_that_are_started_inherit_nothing(netns: NetNS, engine: str) -> None:
    with rtap.open("tap0", netns=netns, engine=engine) as dev:
        for i in range(40):
            dev.tx_burst(0, dev.pool.alloc_burst(8, frame(i)))
        pool = Mempool(8, memfd=True)
        assert pool.in_use == 0
        pid = os.posix_spawn(
            sys.executable,
            [
                sys.executable,
                "-c",
                "import os\n"
                "for fd in os.listdir('/proc/self/fd'):\n"
                "    try: what = os.readlink(f'/proc/self/fd/{fd}')\n"
                "    except OSError: continue\n"
                "    if any(w in what for w in ('/net/tun', 'io_uring', 'memfd', 'eventfd')):\n"
                "        raise SystemExit(what)\n",
            ],
            os.environ,
        )
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


# ---- forks in the middle of things


def use_after_fork(dev: EthDev, worker: Worker, netns: NetNS) -> None:
    """In the child: what takes a lock."""
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
    """By another thread."""
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
    """It does not close what it has the last reference to: it is the parent's."""
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
    """A child that frees mbufs must not wait for a lock whose holder it does not have."""
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
    """Rings, their list and the pool's caches are all in use when the child is made."""
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
    """The whole interpreter is taken down in the child, with everything open in it."""
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
    """A pool of worker processes beside an open device, as data-processing code has it."""
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
