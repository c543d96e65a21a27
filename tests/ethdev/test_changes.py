# SPDX-License-Identifier: BSD-3-Clause
"""A device whose interface is deleted, loses its link or gets a larger MTU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from recorder import DOWN, OTHER_MAC, UP, Recorder
from rigs import iproute
from support import PacketSocket, Task, eventually, frame, ip, link, links, netdev
from this_kernel import kernel

import rtap
from rtap import DeviceGone, EthDev, EthEvent, Link, Mempool, NetNS, RxOffload, Worker


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine) as device:
        yield device


@pytest.fixture
def told(dev: EthDev) -> Recorder:
    return Recorder(dev)


# ---- deletion


def test_deleted_and_made_anew(netns: NetNS, engine: str) -> None:
    options: dict[str, Any] = {"mtu": 1400, "mac": OTHER_MAC, "queues": 3}
    with rtap.open(
        "t0", netns=netns, engine=engine, rx_offloads=RxOffload.CHECKSUM, **options
    ) as dev:
        told = Recorder(dev)
        fd = dev.rx_queue_intr_fd(0)
        dev.rx_queue_intr_enable(0)
        for again in range(5):
            iproute(netns, "link del t0")
            told.expect((EthEvent.INTR_RMV, None))
            for _ in range(2):
                with pytest.raises(DeviceGone):
                    dev.rx_burst(again % 3)
                with pytest.raises(DeviceGone):
                    dev.send(frame())
            dev.stop()
            dev.start()
            told.expect(
                (EthEvent.RECOVERY_SUCCESS, None),
                (EthEvent.ADMIN_STATE, True),
                (EthEvent.INTR_LSC, UP),
            )
            assert dev.rx_queue_intr_fd(0) == fd
            shown = link(netns, "t0")
            assert (shown["mtu"], shown["address"]) == (1400, OTHER_MAC)
            assert shown["linkinfo"]["info_data"]["numqueues"] == 3
            ip(netns, "link", "set", "t0", "multicast", "off")
            with PacketSocket(netns, "t0") as kernel:
                assert dev.send(frame(again))
                assert kernel.frames(1) == [frame(again)]
                kernel.send(frame(7))
                got = [bytes(m) for q in range(3) for m in dev.rx_burst(q, timeout=0.2)]
                assert frame(7) in got
        assert dev.stats().opackets == 5
    assert links(netns) == ["lo"]


def test_deleted_and_configured(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev, Mempool(64) as pool:
        iproute(netns, "link del t0")
        dev.stop()
        dev.configure(1, 1)
        assert link(netns, "t0")["linkinfo"]["info_data"]["numqueues"] == 1
        dev.rx_queue_setup(0, 16, pool)
        dev.tx_queue_setup(0, 16)
        dev.start()
        assert dev.send(frame())
        dev.close()


def test_deleted_and_made_anew_by_somebody_else(netns: NetNS) -> None:
    """The new interface is taken over if it has the same kind, and left alone otherwise."""
    with rtap.open("t0", netns=netns) as dev:
        for kind in ("", " multi_queue"):
            iproute(netns, "link del t0")
            iproute(netns, "tuntap add mode tap t0" + kind)
            dev.stop()
            if not kind:
                with pytest.raises(OSError, match="t0"):
                    dev.start()
            else:
                dev.start()
                assert dev.send(frame())
                assert dev.info().if_index == link(netns, "t0")["ifindex"]
            iproute(netns, "link show t0")


def test_persistence_is_made_anew_too(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, persist=True) as dev:
        iproute(netns, "link del t0")
        dev.stop()
        dev.start()
        assert dev.info().persist
    assert links(netns) == ["lo", "t0"]


def test_a_worker_and_a_waiter_hear_of_the_deletion(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        told = Recorder(dev, EthEvent.INTR_RMV)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))
        with worker:
            waiter = Task(dev.rx_burst, 1, 64, None)
            iproute(netns, "link del t0")
            told.expect((EthEvent.INTR_RMV, None))
            with pytest.raises(DeviceGone):
                waiter.result()
            assert worker.join(10)


# ---- sending and drops while the link is down


def test_sends_while_the_link_is_down_are_refused_and_counted(
    netns: NetNS, dev: EthDev, told: Recorder
) -> None:
    burst = dev.pool.alloc_burst(5, frame())
    for down, up in (
        (dev.set_link_down, dev.set_link_up),
        (lambda: iproute(netns, "link set t0 carrier off"), lambda: carrier_on(netns)),
    ):
        before, errors = netdev(netns, "t0")["rx_packets"], dev.stats().oerrors
        down()
        told.expect((EthEvent.INTR_LSC, DOWN))
        assert dev.tx_burst(0, burst[:]) == 5
        assert dev.stats().oerrors == errors + 5
        assert netdev(netns, "t0")["rx_packets"] == before
        up()
        told.expect((EthEvent.INTR_LSC, UP))
        assert dev.tx_burst(0, burst[:]) == 5
        assert netdev(netns, "t0")["rx_packets"] == before + 5
    assert dev.stats().oerrors == 10
    assert dev.stats().opackets == 10
    assert dev.tx_queue(0).counters()["down"] == 10  # type: ignore[attr-defined]


def carrier_on(ns: NetNS) -> None:
    iproute(ns, "link set t0 carrier on")


def test_what_the_kernel_drops_while_the_link_is_down_is_not_missed(
    netns: NetNS, dev: EthDev, told: Recorder
) -> None:
    def push(n: int) -> None:
        for k in range(n):
            with_drops.send(frame(k))

    def hear(link: Link) -> None:
        while told.next() != (EthEvent.INTR_LSC, link):
            pass

    def queues(state: str) -> None:
        # The event may come first. The kernel sets operstate and turns the queues under one lock.
        eventually(lambda: link(netns, "t0")["operstate"] == state, f"the queues are {state}")

    counted = kernel() >= (6, 11)  # an older one drops them uncounted
    with PacketSocket(netns, "t0") as with_drops:
        assert dev.xstats()["link_down_drops"] == 0
        dev.set_link_down()
        queues("DOWN")
        push(7)
        assert dev.xstats()["link_down_drops"] == 7 * counted
        hear(DOWN)
        dev.set_link_up()
        queues("UP")
        push(3)
        assert (len(dev.rx_burst(0)), dev.xstats()["link_down_drops"]) == (3, 7 * counted)
        hear(UP)
        iproute(netns, "link set t0 carrier off")
        hear(DOWN)
        queues("DOWN")
        push(5)
        dev.stop()
        push(5)
        dev.start()
        assert dev.xstats()["link_down_drops"] == 17 * counted
        assert dev.stats().imissed == 0
        iproute(netns, "link set t0 txqueuelen 2")
        for k in range(6):
            with contextlib.suppress(OSError):  # ENOBUFS is the drop itself
                with_drops.send(frame(k))
        assert dev.stats().imissed == 4
        dev.stats_reset()
        assert (dev.stats().imissed, dev.xstats()["link_down_drops"]) == (0, 17 * counted)
        dev.xstats_reset()
        assert dev.xstats()["link_down_drops"] == 0


# ---- an MTU that others raise


def test_buffers_grow_with_an_mtu_that_others_raise(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        told = Recorder(dev, EthEvent.MTU)
        pool = dev.pool
        old = dev.pool.alloc(b"still there")
        iproute(netns, "link set t0 mtu 9000")
        told.expect((EthEvent.MTU, 9000))
        assert dev.pool is not pool
        assert dev.pool.data_room >= 9000 + 22 + 1
        with PacketSocket(netns, "t0") as kernel:
            kernel.send(frame(1, 9014))
            got = [m for q in range(2) for m in dev.rx_burst(q, timeout=0.2)]
            assert [(bytes(m), m.nb_segs) for m in got] == [(frame(1, 9014), 1)]
        assert dev.stats().ierrors == 0
        assert bytes(old) == b"still there"
        del old
        pool.close()  # nothing receives into it now
        dev.mtu = 20000
        told.expect((EthEvent.MTU, 20000))
        assert dev.pool.data_room >= 20000


def test_buffers_grow_under_a_worker(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        told = Recorder(dev, EthEvent.MTU)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))
        with worker, PacketSocket(netns, "t0") as kernel:
            for mtu in (3000, 9000, 30000):
                iproute(netns, f"link set t0 mtu {mtu}")
                told.expect((EthEvent.MTU, mtu))
                kernel.send(frame(mtu, mtu + 14))
                assert kernel.frames(1) == [frame(mtu, mtu + 14)]


def test_chains_grow_with_an_mtu_that_others_raise(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, rx_offloads=RxOffload.SCATTER) as dev:
        told = Recorder(dev, EthEvent.MTU)
        iproute(netns, "link set t0 mtu 9000")
        told.expect((EthEvent.MTU, 9000))
        with PacketSocket(netns, "t0") as kernel:
            kernel.send(frame(1, 9014))
            (mbuf,) = dev.rx_burst(0, timeout=5)
            assert (bytes(mbuf), mbuf.nb_segs) == (frame(1, 9014), 5)


def test_a_pool_of_the_callers_own_is_warned_about(
    netns: NetNS, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with rtap.open("t0", netns=netns, engine=engine, data_room=2048) as dev:
        told = Recorder(dev, EthEvent.MTU)
        iproute(netns, "link set t0 mtu 9000")
        told.expect((EthEvent.MTU, 9000))
        assert "MTU of t0 is now 9000" in caplog.text
        with PacketSocket(netns, "t0") as kernel:
            kernel.send(frame(1, 9014))
            kernel.send(frame(2))
            # No frame is ever truncated.
            assert [bytes(m) for m in dev.rx_burst(0, timeout=5)] == [frame(2)]
        assert dev.stats().ierrors == 1
