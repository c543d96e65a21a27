# SPDX-License-Identifier: BSD-3-Clause
"""Queues that start and stop while others run, and devices with many queues."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from flows import flow, flow_of
from support import PacketSocket, Task, eventually, frame, ip

import rtap
from rtap import DeviceGone, DeviceStateError, EthDev, Mempool, NetNS
from rtap.control.netlink import find_link


def drain(dev: EthDev, queue: int) -> list[bytes]:
    got: list[bytes] = []
    while burst := dev.rx_burst(queue, 256):
        got += map(bytes, burst)
    return got


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine, queues=4) as device:
        yield device


@pytest.fixture
def peer(netns: NetNS, dev: EthDev) -> Iterator[PacketSocket]:
    with PacketSocket(netns, "t0", 0x0800, rcvbuf=1 << 23) as packets:
        yield packets


def spread(dev: EthDev, peer: PacketSocket, n: int = 400) -> dict[int, int]:
    """Sends `n` flows of one frame each, which must all arrive; returns frames by running queue."""
    for i in range(n):
        peer.send(flow(i))
    counts = {}
    seen: list[int] = []
    for q in range(dev.info().nb_rx_queues):
        try:
            got = drain(dev, q)
        except DeviceStateError:
            continue
        counts[q] = len(got)
        seen += map(flow_of, got)
    assert sorted(seen) == list(range(n))
    return counts


def test_stopped_queue_is_sent_nothing(dev: EthDev, peer: PacketSocket) -> None:
    assert all(spread(dev, peer).values())
    dev.rx_queue_stop(2)
    with pytest.raises(DeviceStateError, match=r"rx queue 2 .*not started"):
        dev.rx_burst(2)
    counts = spread(dev, peer)
    assert set(counts) == {0, 1, 3}
    assert all(counts.values())
    dev.rx_queue_stop(2)
    dev.rx_queue_stop(0)
    dev.rx_queue_stop(3)
    assert spread(dev, peer) == {1: 400}
    assert dev.stats().imissed == 0
    for q in (2, 0, 3, 3):
        dev.rx_queue_start(q)
    assert all(spread(dev, peer).values())
    assert dev.stats().imissed == 0


def test_stopped_rx_queue_still_sends(dev: EthDev, peer: PacketSocket) -> None:
    for q in range(4):
        dev.rx_queue_stop(q)
        assert dev.tx_burst(q, dev.pool.alloc_burst(5, flow(q))) == 5
    assert peer.frames(20) == [flow(q) for q in range(4) for _ in range(5)]
    dev.rx_queue_start(0)
    assert spread(dev, peer) == {0: 400}


def test_nobody_serves(dev: EthDev, peer: PacketSocket) -> None:
    """When no queue is left, the kernel drops and counts frames."""
    for q in range(4):
        dev.rx_queue_stop(q)
    for i in range(10):
        peer.send(flow(i))
    assert dev.stats().imissed == 10
    for q in range(4):
        dev.rx_queue_start(q)
    assert all(spread(dev, peer).values())


def test_tx_queue_stop_and_start(dev: EthDev, peer: PacketSocket) -> None:
    dev.tx_queue_stop(1)
    dev.tx_queue_stop(1)
    burst = dev.pool.alloc_burst(3, flow(1))
    with pytest.raises(DeviceStateError, match=r"tx queue 1 .*not started"):
        dev.tx_burst(1, burst)
    assert len(burst) == 3
    assert dev.tx_burst(0, burst) == 3
    dev.tx_queue_start(1)
    assert dev.tx_burst(1, dev.pool.alloc_burst(3, flow(1))) == 3
    assert len(peer.frames(6)) == 6
    # Its receiving half never stopped.
    assert all(spread(dev, peer).values())


def test_stop_ends_a_wait(dev: EthDev) -> None:
    waiting = Task(lambda: dev.rx_burst(1, 8, None))
    waiting.join(0.05)
    assert waiting.is_alive()
    dev.rx_queue_stop(1)
    with pytest.raises(DeviceStateError, match="stopped while waiting"):
        waiting.result(5)


def test_set_up_anew_while_others_run(dev: EthDev, peer: PacketSocket) -> None:
    """Queue 1 is released, set up with another pool and started a hundred times.

    The other queues carry traffic meanwhile and lose nothing.
    """
    stop = threading.Event()
    sent = dev.pool.alloc(flow(0))

    def busy(q: int) -> int:
        n = 0
        while not stop.is_set():
            burst = rtap.Burst([sent.clone()])
            assert dev.tx_burst(q, burst) == 1
            n += 1
            dev.rx_burst(q)
        return n

    tasks = [Task(busy, q) for q in (0, 2, 3)]
    pools = [Mempool(1024), Mempool(1024, 4096)]
    try:
        for i in range(100):
            dev.rx_queue_stop(1)
            dev.tx_queue_stop(1)
            dev.rx_queue_release(1)
            dev.tx_queue_release(1)
            with pytest.raises(DeviceStateError, match=r"queue 1 .*not set up"):
                dev.rx_burst(1)
            dev.rx_queue_setup(1, 1 + i, pools[i % 2])
            dev.tx_queue_setup(1, 1 + i)
            dev.rx_queue_start(1)
            dev.tx_queue_start(1)
            assert dev.tx_burst(1, pools[i % 2].alloc_burst(2, flow(7))) == 2
    finally:
        stop.set()
    counts = [task.result() for task in tasks]
    assert all(counts)
    stats = dev.stats()
    assert [stats.q_opackets[q] for q in (0, 2, 3)] == counts
    assert stats.oerrors == 0
    for q in range(4):
        drain(dev, q)
    assert spread(dev, peer)[1] > 0
    sent.free()


def test_stopped_under_a_worker(netns: NetNS, netns2: NetNS, engine: str) -> None:
    """Its route ends, and the worker goes on with the others."""
    with (
        rtap.open("t0", netns=netns, engine=engine, queues=4) as a,
        rtap.open("t1", netns=netns2, engine=engine, queues=4) as b,
        PacketSocket(netns, "t0", 0x0800, rcvbuf=1 << 23) as peer,
    ):
        worker = rtap.Worker()
        for q in range(4):
            worker.forward((a, q), (b, q), on_full="retry")
        with worker:
            a.rx_queue_stop(1)
            b.tx_queue_stop(1)
            for n in range(400):
                peer.send(flow(n))
            eventually(lambda: b.stats().opackets == 400, "all forwarded")
            assert worker.running
            a.rx_queue_start(1)
            assert len(a.rx_burst(1)) == 0
        assert a.stats().q_ipackets[1] == 0
        assert a.stats().imissed == 0


def test_interface_keeps_its_queues(netns: NetNS, dev: EthDev) -> None:
    def queues() -> int | None:
        state = find_link(netns.fd, "t0")
        assert state is not None
        return state.queues

    assert queues() == 4
    dev.rx_queue_stop(0)
    dev.rx_queue_stop(3)
    assert queues() == 4
    # The first descriptor is detached but still serves control calls.
    assert dev.info().ifname == "t0"
    dev.mtu = 1400
    dev.set_link_down()
    assert not dev.link().link_status
    dev.set_link_up()
    assert dev.link().link_status
    dev.stop()
    dev.configure(2, 2)
    assert queues() == 2


def test_deferred_start(netns: NetNS, engine: str) -> None:
    with Mempool(1024) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        dev.configure(4, 4, rtap.EthConf(engine=engine))
        for q in range(4):
            dev.rx_queue_setup(q, 64, pool, deferred_start=q in (0, 2))
            dev.tx_queue_setup(q, 64, deferred_start=q == 3)
        for round_ in range(3):
            dev.start()
            with PacketSocket(netns, "t0", 0x0800) as peer:
                assert set(spread(dev, peer)) == {1, 3}
                with pytest.raises(DeviceStateError, match="not started"):
                    dev.tx_burst(3, pool.alloc_burst(1, flow(1)))
                dev.rx_queue_start(2)
                dev.tx_queue_start(3)
                counts = spread(dev, peer)
                assert set(counts) == {1, 2, 3}
                assert all(counts.values())
                assert dev.tx_burst(3, pool.alloc_burst(1, flow(1))) == 1
            assert dev.stats().imissed == 0, round_
            dev.stop()


def test_stopped_queue_starts_with_the_device(dev: EthDev, peer: PacketSocket) -> None:
    dev.rx_queue_stop(1)
    dev.tx_queue_stop(2)
    dev.stop()
    dev.start()
    assert all(spread(dev, peer).values())
    assert dev.tx_burst(2, dev.pool.alloc_burst(1, flow(1))) == 1


def test_released_queue_is_missed_by_start(dev: EthDev) -> None:
    dev.stop()
    dev.rx_queue_release(1)
    with pytest.raises(DeviceStateError, match="needs rx_queue_setup for queue 1"):
        dev.start()
    dev.rx_queue_setup(1, 64, dev.pool)
    dev.start()


def test_statistics_keep_their_places(dev: EthDev) -> None:
    for q in range(4):
        assert dev.tx_burst(q, dev.pool.alloc_burst(q + 1, flow(q))) == q + 1
    dev.tx_queue_stop(1)
    dev.tx_queue_release(1)
    assert dev.stats().q_opackets == [1, 0, 3, 4]
    assert "tx_q1_unicast_packets" not in dev.xstats()
    assert dev.xstats()["tx_q3_unicast_packets"] == 4


def test_refused_while_running(dev: EthDev) -> None:
    with pytest.raises(DeviceStateError, match=r"rx queue 1 .* rx_queue_stop\(1\) first"):
        dev.rx_queue_setup(1, 64, dev.pool)
    with pytest.raises(DeviceStateError, match=r"tx queue 1 .* tx_queue_stop\(1\) first"):
        dev.tx_queue_setup(1, 64)
    with pytest.raises(DeviceStateError, match="running"):
        dev.rx_queue_release(1)
    with pytest.raises(DeviceStateError, match="running"):
        dev.tx_queue_release(1)
    for call in (
        dev.rx_queue_start,
        dev.rx_queue_stop,
        dev.tx_queue_start,
        dev.tx_queue_stop,
        dev.rx_queue_release,
        dev.tx_queue_release,
    ):
        for bad in (-1, 4):
            with pytest.raises(ValueError, match="queue must be 0 to 3"):
                call(bad)
        with pytest.raises(TypeError, match="queue must be an int"):
            call(None)  # type: ignore[arg-type]
    dev.stop()
    for call in (dev.rx_queue_start, dev.rx_queue_stop, dev.tx_queue_start, dev.tx_queue_stop):
        with pytest.raises(DeviceStateError, match="is stopped, expected started"):
            call(0)


def test_refused_setup_leaves_a_queue_that_can_be_set_up(dev: EthDev, peer: PacketSocket) -> None:
    dev.rx_queue_stop(3)
    small = Mempool(16, 256)
    with pytest.raises(ValueError, match="data_room"):
        dev.rx_queue_setup(3, 64, small)
    assert set(spread(dev, peer)) == {0, 1, 2}
    dev.rx_queue_setup(3, 64, dev.pool)
    dev.rx_queue_start(3)
    assert all(spread(dev, peer).values())


def test_plain_interface(netns: NetNS, engine: str) -> None:
    """A single-queue interface cannot detach; frames that came meanwhile are thrown away."""
    ip(netns, "tuntap", "add", "t0", "mode", "tap")
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        assert not dev.info().multi_queue
        dev.rx_queue_stop(0)
        with PacketSocket(netns, "t0", 0x0800) as peer:
            peer.send(flow(1))
            dev.rx_queue_start(0)
            assert len(dev.rx_burst(0)) == 0
            peer.send(flow(2))
            assert drain(dev, 0) == [flow(2)]


def test_stop_on_a_deleted_interface(netns: NetNS, dev: EthDev) -> None:
    ip(netns, "link", "del", "t0")
    with pytest.raises(DeviceGone):
        dev.rx_queue_stop(1)
    with pytest.raises(DeviceStateError, match="not started"):
        dev.rx_burst(1)


# ---- many


@pytest.fixture
def many(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine, queues=128) as device:
        yield device


def test_128_queues_send(netns: NetNS, many: EthDev) -> None:
    with PacketSocket(netns, "t0", rcvbuf=1 << 23) as peer:
        for q in range(128):
            burst = rtap.Burst([many.pool.alloc(frame(q * 10 + n)) for n in range(10)])
            assert many.tx_burst(q, burst) == 10
        assert peer.frames(1280) == [frame(n) for n in range(1280)]
    assert many.stats().q_opackets == [10] * 128
    assert many.stats().oerrors == 0


def test_128_queues_receive_every_flow(netns: NetNS, many: EthDev) -> None:
    """The kernel spreads flows: each queue gets some, each flow has one queue, none is lost."""
    n = 4000
    by_queue: list[Counter[int]] = [Counter() for _ in range(128)]
    with PacketSocket(netns, "t0", 0x0800, rcvbuf=1 << 23) as peer:
        for _ in range(3):
            for i in range(n):
                peer.send(flow(i))
            for q in range(128):
                by_queue[q].update(map(flow_of, drain(many, q)))
    total: Counter[int] = sum(by_queue, Counter())
    assert total == Counter(dict.fromkeys(range(n), 3))
    assert all(by_queue)
    assert sum(len(seen) for seen in by_queue) == n
    stats = many.stats()
    assert stats.ipackets == sum(stats.q_ipackets) == 3 * n
    assert stats.q_ipackets == [seen.total() for seen in by_queue]
    assert stats.imissed == stats.ierrors == stats.rx_nombuf == 0


def test_128_queues_answer_where_they_were_asked(netns: NetNS, many: EthDev) -> None:
    """A flow that is sent on a queue comes back on the same queue."""
    with PacketSocket(netns, "t0", 0x0800, rcvbuf=1 << 23) as peer:
        for q in range(128):
            assert many.tx_burst(q, many.pool.alloc_burst(1, flow(q))) == 1
        assert peer.frames(128) == [flow(q) for q in range(128)]
        for q in range(128):
            peer.send(flow(q, back=True))
        for q in range(128):
            assert drain(many, q) == [flow(q, back=True)]
    assert many.stats().imissed == 0


def test_all_but_one_of_128_stop(netns: NetNS, many: EthDev) -> None:
    for q in range(128):
        if q != 77:
            many.rx_queue_stop(q)
    with PacketSocket(netns, "t0", 0x0800) as peer:
        for i in range(500):
            peer.send(flow(i))
        assert [flow_of(data) for data in drain(many, 77)] == list(range(500))
    assert many.stats().imissed == 0


def test_worker_over_many_queues(netns: NetNS, netns2: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine, queues=32) as a,
        rtap.open("t1", netns=netns2, engine=engine, queues=32) as b,
        PacketSocket(netns, "t0", 0x0800, rcvbuf=1 << 23) as peer,
        PacketSocket(netns2, "t1", 0x0800, rcvbuf=1 << 23) as far,
    ):
        worker = rtap.Worker()
        for q in range(32):
            worker.forward((a, q), (b, q), on_full="retry")
        with worker:
            for n in range(2000):
                peer.send(flow(n))
            eventually(lambda: b.stats().opackets == 2000, "all forwarded", 10)
        assert sorted(flow_of(data) for data in far.frames(2000)) == list(range(2000))
        assert all(a.stats().q_ipackets)
        assert a.stats().q_ipackets == b.stats().q_opackets
        assert a.stats().imissed == 0
