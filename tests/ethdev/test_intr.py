# SPDX-License-Identifier: BSD-3-Clause
"""Receive interrupts: each queue has a descriptor that signals exactly while frames wait."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable, Iterator

import pytest
from flows import flow
from support import PacketSocket, Task, eventually, frame, ip, none_left, open_fds, opened_since

import rtap
from rtap import DeviceGone, DeviceStateError, EthDev, Mempool, NetNS


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine) as device:
        yield device


@pytest.fixture
def peer(netns: NetNS, dev: EthDev) -> Iterator[PacketSocket]:
    with PacketSocket(netns, "t0") as packets:
        yield packets


def with_select(fd: int, timeout: float) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


def with_poll(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def with_epoll(fd: int, timeout: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return bool(epoll.poll(timeout))


def with_asyncio(fd: int, timeout: float) -> bool:
    async def wait() -> bool:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            await asyncio.wait_for(ready.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        finally:
            loop.remove_reader(fd)
        return True

    return asyncio.run(wait())


WAYS = [with_select, with_poll, with_epoll, with_asyncio]
signals = with_select


@pytest.mark.parametrize("wait", WAYS)
def test_signals_while_frames_wait(
    dev: EthDev, peer: PacketSocket, wait: Callable[[int, float], bool]
) -> None:
    fd = dev.rx_queue_intr_fd(0)
    assert dev.rx_queue_intr_fd(0) == fd
    dev.rx_queue_intr_enable(0)
    assert not wait(fd, 0.02)
    woken = Task(wait, fd, 5)
    time.sleep(0.05)
    peer.send(frame(1))
    assert woken.result()
    # It signals until the queue is empty, however often it is polled.
    assert with_select(fd, 0)
    assert with_select(fd, 0)
    peer.send(frame(2))
    assert [bytes(m) for m in dev.rx_burst(0, 1)] == [frame(1)]
    assert wait(fd, 0.02)
    assert [bytes(m) for m in dev.rx_burst(0)] == [frame(2)]
    assert not wait(fd, 0.02)


def test_no_lost_wake_up(dev: EthDev, peer: PacketSocket) -> None:
    """Frames that wait before the interrupt is enabled signal at once."""
    fd = dev.rx_queue_intr_fd(0)
    peer.send(frame(1))
    assert not signals(fd, 0.05)
    dev.rx_queue_intr_enable(0)
    assert signals(fd, 0)
    dev.rx_queue_intr_disable(0)
    assert not signals(fd, 0.05)
    dev.rx_queue_intr_enable(0)
    assert signals(fd, 0)
    assert [bytes(m) for m in dev.rx_burst(0)] == [frame(1)]
    assert not signals(fd, 0)


def test_no_signal_while_disabled(dev: EthDev, peer: PacketSocket) -> None:
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    dev.rx_queue_intr_enable(0)
    dev.rx_queue_intr_disable(0)
    dev.rx_queue_intr_disable(0)
    woken = Task(signals, fd, 0.2)
    peer.send(frame(1))
    assert woken.result() is False
    assert len(dev.rx_burst(0)) == 1


def test_many_rounds_with_disabling(dev: EthDev, peer: PacketSocket) -> None:
    """As in DPDK's l3fwd-power: sleep while enabled, poll while disabled, and miss no frame."""
    n = 2000
    fd = dev.rx_queue_intr_fd(0)

    def send() -> None:
        for i in range(n):
            peer.send(frame(i))
            if i % 7 == 0:
                time.sleep(0.0002)

    sender = Task(send)
    got: list[bytes] = []
    while len(got) < n:
        dev.rx_queue_intr_enable(0)
        assert signals(fd, 5), f"no wake-up after {len(got)} frames"
        dev.rx_queue_intr_disable(0)
        while burst := dev.rx_burst(0, 16):
            got += map(bytes, burst)
    sender.result()
    assert got == [frame(i) for i in range(n)]


def test_our_own_sends_do_not_signal(dev: EthDev) -> None:
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    assert dev.send(frame(1))
    assert not signals(fd, 0.05)


def test_each_queue_has_its_own(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=4) as dev:
        numbers = [dev.rx_queue_intr_fd(q) for q in range(4)]
        assert len(set(numbers)) == 4
        for q in range(4):
            dev.rx_queue_intr_enable(q)
        with PacketSocket(netns, "t0", 0x0800) as peer:
            for n in range(64):
                peer.send(flow(n))
                ready = select.select(numbers, [], [], 5)[0]
                assert len(ready) == 1
                burst = dev.rx_burst(numbers.index(ready[0]))
                assert [bytes(m) for m in burst] == [flow(n)]
        assert all(dev.stats().q_ipackets)


def test_beside_a_waiting_burst(dev: EthDev, peer: PacketSocket) -> None:
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    for n in range(20):
        burst = Task(lambda: [bytes(m) for m in dev.rx_burst(0, 64, 5)])
        peer.send(frame(n))
        assert burst.result() == [frame(n)]
        assert not signals(fd, 0)


def test_beside_a_worker(netns: NetNS, netns2: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine) as a,
        rtap.open("t1", netns=netns2, engine=engine) as b,
        PacketSocket(netns, "t0") as peer,
        PacketSocket(netns2, "t1") as far,
    ):
        fd = a.rx_queue_intr_fd(0)
        a.rx_queue_intr_enable(0)
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0))
        with worker:
            for n in range(100):
                peer.send(frame(n))
            assert far.frames(100) == [frame(n) for n in range(100)]
        eventually(lambda: not signals(fd, 0), "the worker leaves nothing")
        peer.send(frame(100))
        assert signals(fd, 1)
        assert [bytes(m) for m in a.rx_burst(0)] == [frame(100)]


def test_stop_and_start(dev: EthDev, peer: PacketSocket) -> None:
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    for n in range(3):
        peer.send(frame(n))
        assert signals(fd, 1)
        dev.stop()
        # No call could receive the frame.
        assert not signals(fd, 0.02)
        dev.start()
        assert dev.rx_queue_intr_fd(0) == fd
        assert not signals(fd, 0.02)
        peer.send(frame(100 + n))
        assert signals(fd, 1)
        assert [bytes(m) for m in dev.rx_burst(0)] == [frame(100 + n)]
    dev.stop()
    dev.rx_queue_intr_disable(0)
    dev.start()
    peer.send(frame(1))
    assert not signals(fd, 0.05)


def test_enabled_while_stopped(dev: EthDev, peer: PacketSocket) -> None:
    dev.stop()
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    dev.start()
    peer.send(frame(1))
    assert signals(fd, 1)


def test_with_a_stopped_queue(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        fd = dev.rx_queue_intr_fd(1)
        dev.rx_queue_intr_enable(1)
        dev.rx_queue_stop(1)
        dev.rx_queue_stop(0)
        dev.rx_queue_start(1)
        with PacketSocket(netns, "t0") as peer:
            peer.send(frame(1))
            assert signals(fd, 1)
            assert [bytes(m) for m in dev.rx_burst(1)] == [frame(1)]


def test_deleted_interface(netns: NetNS, dev: EthDev) -> None:
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    ip(netns, "link", "del", "t0")
    assert signals(fd, 5)
    with pytest.raises(DeviceGone):
        dev.rx_burst(0)
    dev.rx_queue_intr_disable(0)
    assert not signals(fd, 0)


def test_descriptor_closes_with_its_queue(netns: NetNS, engine: str) -> None:
    dev = rtap.open("t0", netns=netns, engine=engine, queues=2)
    dev.send(frame(0))
    before = open_fds()
    for _ in range(3):
        fd = dev.rx_queue_intr_fd(0)
        dev.rx_queue_intr_enable(0)
        assert len(opened_since(before)) == 1
        dev.rx_queue_stop(0)
        dev.rx_queue_release(0)
        none_left(before)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        dev.rx_queue_setup(0, 64, dev.pool)
        dev.rx_queue_start(0)
    dev.rx_queue_intr_enable(1)
    dev.stop()
    assert len(opened_since(before)) == 1
    dev.configure(1, 1)
    assert before.keys() - open_fds().keys()
    pool = Mempool(64)
    dev.rx_queue_setup(0, 64, pool)
    fd = dev.rx_queue_intr_fd(0)
    dev.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_child_does_not_disturb_the_parent(dev: EthDev, peer: PacketSocket) -> None:
    fd = dev.rx_queue_intr_fd(0)
    dev.rx_queue_intr_enable(0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dev.rx_queue_intr_disable(0)
        except DeviceStateError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    peer.send(frame(1))
    assert signals(fd, 1)


def test_wrong_states(netns: NetNS, engine: str) -> None:
    with Mempool(64) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        calls = (dev.rx_queue_intr_fd, dev.rx_queue_intr_enable, dev.rx_queue_intr_disable)
        for call in calls:
            with pytest.raises(DeviceStateError, match="unconfigured"):
                call(0)
        dev.configure(2, 2, rtap.EthConf(engine=engine))
        for call in calls:
            with pytest.raises(DeviceStateError, match=r"queue 0 .*not set up"):
                call(0)
        dev.rx_queue_setup(0, 64, pool)
        for call in calls:
            call(0)
            with pytest.raises(DeviceStateError, match=r"queue 1 .*not set up"):
                call(1)
            for bad in (-1, 2, 1000):
                with pytest.raises(ValueError, match="queue must be 0 to 1"):
                    call(bad)
            with pytest.raises(TypeError, match="queue must be an int"):
                call("0")  # type: ignore[arg-type]
        dev.close()
        for call in calls[:2]:
            with pytest.raises(DeviceStateError, match="closed"):
                call(0)
        dev.rx_queue_intr_disable(0)  # as close() does: a closed queue no longer signals
