# SPDX-License-Identifier: BSD-3-Clause
"""os.fork with open rings: the child may not use the parent's objects, and the parent goes on."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import pytest
from forks import Child, fork, in_child, warm_up
from support import Tap, Task, frame, links

import rtap
from rtap import Burst, EthDev, Mempool, NetNS

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("tap0", netns=netns, engine=engine) as device:
        yield device


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
    """The queue's owner is a thread that does not exist in the child."""
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
        # Its thread id differs from that of the waiting thread.
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
    """Anonymous memory is copied on write, even where the kernel has pinned the arena."""
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
    """A fork must not separate the ring's pinned memory from the arena."""
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
    """The child's copy of a ring does not hold a reference to a descriptor either."""
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
