# SPDX-License-Identifier: BSD-3-Clause
"""``net_null``: the device layer over a driver without a kernel behind it. Needs no root."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

import rtap
from rtap import Burst, DeviceStateError, EthDev, Mempool


@pytest.fixture
def pool() -> Iterator[Mempool]:
    with Mempool(256) as mempool:
        yield mempool


@pytest.fixture
def dev(pool: Mempool) -> Iterator[EthDev]:
    with rtap.probe("net_null0,size=100") as device:
        start(device, pool, 2)
        yield device


def start(dev: EthDev, pool: Mempool, queues: int) -> None:
    dev.configure(queues, queues)
    for q in range(queues):
        dev.rx_queue_setup(q, 64, pool)
        dev.tx_queue_setup(q, 64)
    dev.start()


def test_hands_out_frames_and_frees_them(dev: EthDev, pool: Mempool) -> None:
    for q in range(2):
        burst = dev.rx_burst(q, 32)
        assert [len(m) for m in burst] == [100] * 32
        assert {m.port for m in burst} == {dev.port_id}
        assert pool.in_use == 32
        assert dev.tx_burst(q, burst) == 32
        assert len(burst) == 0
        assert pool.in_use == 0
    stats = dev.stats()
    assert (stats.ipackets, stats.opackets, stats.ibytes, stats.obytes) == (64, 64, 6400, 6400)
    assert stats.q_ipackets == stats.q_opackets == [32, 32]
    assert stats.imissed == stats.ierrors == stats.oerrors == 0


def test_a_frame_at_a_time(dev: EthDev) -> None:
    assert len(dev.recv(0)) == 100
    assert dev.send(b"x" * 60)
    assert dev.stats().obytes == 60


def test_extended_statistics(dev: EthDev, pool: Mempool) -> None:
    assert len(dev.rx_burst(1, 10)) == 10
    assert dev.xstats()["rx_q1_size_65_to_127_packets"] == 10
    assert dev.xstats_names() == list(dev.xstats())
    assert dev.send(b"\xff" * 6 + bytes(58))
    assert dev.xstats()["tx_q0_broadcast_packets"] == 1
    dev.stats_reset()
    assert dev.stats().ipackets == 0
    assert dev.xstats()["rx_q1_size_65_to_127_packets"] == 10
    dev.xstats_reset()
    assert set(dev.xstats().values()) == {0}


def test_empty_pool(dev: EthDev, pool: Mempool) -> None:
    held = Burst()
    while len(more := dev.rx_burst(0, 100)):
        held.extend(more)
    assert len(held) == 256
    assert dev.stats().rx_nombuf == 1
    assert dev.xstats()["rx_q0_mbuf_alloc_failed"] == 1
    with pytest.raises(rtap.PoolEmpty):
        dev.recv(0)
    held.free()
    assert len(dev.rx_burst(0, 100)) == 100


@pytest.mark.parametrize("call", ["intr_fd", "intr_enable", "intr_disable"])
def test_refuses_interrupts(dev: EthDev, call: str) -> None:
    with pytest.raises(OSError, match="net_null0 has no receive interrupts") as caught:
        getattr(dev, f"rx_queue_{call}")(0)
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(ValueError, match="queue must be 0 to 1"):
        getattr(dev, f"rx_queue_{call}")(2)


def test_the_same_control_methods(dev: EthDev) -> None:
    info = dev.info()
    assert (info.driver_name, info.ifname, info.engine) == ("net_null", "", "none")
    assert info.nb_rx_queues == info.nb_tx_queues == 2
    assert dev.link().link_status
    dev.set_link_down()
    assert not dev.link().link_status
    dev.set_link_up()
    dev.mac = "02:00:00:00:00:42"
    assert dev.mac == "02:00:00:00:00:42"
    assert dev.app_mac == dev.mac.peer()
    dev.mtu = 9000
    assert dev.mtu == 9000
    assert dev.promiscuous
    dev.promiscuous = False
    dev.allmulticast = True
    dev.mac_addr_add("02:00:00:00:00:43")
    dev.mc_addr_list = ["01:00:5e:00:00:01"]
    assert (dev.promiscuous, dev.allmulticast) == (False, True)
    assert dev.mac_addrs == (dev.app_mac, "02:00:00:00:00:43")
    assert len(dev.rx_burst(0, 5)) == 5


def test_queues_one_by_one(dev: EthDev, pool: Mempool) -> None:
    dev.rx_queue_stop(1)
    dev.tx_queue_stop(0)
    with pytest.raises(DeviceStateError, match="not started"):
        dev.rx_burst(1)
    with pytest.raises(DeviceStateError, match="not started"):
        dev.send(b"x" * 60)
    assert len(dev.rx_burst(0, 5)) == 5
    assert dev.tx_burst(1, pool.alloc_burst(3, b"x" * 60)) == 3
    dev.rx_queue_release(1)
    assert dev.stats().q_ipackets == [5, 0]
    dev.rx_queue_setup(1, 32, pool, deferred_start=True)
    dev.rx_queue_start(1)
    assert len(dev.rx_burst(1, 7)) == 7
    dev.stop()
    dev.start()
    with pytest.raises(DeviceStateError, match="not started"):
        dev.rx_burst(1)
    assert dev.send(b"x" * 60)


def test_states_are_the_layers(pool: Mempool) -> None:
    with rtap.probe("net_null3") as dev:
        with pytest.raises(DeviceStateError, match="unconfigured"):
            dev.start()
        with pytest.raises(ValueError, match="1 to 128, got 129"):
            dev.configure(129, 129)
        start(dev, pool, 128)
        with pytest.raises(DeviceStateError, match="started"):
            dev.configure(1, 1)
        assert [len(dev.rx_burst(q, 1)) for q in range(128)] == [1] * 128
        dev.stop()
        with pytest.raises(DeviceStateError):
            dev.rx_burst(0)
        dev.configure(1, 2)
        assert (dev.info().nb_rx_queues, dev.info().nb_tx_queues) == (1, 2)
    with pytest.raises(DeviceStateError, match="closed"):
        dev.xstats()


@pytest.mark.parametrize(
    ("devargs", "match"),
    [
        ("net_null0,size=13", "13"),
        ("net_null0,size=65536", "65536"),
        ("net_null0,size=x", "x"),
        ("net_null0,frob=1", "frob"),
    ],
)
def test_arguments_refused(devargs: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rtap.probe(devargs)


def test_frames_larger_than_the_buffers(pool: Mempool) -> None:
    with rtap.probe("net_null0,size=4000") as dev:
        dev.configure(1, 1)
        with pytest.raises(ValueError, match="4000"):
            dev.rx_queue_setup(0, 64, pool)
